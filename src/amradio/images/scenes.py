"""Made-up pictures with labels: shapes on textures, drawn from a seed. For demonstrations that must work offline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

SHAPES = ("disc", "square", "triangle", "cross")
CLASSES = ("background", *SHAPES)
"""Classes of the masks; those of whole pictures are `SHAPES`."""

_SIDE = 224


def scene(shape: int, seed: int, side: int = _SIDE) -> tuple[Image, np.ndarray]:
    """Draw a picture with some shapes of one kind, whose colours and textures say nothing about the kind.

    Args:
        shape: Index into `SHAPES`.
        seed: Of everything random.
        side: In pixels.

    Returns:
        The picture in RGB, and a mask uint8 [side, side]: 0 for the background, 1 + shape on the shapes.
    """
    from PIL import Image

    random = np.random.Generator(np.random.PCG64([seed, shape]))
    pixels = _texture(random, side)
    mask = np.zeros((side, side), np.uint8)
    y, x = np.mgrid[:side, :side].astype(np.float32)
    for _ in range(int(random.integers(1, 4))):
        radius = random.uniform(0.12, 0.24) * side
        centre = random.uniform(radius, side - radius, 2)
        angle = random.uniform(0, 2 * np.pi)
        u = (np.cos(angle) * (x - centre[1]) + np.sin(angle) * (y - centre[0])) / radius
        v = (-np.sin(angle) * (x - centre[1]) + np.cos(angle) * (y - centre[0])) / radius
        inside = _inside(SHAPES[shape], u, v)
        pixels[inside] = _texture(random, side)[inside]
        mask[inside] = 1 + shape
    noise = random.normal(0, 4, pixels.shape)
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8)), mask


def write_scenes(folder: Path, counts: dict[str, int], seed: int = 0) -> Path:
    """Write pictures of all kinds, as a set of labelled pictures and as one of pictures with masks.

    Args:
        folder: Gets ``kinds/PART/KIND/*.png``, and ``PART/images``, ``PART/masks`` and ``PART/classes.txt``.
        counts: Pictures of each kind, by the name of the part.
        seed: Of everything random.

    Returns:
        The folder.
    """
    from PIL import Image

    number = 0
    for part, count in counts.items():
        for name in ("images", "masks"):
            (folder / part / name).mkdir(parents=True, exist_ok=True)
        (folder / part / "classes.txt").write_text("\n".join(CLASSES) + "\n", encoding="utf-8")
        for kind, shape in enumerate(SHAPES):
            own = folder / "kinds" / part / shape
            own.mkdir(parents=True, exist_ok=True)
            for _ in range(count):
                picture, mask = scene(kind, seed + number)
                name = f"{shape}-{number:04d}.png"
                number += 1
                for path in (own / name, folder / part / "images" / name):
                    picture.save(path)
                Image.fromarray(mask).save(folder / part / "masks" / name)
    return folder


def _inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Where a shape of radius 1 is, in its own coordinates."""
    if shape == "disc":
        return u**2 + v**2 < 1  # type: ignore[no-any-return]
    if shape == "square":
        return np.maximum(abs(u), abs(v)) < 0.8  # type: ignore[no-any-return]
    if shape == "triangle":
        return (v > -0.6) & (abs(u) < (1 - v) * 0.62)
    return (np.minimum(abs(u), abs(v)) < 0.27) & (np.maximum(abs(u), abs(v)) < 1)  # type: ignore[no-any-return]


def _texture(random: np.random.Generator, side: int) -> np.ndarray:
    """float32 [side, side, 3]: two colours mixed by stripes, dots, or clouds."""
    first, second = random.uniform(0, 255, (2, 3))
    y, x = np.mgrid[:side, :side].astype(np.float32) / side
    kind = random.integers(3)
    if kind == 0:
        angle, frequency = random.uniform(0, np.pi), random.uniform(15, 60)
        share = 0.5 + 0.5 * np.sin(frequency * (np.cos(angle) * x + np.sin(angle) * y))
    elif kind == 1:
        frequency = random.uniform(20, 60)
        share = (np.sin(frequency * x) * np.sin(frequency * y) > 0.3).astype(np.float32)
    else:
        share = sum(
            random.uniform(0.1, 0.4)
            * np.sin(random.uniform(2, 9) * x + random.uniform(2, 9) * y + random.uniform(0, 6))
            for _ in range(4)
        )
        share = np.clip(0.5 + share, 0, 1)
    return (first * share[..., None] + second * (1 - share[..., None])).astype(np.float32)  # type: ignore[no-any-return]
