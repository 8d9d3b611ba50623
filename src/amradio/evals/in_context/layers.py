"""A backbone whose features are those of one of its blocks."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from amradio.backbones.protocol import Backbone, HasIntermediates
from amradio.errors import CapabilityError, OptionError
from amradio.models.configs import Resolution
from amradio.models.output import RadioOutput, arrange, check_feature_fmt

_PROBE_STEPS = 4


class LayerBackbone:
    """One block of a backbone, seen as a backbone.

    Args:
        backbone: With intermediate features, in evaluation mode.
        layer: Block, from 0, or from -1 backwards.
        device: Where the backbone is.
        norm: Whether the norm that follows the last block is applied.

    Attributes:
        base: The backbone inside.
        layer: See above.

    Raises:
        CapabilityError: The backbone does not give features of its blocks.
        OptionError: There is no such block.
    """

    def __init__(
        self, backbone: Backbone, layer: int, device: torch.device | str = "cpu", *, norm: bool = True
    ) -> None:
        if not isinstance(backbone, HasIntermediates):
            raise CapabilityError(
                f"A {type(backbone).__name__} does not give features of its blocks, so no layer can be chosen."
            )
        self.base: Any = backbone
        self.layer = layer
        self._options: dict[str, Any] = {"norm": norm, "output_fmt": "NCHW", "intermediates_only": True}
        if "stop_early" in inspect.signature(backbone.forward_intermediates).parameters:
            self._options["stop_early"] = True
        side = _PROBE_STEPS * backbone.min_resolution_step
        height, width = backbone.get_nearest_supported_resolution(side, side)
        with torch.inference_mode():
            found = self._maps(torch.zeros(1, 3, height, width, device=device))  # [1, D, h, w]
        self.embed_dim = found.shape[1]
        self.patch_size = height // found.shape[2]
        self.min_resolution_step = max(backbone.min_resolution_step, self.patch_size)

    @property
    def training(self) -> bool:
        """Whether the backbone inside is."""
        return bool(getattr(self.base, "training", False))

    @property
    def summary_dim(self) -> int:
        """D: the summary is the mean of the features."""
        return self.embed_dim

    @property
    def preferred_resolution(self) -> Resolution | None:
        """Of the backbone inside."""
        found: Resolution | None = self.base.preferred_resolution
        return found

    @property
    def identity(self) -> Any:
        """Of the backbone inside."""
        return getattr(self.base, "identity", None)

    def get_nearest_supported_resolution(self, height: int, width: int) -> Resolution:
        """Round a size in pixels to one that the backbone accepts."""
        found: Resolution = self.base.get_nearest_supported_resolution(height, width)
        return found

    def __call__(self, images: Tensor, feature_fmt: str = "NLC") -> RadioOutput:
        """The block's features."""
        check_feature_fmt(feature_fmt)
        maps = self._maps(images)  # [B, D, h, w]
        tokens = maps.flatten(2).transpose(1, 2)  # [B, L, D]
        return RadioOutput(tokens.mean(1), arrange(tokens, (maps.shape[2], maps.shape[3]), feature_fmt))

    def _maps(self, images: Tensor) -> Tensor:
        maps = self.base.forward_intermediates(images, [self.layer], **self._options)[0]
        if not isinstance(maps, Tensor) or maps.ndim != 4:
            raise OptionError(f"Layer {self.layer} of the backbone is no map of features.")
        return maps
