"""Feature maps cut into segments: by k-means over all photos together, or spectrally, photo by photo."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from amradio.errors import OptionError
from amradio.viz.colours import distinct_colours
from amradio.viz.pca import feature_rows
from amradio.viz.upsample import Upsampling, upsample

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_SPECTRAL = 4096
"""Most positions of one map for spectral segments, whose time grows with their third power."""

_ITERATIONS = 100


def kmeans_segments(maps: Sequence[Tensor], count: int) -> list[Tensor]:
    """Cluster the features of one or several maps, so that a segment means the same in all of them.

    k-means on features of length 1, in float64, without anything random: the first centre is the feature furthest from
    the mean, each further one the feature furthest from all centres so far.

    Args:
        maps: [h, w, C] each, of one width C.
        count: Segments.

    Returns:
        int64 [h, w] each. Segments are numbered by their size, the largest is 0.

    Raises:
        OptionError: There are fewer positions than segments, or the maps do not fit together.
    """
    rows = F.normalize(feature_rows(maps), dim=-1)  # [N, C]
    _check(count, len(rows))
    labels = _by_size(_kmeans(rows, count), count)
    parts = labels.split([m.shape[0] * m.shape[1] for m in maps])
    return [part.view(m.shape[:2]) for part, m in zip(parts, maps, strict=True)]


def spectral_segments(features: Tensor, count: int) -> Tensor:
    """Cut one map where its parts have little in common (normalised cuts, Shi and Malik 2000).

    Positions are joined by the square of their cosine, where that is positive; k-means then runs on the leading
    eigenvectors of the normalised affinity (Ng, Jordan and Weiss 2001).

    Args:
        features: [h, w, C].
        count: Segments.

    Returns:
        int64 [h, w]. Segments are numbered by their size, the largest is 0.

    Raises:
        OptionError: There are fewer positions than segments, or more than `MAX_SPECTRAL`.
    """
    rows = F.normalize(feature_rows(features), dim=-1)  # [N, C]
    _check(count, len(rows))
    if len(rows) > MAX_SPECTRAL:
        raise OptionError(
            f"Spectral segments of a map of {features.shape[0]} x {features.shape[1]} would take very long; the most "
            f"is {MAX_SPECTRAL} positions. Use a smaller resolution, or k-means."
        )
    affinity = (rows @ rows.T).clamp(min=0).square()  # [N, N]
    scale = affinity.sum(1).clamp(min=torch.finfo(affinity.dtype).tiny).rsqrt()
    vectors = torch.linalg.eigh(scale[:, None] * affinity * scale).eigenvectors[:, -count:]  # [N, count]
    return _by_size(_kmeans(F.normalize(vectors, dim=-1), count), count).view(features.shape[:2])


def segment_picture(
    labels: Tensor, size: tuple[int, int], count: int, *, method: Upsampling = "nearest", guide: Image | None = None
) -> Image:
    """Colour segments at the size of their photo.

    Args:
        labels: int64 [h, w].
        size: (height, width) in pixels.
        count: Segments in all, of this and other photos.
        method: Each pixel gets the segment with the largest share of it, under this upsampling.
        guide: See `amradio.viz.upsample.upsample`.

    Returns:
        A picture in RGB.
    """
    from PIL import Image

    shares = upsample(F.one_hot(labels, count).float(), size, method, guide)  # [H, W, count]
    colours = torch.tensor(distinct_colours(count), dtype=torch.uint8)
    return Image.fromarray(colours[shares.argmax(-1)].numpy())


def _check(count: int, positions: int) -> None:
    if not 2 <= count <= positions:
        raise OptionError(
            f"The number of segments must be from 2 to the number of positions, {positions}, got {count}."
        )


def _kmeans(rows: Tensor, count: int) -> Tensor:
    """int64 [N] clusters of float64 [N, C]."""
    first = (rows - rows.mean(0)).square().sum(1).argmax()
    distances = (rows - rows[first]).square().sum(1)  # [N], to the nearest centre
    chosen = [first]
    for _ in range(count - 1):
        chosen.append(distances.argmax())
        distances = torch.minimum(distances, (rows - rows[chosen[-1]]).square().sum(1))
    centres = rows[torch.stack(chosen)]  # [count, C]
    labels = torch.full((len(rows),), -1)
    for _ in range(_ITERATIONS):
        # The squared distance but for what is the same for all centres.
        found = (centres.square().sum(1) - 2 * rows @ centres.T).argmin(1)  # [N]
        if torch.equal(found, labels):
            break
        labels = found
        member = F.one_hot(labels, count).to(rows)  # [N, count]
        sizes = member.sum(0)
        centres = torch.where(sizes[:, None] > 0, member.T @ rows / sizes.clamp(min=1)[:, None], centres)
    return labels


def _by_size(labels: Tensor, count: int) -> Tensor:
    """Renumber clusters, the largest first; of equal ones, in the order of their first positions."""
    positions = torch.arange(len(labels))
    sizes = torch.bincount(labels, minlength=count).tolist()
    firsts = [int(positions[labels == i].min()) if sizes[i] else len(labels) for i in range(count)]
    order = sorted(range(count), key=lambda i: (-sizes[i], firsts[i]))
    number = torch.empty(count, dtype=torch.int64)
    number[torch.tensor(order)] = torch.arange(count)
    return number[labels]
