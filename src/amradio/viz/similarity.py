"""How similar features are: of one patch to all others, of two photos' patches to each other, of patches to text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from amradio.errors import OptionError
from amradio.search import top_k
from amradio.viz.colours import distinct_colours

if TYPE_CHECKING:
    from PIL.Image import Image

_SMOOTH = 3  # lines are drawn this much larger, then reduced


class Match(NamedTuple):
    """Two patches that look like the same thing.

    Attributes:
        a: (row, column) in the first grid.
        b: (row, column) in the second grid.
        similarity: Their cosine.
    """

    a: tuple[int, int]
    b: tuple[int, int]
    similarity: float


def similarity_map(features: Tensor, query: Tensor, reduce: Literal["max", "mean"] = "max") -> Tensor:
    """The cosine similarity of each position with a query.

    Args:
        features: [h, w, D].
        query: [D], or several [n, D]: other features, or embeddings of text in the same space.
        reduce: With several queries: the similarity with the nearest one, or the mean over all.

    Returns:
        float32 [h, w] in [-1, 1]; 0 where features or queries are zero.

    Raises:
        OptionError: Widths differ, there is no query, or values are not finite.
    """
    queries = query if query.ndim == 2 else query[None]  # [n, D]
    if queries.ndim != 2 or len(queries) == 0 or queries.shape[1] != features.shape[-1]:
        raise OptionError(
            f"Features of width {features.shape[-1]} cannot be compared with a query of shape {list(query.shape)}; "
            "both must come from the same space."
        )
    cosines = F.normalize(features.float(), dim=-1) @ F.normalize(queries.to(features.device).float(), dim=-1).T
    if not cosines.isfinite().all():
        raise OptionError("Features or queries are not finite; a model in float16 may have overflowed.")
    found: Tensor = cosines.amax(-1) if reduce == "max" else cosines.mean(-1)  # [h, w]
    return found


def shares(similarities: Tensor, temperature: float = 0.03) -> Tensor:
    """Share several similarities among each other, so that what all have in common drops out.

    Args:
        similarities: [..., n].
        temperature: The lower, the more the best one takes all.

    Returns:
        The softmax over n.

    Raises:
        OptionError: The temperature is not positive.
    """
    if temperature <= 0:
        raise OptionError(f"The temperature must be above 0, got {temperature:g}.")
    return (similarities / temperature).softmax(-1)


def patch_of(xy: tuple[float, float], photo_size: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    """The position of the feature map under a pixel.

    Args:
        xy: Pixel, from the left and from the top.
        photo_size: (height, width) of the photo that is meant, at any scale.
        grid: (h, w) of its feature map.

    Returns:
        (row, column).

    Raises:
        OptionError: The pixel is not on the photo.
    """
    (x, y), (height, width), (h, w) = xy, photo_size, grid
    if not (0 <= x < width and 0 <= y < height):
        raise OptionError(
            f"The point ({x:g}, {y:g}) is not on the photo, which is {width} pixels wide and {height} high."
        )
    return int(y * h / height), int(x * w / width)


def centre_of(patch: tuple[int, int], grid: tuple[int, int], photo_size: tuple[int, int]) -> tuple[float, float]:
    """The middle (x, y) of a patch in pixels of a photo of (height, width)."""
    return (patch[1] + 0.5) * photo_size[1] / grid[1], (patch[0] + 0.5) * photo_size[0] / grid[0]


def correspondences(a: Tensor, b: Tensor, count: int, mutual: bool = True, spacing: float = 0.0) -> list[Match]:
    """Find patches of two photos that belong together.

    Each patch of the first photo is matched with its most similar patch of the second one (cosine; of equal ones, the
    first), and the best matches are taken.

    Args:
        a: [h, w, D] features of the first photo.
        b: [h', w', D] features of the second one.
        count: How many matches at most.
        mutual: Only those whose patches are each other's most similar one.
        spacing: A match whose patch in the first photo is within this distance, in patches, of one taken already is
            left out, so that the matches spread.

    Returns:
        Matches, the most similar first; of equal ones, in the order of the first photo's patches.

    Raises:
        OptionError: Widths differ, `count` is below 1, or features are not finite.
    """
    if a.shape[-1] != b.shape[-1]:
        raise OptionError(f"Features of width {a.shape[-1]} and {b.shape[-1]} cannot be matched; use one model.")
    if count < 1:
        raise OptionError(f"count must be at least 1, got {count}.")
    rows_a, rows_b = (F.normalize(m.float().flatten(0, 1), dim=-1) for m in (a, b))
    scores, nearest = (found[:, 0] for found in top_k(rows_a, rows_b, 1))  # [h * w]
    candidates = torch.arange(len(rows_a))
    if mutual:
        back = top_k(rows_b, rows_a, 1).indices[:, 0]  # [h' * w']
        candidates = candidates[back[nearest] == candidates]
    order = candidates[scores[candidates].sort(descending=True, stable=True).indices]
    taken: list[Match] = []
    for i in order.tolist():
        place = divmod(i, a.shape[1])
        if all((place[0] - m.a[0]) ** 2 + (place[1] - m.a[1]) ** 2 > spacing**2 for m in taken):
            taken.append(Match(place, divmod(int(nearest[i]), b.shape[1]), float(scores[i])))
        if len(taken) == count:
            break
    return taken


def draw_correspondences(
    a: Image, b: Image, matches: Sequence[Match], grids: tuple[tuple[int, int], tuple[int, int]], gap: int = 12
) -> Image:
    """Draw two photos side by side, and a line for each match.

    Args:
        a: The first photo, in RGB.
        b: The second one.
        matches: See `correspondences`.
        grids: (h, w) of both feature maps.
        gap: Pixels between the photos.

    Returns:
        A picture in RGB.
    """
    from PIL import ImageDraw
    from PIL.Image import Resampling

    from amradio.viz.pca import side_by_side

    page = side_by_side([a, b], gap)
    large = page.resize((page.width * _SMOOTH, page.height * _SMOOTH), Resampling.BICUBIC)
    draw = ImageDraw.Draw(large)
    radius = max(min(a.height, b.height) / 80, 2.5) * _SMOOTH
    for match, colour in zip(matches, distinct_colours(len(matches)), strict=True):
        x, y = centre_of(match.a, grids[0], (a.height, a.width))
        u, v = centre_of(match.b, grids[1], (b.height, b.width))
        ends = [(x * _SMOOTH, y * _SMOOTH), ((a.width + gap + u) * _SMOOTH, v * _SMOOTH)]
        draw.line(ends, colour, round(radius / 2))
        for end in ends:
            draw.circle(end, radius, colour, (255, 255, 255), round(radius / 4))
    return large.resize(page.size, Resampling.BOX)


def mark(photo: Image, points: Sequence[tuple[float, float]]) -> Image:
    """Ring points of a photo, so that they are seen on any colour.

    Args:
        photo: In RGB.
        points: (x, y) in pixels.

    Returns:
        A picture in RGB.
    """
    from PIL import ImageDraw
    from PIL.Image import Resampling

    large = photo.resize((photo.width * _SMOOTH, photo.height * _SMOOTH), Resampling.BICUBIC)
    draw = ImageDraw.Draw(large)
    radius = max(min(photo.size) / 32, 4) * _SMOOTH
    for x, y in points:
        centre = (x * _SMOOTH, y * _SMOOTH)
        draw.circle(centre, radius * 1.15, None, (0, 0, 0), round(radius / 1.6))
        draw.circle(centre, radius, None, (255, 255, 255), round(radius / 3))
    return large.resize(photo.size, Resampling.BOX)
