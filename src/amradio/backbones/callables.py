"""Any callable as a backbone: a function or a module from images to features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from amradio.backbones.adapter import PROBE_SIDE, Adapter, Geometry, check_output, map_to_tokens, without_prefix
from amradio.errors import CapabilityError, OptionError
from amradio.models.configs import Resolution
from amradio.weights.checkpoint import Identity

_DICTIONARIES = (("summary", "features"), ("x_norm_clstoken", "x_norm_patchtokens"))
_FORMATS = ("NCHW", "NHWC")
_WANTED = (
    "It must return (summary [B, C], features), a dict with 'summary' and 'features' (or DINOv2's 'x_norm_clstoken' "
    "and 'x_norm_patchtokens'), or features alone: a map [B, D, h, w] or tokens [B, L, D]."
)


class CallableBackbone(Adapter):
    """A function or module from images to features, seen as a backbone.

    The widths are found by one forward pass over a black image. Where only features are returned, the summary is
    their mean over the positions.

    Args:
        fn: Takes images [B, 3, H, W] and returns ``(summary, features)``, a dict of both, or features alone. Features
            are a map (4-D, see `map_fmt`) or row-major tokens [B, L, D]. A module is put into evaluation mode.
        patch_size: Pixels between two feature positions; default the module's own ``patch_size``, or for maps the
            ratio of image and map sides.
        min_resolution_step: What image sides must be multiples of, in pixels; default `patch_size`.
        preferred_resolution: (height, width) in pixels; default unknown.
        num_prefix_tokens: Class and register tokens at the head of token features, which are cut off.
        map_fmt: ``NCHW`` or ``NHWC``: layout of features that are maps.
        mean: Mean of each channel to standardise images with; default none, `fn` gets images in [0, 1].
        std: Standard deviation of each channel, together with `mean`.
        name: For messages and reports; default the function's own.
        identity: Where the weights came from; default the name only.

    Raises:
        OptionError: An option is missing or not valid.
        CapabilityError: `fn` returns something else.
    """

    def __init__(
        self,
        fn: Callable[[Tensor], Any],
        *,
        patch_size: int | None = None,
        min_resolution_step: int | None = None,
        preferred_resolution: Sequence[int] | None = None,
        num_prefix_tokens: int = 0,
        map_fmt: str = "NCHW",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        name: str | None = None,
        identity: Identity | None = None,
    ) -> None:
        if map_fmt not in _FORMATS:
            raise OptionError(f"map_fmt must be one of {list(_FORMATS)}, got {map_fmt!r}.")
        patch_size = patch_size if patch_size is not None else _own_patch_size(fn)
        for option, value in (("patch_size", patch_size), ("min_resolution_step", min_resolution_step)):
            if value is not None and value < 1:
                raise OptionError(f"{option} must be at least 1 pixel, got {value}.")
        preferred = _resolution(preferred_resolution)
        name = name or str(getattr(fn, "__qualname__", type(fn).__name__))
        step = min_resolution_step or patch_size or 1
        unknown = Geometry(
            patch_size=patch_size or 0,
            embed_dim=0,
            summary_dim=0,
            min_resolution_step=step,
            preferred_resolution=preferred,
        )
        super().__init__(unknown, identity or Identity(source=name, layout="callable"), mean, std)
        if isinstance(fn, nn.Module):
            fn.eval()
        self.fn = fn
        self.num_prefix_tokens = num_prefix_tokens
        self.map_fmt = map_fmt
        self.geometry = self._probed(unknown, step_given=min_resolution_step is not None)

    def _probed(self, known: Geometry, *, step_given: bool) -> Geometry:
        """Complete the geometry by what comes out for one black image."""
        device = next((p.device for p in self.parameters()), torch.device("cpu"))
        size = known.preferred_resolution or known.nearest(PROBE_SIDE, PROBE_SIDE)
        with torch.inference_mode():
            summary, features = self._called(self._conditioned(torch.zeros(1, 3, *size, device=device)))
            if features.ndim not in (3, 4):
                raise CapabilityError(
                    f"{self.identity.source} returned features of the shape {list(features.shape)}. {_WANTED}"
                )
            stride = known.patch_size or self._stride_of(features, size)
            self.geometry = Geometry(
                patch_size=stride,
                embed_dim=0,
                summary_dim=0,
                min_resolution_step=known.min_resolution_step if step_given else stride,
                preferred_resolution=known.preferred_resolution,
            )
            self.geometry.check(torch.empty(1, 3, *size, device="meta"), self.identity.source)
            summary, tokens = self._arranged(summary, features, (size.height // stride, size.width // stride))
        return Geometry(
            patch_size=stride,
            embed_dim=tokens.shape[-1],
            summary_dim=summary.shape[-1],
            min_resolution_step=self.geometry.min_resolution_step,
            preferred_resolution=known.preferred_resolution,
        )

    def _run(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self._arranged(*self._called(images), self._grid(images))

    def _called(self, images: Tensor) -> tuple[Tensor | None, Tensor]:
        """What `fn` returns: a summary, if it has one, and features as they are."""
        output, name = self.fn(images), self.identity.source
        summary: Any = None
        features: Any = output
        if isinstance(output, Mapping):
            names = next((pair for pair in _DICTIONARIES if set(pair) <= set(output)), None)
            if names is None:
                raise CapabilityError(f"{name} returned a dict with {sorted(map(str, output))[:8]}. {_WANTED}")
            summary, features = (output[n] for n in names)
        elif isinstance(output, (tuple, list)):
            if len(output) != 2:
                raise CapabilityError(f"{name} returned a {type(output).__name__} of length {len(output)}. {_WANTED}")
            summary, features = output
        return None if summary is None else check_output(summary, name), check_output(features, name)

    def _arranged(self, summary: Tensor | None, features: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        name = self.identity.source
        if features.ndim == 4:
            maps = features if self.map_fmt == "NCHW" else features.permute(0, 3, 1, 2)  # [B, D, h, w]
            if tuple(maps.shape[-2:]) != grid:
                raise CapabilityError(
                    f"{name} returned a {self.map_fmt} map of the shape {list(features.shape)}, which is no "
                    f"{grid[0]}x{grid[1]} grid of {self.patch_size}-pixel patches. Give the right patch_size, and "
                    f"map_fmt if the channels come last."
                )
            tokens = map_to_tokens(maps)  # [B, L, D]
        else:
            tokens = without_prefix(features, self.num_prefix_tokens, grid, name)  # [B, L, D]
        if summary is None:
            summary = tokens.mean(dim=1)  # [B, D]
        if summary.ndim != 2:
            raise CapabilityError(f"{name} returned a summary of the shape {list(summary.shape)}. {_WANTED}")
        return summary, tokens

    def _stride_of(self, features: Tensor, size: Resolution) -> int:
        if features.ndim == 4:
            h, w = features.shape[-2:] if self.map_fmt == "NCHW" else features.shape[1:3]
            stride = size.height // h
            if stride and (stride * h, stride * w) == size:
                return stride
        raise OptionError(
            f"The patch size of {self.identity.source} cannot be told from features of the shape "
            f"{list(features.shape)} for a {size.height}x{size.width} image. Pass patch_size= (pixels between two "
            f"positions)."
        )


def _own_patch_size(fn: Any) -> int | None:
    own = getattr(fn, "patch_size", None)
    return own if isinstance(own, int) else None


def _resolution(size: Sequence[int] | None) -> Resolution | None:
    if size is None:
        return None
    if len(size) != 2:
        raise OptionError(f"preferred_resolution must be (height, width), got {tuple(size)}.")
    return Resolution(*size)
