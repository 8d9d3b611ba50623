"""Small holes and islands of masks."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Runs(NamedTuple):
    """The pixels of a mask as horizontal runs, from the top, each row from the left.

    Attributes:
        row: int64 [R].
        start: int64 [R] first column.
        end: int64 [R] column after the last.
        region: int64 [R] number of the connected region, from 0.
    """

    row: np.ndarray
    start: np.ndarray
    end: np.ndarray
    region: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        """Pixels of each region."""
        return np.bincount(self.region, weights=self.end - self.start).astype(np.int64)


def find_regions(mask: np.ndarray) -> Runs:
    """Find the regions of a mask that hang together, also over corners.

    Args:
        mask: bool [H, W].
    """
    width = mask.shape[1]
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)  # [H, W+1]
    row, start = np.nonzero(edges == 1)
    _, end = np.nonzero(edges == -1)
    # Runs of the next row that touch: those that end no earlier than this one starts and start no later than it ends,
    # with one column to spare for corners. Both sides are sorted, so two searches find where they begin and end.
    stride = width + 2
    first = np.searchsorted(row * stride + end, (row + 1) * stride + start)
    last = np.searchsorted(row * stride + start, (row + 1) * stride + end, side="right")
    counts = np.maximum(last - first, 0)
    upper = np.repeat(np.arange(len(row)), counts)
    lower = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(first, counts)
    return Runs(row, start, end, _connected(len(row), upper, lower))


def without_small_regions(mask: np.ndarray, min_area: int) -> np.ndarray:
    """Fill holes and take islands away that are smaller than an area; the largest island always stays.

    Holes and islands hang together over corners too, as in SAM's own tools.

    Args:
        mask: bool [H, W].
        min_area: In pixels.

    Returns:
        bool [H, W]: a new mask, or `mask` itself if nothing changed.
    """
    holes = find_regions(~mask)
    sizes = holes.sizes
    if len(sizes) and sizes.min() < min_area:
        mask = mask | _painted(holes, sizes < min_area, mask.shape)
    islands = find_regions(mask)
    sizes = islands.sizes
    small = sizes < min_area
    if small.all() and len(small):
        small[sizes.argmax()] = False
    return mask & ~_painted(islands, small, mask.shape) if small.any() else mask


def _connected(count: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Number the components of a graph with nodes 0..count-1 and edges a-b, from 0."""
    label = np.arange(count)
    while True:
        lowest = label.copy()
        np.minimum.at(lowest, a, label[b])
        np.minimum.at(lowest, b, label[a])
        lowest = lowest[lowest]  # a step along the chain of labels, so that long ones take few rounds
        if (lowest == label).all():
            return np.unique(label, return_inverse=True)[1]
        label = lowest


def _painted(runs: Runs, chosen: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The pixels of some regions: bool [H, W]."""
    keep = chosen[runs.region]
    turns = np.zeros((shape[0], shape[1] + 1), dtype=np.int8)
    turns[runs.row[keep], runs.start[keep]] = 1
    turns[runs.row[keep], runs.end[keep]] = -1  # runs of a row never touch
    painted: np.ndarray = np.cumsum(turns, axis=1)[:, :-1] == 1
    return painted
