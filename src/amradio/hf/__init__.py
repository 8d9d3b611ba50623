"""Models of this package as classes of Hugging Face ``transformers``.

Importing this module registers `AmradioConfig`, `AmradioModel`, `AmradioBackbone` and `AmradioImageProcessor` with the
``Auto`` classes of transformers (extra ``[hf]``, 5.13 or newer), under the model type ``amradio``.

    import amradio.hf
    from transformers import AutoModel
    model = AutoModel.from_pretrained("path/that/save_pretrained/wrote")
    model = amradio.hf.AmradioModel.from_pretrained("nvidia/C-RADIOv2-B")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from amradio.hf.library import is_available, is_too_old, require

_EXPORTS = {
    "AmradioBackbone": "amradio.hf.backbone",
    "AmradioConfig": "amradio.hf.configuration",
    "AmradioImageProcessor": "amradio.hf.image_processing",
    "AmradioModel": "amradio.hf.modeling",
    "AmradioModelOutput": "amradio.hf.modeling",
    "AmradioPreTrainedModel": "amradio.hf.base",
    "AmradioTower": "amradio.hf.tower",
    "AmradioTowerConfig": "amradio.hf.tower",
    "LORA_TARGETS": "amradio.hf.modeling",
    "assemble_llava": "amradio.hf.llava",
    "llava_processor": "amradio.hf.llava",
}

__all__ = sorted(_EXPORTS)

if TYPE_CHECKING:
    from amradio.hf.backbone import AmradioBackbone as AmradioBackbone
    from amradio.hf.base import AmradioPreTrainedModel as AmradioPreTrainedModel
    from amradio.hf.configuration import AmradioConfig as AmradioConfig
    from amradio.hf.image_processing import AmradioImageProcessor as AmradioImageProcessor
    from amradio.hf.llava import assemble_llava as assemble_llava
    from amradio.hf.llava import llava_processor as llava_processor
    from amradio.hf.modeling import LORA_TARGETS as LORA_TARGETS
    from amradio.hf.modeling import AmradioModel as AmradioModel
    from amradio.hf.modeling import AmradioModelOutput as AmradioModelOutput
    from amradio.hf.tower import AmradioTower as AmradioTower
    from amradio.hf.tower import AmradioTowerConfig as AmradioTowerConfig


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require()
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return list(__all__)


if is_too_old():
    require()
if is_available():
    from amradio.hf.registration import register

    register()
