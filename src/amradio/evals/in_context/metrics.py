"""Scores of label maps from a confusion matrix that is added up as pictures come."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from amradio.errors import DatasetError
from amradio.evals.in_context.assignment import best_assignment
from amradio.evals.in_context.protocol import Miou
from amradio.evals.report import Metric

if TYPE_CHECKING:
    from amradio.distributed import Group

_IDS = 256


class Confusion:
    """Counts of pixels by true and predicted class.

    Args:
        num_classes: C.
        ignore_index: A class that is not scored where it is the truth. Pixels whose id is no class never are.

    Attributes:
        counts: int64 [C, C]: pixels of class i (rows) taken for class j (columns).
    """

    def __init__(self, num_classes: int, ignore_index: int = 255) -> None:
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        self._ignore_index = ignore_index

    def update(self, truth: Tensor, predicted: Tensor) -> None:
        """Count the pixels of label maps.

        Args:
            truth: uint8, any shape.
            predicted: uint8, the same shape: classes.
        """
        classes = len(self.counts)
        pairs = truth.flatten().to(torch.int64).mul_(classes).add_(predicted.flatten())
        found = torch.bincount(pairs, minlength=_IDS * classes).view(_IDS, classes)[:classes].cpu()
        if self._ignore_index < classes:
            found[self._ignore_index] = 0
        self.counts += found

    def reduce(self, group: Group | None) -> None:
        """Add what other processes counted."""
        if group is not None:
            self.counts = group.all_reduce_sum(self.counts)

    @property
    def present(self) -> Tensor:
        """Bool [C]: which classes occur in the truth."""
        return self.counts.sum(1) > 0

    def metrics(self, miou: Miou) -> dict[str, Metric]:
        """The scores, in percent: ``miou``, ``pixel_accuracy``, and the plain means if ``miou`` is another.

        Raises:
            DatasetError: No pixel was scored.
        """
        total = int(self.counts.sum())
        if total == 0:
            raise DatasetError(
                "No pixel of the evaluation set has a class, so there is nothing to score: all of its masks are void."
            )
        values = {"miou": mean_iou(self.counts, miou), "pixel_accuracy": int(self.counts.trace()) / total}
        if miou != "present":
            values |= {"miou_present": mean_iou(self.counts, "present"), "miou_all": mean_iou(self.counts, "all")}
        return {name: Metric(100 * value, "%") for name, value in values.items()}


def iou(counts: Tensor) -> Tensor:
    """Intersection over union of each class.

    Args:
        counts: int64 [C, C], see `Confusion`.

    Returns:
        float64 [C]; 0 for a class that neither occurs nor is predicted.
    """
    return _pair_iou(counts).diagonal()


def mean_iou(counts: Tensor, kind: Miou = "present") -> float:
    """Mean intersection over union.

    Args:
        counts: int64 [C, C], see `Confusion`.
        kind: ``present``: over classes that occur in the truth. ``all``: over all C, where classes that do not occur
            count as 0. The others first rename predicted classes, as clusterings are scored, and average over all C:
            ``hungarian`` one to one, such that the mean is highest; ``many-to-one-iou`` each to the class with which it
            has the highest IoU; ``many-to-one-precision`` each to the class that most of its pixels have.

    Returns:
        A share, 0 to 1.
    """
    if kind == "present":
        return float(iou(counts)[counts.sum(1) > 0].mean())
    return float(iou(counts if kind == "all" else renamed(counts, match(counts, kind))).mean())


def match(counts: Tensor, kind: Miou) -> Tensor:
    """For each predicted class, int64 [C], the class that it is counted as; see `mean_iou`."""
    if kind == "hungarian":
        return best_assignment(_pair_iou(counts).T)
    if kind == "many-to-one-iou":
        return _pair_iou(counts).argmax(0)
    if kind == "many-to-one-precision":
        return counts.argmax(0)
    return torch.arange(len(counts))


def renamed(counts: Tensor, names: Tensor) -> Tensor:
    """The confusion [C, C] after each predicted class is counted as another."""
    return torch.zeros_like(counts).index_add_(1, names, counts)


def _pair_iou(counts: Tensor) -> Tensor:
    """IoU of each true with each predicted class, float64 [C, C]."""
    together = counts.sum(1, keepdim=True) + counts.sum(0, keepdim=True) - counts
    return counts.double() / together.clamp(min=1)
