"""Making the classes known to the ``Auto`` classes of transformers."""

from __future__ import annotations

from amradio.hf.backbone import AmradioBackbone
from amradio.hf.configuration import AmradioConfig
from amradio.hf.image_processing import AmradioImageProcessor
from amradio.hf.modeling import AmradioModel
from amradio.hf.tower import AmradioTower, AmradioTowerConfig


def register() -> None:
    """Register configuration, models and image processor; a second time changes nothing."""
    from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel

    AutoConfig.register(AmradioConfig.model_type, AmradioConfig, exist_ok=True)
    AutoModel.register(AmradioConfig, AmradioModel, exist_ok=True)
    AutoConfig.register(AmradioTowerConfig.model_type, AmradioTowerConfig, exist_ok=True)
    AutoModel.register(AmradioTowerConfig, AmradioTower, exist_ok=True)
    AutoBackbone.register(AmradioConfig, AmradioBackbone, exist_ok=True)
    # The one class for both backends: it needs no torchvision, and where there is one, results must not depend on that.
    both = {"pil": AmradioImageProcessor, "torchvision": AmradioImageProcessor}
    AutoImageProcessor.register(AmradioConfig, image_processor_classes=both, exist_ok=True)
