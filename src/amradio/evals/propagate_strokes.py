"""A few strokes, or a mask, on one photo, carried to other photos: in-context segmentation for a person with a brush.

Patches that were painted are the memory; each patch of another photo is looked up among them, and their labels are
mixed as in `amradio.evals.in_context` (Balazevic et al. 2023, equations 1 to 3). Nothing is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from amradio.errors import OptionError
from amradio.evals.in_context.memory import patch_counts
from amradio.evals.in_context.propagate import attention, label_map, mix_labels
from amradio.images.segmentation.masks import VOID
from amradio.search import top_k

NEIGHBOURS = 30
TEMPERATURE = 0.02
BACKGROUND = 0


@dataclass(frozen=True)
class Stroke:
    """A line that was painted.

    Attributes:
        label: Class, from 0; `VOID` wipes out.
        radius: Half of its width, as a share of the photo's longest side.
        points: (x, y) of its corners, as shares of width and height.
    """

    label: int
    radius: float
    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        numbers = [self.radius, *(v for point in self.points for v in point)]
        if not self.points or not 0 <= self.label <= VOID or not all(0 <= v <= 1 for v in numbers):
            raise OptionError(
                "A stroke has a label from 0 to 255, and points and a radius from 0 to 1, got "
                f"label {self.label}, radius {self.radius:g} and {len(self.points)} points."
            )


class PatchMemory(NamedTuple):
    """Patches whose classes are known.

    Attributes:
        features: float32 [M, D] of length 1.
        counts: integers [M, C]: pixels of each class.
    """

    features: Tensor
    counts: Tensor


class Carried(NamedTuple):
    """What the memory says about a photo.

    Attributes:
        shares: float32 [h, w, C]: of each class.
        similarity: float32 [h, w]: the cosine with the nearest patch of the memory that is not background.
    """

    shares: Tensor
    similarity: Tensor


def paint(strokes: Sequence[Stroke], size: tuple[int, int]) -> np.ndarray:
    """Draw strokes, later ones over earlier ones.

    Args:
        strokes: Any number.
        size: (height, width) in pixels.

    Returns:
        uint8 [height, width]: classes, and `VOID` where nothing was painted.
    """
    from PIL import Image, ImageDraw

    height, width = size
    mask = Image.new("L", (width, height), VOID)
    draw = ImageDraw.Draw(mask)
    for stroke in strokes:
        radius = max(stroke.radius * max(size), 0.5)
        corners = [(x * width - 0.5, y * height - 0.5) for x, y in stroke.points]
        if len(corners) > 1:
            draw.line(corners, stroke.label, max(round(2 * radius), 1), joint="curve")
        for x, y in (corners[0], corners[-1]):
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), stroke.label)
    return np.array(mask)


def remember(examples: Sequence[tuple[Tensor, np.ndarray]], num_classes: int) -> PatchMemory:
    """Make a memory of the patches that have any label.

    Args:
        examples: For each labelled photo its features [h, w, D], and a mask uint8 [h * p, w * p] with classes and
            `VOID`, for any p.
        num_classes: C.

    Returns:
        The memory.

    Raises:
        OptionError: Nothing is labelled, a label is no class, or a mask does not fit its features.
    """
    rows, counts = [], []
    for features, mask in examples:
        (h, w, width), (height, across) = features.shape, mask.shape
        if height * w != across * h or height % h:
            raise OptionError(
                f"A mask of {height} x {across} (height x width) does not fit {h} x {w} patches: each patch must be "
                "the same whole number of pixels high and wide."
            )
        if ((mask >= num_classes) & (mask != VOID)).any():
            raise OptionError(
                f"The mask has the class {int(mask[mask != VOID].max())}; classes are below {num_classes}."
            )
        found = patch_counts(torch.from_numpy(mask)[None], height // h, num_classes)[0]  # [h * w, C]
        known = found.sum(1) > 0
        rows.append(F.normalize(features.float().reshape(-1, width)[known], dim=1))
        counts.append(found[known])
    if not sum(map(len, rows)):
        raise OptionError("Nothing is labelled yet: paint at least one stroke, or give a mask.")
    return PatchMemory(torch.cat(rows), torch.cat(counts))


def carry(memory: PatchMemory, features: Tensor, *, k: int = NEIGHBOURS, temperature: float = TEMPERATURE) -> Carried:
    """Look the patches of a photo up.

    Args:
        memory: See `remember`.
        features: [h, w, D] of the photo.
        k: Neighbours that vote; fewer if the memory is smaller.
        temperature: Of the softmax over their cosines.

    Returns:
        What the memory says.

    Raises:
        OptionError: Widths differ, or features are not finite.
    """
    grid = (features.shape[0], features.shape[1])
    queries = F.normalize(features.float().flatten(0, 1), dim=1)  # [h * w, D]
    found = top_k(queries, memory.features, min(k, len(memory.features)))
    weights = attention(found.scores, None, temperature)
    shares = mix_labels(weights, found.indices, memory.counts)  # [h * w, C]
    things = memory.features[memory.counts.argmax(1) != BACKGROUND]
    nearest = top_k(queries, things, 1).scores[:, 0] if len(things) else torch.full((len(queries),), -1.0)
    return Carried(shares.unflatten(0, grid), nearest.unflatten(0, grid))


def settle(carried: Carried, size: tuple[int, int], background_below: float | None = None) -> Tensor:
    """Decide for one class at each pixel.

    Args:
        carried: What the memory says.
        size: (height, width) of the result.
        background_below: Patches that are less similar to all things are background, which helps in photos with things
            unlike any that was painted; None: no patch is treated so.

    Returns:
        uint8 [height, width].
    """
    shares = carried.shares
    if background_below is not None:
        unknown = F.one_hot(torch.tensor(BACKGROUND), shares.shape[-1]).to(shares)
        shares = torch.where((carried.similarity < background_below)[..., None], unknown, shares)
    return label_map(shares, size)
