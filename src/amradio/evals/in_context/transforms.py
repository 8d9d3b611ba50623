"""Pictures and masks together: jittered colours, random crops, resizing. Pure functions of what was drawn.

The published recipe (open-hummingbird-eval 2.0.0): each with probability 1/2, brightness, contrast, saturation and hue
are changed by up to 10 %; then a part of 50 to 100 % of the area is resized.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

STRENGTH = 0.1
AREA = (0.5, 2.0)  # shares above 1 do not fit and are drawn again
ASPECT = (3 / 4, 4 / 3)
TRIES = 10


@dataclass(frozen=True)
class Change:
    """What happens to a picture and its mask.

    Attributes:
        jitter: Factors of brightness, contrast and saturation, and the shift of the hue in turns; None leaves one be.
        crop: (top, left, height, width) of the part that is resized; None: all.
    """

    jitter: tuple[float | None, float | None, float | None, float | None] = (None, None, None, None)
    crop: tuple[int, int, int, int] | None = None


def draw_change(size: tuple[int, int], target: tuple[int, int], generator: torch.Generator) -> Change:
    """Draw a change, with as many random numbers in the same order as the published code takes.

    Args:
        size: (height, width) of the picture.
        target: (height, width) that the part is resized to. The part's aspect is up to 4/3 away from it.
        generator: On the CPU.
    """
    return Change(_draw_jitter(generator), _draw_crop(size, target[1] / target[0], generator))


def apply_jitter(picture: Image, change: Change) -> Image:
    """Change the colours of an RGB picture, rounding to 8 bits after each step."""
    from PIL import Image, ImageEnhance

    *factors, hue = change.jitter
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for enhancer, factor in zip(enhancers, factors, strict=True):
        if factor is not None:
            picture = enhancer(picture).enhance(factor)
    if hue is None:
        return picture
    hsv = np.array(picture.convert("HSV"))  # [H, W, 3]
    hsv[..., 0] += np.int32(hue * 255).astype(np.uint8)  # modulo 256: the hue is a circle
    bands = [Image.fromarray(np.ascontiguousarray(band)) for band in hsv.transpose(2, 0, 1)]
    return Image.merge("HSV", bands).convert("RGB")


def resize_picture(picture: Image, target: tuple[int, int], crop: tuple[int, int, int, int] | None = None) -> Tensor:
    """Resize a picture, or a part of it, with an antialiased bilinear filter: uint8 [3, H, W]."""
    from PIL.Image import Resampling

    from amradio.images.decode import to_uint8_tensor

    if crop is not None:  # not as a box of the resize, which would look beyond it
        picture = picture.crop(_box(crop))
    return to_uint8_tensor(picture.resize((target[1], target[0]), Resampling.BILINEAR))


def resize_exactly(picture: Image, target: tuple[int, int], crop: tuple[int, int, int, int] | None) -> Tensor:
    """Like `resize_picture`, without rounding to 8 bits, as the published code does: float32 [3, H, W] in [0, 1]."""
    from amradio.images.decode import to_tensor

    pixels = to_tensor(picture if crop is None else picture.crop(_box(crop)))  # [3, h, w]
    return F.interpolate(pixels[None], target, mode="bilinear", align_corners=False, antialias=True)[0]


def resize_mask(
    mask: np.ndarray,
    target: tuple[int, int],
    crop: tuple[int, int, int, int] | None = None,
    nearest: str = "centre",
) -> np.ndarray:
    """Resize a mask, or a part of it, by taking the nearest pixels.

    Args:
        mask: [H, W].
        target: (height, width).
        crop: (top, left, height, width).
        nearest: See `amradio.evals.in_context.protocol.InContextProtocol`.

    Returns:
        Of the same dtype, [height, width].
    """
    top, left, height, width = crop or (0, 0, *mask.shape)
    shift = 0.5 if nearest == "centre" else 0.0
    rows = top + _nearest(height, target[0], shift)
    columns = left + _nearest(width, target[1], shift)
    resized: np.ndarray = mask[rows[:, None], columns]
    return resized


def _nearest(count: int, wanted: int, shift: float) -> np.ndarray:
    # float32, as torch computes it: in float64 a few pixels of some sizes would differ.
    places = (np.arange(wanted, dtype=np.float32) + np.float32(shift)) * np.float32(count / wanted)
    found: np.ndarray = np.minimum(places.astype(np.int64), count - 1)
    return found


def _box(crop: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    top, left, height, width = crop
    return left, top, left + width, top + height


def _draw_jitter(generator: torch.Generator) -> tuple[float | None, float | None, float | None, float | None]:
    drawn: list[float | None] = []
    for low, high in ((1 - STRENGTH, 1 + STRENGTH),) * 3 + ((-STRENGTH, STRENGTH),):
        if float(torch.rand(1, generator=generator)) > 0.5:
            drawn.append(None)
            continue
        torch.randperm(4, generator=generator)  # an order of one thing: it has no effect but is drawn
        drawn.append(float(torch.empty(1).uniform_(low, high, generator=generator)))
    brightness, contrast, saturation, hue = drawn
    return brightness, contrast, saturation, hue


def _draw_crop(size: tuple[int, int], aspect: float, generator: torch.Generator) -> tuple[int, int, int, int]:
    height, width = size
    low, high = torch.log(torch.tensor(ASPECT)).tolist()
    for _ in range(TRIES):
        area = height * width * torch.empty(1).uniform_(*AREA, generator=generator).item()
        ratio = aspect * torch.exp(torch.empty(1).uniform_(low, high, generator=generator)).item()
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = int(torch.randint(0, height - h + 1, (1,), generator=generator))
            left = int(torch.randint(0, width - w + 1, (1,), generator=generator))
            return top, left, h, w
    # The largest part in the middle whose aspect is allowed.
    h, w = height, width
    if width / height < ASPECT[0] * aspect:
        h = round(width / (ASPECT[0] * aspect))
    elif width / height > ASPECT[1] * aspect:
        w = round(height * ASPECT[1] * aspect)
    return (height - h) // 2, (width - w) // 2, h, w
