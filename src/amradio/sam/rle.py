"""Masks as run lengths, in the form of COCO's annotations: column by column, outside and inside in turns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from amradio.images.segmentation.polygons import fill_runs, unpack_runs


class Rle(TypedDict):
    """A mask.

    Attributes:
        size: [height, width].
        counts: Lengths, the first of pixels outside; or packed as text (`packed`).
    """

    size: list[int]
    counts: list[int] | str


def encode(masks: Tensor) -> list[Rle]:
    """Turn masks, bool [N, H, W], into run lengths."""
    height, width = masks.shape[-2:]
    rows = masks.mT.reshape(len(masks), -1)  # [N, W*H], as columns are read first
    edges = rows[:, 1:] != rows[:, :-1]
    found: list[Rle] = []
    starts_inside = rows[:, 0].tolist() if rows.shape[1] else [False] * len(rows)
    for row, inside in zip(edges.cpu(), starts_inside, strict=True):
        ends = torch.cat([row.nonzero()[:, 0] + 1, torch.tensor([height * width])])
        counts = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
        found.append({"size": [height, width], "counts": [0, *counts] if inside else counts})
    return found


def decode(rle: Rle) -> np.ndarray:
    """Turn run lengths, plain or packed, into bool [H, W].

    Raises:
        ValueError: They do not add up to the mask, or are damaged.
    """
    return fill_runs(counts_of(rle), *rle["size"])


def area(rle: Rle) -> int:
    """Pixels inside."""
    return sum(counts_of(rle)[1::2])


def packed(rle: Rle) -> Rle:
    """The same mask with its lengths as text, as COCO's result files have them."""
    return {"size": rle["size"], "counts": pack_runs(counts_of(rle))}


def counts_of(rle: Rle) -> list[int]:
    """The run lengths as numbers."""
    counts = rle["counts"]
    return unpack_runs(counts) if isinstance(counts, str) else counts


def pack_runs(counts: Sequence[int]) -> str:
    """Pack run lengths as text; the inverse of `amradio.images.segmentation.polygons.unpack_runs`."""
    characters = []
    for i, count in enumerate(counts):
        value = count - counts[i - 2] if i > 2 else count
        more = True
        while more:
            code, value = value & 31, value >> 5
            more = value != (-1 if code & 16 else 0)  # the sign of the last group is that of the number
            characters.append(chr(48 + (code | 32 if more else code)))
    return "".join(characters)
