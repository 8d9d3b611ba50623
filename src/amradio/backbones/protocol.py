"""What everything above the models is written against."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from amradio.models.configs import Resolution
from amradio.models.output import RadioOutput


@runtime_checkable
class Backbone(Protocol):
    """Images in, a summary and a map of features out.

    `amradio.models.radio.RadioModel` without adaptors satisfies it, and so does each of its views, and whatever
    `amradio.load_backbone` returns.
    """

    @property
    def patch_size(self) -> int:
        """Pixels between two feature positions."""
        ...

    @property
    def min_resolution_step(self) -> int:
        """What both image sides must be multiples of, in pixels."""
        ...

    @property
    def embed_dim(self) -> int:
        """Width D of the features."""
        ...

    @property
    def summary_dim(self) -> int:
        """Width C of the summary."""
        ...

    @property
    def preferred_resolution(self) -> Resolution | None:
        """(height, width) in pixels that suits summaries best, if known."""
        ...

    def get_nearest_supported_resolution(self, height: int, width: int) -> Resolution:
        """Round a size in pixels to the nearest (height, width) that the backbone accepts."""
        ...

    def __call__(self, images: Tensor, feature_fmt: str = "NLC") -> RadioOutput:
        """Compute summary [B, C] and features of images [B, 3, H, W] in [0, 1]."""
        ...


@runtime_checkable
class HasIdentity(Protocol):
    """A backbone that knows where its weights came from (an `amradio.weights.checkpoint.Identity`)."""

    identity: Any


@runtime_checkable
class HasIntermediates(Protocol):
    """A backbone with features of intermediate blocks."""

    def forward_intermediates(self, images: Tensor, indices: Any = None, **options: Any) -> Any:
        """See `amradio.models.radio.RadioModel.forward_intermediates`."""
        ...


@runtime_checkable
class HasAttention(Protocol):
    """A backbone that shows how its class and register tokens attend."""

    @property
    def patch_size(self) -> int:
        """Pixels between two patches."""
        ...

    @property
    def num_cls_tokens(self) -> int:
        """Class tokens, which come before the registers."""
        ...

    def prefix_attention(self, images: Tensor, layer: int = -1) -> Tensor:
        """See `amradio.models.radio.RadioModel.prefix_attention`."""
        ...


@runtime_checkable
class HasText(Protocol):
    """A backbone whose summaries live in a text tower's space."""

    @property
    def tokenizer(self) -> Any:
        """A list of strings to tokens."""
        ...

    def encode_text(self, tokens: Any, normalize: bool = False) -> Tensor:
        """Embed tokens: [N, C]."""
        ...
