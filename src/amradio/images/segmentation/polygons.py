"""Regions of instance annotations as pixels: polygons, and run lengths plain or packed."""

from __future__ import annotations

import numpy as np


def fill_polygon(points: np.ndarray, height: int, width: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Find the pixels whose centres are inside a polygon, by the even-odd rule.

    Args:
        points: float [N, 2] x and y of the corners, in pixels; the centre of the first pixel is at (0.5, 0.5).
        height: Of the picture.
        width: Of the picture.

    Returns:
        bool [h, w], the part of the picture that the polygon touches, and its first row and column.
    """
    x0, y0 = points.astype(np.float64).T  # [N]
    x1, y1 = np.roll(x0, -1), np.roll(y0, -1)
    top, bottom = _first_centre(y0.min(), height), _first_centre(y0.max(), height)
    left, right = _first_centre(x0.min(), width), _first_centre(x0.max(), width)
    # Edges cross the rows of pixel centres from `first` up to, not including, `last`.
    first = np.clip(np.ceil(np.minimum(y0, y1) - 0.5), top, bottom).astype(np.int64)
    last = np.clip(np.ceil(np.maximum(y0, y1) - 0.5), top, bottom).astype(np.int64)
    crossings = last - first
    edge = np.repeat(np.arange(len(x0)), crossings)  # [K] one entry for each crossing of an edge and a row
    row = np.arange(len(edge)) - np.repeat(np.cumsum(crossings) - crossings, crossings) + first[edge]
    share = (row + 0.5 - y0[edge]) / (y1[edge] - y0[edge])
    x = x0[edge] + share * (x1[edge] - x0[edge])
    column = np.clip(np.ceil(x - 0.5), left, right).astype(np.int64)
    # Each crossing turns inside to outside, or back, for all pixels right of it.
    turns = np.zeros((bottom - top, right - left + 1), dtype=np.int32)
    np.add.at(turns, (row - top, column - left), 1)
    inside = np.cumsum(turns, axis=1)[:, :-1] % 2 == 1  # [h, w]
    return inside, (top, left)


def unpack_runs(text: str) -> list[int]:
    """Unpack run lengths in COCO's compressed text form.

    A number is a sequence of characters with 5 bits each, lowest first; from the fourth on, numbers are differences to
    the last but one.

    Raises:
        ValueError: The text is cut short, or has other characters.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64:
            raise ValueError(f"{character!r} is no character of packed run lengths")
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:  # the highest bit is the sign
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = shift = 0
    if shift:
        raise ValueError("the packed run lengths are cut short")
    return counts


def fill_runs(counts: list[int], height: int, width: int) -> np.ndarray:
    """Turn run lengths into pixels.

    Args:
        counts: Of pixels outside and inside in turns, column by column.
        height: Of the region's picture.
        width: Of the region's picture.

    Returns:
        bool [height, width].

    Raises:
        ValueError: The lengths do not add up to the picture.
    """
    if min(counts, default=0) < 0 or sum(counts) != height * width:
        raise ValueError(f"the run lengths cover {sum(counts):,} of {height} x {width} = {height * width:,} pixels")
    inside = np.repeat(np.arange(len(counts)) % 2 == 1, counts)  # [W*H]
    region: np.ndarray = inside.reshape(width, height).T
    return region


def _first_centre(edge: float, size: int) -> int:
    """The first pixel whose centre is not left of an edge, or not above it."""
    return int(np.clip(np.ceil(edge - 0.5), 0, size))
