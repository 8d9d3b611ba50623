"""Mean average precision of a ranked retrieval with positives and junk, as ROxford and RParis are scored.

Radenović et al. 2018, "Revisiting Oxford and Paris: Large-Scale Image Retrieval Benchmarking". Of those sets, Medium
takes easy and hard positives; Hard takes hard positives and counts the easy ones as junk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from amradio.backbones.protocol import Backbone
from amradio.errors import DatasetError, OptionError
from amradio.evals.report import EvalReport, Metric
from amradio.evals.retrieval_task import RetrievalTask
from amradio.evals.runner import Measurement, Setup, policy_for
from amradio.evals.uniform_knn import reduce, unit_summaries
from amradio.search import top_k

if TYPE_CHECKING:
    from amradio.features.collect import FeatureTable

KAPPAS = (1, 5, 10)
_RANKED_AT_ONCE = 2**24  # places of rankings that are held: queries x database


@dataclass(frozen=True, kw_only=True)
class RetrievalMapConfig:
    """How to rank.

    Attributes:
        pca: Components that features are reduced to, fitted on the database; None: they are not. See
            `amradio.evals.uniform_knn.reduce`.
        kappas: Cut-offs of the precision.
    """

    pca: int | None = None
    kappas: tuple[int, ...] = KAPPAS

    def __post_init__(self) -> None:
        if self.pca is not None and self.pca < 1:
            raise OptionError(f"pca must be at least 1, got {self.pca}.")
        if not self.kappas or min(self.kappas) < 1 or len(set(self.kappas)) != len(self.kappas):
            raise OptionError(f"kappas must be different numbers of at least 1, got {list(self.kappas)}.")


def run_retrieval_map(
    backbone: Backbone,
    task: RetrievalTask,
    config: RetrievalMapConfig | None = None,
    setup: Setup | None = None,
) -> EvalReport:
    """Evaluate a backbone by ranking a database for each query.

    Under a group the processes share out the pictures; each then ranks all of them.

    Args:
        backbone: Its summaries are what is evaluated; those of a `amradio.fungi.FungiWrapper` are taken block by block.
        task: Pictures and what is right. A picture of the database that fails is ranked last, a query that fails is
            left out.
        config: The protocol's options.
        setup: Size of the pictures, device, processes.

    Returns:
        The report, on every process: ``map`` and ``mp1``, ``mp5``, ... in percent; behind these names that of the
        judgement, if it has one.

    Raises:
        DatasetError: No picture worked, or no query has anything to find.
        OptionError: Summaries are not finite.
    """
    config = config or RetrievalMapConfig()
    setup = setup or Setup(policy_for(backbone))
    measurement = Measurement(backbone, setup)
    database = measurement.features("database", task.database)
    same = task.queries is task.database
    queries = database if same else measurement.features("queries", task.queries)
    with measurement.stage("pca"):
        rows, asked = (unit_summaries(backbone, table.summaries["backbone"]) for table in (database, queries))
        reduced = reduce(rows, asked, config.pca)
    if config.pca is not None and reduced.pca is None:
        measurement.notes.append(
            f"No PCA was applied: {config.pca} components are not fewer than {len(rows)} pictures and {rows.shape[1]} "
            "features."
        )
    with measurement.stage("search"):
        scores = _scores(reduced.test, reduced.train, database, queries, task, config, setup.options.device)
    metrics: dict[str, Metric] = {}
    counted: dict[str, int] = {}
    for judgement, found in zip(task.judgements, scores, strict=True):
        end = f"_{judgement.name}" if judgement.name else ""
        counted[judgement.name or "all"] = sum(not np.isnan(p) for p in found.average_precision)
        values = {"map": found.mean_average_precision}
        values |= {f"mp{k}": v for k, v in zip(config.kappas, found.mean_precision_at, strict=True)}
        metrics |= {f"{name}{end}": Metric(100 * value, "%") for name, value in values.items()}
    if not any(counted.values()):
        raise DatasetError(f"No query of {task.queries.name} has a picture to find in {task.database.name}.")
    pca = f"PCA to {config.pca} components fitted on the database, " if reduced.pca is not None else ""
    return measurement.report(
        task="retrieval-map",
        protocol=f"mean average precision of the whole database ranked by inner product of unit summaries, {pca}area "
        f"under the precision-recall curve by the trapezoidal rule; {task.about}",
        config=config,
        metrics=metrics,
        details={"queries_with_positives": counted},
    )


@dataclass(frozen=True)
class RetrievalScores:
    """Scores of a ranking, in [0, 1].

    Attributes:
        mean_average_precision: Over the queries that have positives.
        mean_precision_at: For each cut-off, over the same queries.
        average_precision: For each query; NaN without positives.
        precision_at: For each query and each cut-off; NaN without positives.
        kappas: The cut-offs.
    """

    mean_average_precision: float
    mean_precision_at: tuple[float, ...]
    average_precision: tuple[float, ...]
    precision_at: tuple[tuple[float, ...], ...]
    kappas: tuple[int, ...]


def ranking(queries: Tensor, database: Tensor) -> Tensor:
    """Rank the whole database for each query by inner product.

    Args:
        queries: [Q, C].
        database: [N, C].

    Returns:
        int64 [Q, N], the best first.
    """
    return top_k(queries, database, len(database)).indices


def score_ranking(
    ranks: Tensor,
    positives: Sequence[Sequence[int]],
    junk: Sequence[Sequence[int]] | None = None,
    kappas: Sequence[int] = KAPPAS,
) -> RetrievalScores:
    """Score a ranking.

    Args:
        ranks: int64 [Q, N] rows of the database, the best first.
        positives: For each query the rows that are right.
        junk: For each query the rows that are neither right nor wrong: they are taken out of the ranking.
        kappas: Cut-offs of the precision. A query whose positives have all been found before is cut off at the last.

    Returns:
        The scores; means are NaN if no query has positives.

    Raises:
        OptionError: The lists are of different lengths, or a positive is not in the ranking.
    """
    junk = junk if junk is not None else [()] * len(positives)
    if not len(ranks) == len(positives) == len(junk):
        raise OptionError(
            f"There are {len(ranks)} rankings, {len(positives)} lists of positives and {len(junk)} of junk."
        )
    precisions: list[float] = []
    at: list[tuple[float, ...]] = []
    for query, row in enumerate(ranks.cpu().numpy()):
        places = _places(row, positives[query], junk[query], query)
        precisions.append(_average_precision(places) if len(places) else float("nan"))
        at.append(tuple(_precision_at(places, kappa) for kappa in kappas))
    return _summed(precisions, at, kappas)


def _scores(
    queries: Tensor,
    rows: Tensor,
    database: FeatureTable,
    asked: FeatureTable,
    task: RetrievalTask,
    config: RetrievalMapConfig,
    device: torch.device,
) -> list[RetrievalScores]:
    """Rank and score some queries at a time, for each judgement."""
    failed = np.setdiff1d(np.arange(len(task.database)), database.positions.numpy())
    rows, parts = rows.to(device), [list[RetrievalScores]() for _ in task.judgements]
    step = max(_RANKED_AT_ONCE // len(task.database), 1)
    for start in range(0, len(queries), step):
        ranks = database.positions[ranking(queries[start : start + step].to(device), rows).cpu()]  # [q, N]
        last = torch.from_numpy(failed).expand(len(ranks), -1)
        positions = asked.positions[start : start + step].tolist()
        for judgement, part in zip(task.judgements, parts, strict=True):
            positives, junk = ([one[i] for i in positions] for one in (judgement.positives, judgement.junk))
            part.append(score_ranking(torch.cat([ranks, last], dim=1), positives, junk, config.kappas))
    found = []
    for part in parts:
        precisions = [p for one in part for p in one.average_precision]
        found.append(_summed(precisions, [row for one in part for row in one.precision_at], config.kappas))
    return found


def _summed(precisions: Sequence[float], at: Sequence[tuple[float, ...]], kappas: Sequence[int]) -> RetrievalScores:
    """Means over the queries that have positives."""
    counted = [i for i, p in enumerate(precisions) if not np.isnan(p)]
    return RetrievalScores(
        mean_average_precision=_mean([precisions[i] for i in counted]),
        mean_precision_at=tuple(_mean([at[i][k] for i in counted]) for k in range(len(kappas))),
        average_precision=tuple(precisions),
        precision_at=tuple(at),
        kappas=tuple(kappas),
    )


def _places(row: np.ndarray, positives: Sequence[int], junk: Sequence[int], query: int) -> np.ndarray:
    """Places of the positives in a ranking without junk, from 0, ascending."""
    kept = row[~np.isin(row, np.asarray(junk, dtype=row.dtype))]
    places = np.flatnonzero(np.isin(kept, np.asarray(positives, dtype=row.dtype)))
    if len(places) != len(set(positives) - set(junk)):
        raise OptionError(f"The ranking of query {query} lacks some of its positives; it must hold the whole database.")
    return places


def _average_precision(places: np.ndarray) -> float:
    """Area under the precision-recall curve by the trapezoidal rule."""
    found = np.arange(len(places))
    before = np.where(places == 0, 1.0, found / np.maximum(places, 1))
    after = (found + 1) / (places + 1)
    return float(((before + after) / 2).sum() / len(places))


def _precision_at(places: np.ndarray, kappa: int) -> float:
    if not len(places):
        return float("nan")
    cut = min(int(places[-1]) + 1, kappa)
    return float((places < cut).sum() / cut)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")
