"""Least squares from patch features to class shares, in one pass over the pictures.

The sums that the normal equations need are added up as pictures come, apart for one picture in ten, whose error
chooses the strength of the regularisation: it follows from the sums too, so no picture is read twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from amradio.evals.linear_seg.head import LinearMap

if TYPE_CHECKING:
    from amradio.distributed import Group

HOLDOUT = 10
"""One picture in so many chooses the regularisation; of fewer pictures the last one."""
USUAL = 1e-2
"""The strength where no picture could be held out."""


class RidgeFit(NamedTuple):
    """What came out.

    Attributes:
        head: The solution.
        strength: The regularisation that was chosen.
        errors: Mean squared error on the held-out pictures for each strength; empty if there was nothing to choose.
    """

    head: LinearMap
    strength: float
    errors: tuple[float, ...]


class RidgeSums:
    """Sums over patches, each weighted by its pixels that have a class.

    Args:
        dim: D.
        classes: C.
        device: Where they are added up.

    Attributes:
        xx: float64 [D + 1, D + 1], the last row and column belong to a constant 1.
        xy: float64 [D + 1, C].
        yy: float64 [C].
    """

    def __init__(self, dim: int, classes: int, device: torch.device | str = "cpu") -> None:
        self.xx = torch.zeros(dim + 1, dim + 1, dtype=torch.float64, device=device)
        self.xy = torch.zeros(dim + 1, classes, dtype=torch.float64, device=device)
        self.yy = torch.zeros(classes, dtype=torch.float64, device=device)

    def add(self, features: Tensor, counts: Tensor) -> None:
        """Add patches.

        Args:
            features: [P, D].
            counts: [P, C]: pixels of each class in each patch; a patch without any does not count.
        """
        weight = counts.sum(1, dtype=torch.float64)[:, None]  # [P, 1]
        shares = counts.double() / weight.clamp(min=1)  # [P, C]
        x = torch.cat([features.double(), torch.ones_like(weight)], dim=1)  # [P, D + 1]
        weighted = x * weight
        self.xx += weighted.T @ x
        self.xy += weighted.T @ shares
        self.yy += (shares.square() * weight).sum(0)

    def reduce(self, group: Group | None) -> None:
        """Add what other processes have."""
        if group is not None:
            self.xx, self.xy, self.yy = (group.all_reduce_sum(s) for s in (self.xx, self.xy, self.yy))

    def plus(self, other: RidgeSums) -> RidgeSums:
        """The sums over both sets of patches."""
        both = RidgeSums(len(self.xx) - 1, self.xy.shape[1], self.xx.device)
        both.xx, both.xy, both.yy = self.xx + other.xx, self.xy + other.xy, self.yy + other.yy
        return both

    @property
    def weight(self) -> float:
        """Pixels that have a class."""
        return float(self.xx[-1, -1])

    def solve(self, strength: float) -> Tensor:
        """The solution float64 [D + 1, C] for features of mean 0 and variance 1, the constant not regularised."""
        n = self.xx[-1, -1]
        mean = self.xx[-1, :-1] / n  # [D]
        covariance = self.xx[:-1, :-1] / n - torch.outer(mean, mean)  # [D, D]
        deviation = covariance.diagonal().clamp(min=1e-12).sqrt()  # [D]
        target = self.xy[-1] / n  # [C]
        cross = self.xy[:-1] / n - torch.outer(mean, target)  # [D, C]
        standard = covariance / torch.outer(deviation, deviation)
        standard.diagonal().add_(strength)
        solved = torch.linalg.solve(standard, cross / deviation[:, None]) / deviation[:, None]  # [D, C]
        return torch.cat([solved, (target - mean @ solved)[None]])  # [D + 1, C]

    def error(self, solution: Tensor) -> float:
        """Mean squared error of a solution [D + 1, C] on these patches, all classes added up."""
        inner = (solution * (self.xx @ solution)).sum() - 2 * (solution * self.xy).sum() + self.yy.sum()
        return float(inner / self.xx[-1, -1])


def fit_ridge(fit: RidgeSums, held_out: RidgeSums, strengths: Sequence[float]) -> RidgeFit:
    """Choose the regularisation on held-out patches, and solve for all.

    Args:
        fit: Most patches.
        held_out: The others; may be empty.
        strengths: To choose from; without held-out patches, the one nearest to `USUAL` is taken.
    """
    errors: tuple[float, ...] = ()
    strength = min(strengths, key=lambda s: abs(math.log(s / USUAL)))
    if len(strengths) > 1 and held_out.weight > 0 and fit.weight > 0:
        errors = tuple(held_out.error(fit.solve(s)) for s in strengths)
        strength = strengths[min(range(len(errors)), key=errors.__getitem__)]
    solution = fit.plus(held_out).solve(strength)  # [D + 1, C]
    return RidgeFit(LinearMap(solution[:-1].T.float().contiguous(), solution[-1].float()), strength, errors)
