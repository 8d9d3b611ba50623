"""Linear classification on frozen summaries: multinomial logistic regression, found exactly rather than by SGD.

The objective is scikit-learn's (``LogisticRegression``, L2 penalty, bias not penalised), so the result has no learning
rate, schedule or epochs that would have to be tuned for each backbone. Its one free number, the regularisation, is
chosen on a part of the train set that is held out; the evaluation set is touched once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from amradio.backbones.protocol import Backbone
from amradio.errors import OptionError
from amradio.evals.classification import ClassificationTally, confusion_detail
from amradio.evals.logistic import Fit, channel_statistics, fit_logistic, row_blocks
from amradio.evals.report import EvalReport, Metric
from amradio.evals.runner import ClassRule, Measurement, Setup, check_pair, labels_of, policy_for

if TYPE_CHECKING:
    from amradio.distributed import Group
    from amradio.features.collect import FeatureTable
    from amradio.images.dataset import ImageSet

Normalisation = Literal["standardise", "l2", "none"]


@dataclass(frozen=True, kw_only=True)
class LinearConfig:
    """How to fit the classifier.

    Attributes:
        c: Inverse strengths of the regularisation to try, as scikit-learn's ``C``: the objective is the sum of the
            pictures' losses times C, plus half the squared weights.
        normalise: ``standardise``: each channel to mean 0 and deviation 1 over the train set; ``l2``: each summary to
            length 1; ``none``.
        holdout: Share of each class of the train set on which C is chosen; afterwards all of it is fitted.
        seed: Of the choice of these pictures.
        max_iterations: Of L-BFGS, for each C.
        tolerance: L-BFGS stops when no component of the gradient is larger than this times the largest one at zero
            weights.
        dtype: Of the fit.
        classes: How the classes of the two sets must agree.
    """

    c: tuple[float, ...] = tuple(10.0**e for e in range(-6, 6))
    normalise: Normalisation = "standardise"
    holdout: float = 0.1
    seed: int = 0
    max_iterations: int = 1000
    tolerance: float = 1e-5
    dtype: Literal["float32", "float64"] = "float32"
    classes: ClassRule = "same"

    def __post_init__(self) -> None:
        if not self.c or len(set(self.c)) != len(self.c) or not all(math.isfinite(c) and c > 0 for c in self.c):
            raise OptionError(f"c must be one or several different numbers above 0, got {list(self.c)}.")
        if not 0 < self.holdout < 1:
            raise OptionError(f"holdout must be between 0 and 1, got {self.holdout}.")
        if self.max_iterations < 1 or not self.tolerance > 0:
            raise OptionError(
                f"max_iterations must be at least 1 and tolerance above 0, got {self.max_iterations} and "
                f"{self.tolerance}."
            )


def holdout_mask(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Choose pictures to hold out, the same share of each class.

    Args:
        labels: int64 [N].
        fraction: Share of each class, rounded; at least one picture of a class of two or more, and never all.
        seed: Of the choice.

    Returns:
        bool [N], true for those held out.
    """
    shuffled = np.random.Generator(np.random.PCG64(seed)).permutation(len(labels))
    order = shuffled[np.argsort(labels[shuffled], kind="stable")]  # [N] classes one after the other
    _, starts, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    counts = np.minimum(np.maximum(np.rint(fraction * sizes), 1), sizes - 1).astype(np.int64)
    rank = np.arange(len(labels)) - np.repeat(starts, sizes)  # within the class
    mask = np.zeros(len(labels), dtype=bool)
    mask[order] = rank < np.repeat(counts, sizes)
    return mask


