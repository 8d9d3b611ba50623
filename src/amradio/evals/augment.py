"""Views of a picture that show the same: RandAugment, then a random part of it.

RandAugment: Cubuk et al. 2019 (arXiv 1909.13719), three operations at magnitude 9 of 30, as RADIO's examples have it.
Of the operations only their number is known, ten; which ones is our choice: torchvision's without shears and
translations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from amradio.images.sources import ImageSource

if TYPE_CHECKING:
    from PIL.Image import Image

OPERATIONS = 3
MAGNITUDE = 9 / 30
SCALE = (0.5, 1.0)
"""Share of the picture's area that a view shows."""

_ASPECT = (3 / 4, 4 / 3)
_TRIES = 10
_FILL = (124, 116, 104)  # mean colour of ImageNet, in corners that a rotation leaves empty


@dataclass(frozen=True)
class AugmentedView:
    """One view of a picture, as a picture of its own; the same view for the same seed.

    Attributes:
        source: The picture.
        size: (height, width) of the view.
        seed: Numbers that tell views apart: of the run, the picture, the view.
    """

    source: ImageSource
    size: tuple[int, int]
    seed: tuple[int, ...]

    @property
    def id(self) -> str:
        """The picture's name, and the number of the view."""
        return f"{self.source.id}-view{self.seed[-1]}"

    @property
    def location(self) -> str:
        """Of the picture."""
        return self.source.location

    def decode(
        self, *, max_pixels: int, background: tuple[int, int, int], at_least: tuple[int, int] | None = None
    ) -> Image:
        """Decode the picture and make the view, exactly of its size.

        Raises:
            ImageError: It cannot be decoded.
        """
        picture = self.source.decode(max_pixels=max_pixels, background=background)
        return augmented(picture, self.size, np.random.Generator(np.random.PCG64(self.seed)))


def augmented(picture: Image, size: tuple[int, int], rng: np.random.Generator) -> Image:
    """Make a view.

    Args:
        picture: In RGB.
        size: (height, width) of the view.
        rng: Decides.

    Returns:
        In RGB.
    """
    from PIL.Image import Resampling

    # Colours of pixels that the view will not show cost as much as others: twice the size is enough for any part.
    ratio = 2 * max(size) / min(picture.size)
    if ratio < 1:
        reduced = (max(round(side * ratio), 1) for side in picture.size)
        picture = picture.resize((next(reduced), next(reduced)), Resampling.BICUBIC)
    names = list(_operations())
    for name in rng.choice(len(names), OPERATIONS):
        sign = 1 if rng.random() < 0.5 else -1
        picture = _operations()[names[int(name)]](picture, sign * MAGNITUDE)
    left, top, width, height = random_part(picture.width, picture.height, rng)
    box = (left, top, left + width, top + height)
    return picture.resize((size[1], size[0]), Resampling.BICUBIC, box=box)


def random_part(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """A part of random area and aspect, as torchvision's RandomResizedCrop draws it.

    Returns:
        (left, top, width, height); where no draw fits, the largest centred part of a bounded aspect.
    """
    low, high = math.log(_ASPECT[0]), math.log(_ASPECT[1])
    for _ in range(_TRIES):
        area = width * height * rng.uniform(*SCALE)
        aspect = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    w = min(width, max(round(height * _ASPECT[1]), 1))
    h = min(height, max(round(width / _ASPECT[0]), 1))
    return (width - w) // 2, (height - h) // 2, w, h


def _operations() -> Mapping[str, Callable[[Image, float], Image]]:
    """Operations by name: a picture, and a magnitude from -1 to 1 of which some use the sign."""
    from PIL import ImageEnhance, ImageOps
    from PIL.Image import Resampling

    def enhanced(kind: Callable[[Image], ImageEnhance._Enhance]) -> Callable[[Image, float], Image]:
        return lambda picture, m: kind(picture).enhance(1 + 0.9 * m)

    return {
        "identity": lambda picture, m: picture,
        "rotate": lambda picture, m: picture.rotate(30 * m, Resampling.BILINEAR, fillcolor=_FILL),
        "brightness": enhanced(ImageEnhance.Brightness),
        "colour": enhanced(ImageEnhance.Color),
        "contrast": enhanced(ImageEnhance.Contrast),
        "sharpness": enhanced(ImageEnhance.Sharpness),
        "posterize": lambda picture, m: ImageOps.posterize(picture, 8 - round(4 * abs(m))),
        "solarize": lambda picture, m: ImageOps.solarize(picture, round(255 * (1 - abs(m)))),
        "autocontrast": lambda picture, m: ImageOps.autocontrast(picture),
        "equalize": lambda picture, m: ImageOps.equalize(picture),
    }
