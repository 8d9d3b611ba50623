"""k-NN classification on summaries: no training, so the number says something about the backbone alone.

Weighted vote of Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", section
3.4: each of the k nearest pictures by cosine similarity s votes for its class with exp(s / temperature). RADIO, DINO
and DINOv2 report this number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from amradio.backbones.protocol import Backbone
from amradio.errors import OptionError
from amradio.evals.classification import ClassificationTally, confusion_detail, mean_metrics
from amradio.evals.report import EvalReport
from amradio.evals.runner import ClassRule, Measurement, Setup, check_pair, labels_of, policy_for
from amradio.search import Neighbours, top_k

if TYPE_CHECKING:
    from amradio.distributed import Group
    from amradio.features.collect import FeatureTable
    from amradio.images.dataset import ImageSet

SearchDtype = Literal["float32", "bfloat16", "float16"]
_VOTES_AT_ONCE = 2**24  # scores held at once: queries x classes


@dataclass(frozen=True, kw_only=True)
class KnnConfig:
    """How to classify by neighbours.

    Attributes:
        k: Numbers of neighbours; all come from one search. The first one gives ``top1`` and ``top5``, per-class values
            and the confusion matrix, a further one ``top1_k10`` and so on.
        temperature: Of the vote.
        shots: Pictures of each class in the database; None takes all of the train set.
        draws: How often such a database is drawn; metrics are means, with their standard deviation.
        seed: Draw i uses seed + i.
        classes: How the classes of the two sets must agree.
        search_dtype: In which precision similarities are computed.
    """

    k: tuple[int, ...] = (20,)
    temperature: float = 0.07
    shots: int | None = None
    draws: int = 5
    seed: int = 0
    classes: ClassRule = "same"
    search_dtype: SearchDtype = "float32"

    def __post_init__(self) -> None:
        if not self.k or min(self.k) < 1 or len(set(self.k)) != len(self.k):
            raise OptionError(f"k must be one or several different numbers of at least 1, got {list(self.k)}.")
        if not self.temperature > 0:
            raise OptionError(f"temperature must be above 0, got {self.temperature}.")
        if (self.shots is not None and self.shots < 1) or self.draws < 1:
            raise OptionError(f"shots and draws must be at least 1, got {self.shots} and {self.draws}.")


def vote(similarities: Tensor, labels: Tensor, num_classes: int, temperature: float = 0.07) -> Tensor:
    """Weigh classes by the neighbours of queries.

    Args:
        similarities: [Q, k] cosine similarities of the neighbours.
        labels: int64 [Q, k] their classes.
        num_classes: C.
        temperature: Of exp(similarity / temperature).

    Returns:
        [Q, C] float64: the logarithm of each class's weight, -inf for a class without a neighbour. Logarithms, so that
        no temperature overflows.
    """
    logits = similarities.double() / temperature  # [Q, k]
    best = logits.max(1, keepdim=True).values  # [Q, 1]
    weights = logits.new_zeros(len(logits), num_classes)  # [Q, C]
    weights.scatter_add_(1, labels, (logits - best).exp())
    return weights.log() + best


def classify(
    neighbours: Neighbours,
    database_labels: Tensor,
    targets: Tensor,
    num_classes: int,
    config: KnnConfig,
    group: Group | None = None,
) -> dict[int, ClassificationTally]:
    """Vote and count, for each k of a config.

    Args:
        neighbours: At least max(k) neighbours of each query, best first, by cosine similarity.
        database_labels: int64 [N] the classes of the rows that the neighbours point to.
        targets: int64 [Q] the true classes of the queries.
        num_classes: C.
        config: The numbers of neighbours and the temperature.
        group: The processes that have the other queries.

    Returns:
        The counts for each k, over the queries of all processes.
    """
    tallies = {k: ClassificationTally(num_classes) for k in config.k}
    for rows in _row_blocks(len(targets), num_classes):
        scores, indices = neighbours.scores[rows].cpu(), neighbours.indices[rows].cpu()  # [q, k] each
        labels = database_labels[indices]  # [q, k]
        for k, tally in tallies.items():
            tally.update(vote(scores[:, :k], labels[:, :k], num_classes, config.temperature), targets[rows])
    for tally in tallies.values():
        tally.reduce(group)
    return tallies


def run_knn(
    backbone: Backbone,
    train: ImageSet,
    evaluation: ImageSet,
    config: KnnConfig | None = None,
    setup: Setup | None = None,
) -> EvalReport:
    """Evaluate a backbone by k-NN classification.

    Under a group each process computes its share of the features and holds its share of the database, in which it
    searches for the queries of all.

    Args:
        backbone: Its summaries are what is evaluated; a view evaluates an adaptor's.
        train: The labelled pictures that form the database.
        evaluation: The pictures to classify.
        config: The protocol's options.
        setup: Size of the pictures, device, processes.

    Returns:
        The report, on every process.

    Raises:
        DatasetError: Labels are missing, the classes of the sets do not agree, a class has fewer pictures than
            `shots`, or no picture worked.
        OptionError: k is larger than the database.
    """
    config = config or KnnConfig()
    setup = setup or Setup(policy_for(backbone))
    pair = check_pair(train, evaluation, config.classes)
    evaluation, num_classes = pair.evaluation, pair.num_classes
    draws = [train] if config.shots is None else _draws(train, config)
    _check_k(max(config.k), min(map(len, draws)))
    measurement = Measurement(backbone, setup)
    measurement.notes += pair.notes
    queries = measurement.features("eval", evaluation, gather=False)
    targets = torch.from_numpy(labels_of(evaluation).copy())[queries.positions]  # [Q]
    runs = []
    for drawn in draws:
        database = measurement.features("train", drawn, gather=False)
        with measurement.stage("search"):
            found, database_labels = _search(queries, database, drawn, config, setup)
        with measurement.stage("vote"):
            runs.append(classify(found, database_labels, targets, num_classes, config, setup.group))
    first = config.k[0]
    total = ClassificationTally(num_classes)
    for run in runs:
        total.add(run[first])
    return measurement.report(
        task="knn",
        protocol="k-NN on L2-normalised summaries by cosine similarity, each neighbour votes with exp(similarity / "
        f"{config.temperature:g}); {_database_text(config)}",
        config=config,
        metrics=mean_metrics([_accuracies(run) for run in runs]),
        per_class=total.per_class(evaluation.class_names),
        details={"confusion": {"k": first, **confusion_detail(total, evaluation.class_names)}},
    )


def _draws(train: ImageSet, config: KnnConfig) -> list[ImageSet]:
    assert config.shots is not None
    # Seeds far from each other, so that two runs with neighbouring seeds share no draw.
    seeds = np.random.SeedSequence(config.seed).generate_state(config.draws, np.uint64)
    return [train.per_class(config.shots, int(seed)) for seed in seeds]


def _check_k(k: int, pictures: int) -> None:
    if k > pictures:
        raise OptionError(f"k is {k}, and the database has only {pictures} pictures. Choose a smaller k or more shots.")


def _search(
    queries: FeatureTable, database: FeatureTable, train: ImageSet, config: KnnConfig, setup: Setup
) -> tuple[Neighbours, Tensor]:
    """The max(k) nearest rows of the database, which the processes hold together, and the labels of its rows."""
    rows = normalize(database.summaries["backbone"], dim=1)  # [N_r, C]
    positions = _concatenated(database.positions, setup.group)  # [N]
    most = max(config.k)
    _check_k(most, len(positions))
    found = top_k(
        normalize(queries.summaries["backbone"], dim=1),  # [Q, C]
        rows,
        most,
        dtype=getattr(torch, config.search_dtype),
        device=setup.options.device,
        group=setup.group,
    )
    labels = torch.from_numpy(labels_of(train).copy())[positions]  # [N]
    return found, labels


def _concatenated(positions: Tensor, group: Group | None) -> Tensor:
    """The positions of all processes' rows, in the order in which the search numbers them."""
    return positions if group is None else torch.cat(group.all_gather_rows(positions))


def _accuracies(tallies: dict[int, ClassificationTally]) -> dict[str, float]:
    """``top1`` and ``top5`` of the first k, then ``top1_k10``, ... of the others."""
    named: dict[str, float] = {}
    for i, (k, tally) in enumerate(tallies.items()):
        named |= {name if i == 0 else f"{name}_k{k}": value for name, value in tally.accuracies().items()}
    return named


def _row_blocks(count: int, num_classes: int) -> Iterator[slice]:
    step = max(_VOTES_AT_ONCE // num_classes, 1)
    return (slice(start, start + step) for start in range(0, count, step))


def _database_text(config: KnnConfig) -> str:
    if config.shots is None:
        return "database: the whole train set"
    return f"database: {config.shots} pictures a class, {config.draws} draws"
