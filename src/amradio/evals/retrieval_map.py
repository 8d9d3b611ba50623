"""Mean average precision of a ranked retrieval with positives and junk, as ROxford and RParis are scored.

Radenović et al. 2018, "Revisiting Oxford and Paris: Large-Scale Image Retrieval Benchmarking". Of those sets, Medium
takes easy and hard positives; Hard takes hard positives and counts the easy ones as junk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from amradio.errors import OptionError
from amradio.search import top_k

KAPPAS = (1, 5, 10)


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
