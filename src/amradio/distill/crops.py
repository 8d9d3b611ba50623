"""What is shown of a picture: random crops, flips, colours and mixtures, as a pure function of seed, epoch and picture.

A view is drawn in relative coordinates, without looking at the picture or at the size that it is rendered at. Student
and teachers therefore see the same crop, each at its own size: patient and consistent teaching (Beyer et al. 2021,
arXiv 2106.05237). Only raw bits of PCG64 are used, which NumPy keeps the same in all versions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from amradio.errors import ConfigError, OptionError

if TYPE_CHECKING:
    from PIL.Image import Image

_DRAWS_FOR_CROP = 5
_GREY = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601, as in Pillow


@dataclass(frozen=True, kw_only=True)
class CropOptions:
    """How a view of a picture is drawn.

    Attributes:
        scale: Smallest and largest share of the picture's area.
        ratio: Smallest and largest width over height of a crop, drawn evenly on a logarithmic scale.
        flip: Probability of mirroring left and right.
        brightness: Factors are drawn from 1 - brightness to 1 + brightness; 0 leaves it as it is.
        contrast: Likewise, about middle grey rather than the mean of the picture, so that overlapping windows agree.
        saturation: Likewise.
        mixup: Probability that a view is a mixture of two pictures, with a share drawn evenly from 0 to 1.

    Raises:
        ConfigError: A number is out of its range.
    """

    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    mixup: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ConfigError(f"The scale of crops must rise within (0, 1], got {list(self.scale)}.")
        if not 0 < self.ratio[0] <= self.ratio[1] < math.inf:
            raise ConfigError(f"The ratio of crops must rise above 0, got {list(self.ratio)}.")
        for name in ("flip", "brightness", "contrast", "saturation", "mixup"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} of crops must be in [0, 1], got {getattr(self, name)}.")


@dataclass(frozen=True)
class Crop:
    """A region of one picture, in terms that hold for any size of it.

    Attributes:
        index: Of the picture.
        area: Share of the picture's area.
        ratio: Width over height.
        x: Where it lies, from 0 (left) to 1 (right).
        y: Where it lies, from 0 (top) to 1 (bottom).
        flip: Whether it is mirrored.
    """

    index: int
    area: float
    ratio: float
    x: float
    y: float
    flip: bool

    def box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Resolve the region for a picture of some size; too long a crop is scaled down until it fits.

        Args:
            width: Of the picture, in pixels.
            height: Of the picture, in pixels.

        Returns:
            (left, top, right, bottom) in pixels, not rounded.
        """
        w, h = math.sqrt(width * height * self.area * self.ratio), math.sqrt(width * height * self.area / self.ratio)
        fit = min(1.0, width / w, height / h)
        w, h = w * fit, h * fit
        left, top = self.x * (width - w), self.y * (height - h)
        return left, top, left + w, top + h

    @property
    def smallest_side(self) -> float:
        """A lower bound on its shorter side, as a share of the picture's shorter side, whatever the picture's shape."""
        narrow = min(self.ratio, 1 / self.ratio)
        return min(math.sqrt(self.area * narrow), narrow)


