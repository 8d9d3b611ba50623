"""Random scales, crops, flips and colours for pictures with masks, as mmsegmentation draws them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from amradio.evals.linear_seg.config import Augmentation
from amradio.images.segmentation import VOID

if TYPE_CHECKING:
    from PIL.Image import Image

_TRIES = 10
_BRIGHTNESS = 32.0
_FACTOR = (0.5, 1.5)
_HUE = 18  # of 180


def augmented(
    picture: Image,
    mask: np.ndarray,
    side: int,
    options: Augmentation,
    fill: tuple[int, int, int],
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a training sample.

    Args:
        picture: In RGB.
        mask: uint8 [H, W], of the same size.
        side: Of the square that comes out, in pixels.
        options: How far pictures are varied.
        fill: RGB colour of what lies beyond the picture; its mask is void.
        rng: Where the random numbers come from.

    Returns:
        uint8 [side, side, 3] and uint8 [side, side].
    """
    from PIL import Image
    from PIL.Image import Resampling

    factor = rng.uniform(*options.scale)
    height, width = scaled(mask.shape, side * factor, options.longest)
    pixels = np.asarray(picture.resize((width, height), Resampling.BILINEAR))  # [h, w, 3]
    labels = np.asarray(Image.fromarray(mask).resize((width, height), Resampling.NEAREST))  # [h, w]
    pixels, labels = _crop(pixels, labels, side, options.max_class_share, rng)
    if rng.random() < 0.5:
        pixels, labels = pixels[:, ::-1], labels[:, ::-1]
    if options.colours:
        pixels = recoloured(pixels, rng)
    canvas = np.empty((side, side, 3), dtype=np.uint8)
    canvas[:] = fill
    truth = np.full((side, side), VOID, dtype=np.uint8)
    canvas[: pixels.shape[0], : pixels.shape[1]] = pixels
    truth[: labels.shape[0], : labels.shape[1]] = labels
    return canvas, truth


def scaled(size: tuple[int, ...], shortest: float, longest: float | None) -> tuple[int, int]:
    """Scale a size (height, width), keeping its aspect.

    Args:
        size: In pixels.
        shortest: What the shortest side becomes.
        longest: The longest side becomes at most so many times `shortest`; None: no limit.

    Returns:
        (height, width), at least one pixel each.
    """
    factor = shortest / min(size)
    if longest is not None:
        factor = min(factor, longest * shortest / max(size))
    return max(int(size[0] * factor + 0.5), 1), max(int(size[1] * factor + 0.5), 1)


def recoloured(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Vary brightness, contrast, saturation and hue, each with probability one half; contrast first or last.

    Args:
        pixels: uint8 [H, W, 3].
        rng: Where the random numbers come from.

    Returns:
        uint8 [H, W, 3].
    """
    x = pixels.astype(np.float32)
    if rng.random() < 0.5:
        x = _clipped(x + rng.uniform(-_BRIGHTNESS, _BRIGHTNESS))
    contrast = rng.uniform(*_FACTOR) if rng.random() < 0.5 else None
    first = rng.random() < 0.5
    if contrast is not None and first:
        x = _clipped(x * contrast)
    saturation = rng.uniform(*_FACTOR) if rng.random() < 0.5 else 1.0
    hue = int(rng.integers(-_HUE, _HUE)) if rng.random() < 0.5 else 0
    if saturation != 1.0 or hue:
        x = _hsv(x, saturation, hue)
    if contrast is not None and not first:
        x = _clipped(x * contrast)
    return x.astype(np.uint8)


def _crop(
    pixels: np.ndarray, labels: np.ndarray, side: int, max_share: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A part of at most `side` x `side` pixels in which no class is all there is, if one is found."""
    height, width = labels.shape
    for _ in range(_TRIES):
        top = int(rng.integers(0, max(height - side, 0) + 1))
        left = int(rng.integers(0, max(width - side, 0) + 1))
        part = labels[top : top + side, left : left + side]
        counts = np.bincount(part[part != VOID], minlength=1)
        if (counts > 0).sum() > 1 and counts.max() < max_share * counts.sum():
            break
    return pixels[top : top + side, left : left + side], part


def _hsv(x: np.ndarray, saturation: float, hue: int) -> np.ndarray:
    from PIL import Image

    h, s, v = Image.fromarray(x.astype(np.uint8)).convert("HSV").split()
    hues = (np.asarray(h, dtype=np.int16) + round(hue / 180 * 256)) % 256
    saturations = _clipped(np.asarray(s, dtype=np.float32) * saturation)
    bands = [Image.fromarray(band.astype(np.uint8)) for band in (hues, saturations)]
    merged = Image.merge("HSV", [*bands, v]).convert("RGB")
    return np.asarray(merged).astype(np.float32)


def _clipped(x: np.ndarray) -> np.ndarray:
    clipped: np.ndarray = np.clip(x, 0, 255)
    return clipped
