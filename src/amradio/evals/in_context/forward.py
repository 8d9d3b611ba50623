"""Batches of pictures through a backbone, down to patch features on its device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amradio.backbones.protocol import Backbone
from amradio.errors import OptionError, ResolutionError
from amradio.evals.in_context.loader import ReadyPair
from amradio.evals.in_context.protocol import HBIRD_STD, IMAGENET_MEAN, IMAGENET_STD, InContextProtocol
from amradio.features.bucketing import batches_by_shape
from amradio.features.runner import ExtractOptions, is_out_of_memory


@dataclass(frozen=True)
class PatchFeatures:
    """A batch that went through the backbone, or pictures that did not.

    Attributes:
        pairs: B pictures.
        features: [B, P, D] on the device, as the backbone gave them; None if there are none.
        grid: (h, w) with h * w = P.
        reason: Why there are no features, where the pictures themselves do not say it.
    """

    pairs: Sequence[ReadyPair]
    features: Tensor | None = None
    grid: tuple[int, int] = (0, 0)
    reason: str | None = None


class Forward:
    """Runs a backbone over pictures.

    Args:
        backbone: In evaluation mode, on the device of the options.
        options: Batch size, precision and so on.
        protocol: About the input.

    Raises:
        OptionError: The backbone is in training mode.
    """

    def __init__(self, backbone: Backbone, options: ExtractOptions, protocol: InContextProtocol) -> None:
        if getattr(backbone, "training", False):
            raise OptionError("The model is in training mode, in which features are random. Call model.eval() first.")
        self._backbone = backbone
        self._call: Any = torch.compile(backbone, dynamic=True) if options.compile else backbone
        self._options = options
        self._input: tuple[Tensor, Tensor] | None = None
        if protocol.input_std == "hbird":
            mean, std, quirk = (
                torch.tensor(v, device=options.device).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD, HBIRD_STD)
            )
            self._input = (std / quirk, mean - mean * (std / quirk))
        self._most: int | None = None  # pixels of a batch, known once memory ran out

    def batches(self, pairs: Iterable[ReadyPair]) -> Iterator[PatchFeatures]:
        """Run pictures, batched by shape; those that are unusable come by themselves.

        Args:
            pairs: Read lazily.
        """
        options = self._options
        look_ahead = options.look_ahead or 2 * options.batch_size
        for batch in batches_by_shape(pairs, lambda pair: pair.shape, options.batch_size, look_ahead):
            if batch[0].pixels is None:
                yield PatchFeatures(batch)
                continue
            start = 0
            while start < len(batch):
                part = batch[start : start + self._how_many(batch[0])]
                found = self._try(part)
                if found is not None:
                    yield found
                    start += len(part)
                elif len(part) > 1:
                    self._most = len(part) // 2 * batch[0].pixels[0].numel()
                else:
                    height, width = batch[0].pixels.shape[-2:]
                    reason = f"Out of memory for this picture alone, at {height} x {width} pixels."
                    yield PatchFeatures(part, reason=reason)
                    start += 1

    def _how_many(self, pair: ReadyPair) -> int:
        assert pair.pixels is not None
        return self._options.batch_size if self._most is None else max(self._most // pair.pixels[0].numel(), 1)

    def _try(self, pairs: Sequence[ReadyPair]) -> PatchFeatures | None:
        """A forward pass, or None if memory ran out."""
        options = self._options
        # The exception holds the frames, and so the tensors, of the failed pass: it must be gone before the next one.
        try:
            with (
                torch.inference_mode(),
                torch.autocast(options.device.type, options.autocast, enabled=options.autocast is not None),
            ):
                features = self._call(self._images(pairs), feature_fmt="NLC").features  # [B, P, D]
            grid = self._grid(pairs[0], features.shape[1])
            return PatchFeatures(pairs, features, grid)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        if options.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def _images(self, pairs: Sequence[ReadyPair]) -> Tensor:
        """[B, 3, H, W] on the device, as the protocol wants the backbone to see them."""
        options = self._options
        pixels = [pair.pixels for pair in pairs if pair.pixels is not None]
        stacked = torch.empty(
            (len(pixels), *pixels[0].shape), dtype=pixels[0].dtype, pin_memory=options.device.type == "cuda"
        )
        images = torch.stack(pixels, out=stacked).to(options.device, non_blocking=True)
        images = images.float().div_(255) if images.dtype == torch.uint8 else images
        if self._input is not None:
            scale, shift = self._input
            images = images * scale + shift
        return images.to(options.dtype)

    def _grid(self, pair: ReadyPair, patches: int) -> tuple[int, int]:
        assert pair.pixels is not None
        height, width = pair.pixels.shape[-2:]
        grid = height // self._backbone.patch_size, width // self._backbone.patch_size
        if grid[0] * grid[1] != patches:
            raise ResolutionError(
                f"The backbone gave {patches} features for a picture of {height} x {width} pixels; with its patches of "
                f"{self._backbone.patch_size} pixels there should be {grid[0]} x {grid[1]}."
            )
        return grid
