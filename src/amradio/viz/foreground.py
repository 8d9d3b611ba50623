"""Objects and what is around them, by the first principal component of their features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from amradio.errors import OptionError
from amradio.viz.pca import feature_rows, principal_directions


def foreground_masks(maps: Sequence[Tensor]) -> list[Tensor]:
    """Split feature maps into foreground and background.

    The first principal component of all maps together is cut where its two parts are furthest apart (Otsu's threshold,
    exact). The foreground is the part that is rarer at the borders of the maps than inside them; photographers put
    what they mean into the middle. It is a guess: on a photo of a texture it means nothing.

    Args:
        maps: [h, w, C] each, of one width C.

    Returns:
        bool [h, w] each: True on the foreground. Maps without any variation are foreground throughout.

    Raises:
        OptionError: There is no map, or they do not fit together.
    """
    if any(m.ndim != 3 for m in maps):
        raise OptionError(f"Foreground is found in maps [h, w, C], got shapes {[list(m.shape) for m in maps]}.")
    rows = feature_rows(maps)
    direction = principal_directions(rows, 1)  # [C, 1], or nothing
    if direction.shape[1] == 0 or not direction.any():
        return [torch.ones(m.shape[:2], dtype=torch.bool) for m in maps]
    values = [(m.double() @ direction)[..., 0] for m in maps]  # [h, w]
    cut = otsu(torch.cat([v.flatten() for v in values]))
    above = [v > cut for v in values]
    border = torch.cat([a[_border(a)] for a in above]).double().mean()
    overall = torch.cat([a.flatten() for a in above]).double().mean()
    return above if border <= overall else [~a for a in above]


def otsu(values: Tensor) -> float:
    """The threshold that parts values into two groups with the largest variance between them.

    Args:
        values: [N], at least one.

    Returns:
        The middle between the highest value of the lower group and the lowest of the upper one; the lowest of several
        equally good ones. The value itself if all are equal.
    """
    ordered = values.double().sort().values
    n = len(ordered)
    lower = torch.arange(1, n, dtype=torch.float64)  # size of the lower group
    sums = ordered.cumsum(0)
    means = sums[:-1] / lower, (sums[-1] - sums[:-1]) / (n - lower)
    between = (lower * (n - lower) * (means[1] - means[0]) ** 2).where(ordered[1:] > ordered[:-1], -1.0)
    if n < 2 or between.max() < 0:
        return float(ordered[0])
    at = int(between.argmax())
    return float((ordered[at] + ordered[at + 1]) / 2)


def _border(mask: Tensor) -> Tensor:
    """True on the outermost cells."""
    border = torch.ones_like(mask)
    border[1:-1, 1:-1] = False
    return border
