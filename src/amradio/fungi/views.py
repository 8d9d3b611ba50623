"""Views of one picture that the per-image objectives compare, as in FUNGI's code (arXiv 2407.10964, section 4.3).

Pictures are uint8 [3, H, W] on the CPU, views float32 [V, 3, S, S] in [0, 1]; standardisation is the backbone's. Crops
are resized by Pillow, whose rounding to bytes is a part of the published numbers. Random crops are drawn from a seed
that belongs to the picture.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from amradio.errors import OptionError

if TYPE_CHECKING:
    from PIL.Image import Image

Filter = Literal["bilinear", "bicubic"]
_ATTEMPTS = 10
_ASPECTS = (3 / 4, 4 / 3)


class Crop(NamedTuple):
    """A part of a picture, in pixels."""

    top: int
    left: int
    height: int
    width: int


def random_crop(height: int, width: int, scale: tuple[float, float], rng: random.Random) -> Crop:
    """Draw a crop of random area and aspect.

    The area is uniform in `scale` of the picture's, the aspect log-uniform in 3/4 to 4/3. If 10 draws do not fit, the
    largest centred crop with such an aspect is taken.

    Args:
        height: Of the picture.
        width: Of the picture.
        scale: Bounds of the area, as shares.
        rng: Where numbers come from.

    Returns:
        The crop.
    """
    low, high = (math.log(aspect) for aspect in _ASPECTS)
    for _ in range(_ATTEMPTS):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return Crop(rng.randint(0, height - h), rng.randint(0, width - w), h, w)
    aspect = min(max(width / height, _ASPECTS[0]), _ASPECTS[1])
    h, w = min(height, round(width / aspect)), min(width, round(height * aspect))
    return Crop((height - h) // 2, (width - w) // 2, h, w)


def crop_views(picture: Tensor, crops: Sequence[Sequence[int]], size: int, resampling: Filter) -> Tensor:
    """Cut parts out and bring each to a square.

    Args:
        picture: uint8 [3, H, W].
        crops: (top, left, height, width) of each view.
        size: Side of the square.
        resampling: Antialiased.

    Returns:
        float32 [V, 3, size, size] in [0, 1].
    """
    image = _to_pil(picture)
    parts = (image.crop((left, top, left + w, top + h)) for top, left, h, w in crops)
    return torch.stack([_resized(part, size, resampling) for part in parts]).float().div_(255)


def resize_view(picture: Tensor, resize: int = 256, crop: int = 224) -> Tensor:
    """The view of the KL objective: a bilinear resize to a square, whatever the aspect, and its centre.

    Args:
        picture: uint8 [3, H, W].
        resize: Side of the square.
        crop: Side of the centre, at most `resize`.

    Returns:
        float32 [1, 3, crop, crop] in [0, 1].
    """
    if crop > resize:
        raise OptionError(f"A centre of {crop} pixels cannot be cut out of {resize}.")
    start = round((resize - crop) / 2)
    view = _resized(_to_pil(picture), resize, "bilinear")[:, start : start + crop, start : start + crop]
    return view.float().div_(255)[None]


def window_views(picture: Tensor, size: int = 224, num_patches: int = 4, stride_scale: int = 6) -> Tensor:
    """The views of the SimCLR objective: overlapping windows at fixed places, row by row, enlarged to the full size.

    Args:
        picture: uint8 [3, H, W].
        size: Side of the square that the picture is resized to first, whatever its aspect, and of the views.
        num_patches: Windows that would tile the square: their side is ``size / sqrt(num_patches)``.
        stride_scale: The stride is this fraction of the side, in whole pixels.

    Returns:
        float32 [V, 3, size, size]; bicubic interpolation leaves [0, 1] a little, and stays as it is. With the
        defaults V is 49.

    Raises:
        OptionError: Windows or strides would have no pixels.
    """
    side = int(size / math.sqrt(num_patches)) if num_patches >= 1 else 0
    stride = int(side / stride_scale) if stride_scale >= 1 else 0
    if stride < 1:
        raise OptionError(
            f"Windows of {size} pixels / sqrt({num_patches}) with a stride of 1/{stride_scale} of that are empty."
        )
    image = _resized(_to_pil(picture), size, "bicubic").float().div_(255)  # [3, S, S]
    windows = image.unfold(1, side, stride).unfold(2, side, stride)  # [3, rows, cols, side, side]
    windows = windows.permute(1, 2, 0, 3, 4).flatten(0, 1)  # [V, 3, side, side]
    return F.interpolate(windows, size=(size, size), mode="bicubic", antialias=True, align_corners=False)


def _to_pil(picture: Tensor) -> Image:
    from PIL import Image

    if picture.dtype != torch.uint8 or picture.ndim != 3 or picture.shape[0] != 3:
        raise OptionError(f"A picture is uint8 [3, H, W], got {picture.dtype} {list(picture.shape)}.")
    return Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())


def _resized(image: Image, size: int, resampling: Filter) -> Tensor:
    """uint8 [3, size, size]."""
    from PIL.Image import Resampling

    from amradio.images.decode import to_uint8_tensor

    method = Resampling.BICUBIC if resampling == "bicubic" else Resampling.BILINEAR
    # Rows first, then columns, as Pillow did before version 13, which takes the cheaper order: the bytes in between are
    # rounded and clipped, so the order shows.
    return to_uint8_tensor(image.resize((size, image.height), method).resize((size, size), method))
