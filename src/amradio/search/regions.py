"""Where in which picture something is that looks like a part of another picture."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from amradio.errors import OptionError
from amradio.search.neighbours import Neighbours

_TOKENS_AT_ONCE = 2**16


def region_query(features: Tensor, box: tuple[float, float, float, float] | None = None) -> Tensor:
    """Describe a part of a picture by one feature.

    Args:
        features: [h, w, D] of the picture.
        box: (left, top, right, bottom) as shares of width and height; None: all of it.

    Returns:
        float32 [D] of length 1: the mean of the features whose middle is in the box, each of length 1; of the one under
        the middle of the box if it is smaller than that.

    Raises:
        OptionError: The box is not in the picture.
    """
    h, w, width = features.shape
    left, top, right, bottom = box or (0.0, 0.0, 1.0, 1.0)
    if not (0 <= left <= right <= 1 and 0 <= top <= bottom <= 1):
        raise OptionError(f"A box is left, top, right, bottom from 0 to 1 in rising order, got {box}.")
    rows, columns = _inside(top, bottom, h), _inside(left, right, w)
    chosen = features[rows[0] : rows[1], columns[0] : columns[1]].float().reshape(-1, width)
    return F.normalize(F.normalize(chosen, dim=1).mean(0), dim=0)


def best_positions(tokens: Tensor, offsets: Tensor, query: Tensor) -> Neighbours:
    """Find, in each of several pictures, the position most similar to a query.

    Args:
        tokens: [T, D] features of n pictures, one after the other, on any device and in any floating point dtype.
        offsets: int64 [n + 1]: the first row of each picture, and T. No picture is empty.
        query: [D].

    Returns:
        Cosines [n] and positions [n], counted from 0 in each picture; of equal ones, the first.
    """
    unit = F.normalize(query.float(), dim=0)
    cosines = torch.cat(
        [
            F.normalize(tokens[start : start + _TOKENS_AT_ONCE].float(), dim=1) @ unit
            for start in range(0, len(tokens), _TOKENS_AT_ONCE)
        ]
        or [torch.zeros(0)]
    )  # [T]
    offsets = offsets.to(torch.int64).cpu()
    counts = offsets.diff()
    picture = torch.arange(len(counts)).repeat_interleave(counts)  # [T]
    scores = torch.full((len(counts),), -torch.inf).scatter_reduce(0, picture, cosines.cpu(), "amax")
    place = torch.arange(len(picture)) - offsets[picture]
    missed = cosines.cpu() < scores[picture]
    last = int(counts.max()) if len(counts) else 0
    indices = torch.full((len(counts),), last).scatter_reduce(0, picture, place.masked_fill(missed, last), "amin")
    return Neighbours(scores, indices)


def _inside(low: float, high: float, count: int) -> tuple[int, int]:
    """First and last + 1 of the cells whose middle is between two shares; at least one cell."""
    first = max(min(round(low * count), count), 0)
    last = max(min(round(high * count), count), 0)
    if first < last:
        return first, last
    middle = min(int((low + high) / 2 * count), count - 1)
    return middle, middle + 1