def run_linear(
    backbone: Backbone,
    train: ImageSet,
    evaluation: ImageSet,
    config: LinearConfig | None = None,
    setup: Setup | None = None,
) -> EvalReport:
    """Evaluate a backbone by linear classification of its summaries.

    Under a group each process computes and keeps its share of the features; gradients are added up.

    Args:
        backbone: Its summaries are what is evaluated; a view evaluates an adaptor's.
        train: The labelled pictures to fit.
        evaluation: The pictures to classify.
        config: The protocol's options.
        setup: Size of the pictures, device, processes.

    Returns:
        The report, on every process.

    Raises:
        DatasetError: Labels are missing, the classes of the sets do not agree, or no picture worked.
    """
    config = config or LinearConfig()
    setup = setup or Setup(policy_for(backbone))
    pair = check_pair(train, evaluation, config.classes)
    evaluation, num_classes = pair.evaluation, pair.num_classes
    measurement = Measurement(backbone, setup)
    measurement.notes += pair.notes
    train_rows = _Rows.of(measurement.features("train", train, gather=False), train, setup, config)
    eval_rows = _Rows.of(measurement.features("eval", evaluation, gather=False), evaluation, setup, config)
    if config.normalise == "standardise":
        mean, deviation = channel_statistics(train_rows.features, setup.group)
        train_rows, eval_rows = (r.standardised(mean, deviation) for r in (train_rows, eval_rows))
    task = _Task(config, num_classes, setup.group)
    sweep: list[dict[str, Any]] = []
    c = config.c[0]
    if len(config.c) > 1:
        with measurement.stage("sweep"):
            held_out = torch.from_numpy(holdout_mask(labels_of(train), config.holdout, config.seed))
            if not held_out.any():
                raise OptionError(
                    f"No class of {train.name} has two pictures, so none can be held out to choose C. Give one C."
                )
            c, sweep = task.choose(train_rows, held_out)
        measurement.notes += _notes_on(c, sweep, config)
    with measurement.stage("fit"):
        fit = task.fit(train_rows, c)
    if not fit.converged:
        measurement.notes.append(
            f"The final fit stopped after {fit.iterations} iterations at {fit.gradient:.1e} of the gradient at zero "
            f"weights, above the tolerance of {config.tolerance:.1e}."
        )
    tally = task.evaluate(fit, eval_rows)
    chosen = f"C chosen on {config.holdout:.0%} of each class of the train set" if sweep else f"C = {c:g}"
    return measurement.report(
        task="linear",
        protocol=f"multinomial logistic regression on frozen summaries ({config.normalise}), L-BFGS, {chosen}, then "
        "fitted on all of it",
        config=config,
        metrics={name: Metric(value, "%") for name, value in tally.accuracies().items()},
        per_class=tally.per_class(evaluation.class_names),
        details={
            "c": c,
            "iterations": fit.iterations,
            "gradient": fit.gradient,
            "sweep": sweep,
            "confusion": confusion_detail(tally, evaluation.class_names),
        },
    )


@dataclass(frozen=True)
class _Rows:
    """This process's part of a set.

    Attributes:
        features: [N, C] on the device.
        labels: int64 [N] on the device.
        positions: int64 [N] on the CPU, in the whole set.
    """

    features: Tensor
    labels: Tensor
    positions: Tensor

    @classmethod
    def of(cls, table: FeatureTable, images: ImageSet, setup: Setup, config: LinearConfig) -> _Rows:
        features = table.summaries["backbone"].to(setup.options.device, getattr(torch, config.dtype))
        if config.normalise == "l2":
            features = F.normalize(features, dim=1)
        labels = torch.from_numpy(labels_of(images).copy())[table.positions]
        return cls(features, labels.to(features.device), table.positions)

    def standardised(self, mean: Tensor, deviation: Tensor) -> _Rows:
        return _Rows((self.features - mean) / deviation, self.labels, self.positions)

    def take(self, mask: Tensor) -> _Rows:
        """The rows whose positions a mask over the whole set marks."""
        own = mask[self.positions]
        on_device = own.to(self.features.device)
        return _Rows(self.features[on_device], self.labels[on_device], self.positions[own])


@dataclass(frozen=True)
class _Task:
    config: LinearConfig
    num_classes: int
    group: Group | None

    def fit(self, rows: _Rows, c: float, start: Fit | None = None) -> Fit:
        return fit_logistic(
            rows.features,
            rows.labels,
            self.num_classes,
            c,
            start=start,
            max_iterations=self.config.max_iterations,
            tolerance=self.config.tolerance,
            group=self.group,
        )

    def evaluate(self, fit: Fit, rows: _Rows) -> ClassificationTally:
        """Count right answers over the rows of all processes."""
        tally = ClassificationTally(self.num_classes)
        for block in row_blocks(len(rows.labels), self.num_classes):
            tally.update(F.linear(rows.features[block], fit.weight, fit.bias), rows.labels[block])
        tally.reduce(self.group)
        return tally

    def choose(self, rows: _Rows, held_out: Tensor) -> tuple[float, list[dict[str, Any]]]:
        """The C with the best top-1 on the pictures held out, the smallest of equally good ones; and what was tried.

        From strong to weak regularisation, each fit starts from the one before: much faster than from zero.
        """
        fitted, rest = rows.take(~held_out), rows.take(held_out)
        fit: Fit | None = None
        sweep = []
        for c in sorted(self.config.c):
            fit = self.fit(fitted, c, fit)
            top1 = self.evaluate(fit, rest).accuracies()["top1"]
            effort = {"iterations": fit.iterations, "gradient": fit.gradient, "converged": fit.converged}
            sweep.append({"c": c, "top1": top1, **effort})
        best = max(sweep, key=lambda s: s["top1"])
        return best["c"], sweep


def _notes_on(c: float, sweep: list[dict[str, Any]], config: LinearConfig) -> list[str]:
    """What a reader has to know about a choice of C."""
    notes = []
    if c in (sweep[0]["c"], sweep[-1]["c"]):
        notes.append(f"The best C, {c:g}, is at the end of what was tried; a wider range may be better.")
    slow = [s["c"] for s in sweep if not s["converged"]]
    if slow:
        notes.append(
            f"L-BFGS did not reach the tolerance within {config.max_iterations} iterations for C = "
            f"{', '.join(f'{s:g}' for s in slow)}."
        )
    return notes
