"""amradio: features from pictures with agglomerative vision backbones (RADIO, E-RADIO, C-RADIO).

    import amradio
    model = amradio.load("c-radio_v4-h", adaptors=["siglip2-g"])
    summary, features = model(images)["siglip2-g"]

Importing the package imports nothing heavy; names are resolved at their first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "AmradioError": "amradio.errors",
    "Backbone": "amradio.backbones.protocol",
    "RadioConfig": "amradio.models.configs",
    "RadioModel": "amradio.models.radio",
    "RadioOutput": "amradio.models.output",
    "Resolution": "amradio.models.configs",
    "convert": "amradio.weights.convert",
    "load": "amradio.backbones.load",
    "load_backbone": "amradio.backbones.dispatch",
    "save": "amradio.weights.convert",
}

__all__ = ["__version__", *_EXPORTS]

if TYPE_CHECKING:
    from amradio.backbones.dispatch import load_backbone as load_backbone
    from amradio.backbones.load import load as load
    from amradio.backbones.protocol import Backbone as Backbone
    from amradio.errors import AmradioError as AmradioError
    from amradio.models.configs import RadioConfig as RadioConfig
    from amradio.models.configs import Resolution as Resolution
    from amradio.models.output import RadioOutput as RadioOutput
    from amradio.models.radio import RadioModel as RadioModel
    from amradio.weights.convert import convert as convert
    from amradio.weights.convert import save as save


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'amradio' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
