"""The memory: features of patches and the pixels of each class in them, and which patches go into it.

Labels are kept as counts of pixels, which are exact and small, and are divided only where they are used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from amradio.errors import OptionError, ResolutionError
from amradio.evals.in_context.protocol import VoidRule

_IDS = 256


def patch_counts(masks: Tensor, patch_size: int, num_classes: int, void: VoidRule = "exclude") -> Tensor:
    """Count the pixels of each class in each patch.

    Args:
        masks: uint8 [B, H, W] classes, and 255 for void.
        patch_size: Side in pixels, p.
        num_classes: C.
        void: What is done with void.

    Returns:
        int16 [B, P, C] (int32 for patches of more than 181 pixels a side), patches row by row.

    Raises:
        ResolutionError: A side is no multiple of the patch.
    """
    b, height, width = masks.shape
    if height % patch_size or width % patch_size:
        raise ResolutionError(
            f"A mask of {height} x {width} (height x width) does not consist of whole patches of {patch_size} pixels. "
            f"Nearest: {_nearest(height, patch_size)} x {_nearest(width, patch_size)}."
        )
    h, w = height // patch_size, width // patch_size
    rows = torch.arange(height, device=masks.device).div_(patch_size, rounding_mode="floor")  # [H]
    columns = torch.arange(width, device=masks.device).div_(patch_size, rounding_mode="floor")  # [W]
    patches = (rows[:, None] * w + columns).mul_(num_classes + 1)  # [H, W] first bin of the pixel's patch
    labels = masks.clamp(max=num_classes)  # void falls into the last bin
    offsets = torch.arange(b, device=masks.device).mul_(h * w * (num_classes + 1))[:, None, None]
    bins = (patches + offsets).add_(labels)  # [B, H, W]
    counts = torch.bincount(bins.flatten(), minlength=b * h * w * (num_classes + 1))
    counts = counts.view(b, h * w, num_classes + 1)
    if void == "class-0":
        counts[..., 0] += counts[..., num_classes]
    dtype = torch.int16 if patch_size**2 <= torch.iinfo(torch.int16).max else torch.int32
    return counts[..., :num_classes].to(dtype)


def sampling_scores(counts: Tensor, noise: Tensor) -> Tensor:
    """By how much patches would rather not be chosen: low for rare classes, times chance.

    Each patch adds up, over the classes that occur in it, in how many patches of the picture they occur.

    Args:
        counts: integers [B, P, C].
        noise: float32 [B, P] in [0, 1).

    Returns:
        float32 [B, P]; infinite for patches without any class.
    """
    occurs = (counts > 0).float()  # [B, P, C]
    frequency = occurs.sum(1, keepdim=True)  # [B, 1, C]
    scores = (occurs * frequency).sum(2)  # [B, P]
    return (scores * noise).masked_fill(scores == 0, float("inf"))


def patches_per_picture(memory_size: int, pictures: int, patches: int | None, epochs: int) -> int:
    """How many patches of each picture go into a memory, k_img.

    Args:
        memory_size: Patches in the memory.
        pictures: N.
        patches: P of a picture, if all have as many.
        epochs: How often a picture goes in.

    Returns:
        At least 1. It may exceed P, which the caller says to the user.

    Raises:
        OptionError: The memory is smaller than the number of pictures.
    """
    share = memory_size // (pictures * epochs)
    if share < 1:
        times = f" x {epochs} epochs" if epochs > 1 else ""
        capacity = "" if patches is None else f" and at most {pictures * epochs * patches:,}"
        raise OptionError(
            f"A memory of {memory_size:,} patches cannot hold one of each of {pictures:,} pictures{times}. Choose at "
            f"least {pictures * epochs:,}{capacity}, or fewer pictures."
        )
    return share


@dataclass(frozen=True)
class MemoryBank:
    """What queries are compared with.

    Attributes:
        features: [M, D] of length 1 (or as the backbone's own similarity needs them).
        counts: integers [M, C] pixels of each class.
        item: int32 [M] the picture that a row comes from, as a row of `pictures`; -1 for spare rows.
        patch: int32 [M] the number of the patch in its picture.
        rank: int32 [M] how early the patch was chosen in its picture, from 0: the rows below n are a memory of n
            patches of each picture.
        pictures: int32 [I, 8]: for each picture its position in the set, the epoch, the height and width that it was
            resized to, and the part (top, left, height, width) that was.
        jitter: float32 [I, 4]: brightness, contrast, saturation, hue; NaN where one was left alone.
        about: What it was made of and how, as JSON can hold it.
    """

    features: Tensor
    counts: Tensor
    item: Tensor
    patch: Tensor
    rank: Tensor
    pictures: Tensor
    jitter: Tensor
    about: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.features)

    @property
    def labels(self) -> Tensor:
        """float32 [M, C]: shares of the classes; zeros for spare rows."""
        counts = self.counts.float()
        return counts / counts.sum(1, keepdim=True).clamp(min=1)

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        tensors = (self.features, self.counts, self.item, self.patch, self.rank, self.pictures, self.jitter)
        return sum(t.nbytes for t in tensors)

    def limited(self, per_picture: int) -> MemoryBank:
        """The part with so many patches of each picture, those that were chosen first."""
        chosen = (self.rank < per_picture).nonzero()[:, 0]
        return self if len(chosen) == len(self) else self._rows(chosen)

    def padded(self, rows: int) -> MemoryBank:
        """With spare rows of zeros at the end, as the code of the FUNGI paper leaves them."""
        spare = rows - len(self)
        if spare <= 0:
            return self

        def pad(values: Tensor, fill: int) -> Tensor:
            return torch.cat([values, values.new_full((spare, *values.shape[1:]), fill)])

        return replace(
            self,
            features=pad(self.features, 0),
            counts=pad(self.counts, 0),
            item=pad(self.item, -1),
            patch=pad(self.patch, -1),
            rank=pad(self.rank, -1),
        )

    def _rows(self, chosen: Tensor) -> MemoryBank:
        return replace(
            self,
            features=self.features[chosen],
            counts=self.counts[chosen],
            item=self.item[chosen],
            patch=self.patch[chosen],
            rank=self.rank[chosen],
        )


def _nearest(side: int, patch_size: int) -> int:
    return max(round(side / patch_size), 1) * patch_size
