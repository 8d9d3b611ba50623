"""Accuracy, per-class accuracy and the confusion matrix, added up batch by batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from amradio.evals.report import Metric

if TYPE_CHECKING:
    from amradio.distributed import Group

TOP = (1, 5)
"""A picture counts for top-n if its class is among the n best scores."""


class ClassificationTally:
    """Counts right and wrong answers.

    Equal scores are ranked by class number, so that results do not depend on the device. The confusion matrix is kept
    as the pairs that occur, which are never more than pictures, and not as classes x classes.

    Args:
        num_classes: Classes are numbered from 0.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self._hits = {n: torch.zeros(num_classes, dtype=torch.int64) for n in TOP}  # [C] each, by true class
        self._totals = torch.zeros(num_classes, dtype=torch.int64)  # [C]
        self._pairs = torch.zeros(0, dtype=torch.int64)  # [P] true * C + predicted, sorted
        self._pair_counts = torch.zeros(0, dtype=torch.int64)  # [P]

    def update(self, scores: Tensor, targets: Tensor) -> None:
        """Count a batch.

        Args:
            scores: [B, C]; a class with -inf is no answer, also where fewer than five classes have a score.
            targets: int64 [B] on any device.
        """
        targets = targets.to(scores.device)
        own = scores.gather(1, targets[:, None])  # [B, 1]
        classes = torch.arange(self.num_classes, device=scores.device)
        before = (scores > own) | ((scores == own) & (classes < targets[:, None]))  # [B, C]
        rank = torch.where(own[:, 0] > -torch.inf, before.sum(1), max(TOP))  # [B]
        for n in TOP:
            self._hits[n] += self._count(targets[rank < n])
        self._totals += self._count(targets)
        self._add_pairs(targets * self.num_classes + scores.argmax(1))

    def add(self, other: ClassificationTally) -> None:
        """Add what another one counted, over the same classes."""
        for n in TOP:
            self._hits[n] += other._hits[n]
        self._totals += other._totals
        self._merge_pairs(torch.cat([self._pairs, other._pairs]), torch.cat([self._pair_counts, other._pair_counts]))

    def reduce(self, group: Group | None) -> None:
        """Add what other processes counted."""
        if group is None:
            return
        for n in TOP:
            self._hits[n] = group.all_reduce_sum(self._hits[n])
        self._totals = group.all_reduce_sum(self._totals)
        pairs = group.all_gather_rows(torch.stack([self._pairs, self._pair_counts], 1))  # [P_r, 2] each
        self._merge_pairs(*torch.cat(pairs).unbind(1))

    @property
    def count(self) -> int:
        """How many pictures were counted."""
        return int(self._totals.sum())

    def accuracies(self) -> dict[str, float]:
        """``top1`` and ``top5`` in percent."""
        return {f"top{n}": 100 * int(hits.sum()) / max(self.count, 1) for n, hits in self._hits.items()}

    def per_class(self, names: Sequence[str] | None = None) -> dict[str, float]:
        """Top-1 accuracy in percent of each class that occurs, by name, or by number where there are no names."""
        values = 100 * self._hits[1].double() / self._totals  # [C]
        labels = class_labels(self.num_classes, names)
        return {labels[i]: float(values[i]) for i in self._totals.nonzero()[:, 0].tolist()}

    def confusion(self) -> list[list[int]]:
        """The confusion matrix as [true class, predicted class, count] of each pair that occurs, in order."""
        counted = zip(self._pairs.tolist(), self._pair_counts.tolist(), strict=True)
        return [[*divmod(pair, self.num_classes), count] for pair, count in counted]

    def _count(self, classes: Tensor) -> Tensor:
        return torch.bincount(classes.cpu(), minlength=self.num_classes)

    def _add_pairs(self, pairs: Tensor) -> None:
        new = torch.cat([self._pairs, pairs.cpu()])
        self._merge_pairs(new, torch.cat([self._pair_counts, torch.ones(len(pairs), dtype=torch.int64)]))

    def _merge_pairs(self, pairs: Tensor, counts: Tensor) -> None:
        self._pairs, inverse = pairs.unique(return_inverse=True)
        self._pair_counts = torch.zeros(len(self._pairs), dtype=torch.int64).index_add_(0, inverse, counts)


def class_labels(num_classes: int, names: Sequence[str] | None) -> list[str]:
    """A distinct text for each class: its name, with its number where two classes share a name.

    ImageNet has two classes called ``maillot`` and two called ``crane``.
    """
    if names is None:
        return [str(i) for i in range(num_classes)]
    seen: dict[str, int] = {}
    for name in names:
        seen[name] = seen.get(name, 0) + 1
    return [name if seen[name] == 1 else f"{name} ({i})" for i, name in enumerate(names)]


def mean_metrics(runs: Sequence[Mapping[str, float]], unit: str = "%") -> dict[str, Metric]:
    """Average repetitions: mean and standard deviation (n - 1 in the denominator); none for a single run."""
    metrics = {}
    for name in runs[0]:
        values = [run[name] for run in runs]
        mean = math.fsum(values) / len(values)
        spread = math.fsum((v - mean) ** 2 for v in values)
        std = math.sqrt(spread / (len(values) - 1)) if len(values) > 1 else None
        metrics[name] = Metric(mean, unit, std)
    return metrics


def confusion_detail(tally: ClassificationTally, names: Sequence[str] | None) -> dict[str, Any]:
    """The confusion matrix as a report holds it."""
    return {"classes": class_labels(tally.num_classes, names), "true_predicted_count": tally.confusion()}
