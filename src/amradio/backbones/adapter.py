"""What the adapters of foreign networks share: the geometry, the standardisation of images, the checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from amradio.errors import CapabilityError, OptionError, ResolutionError
from amradio.models.configs import Resolution
from amradio.models.normalizers import InputConditioner
from amradio.models.output import RadioOutput, arrange, check_feature_fmt
from amradio.weights.checkpoint import Identity

PROBE_SIDE = 224


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Sizes of a backbone.

    Attributes:
        patch_size: Pixels between two feature positions.
        embed_dim: Width D of the features.
        summary_dim: Width C of the summary.
        min_resolution_step: What both image sides must be multiples of, in pixels.
        preferred_resolution: (height, width) in pixels that suits the network best, if known.
        fixed: Whether no other size than `preferred_resolution` is accepted.
    """

    patch_size: int
    embed_dim: int
    summary_dim: int
    min_resolution_step: int
    preferred_resolution: Resolution | None = None
    fixed: bool = False

    def nearest(self, height: int, width: int) -> Resolution:
        """The accepted size nearest to a size in pixels; at least one step a side, a tie goes to the even multiple."""
        if self.fixed and self.preferred_resolution is not None:
            return self.preferred_resolution
        step = self.min_resolution_step
        return Resolution(*(max(round(side / step) * step, step) for side in (height, width)))

    def check(self, images: Tensor, name: str) -> None:
        """Refuse images that the network cannot take.

        Args:
            images: A batch.
            name: Of the backbone, for the message.

        Raises:
            ResolutionError: They are no batch of images, or of an unsupported size.
        """
        if images.ndim != 4:
            raise ResolutionError(f"Images must be [B, 3, H, W], got the shape {list(images.shape)}.")
        height, width = images.shape[-2:]
        h, w = self.nearest(height, width)
        if (h, w) == (height, width):
            return
        rule = "accepts one size only" if self.fixed else f"needs multiples of {self.min_resolution_step} pixels"
        raise ResolutionError(
            f"{name} {rule}, got {height}x{width} (height x width). The nearest supported size is {h}x{w}; "
            f"`get_nearest_supported_resolution(height, width)` computes it."
        )


class Adapter(nn.Module):
    """A foreign network as an `amradio.backbones.protocol.Backbone`, in evaluation mode.

    Subclasses say what the network computes, in `_run`.

    Args:
        geometry: Its sizes.
        identity: Where its weights came from.
        mean: Mean of each channel that images are standardised with; None together with `std` leaves them in [0, 1].
        std: Standard deviation of each channel.

    Attributes:
        geometry: Its sizes.
        identity: Where its weights came from.
    """

    def __init__(
        self,
        geometry: Geometry,
        identity: Identity,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.geometry = geometry
        self.identity = identity
        self.input_conditioner: nn.Module = conditioner(mean, std)

    @property
    def patch_size(self) -> int:
        """Pixels between two feature positions."""
        return self.geometry.patch_size

    @property
    def embed_dim(self) -> int:
        """Width D of the features."""
        return self.geometry.embed_dim

    @property
    def summary_dim(self) -> int:
        """Width C of the summary."""
        return self.geometry.summary_dim

    @property
    def min_resolution_step(self) -> int:
        """What both image sides must be multiples of, in pixels."""
        return self.geometry.min_resolution_step

    @property
    def preferred_resolution(self) -> Resolution | None:
        """(height, width) in pixels that suits the network best, if known."""
        return self.geometry.preferred_resolution

    @property
    def dtype(self) -> torch.dtype:
        """The network's parameter dtype; float32 where it has no parameters."""
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.float32)

    def get_nearest_supported_resolution(self, height: int, width: int) -> Resolution:
        """Round a size in pixels to the nearest (height, width) that the network accepts."""
        return self.geometry.nearest(height, width)

    def forward(self, images: Tensor, feature_fmt: str = "NLC") -> RadioOutput:
        """Compute summary and features.

        Args:
            images: [B, 3, H, W] in [0, 1], of a supported size.
            feature_fmt: ``NLC``: features [B, L, D]; ``NCHW``: [B, D, h, w]; ``NHWC``: [B, h, w, D].

        Returns:
            Summary [B, C] and features.

        Raises:
            OptionError: `feature_fmt` is unknown.
            ResolutionError: The image size is not supported; the message names the nearest one that is.
        """
        check_feature_fmt(feature_fmt)
        self.geometry.check(images, self.identity.source)
        summary, features = self._run(self._conditioned(images))
        return RadioOutput(summary, arrange(features, self._grid(images), feature_fmt))

    def _run(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Conditioned images [B, 3, H, W] to summary [B, C] and row-major features [B, L, D]."""
        raise NotImplementedError

    def _conditioned(self, images: Tensor) -> Tensor:
        x: Tensor = self.input_conditioner(images)
        return x.to(self.dtype)

    def _grid(self, images: Tensor) -> tuple[int, int]:
        return images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size


def conditioner(mean: Sequence[float] | None, std: Sequence[float] | None) -> nn.Module:
    """The standardisation of images in [0, 1]; the identity without statistics.

    Raises:
        OptionError: Only one of the two is given, they are not three numbers each, or a deviation is not positive.
    """
    if mean is None and std is None:
        return nn.Identity()
    if mean is None or std is None:
        raise OptionError(f"mean and std must be given together, got mean={mean} and std={std}.")
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise OptionError(f"mean and std must be 3 numbers each, std above 0, got mean={mean} and std={std}.")
    return InputConditioner(tuple(map(float, mean)), tuple(map(float, std)))


def map_to_tokens(maps: Tensor) -> Tensor:
    """Feature maps [B, D, h, w] as row-major tokens [B, h*w, D]."""
    return maps.flatten(2).transpose(1, 2)  # [B, h*w, D]


def without_prefix(tokens: Tensor, num_prefix: int, grid: tuple[int, int], name: str) -> Tensor:
    """The patch tokens of a sequence, after a check that their number is that of the grid.

    Args:
        tokens: [B, P + L, D].
        num_prefix: P, as the network itself says.
        grid: (h, w) with L = h * w.
        name: Of the backbone, for the message.

    Returns:
        [B, L, D].

    Raises:
        CapabilityError: There are more or fewer tokens: the network is not what its description says.
    """
    expected, found = num_prefix + grid[0] * grid[1], tokens.shape[1]
    if found != expected:
        raise CapabilityError(
            f"{name} gave {found} tokens for a grid of {grid[0]}x{grid[1]} patches, but by its own description there "
            f"should be {expected}: {num_prefix} class and register tokens and {grid[0] * grid[1]} patches. Give the "
            f"right num_prefix_tokens and patch_size, or a callable that returns (summary, features)."
        )
    return tokens[:, num_prefix:]


def check_output(value: Any, name: str) -> Tensor:
    """The value if it is a tensor with floating point numbers.

    Raises:
        CapabilityError: It is something else.
    """
    if isinstance(value, Tensor) and value.is_floating_point():
        return value
    found = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
    raise CapabilityError(f"{name} returned {found} where a floating point tensor was expected.")