@dataclass(frozen=True)
class View:
    """One augmented picture.

    Attributes:
        crops: One, or two that are mixed.
        share: Of the first crop in a mixture.
        brightness: Factor of all values.
        contrast: Factor about middle grey.
        saturation: Factor about the grey of each pixel.
    """

    crops: tuple[Crop, ...]
    share: float = 1.0
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0

    @property
    def indices(self) -> tuple[int, ...]:
        """Which pictures it shows."""
        return tuple(crop.index for crop in self.crops)

    @property
    def smallest_side(self) -> float:
        """A lower bound on the shorter side of its crops, as a share of the shorter side of their pictures."""
        return min(crop.smallest_side for crop in self.crops)

    def render(self, pictures: Sequence[Image], size: tuple[int, int], shift: tuple[int, int] = (0, 0)) -> Tensor:
        """Make the pixels, by an antialiased bicubic filter at sub-pixel precision.

        Args:
            pictures: For each of `indices`, in RGB, of any size.
            size: (height, width) of the result.
            shift: (rows, columns) in pixels of the result by which the window is moved down and to the right, as seen
                after mirroring. What lies beyond the picture continues its edge.

        Returns:
            uint8 [3, height, width].

        Raises:
            OptionError: The number of pictures is another one.
        """
        if len(pictures) != len(self.crops):
            raise OptionError(f"This view shows {len(self.crops)} pictures, got {len(pictures)}.")
        parts = [_cut(picture, crop, size, shift) for picture, crop in zip(pictures, self.crops, strict=True)]
        if len(parts) == 1 and self.brightness == self.contrast == self.saturation == 1:
            pixels = parts[0]
        else:
            pixels = self._coloured(self._mixed(parts))
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))  # [3, h, w]

    def _mixed(self, parts: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        first = parts[0].astype(np.float32)
        if len(parts) == 1:
            return first
        second = parts[1].astype(np.float32)
        return np.asarray(second + np.float32(self.share) * (first - second), dtype=np.float32)

    def _coloured(self, x: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Change colours pixel by pixel: x is [h, w, 3] from 0 to 255."""
        x = (x * np.float32(self.brightness) - np.float32(127.5)) * np.float32(self.contrast) + np.float32(127.5)
        if self.saturation != 1:
            grey = (x @ _GREY)[..., None]  # [h, w, 1]
            x = grey + np.float32(self.saturation) * (x - grey)
        return np.rint(x).clip(0, 255).astype(np.uint8)


def epoch_order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of pictures in an epoch.

    Args:
        count: Pictures.
        seed: Of the run.
        epoch: From 0.

    Returns:
        int64 [count], a permutation.
    """
    keys = _bits(count, seed, epoch)
    return np.argsort(keys, kind="stable").astype(np.int64)


def draw_view(options: CropOptions, seed: int, epoch: int, index: int, count: int) -> View:
    """Draw what is shown of a picture in an epoch.

    Args:
        options: How.
        seed: Of the run, not negative.
        epoch: From 0.
        index: Of the picture.
        count: Pictures in the set; a partner to mix with is any other one.

    Returns:
        The view: the same for the same arguments, always and everywhere.
    """
    bits = _bits(6 + 2 * _DRAWS_FOR_CROP, seed, epoch, index)
    u = [float(b) for b in (bits >> np.uint64(11)) * 2.0**-53]  # uniform in [0, 1)
    colours = [
        1 + strength * (2 * draw - 1)
        for strength, draw in zip((options.brightness, options.contrast, options.saturation), u[:3], strict=True)
    ]
    first, second = u[6 : 6 + _DRAWS_FOR_CROP], u[6 + _DRAWS_FOR_CROP :]
    crops = (_crop(options, index, first),)
    if count < 2 or u[3] >= options.mixup:
        return View(crops, 1.0, *colours)
    partner = (index + 1 + int(u[4] * (count - 1))) % count
    return View((*crops, _crop(options, partner, second)), u[5], *colours)


def make_mosaic(images: Tensor, k: int) -> Tensor:
    """Join k x k pictures into one, for teachers that see high resolutions only (RADIOv2.5).

    Args:
        images: [B, C, h, w]; B is a multiple of k².
        k: Side of the mosaic, in pictures.

    Returns:
        [B/k², C, k*h, k*w]: each k² consecutive pictures, row by row.

    Raises:
        OptionError: The batch cannot be arranged.
    """
    b, c, h, w = images.shape
    if k < 1 or b % (k * k):
        raise OptionError(f"A mosaic of {k} x {k} takes a multiple of {k * k} pictures, got {b}.")
    x = images.reshape(b // k**2, k, k, c, h, w).permute(0, 3, 1, 4, 2, 5)  # [B/k², C, k, h, k, w]
    return x.reshape(b // k**2, c, k * h, k * w)


def cut_mosaic(features: Tensor, k: int) -> Tensor:
    """Cut what a teacher said of mosaics into what it said of the pictures: the inverse of `make_mosaic`.

    Args:
        features: [M, D, k*h, k*w].
        k: Side of the mosaic, in pictures.

    Returns:
        [M*k², D, h, w].

    Raises:
        OptionError: The seams between pictures are not between positions.
    """
    m, d, height, width = features.shape
    if k < 1 or height % k or width % k:
        raise OptionError(f"A map of {height} x {width} positions cannot be cut into {k} x {k} pictures.")
    h, w = height // k, width // k
    x = features.reshape(m, d, k, h, k, w).permute(0, 2, 4, 1, 3, 5)  # [M, k, k, D, h, w]
    return x.reshape(m * k**2, d, h, w)


def _bits(count: int, *key: int) -> NDArray[np.uint64]:
    """Raw random bits for a key of numbers that are not negative."""
    drawn: Any = np.random.PCG64(np.random.SeedSequence(key)).random_raw(count)
    return drawn.astype(np.uint64, copy=False)  # type: ignore[no-any-return]


def _crop(options: CropOptions, index: int, u: Sequence[float]) -> Crop:
    low, high = math.log(options.ratio[0]), math.log(options.ratio[1])
    return Crop(
        index=index,
        area=options.scale[0] + (options.scale[1] - options.scale[0]) * u[0],
        ratio=math.exp(low + (high - low) * u[1]),
        x=u[2],
        y=u[3],
        flip=u[4] < options.flip,
    )


def _cut(picture: Image, crop: Crop, size: tuple[int, int], shift: tuple[int, int]) -> NDArray[np.uint8]:
    """Resample a region of a picture: uint8 [h, w, 3]."""
    from PIL.Image import Resampling

    left, top, right, bottom = crop.box(picture.width, picture.height)
    rows, columns = shift[0], -shift[1] if crop.flip else shift[1]
    down, aside = rows * (bottom - top) / size[0], columns * (right - left) / size[1]
    source, (x, y) = _padded(picture, (left + aside, top + down, right + aside, bottom + down))
    box = (
        max(left + aside + x, 0.0),
        max(top + down + y, 0.0),
        min(right + aside + x, float(source.width)),
        min(bottom + down + y, float(source.height)),
    )
    pixels = np.asarray(source.resize((size[1], size[0]), Resampling.BICUBIC, box=box))
    return pixels[:, ::-1] if crop.flip else pixels


def _padded(picture: Image, box: tuple[float, float, float, float]) -> tuple[Image, tuple[int, int]]:
    """Continue a picture beyond its edges until a box fits.

    Returns:
        The picture, and by how much (x, y) its old corner has moved.
    """
    slack = 1e-6  # of rounding, in pixels
    left, top = (max(math.ceil(-v - slack), 0) for v in box[:2])
    right = max(math.ceil(box[2] - picture.width - slack), 0)
    bottom = max(math.ceil(box[3] - picture.height - slack), 0)
    if not (left or top or right or bottom):
        return picture, (0, 0)
    from PIL import Image

    pixels = np.pad(np.asarray(picture), ((top, bottom), (left, right), (0, 0)), mode="edge")
    return Image.fromarray(pixels), (left, top)
