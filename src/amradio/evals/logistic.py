"""Multinomial logistic regression by L-BFGS: exact, by blocks of rows, over one process or many.

The objective is scikit-learn's (``LogisticRegression``, L2 penalty, bias not penalised).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from amradio.distributed import Group

_ROWS_AT_ONCE = 2**14
_LOGITS_AT_ONCE = 2**25  # values held at once: pictures x classes


class Fit(NamedTuple):
    """A fitted classifier.

    Attributes:
        weight: [K, C].
        bias: [K].
        iterations: Of L-BFGS.
        gradient: Largest component of the gradient at the end, relative to that at zero weights.
        converged: Whether it ended by itself: at the tolerance, or where the dtype allows no better.
    """

    weight: Tensor
    bias: Tensor
    iterations: int
    gradient: float
    converged: bool


def fit_logistic(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    c: float,
    *,
    start: Fit | None = None,
    max_iterations: int = 1000,
    tolerance: float = 1e-5,
    group: Group | None = None,
) -> Fit:
    """Minimise mean cross entropy + |weight|^2 / (2 c n) by L-BFGS over all n pictures.

    Args:
        features: [N, C] of this process; computed in their dtype, on their device.
        labels: int64 [N] on the same device.
        num_classes: K.
        c: Inverse strength of the regularisation, as in scikit-learn.
        start: Where to begin; zeros if not given.
        max_iterations: Of L-BFGS.
        tolerance: See `Fit`.
        group: The processes that hold the other rows. All of them get the same result.

    Returns:
        The classifier.
    """
    objective = _Objective.of(features, labels, num_classes, c, group)
    scaled = features.new_zeros(num_classes, features.shape[1] + 1)  # [K, C + 1], the bias last
    steepest = max(float(objective(scaled)[1].abs().max()), torch.finfo(scaled.dtype).tiny)
    if start is not None:
        scaled.copy_(torch.cat([start.weight, start.bias[:, None]], 1) / objective.scale)

    def closure() -> float:
        loss, scaled.grad = objective(scaled)
        return loss

    optimiser = torch.optim.LBFGS(
        [scaled],
        max_iter=max_iterations,
        max_eval=4 * max_iterations,
        tolerance_grad=tolerance * steepest,
        tolerance_change=torch.finfo(scaled.dtype).eps * 1e-2,
        history_size=20,
        line_search_fn="strong_wolfe",
    )
    optimiser.step(closure)
    iterations = int(optimiser.state[scaled]["n_iter"])
    # Anew: the line search may have left the gradient of a point that it did not take.
    gradient = float(objective(scaled)[1].abs().max()) / steepest
    theta = scaled * objective.scale
    return Fit(theta[:, :-1].clone(), theta[:, -1].clone(), iterations, gradient, iterations < max_iterations)


@dataclass(frozen=True)
class _Objective:
    """Mean cross entropy + penalty / 2 * |weight|^2, as a function of scaled weights.

    In units in which the second derivatives at zero weights are about 1, L-BFGS needs few steps also where the penalty
    is far stronger than the data, or channels are of different size.

    Attributes:
        features: [N, C] of this process.
        labels: int64 [N] of this process.
        count: Pictures of all processes.
        penalty: On the mean loss.
        scale: [C + 1] weights, and the bias last, for scaled ones of 1.
        group: The processes.
    """

    features: Tensor
    labels: Tensor
    count: float
    penalty: float
    scale: Tensor
    group: Group | None

    @classmethod
    def of(cls, features: Tensor, labels: Tensor, num_classes: int, c: float, group: Group | None) -> _Objective:
        count = float(_sum(torch.tensor([len(features)], dtype=torch.float64), group))
        penalty = 1 / (c * count)
        chance = 1 / num_classes
        squares = _sum(_column_sums(features, torch.square), group) / count  # [C]
        curvature = chance * (1 - chance) * torch.cat([squares, torch.ones(1, dtype=torch.float64)])  # [C + 1]
        curvature[:-1] += penalty
        scale = curvature.clamp_min(1e-12).rsqrt().to(features)
        return cls(features, labels, count, penalty, scale, group)

    def __call__(self, scaled: Tensor) -> tuple[float, Tensor]:
        """Value and gradient [K, C + 1], the same on every process."""
        theta = scaled * self.scale  # [K, C + 1]
        loss, gradient = _loss_and_gradient(theta, self.features, self.labels)
        total = float(_sum(torch.tensor([loss], dtype=torch.float64), self.group))
        gradient = _sum(gradient, self.group) / self.count
        gradient[:, :-1] += self.penalty * theta[:, :-1]
        size = float(theta[:, :-1].cpu().double().square().sum())
        return total / self.count + self.penalty / 2 * size, gradient * self.scale


def _loss_and_gradient(theta: Tensor, features: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    """Summed cross entropy and its gradient [K, C + 1], by blocks of rows: [N, K] never exists."""
    weight, bias = theta[:, :-1], theta[:, -1]
    loss, gradient = 0.0, torch.zeros_like(theta)
    for block in row_blocks(len(labels), len(theta)):
        x, y = features[block], labels[block, None]  # [n, C], [n, 1]
        log_probabilities = F.log_softmax(F.linear(x, weight, bias), dim=1)  # [n, K]
        loss -= float(log_probabilities.gather(1, y).cpu().double().sum())  # the line search compares tiny differences
        error = log_probabilities.exp_().scatter_add_(1, y, -torch.ones_like(y, dtype=x.dtype))  # [n, K]
        gradient[:, :-1].addmm_(error.T, x)
        gradient[:, -1] += error.sum(0)
    return loss, gradient


def channel_statistics(features: Tensor, group: Group | None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [C] over the rows of all processes; deviation 1 for a channel that is constant."""
    count = _sum(torch.tensor([len(features)], dtype=torch.float64), group)
    mean = _sum(_column_sums(features, lambda x: x), group) / count  # [C]
    # In a second pass: the difference of large sums would lose the deviation of channels with a large mean.
    deviation = (_sum(_column_sums(features, lambda x: (x - mean.to(x)).square()), group) / count).sqrt()  # [C]
    deviation = torch.where(deviation > 1e-7 * mean.abs().clamp_min(1e-30), deviation, 1.0)
    return mean.to(features), deviation.to(features)


def _column_sums(features: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
    """Sums [C] in float64 of a function of the features, which are never all held in float64."""
    place = torch.device("cpu") if features.device.type == "mps" else features.device  # which has no float64
    total = torch.zeros(features.shape[1], dtype=torch.float64, device=place)
    for block in features.split(_ROWS_AT_ONCE):
        total += of(block.to(place).double()).sum(0)
    return total.cpu()


def _sum(values: Tensor, group: Group | None) -> Tensor:
    return values if group is None else group.all_reduce_sum(values)


def row_blocks(count: int, num_classes: int) -> Iterator[slice]:
    """Cut rows into blocks whose logits [n, K] are of bounded size."""
    step = max(_LOGITS_AT_ONCE // num_classes, 1)
    return (slice(start, start + step) for start in range(0, count, step))
