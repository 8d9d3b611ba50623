"""k-NN with equal votes, as FUNGI's numbers are made: unit blocks side by side, PCA, Euclidean distance.

Simoncini et al. 2024 (arXiv 2407.10964), section 4.1. Embedding and gradients are each scaled to length 1 and
concatenated without weights; PCA, if any, is fitted on the train set, and its result is not scaled again. Without PCA
all rows have one length, so the distance ranks as the mean of the blocks' cosines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from amradio.backbones.protocol import Backbone
from amradio.errors import OptionError
from amradio.evals.classification import ClassificationTally, confusion_detail
from amradio.evals.report import EvalReport, Metric
from amradio.evals.runner import ClassRule, Measurement, Setup, check_pair, labels_of, policy_for
from amradio.fungi.image import FungiWrapper
from amradio.fungi.pca import Pca, can_reduce
from amradio.search import Neighbours, top_k

if TYPE_CHECKING:
    from amradio.images.dataset import ImageSet

_GATHERED_AT_ONCE = 2**24


@dataclass(frozen=True, kw_only=True)
class UniformKnnConfig:
    """How to classify by neighbours with equal votes.

    Attributes:
        k: Numbers of neighbours; all come from one search. The first one gives ``top1`` and the like, a further one
            ``top1_k10`` and so on.
        pca: Components that features are reduced to; None: they are not. See `reduce`.
        shots: The first pictures of each class, in the order of the train set, are the database; None takes all.
        classes: How the classes of the two sets must agree.
    """

    k: tuple[int, ...] = (20,)
    pca: int | None = None
    shots: int | None = None
    classes: ClassRule = "same"

    def __post_init__(self) -> None:
        if not self.k or min(self.k) < 1 or len(set(self.k)) != len(self.k):
            raise OptionError(f"k must be one or several different numbers of at least 1, got {list(self.k)}.")
        for name in ("pca", "shots"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"{name} must be at least 1, got {value}.")


def run_uniform_knn(
    backbone: Backbone,
    train: ImageSet,
    evaluation: ImageSet,
    config: UniformKnnConfig | None = None,
    setup: Setup | None = None,
) -> EvalReport:
    """Evaluate a backbone as FUNGI's numbers are made.

    Under a group the processes share out the pictures; each then classifies all of them.

    Args:
        backbone: Its summaries are what is evaluated; those of a `amradio.fungi.FungiWrapper` are taken block by block.
        train: The labelled pictures that form the database.
        evaluation: The pictures to classify.
        config: The protocol's options.
        setup: Size of the pictures, device, processes.

    Returns:
        The report, on every process: ``top1`` and ``mean_per_class`` in percent; for two classes ``auc``.

    Raises:
        DatasetError: Labels are missing, the classes of the sets do not agree, or no picture worked.
        OptionError: k is larger than the database.
    """
    config = config or UniformKnnConfig()
    setup = setup or Setup(policy_for(backbone))
    pair = check_pair(train, evaluation, config.classes)
    evaluation, num_classes = pair.evaluation, pair.num_classes
    if config.shots is not None:
        train = train.select(first_per_class(torch.from_numpy(labels_of(train).copy()), config.shots).numpy())
    measurement = Measurement(backbone, setup)
    measurement.notes += pair.notes
    queries, database = measurement.features("eval", evaluation), measurement.features("train", train)
    if max(config.k) > len(database):
        raise OptionError(f"k is {max(config.k)}, and the database has only {len(database)} pictures.")
    labels = torch.from_numpy(labels_of(train).copy())[database.positions]  # [N]
    targets = torch.from_numpy(labels_of(evaluation).copy())[queries.positions]  # [Q]
    with measurement.stage("pca"):
        rows, asked = (unit_summaries(backbone, table.summaries["backbone"]) for table in (database, queries))
        reduced = reduce(rows, asked, config.pca)
    if config.pca is not None and reduced.pca is None:
        measurement.notes.append(
            f"No PCA was applied: {config.pca} components are not fewer than {len(rows)} pictures and {rows.shape[1]} "
            "features."
        )
    with measurement.stage("search"):
        found = nearest(reduced.train.to(setup.options.device), reduced.test.to(setup.options.device), max(config.k))
    metrics: dict[str, Metric] = {}
    tally = ClassificationTally(num_classes)
    for i, k in enumerate(config.k):
        several = Neighbours(found.scores[:, :k].cpu(), found.indices[:, :k].cpu())
        shares = class_shares(several, labels, num_classes)  # [Q, C]
        end = "" if i == 0 else f"_k{k}"
        metrics |= {f"{name}{end}": value for name, value in _metrics(shares, targets, num_classes).items()}
        if i == 0:
            tally.update(shares, targets)
    return measurement.report(
        task="knn",
        protocol=_words(config, reduced.pca is not None),
        config=config,
        metrics=metrics,
        per_class=tally.per_class(evaluation.class_names),
        details={"confusion": {"k": config.k[0], **confusion_detail(tally, evaluation.class_names)}},
    )


def unit_summaries(backbone: Backbone, summaries: Tensor) -> Tensor:
    """Summaries [N, C] as blocks of length 1: those with gradients are such already, others are one block."""
    return summaries.float() if isinstance(backbone, FungiWrapper) else unit_blocks([summaries])


def _words(config: UniformKnnConfig, is_reduced: bool) -> str:
    pca = f", PCA to {config.pca} components fitted on the database" if is_reduced else ""
    database = "the whole train set" if config.shots is None else f"the first {config.shots} pictures of each class"
    return (
        f"k-NN with equal votes by Euclidean distance, on blocks of length 1 side by side{pca}; database: {database}; "
        "protocol fungi"
    )


def _metrics(shares: Tensor, targets: Tensor, num_classes: int) -> dict[str, Metric]:
    predictions = shares.argmax(1)
    found = {
        "top1": Metric(100 * accuracy(predictions, targets), "%"),
        "mean_per_class": Metric(100 * mean_class_accuracy(predictions, targets), "%"),
    }
    if num_classes == 2 and len(targets.unique()) == 2:
        found["auc"] = Metric(100 * binary_auc(shares[:, 1], targets), "%")
    return found


class Reduced(NamedTuple):
    """Train and test features after PCA.

    Attributes:
        train: [N, dim].
        test: [Q, dim].
        pca: What was fitted on the train features; None where they were left as they are.
    """

    train: Tensor
    test: Tensor
    pca: Pca | None


def unit_blocks(blocks: Sequence[Tensor]) -> Tensor:
    """Blocks of features [N, C_i], each scaled to length 1, side by side: [N, sum of C_i]."""
    return torch.cat([F.normalize(block.float(), dim=-1) for block in blocks], dim=-1)


def reduce(train: Tensor, test: Tensor, dim: int | None) -> Reduced:
    """Reduce features to their principal components, if there are more than enough rows and columns for that.

    Args:
        train: [N, C]; the components are fitted on these.
        test: [Q, C].
        dim: Components; None: no PCA. Not applied either unless it is below both N and C.

    Returns:
        Both sets.
    """
    if dim is None or not can_reduce(len(train), train.shape[1], dim):
        return Reduced(train, test, None)
    pca = Pca.fit(train, dim)
    return Reduced(pca.transform(train), pca.transform(test), pca)


def first_per_class(labels: Tensor, count: int) -> Tensor:
    """The first pictures of each class, in the order of the set.

    Args:
        labels: int64 [N].
        count: Of each class; a class with fewer gives all.

    Returns:
        int64 positions, ascending.
    """
    order = labels.argsort(stable=True)
    sizes = torch.bincount(labels)
    starts = (sizes.cumsum(0) - sizes)[labels[order]]  # [N]
    return order[torch.arange(len(labels), device=labels.device) - starts < count].sort().values


def nearest(train: Tensor, test: Tensor, k: int) -> Neighbours:
    """The nearest rows by Euclidean distance.

    Args:
        train: [N, C].
        test: [Q, C].
        k: 1 to N.

    Returns:
        The neighbours, nearest first; their scores are negative distances.
    """
    # |t - q|^2 = |t|^2 - 2 t q + |q|^2: nearest is where the inner product of (t, -|t|^2 / 2) and (q, 1) is largest.
    half = -0.5 * train.double().square().sum(1, keepdim=True).float()
    found = top_k(F.pad(test.float(), (0, 1), value=1.0), torch.cat([train.float(), half], dim=1), k)
    indices = found.indices.to(train.device)
    distances = torch.empty(indices.shape, device=test.device)
    step = max(_GATHERED_AT_ONCE // (k * train.shape[1]), 1)
    for start in range(0, len(test), step):
        rows = slice(start, start + step)
        distances[rows] = (train[indices[rows]].to(test.device) - test[rows, None]).float().norm(dim=-1)
    distances, order = distances.sort(dim=1, stable=True)
    return Neighbours(-distances, found.indices.to(order.device).gather(1, order))


def class_shares(neighbours: Neighbours, labels: Tensor, num_classes: int) -> Tensor:
    """The share of each class among the neighbours.

    Args:
        neighbours: [Q, k] of rows.
        labels: int64 [N] classes of the rows.
        num_classes: C.

    Returns:
        float32 [Q, C]. The prediction is the largest share, of equal ones the smallest class, as `torch.argmax` takes.
    """
    voted = labels.to(neighbours.indices.device)[neighbours.indices]  # [Q, k]
    counts = torch.zeros(len(voted), num_classes, device=voted.device)
    counts.scatter_add_(1, voted, torch.ones_like(voted, dtype=torch.float32))
    return counts / voted.shape[1]


def accuracy(predictions: Tensor, targets: Tensor) -> float:
    """Share of right predictions, in [0, 1]."""
    return float((predictions == targets).double().mean())


def mean_class_accuracy(predictions: Tensor, targets: Tensor) -> float:
    """Mean over the classes that occur in the targets of the share of right predictions, in [0, 1]."""
    right = (predictions == targets).double()
    classes, which = targets.unique(return_inverse=True)
    sums = torch.zeros(len(classes), dtype=torch.float64, device=right.device).scatter_add_(0, which, right)
    return float((sums / torch.bincount(which)).mean())


def binary_auc(scores: Tensor, targets: Tensor) -> float:
    """Area under the ROC curve of two classes.

    Args:
        scores: [Q] higher where class 1 is likelier.
        targets: int64 [Q] of 0 and 1.

    Returns:
        The chance that a picture of class 1 has a higher score than one of class 0, ties counted half.

    Raises:
        OptionError: One of the classes does not occur.
    """
    positive, negative = scores[targets == 1].double(), scores[targets == 0].double()
    if not len(positive) or not len(negative):
        raise OptionError("The area under the curve needs pictures of both classes.")
    ordered = negative.sort().values
    below = torch.searchsorted(ordered, positive)
    up_to = torch.searchsorted(ordered, positive, right=True)
    return float((below + up_to).double().mean() / 2 / len(negative))
