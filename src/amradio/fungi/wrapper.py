"""What both kinds of FUNGI backbones share: everything about the backbone inside that stays as it is."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

from torch import nn

from amradio.backbones.protocol import Backbone
from amradio.errors import CapabilityError
from amradio.models.configs import Resolution
from amradio.models.radio import RadioModel
from amradio.weights.checkpoint import Identity


class Wrapper(nn.Module):
    """A backbone around a backbone.

    Args:
        backbone: The one inside; shared, and never changed. Of a RADIO model with adaptors the backbone's own output
            is taken.

    Raises:
        CapabilityError: It is no backbone.
    """

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        if not isinstance(backbone, Backbone):
            raise CapabilityError(
                f"FUNGI wraps a backbone, as amradio.load_backbone returns it, got a {type(backbone).__name__}."
            )
        if isinstance(backbone, RadioModel) and backbone.adaptors:
            backbone = backbone.view("backbone")
        self.base = backbone
        self.training = bool(getattr(backbone, "training", False))

    @property
    def _inner(self) -> Backbone:
        return cast(Backbone, self.base)

    @property
    def patch_size(self) -> int:
        """Pixels between two feature positions."""
        return self._inner.patch_size

    @property
    def min_resolution_step(self) -> int:
        """What both image sides must be multiples of, in pixels."""
        return self._inner.min_resolution_step

    @property
    def embed_dim(self) -> int:
        """Width D of the features."""
        return self._inner.embed_dim

    @property
    def summary_dim(self) -> int:
        """Width C of the summary."""
        return self._inner.summary_dim

    @property
    def preferred_resolution(self) -> Resolution | None:
        """(height, width) in pixels that suits the backbone best, if known."""
        return self._inner.preferred_resolution

    @property
    def identity(self) -> Identity:
        """Where the weights came from; the version says that there are gradients in the features."""
        base = getattr(self.base, "identity", None)
        if not isinstance(base, Identity):
            base = Identity(source=type(self.base).__name__, layout="fungi")
        return dataclasses.replace(base, version=f"{base.version or base.source} + {self.description}")

    @property
    def description(self) -> str:
        """What was added, in a few words for reports."""
        raise NotImplementedError

    def get_nearest_supported_resolution(self, height: int, width: int) -> Resolution:
        """Round a size in pixels to the nearest (height, width) that the backbone accepts."""
        return self._inner.get_nearest_supported_resolution(height, width)
