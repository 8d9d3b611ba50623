"""Maps to the size of their photo: by the grid alone, or guided by the edges of the photo."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from amradio.errors import OptionError

if TYPE_CHECKING:
    from PIL.Image import Image

Upsampling = Literal["nearest", "bilinear", "bicubic", "guided"]
"""``nearest`` shows the true grid; ``bilinear`` and ``bicubic`` interpolate between cell centres; ``guided`` also lets
values stop at edges of the photo (joint bilateral upsampling, Kopf et al. 2007)."""

SIGMA_SPACE = 0.75
"""Of the guided weights, in cells."""

SIGMA_COLOUR = 0.15
"""Of the guided weights: Euclidean distance of colours in [0, 1]."""

REACH = 2
"""Cells in each direction that take part in a guided value."""

_PIXELS_AT_ONCE = 2**19


def upsample(
    maps: Tensor, size: tuple[int, int], method: Upsampling = "bilinear", guide: Image | None = None
) -> Tensor:
    """Bring a map to the size of a picture.

    A guided value is a mean of the `REACH` nearest cells in each direction, weighted by their distance to the pixel
    and by how similar the pixel's colour is to the mean colour of the cell. It never leaves the range of these cells,
    as a bicubic one can. What looks finer than the grid is then the photo's detail, not the model's.

    Args:
        maps: [h, w, C].
        size: (height, width) in pixels.
        method: See `Upsampling`.
        guide: For ``guided``: the photo, in RGB, of this size.

    Returns:
        float32 [height, width, C].

    Raises:
        OptionError: The method is unknown, or the guide is missing or of another size.
    """
    if method not in get_args(Upsampling):
        raise OptionError(f"Unknown upsampling {method!r}. Known are: {', '.join(get_args(Upsampling))}.")
    if method == "guided":
        return _guided(maps.float(), _pixels(guide, size))
    x = maps.float().permute(2, 0, 1)[None]  # [1, C, h, w]
    if tuple(size) != tuple(maps.shape[:2]):
        mode = "nearest-exact" if method == "nearest" else method
        x = F.interpolate(x, size=tuple(size), mode=mode)  # [1, C, H, W]
    return x[0].permute(1, 2, 0)


def _pixels(guide: Image | None, size: tuple[int, int]) -> Tensor:
    """float32 [H, W, 3] in [0, 1]."""
    from amradio.images.decode import to_tensor

    if guide is None:
        raise OptionError("Guided upsampling follows the edges of a photo, and none is given: pass it as `guide`.")
    if (guide.height, guide.width) != tuple(size):
        raise OptionError(
            f"The guide is {guide.height} x {guide.width} pixels (height x width), and the result shall have "
            f"{size[0]} x {size[1]}; resize the photo first."
        )
    return to_tensor(guide).permute(1, 2, 0)


def _guided(maps: Tensor, guide: Tensor) -> Tensor:
    """Joint bilateral upsampling of [h, w, C] by [H, W, 3]; rows of pixels in chunks, so that memory stays small."""
    height, width = guide.shape[:2]
    cells = F.adaptive_avg_pool2d(guide.permute(2, 0, 1), (maps.shape[0], maps.shape[1])).permute(1, 2, 0)  # [h, w, 3]
    step = max(_PIXELS_AT_ONCE // width, 1)
    parts = [
        _guided_rows(maps, cells, guide[top : top + step], torch.arange(top, min(top + step, height)), height)
        for top in range(0, height, step)
    ]
    return torch.cat(parts)


def _guided_rows(maps: Tensor, cells: Tensor, guide: Tensor, rows: Tensor, height: int) -> Tensor:
    """The given rows: [R, W, C]."""
    (h, w), width = maps.shape[:2], guide.shape[1]
    y = (rows + 0.5) * h / height - 0.5  # [R] in cells
    x = (torch.arange(width) + 0.5) * w / width - 0.5  # [W]
    offsets = [(i, j) for i in range(1 - REACH, REACH + 1) for j in range(1 - REACH, REACH + 1)]
    logits, taken = [], []
    for i, j in offsets:
        row, column = y.floor().long() + i, x.floor().long() + j
        inside = ((row >= 0) & (row < h))[:, None] & ((column >= 0) & (column < w))  # [R, W]
        index = (row.clamp(0, h - 1)[:, None], column.clamp(0, w - 1))
        space = ((y - row)[:, None] ** 2 + (x - column) ** 2) / (2 * SIGMA_SPACE**2)
        colour = (guide - cells[index]).square().sum(-1) / (2 * SIGMA_COLOUR**2)  # [R, W]
        logits.append((-space - colour).masked_fill(~inside, -torch.inf))
        taken.append(index)
    # By softmax: at a pixel that resembles no cell, all weights would underflow to 0.
    weights = torch.stack(logits).softmax(0)  # [K, R, W]
    found = torch.zeros(len(rows), width, maps.shape[-1])
    for weight, index in zip(weights, taken, strict=True):
        found += weight[..., None] * maps[index]
    return found
