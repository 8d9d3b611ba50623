"""The search of one process in the rows that it holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from amradio.errors import OptionError
from amradio.search.plan import MemoryPlan
from amradio.search.rows import Database, Rows, largest_norm
from amradio.search.scores import (
    block_scores,
    exact_device,
    fast_error,
    fast_products,
    pair_scores,
    pairs_at_once,
    underflow,
)
from amradio.search.select import Kept, order_by_score

Similarity = Callable[[Tensor, Tensor], Tensor]
_Score = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def check_arguments(queries: Tensor, database: Database) -> Rows:
    """The database as rows, of the length of the queries."""
    if queries.ndim != 2:
        raise OptionError(f"Queries must have the shape [Q, D], got {list(queries.shape)}.")
    rows = Rows(database)
    if queries.shape[1] != rows.dim:
        raise OptionError(
            f"Queries have {queries.shape[1]} features and rows of the database {rows.dim}: they come from different "
            "models, adaptors or layers."
        )
    return rows


def check_k(k: int, count: int) -> None:
    """Refuse a number of neighbours that the database does not have."""
    if not 1 <= k <= count:
        raise OptionError(f"k must be from 1 to {count}, the number of rows in the database; got {k}.")


@dataclass(frozen=True)
class ExactSearch:
    """Exact search in some rows.

    Attributes:
        rows: Where to search.
        k: Neighbours; at most as many as there are rows.
        plan: Chunk sizes.
        device: Where scores are computed.
        rounded: The dtype to which features are rounded.
        similarity: Instead of the inner product.
    """

    rows: Rows
    k: int
    plan: MemoryPlan
    device: torch.device
    rounded: torch.dtype
    similarity: Similarity | None

    @torch.no_grad()
    def run(self, queries: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
        """The neighbours of as many queries as one pass takes.

        Args:
            queries: [q, D].
            first: Number of the first one, for messages.

        Returns:
            Scores float32 and indices int64 [q, k], on the search's device.
        """
        if len(queries) == 0:
            kept = Kept(0, self.k, self.device)
            return kept.scores, kept.indices
        queries = self._ready(queries)
        largest_query = largest_norm(queries, "queries", first)
        if self.similarity is not None:
            return self._by_all_scores(queries, self._similarities, self.plan.query_rows)
        kept, largest_row = self._candidates(queries)
        largest = largest_query * largest_row
        if largest > torch.finfo(torch.float32).max / 4:
            raise OptionError(
                f"Features are so large (norms up to {largest_query:.3g} and {largest_row:.3g}) that inner products "
                "would overflow float32. Scale them, for example to unit length."
            )
        possible, undecided = self._possible(queries, kept, largest_row)
        scores = self._scores_of(queries, kept.indices, possible, largest)  # [q, c]
        scores, indices = order_by_score(scores, kept.indices, self.k)
        if len(undecided):
            score = partial(_scores_of_block, largest=largest)
            scores[undecided], indices[undecided] = self._by_all_scores(queries[undecided], score, self.plan.exact_rows)
        return scores, indices

    def _ready(self, features: Tensor) -> Tensor:
        """Features rounded, on the device, in the dtype of the arithmetic."""
        features = features.to(self.device).to(self.rounded)
        return features if self.device.type == "cuda" else features.to(torch.float32)

    def _blocks(self) -> Iterator[tuple[int, Tensor]]:
        """First row and features [d, D] of all blocks."""
        for start, stop in self.rows.bounds(self.plan.database_rows):
            yield start, self._ready(self.rows.block(start, stop))

    def _candidates(self, queries: Tensor) -> tuple[Kept, float]:
        """A few more rows than k with the highest fast products, and the largest norm of a row."""
        limit = min(max(self.plan.candidates, self.k), len(self.rows))
        kept = Kept(len(queries), limit, self.device)
        buffer = torch.empty(self.plan.query_rows * self.plan.database_rows, device=self.device)
        largest = 0.0
        for start, block in self._blocks():
            largest = max(largest, largest_norm(block, "database", start))
            for chunk in _chunks(len(queries), self.plan.query_rows):
                asking = queries[chunk]
                scores = buffer[: len(asking) * len(block)].view(len(asking), len(block))  # [q, d]
                fast_products(asking, block, scores)
                kept.merge_candidates(chunk, scores, start)
            kept.advance(len(block))
        return kept, largest

    def _possible(self, queries: Tensor, kept: Kept, largest_row: float) -> tuple[Tensor, Tensor]:
        """Which candidates may be among the best k, and the queries for which that does not say enough.

        A row can be among the best k only if its fast product is within twice the error of the k-th best one. If all
        that were kept are, others may be too, and the query is undecided; that takes many nearly equal rows.

        Returns:
            bool [q, c], without those of undecided queries; int64 [u] the undecided queries.
        """
        norms = torch.linalg.vector_norm(queries, dim=1, dtype=torch.float32)  # [q]
        error = fast_error(self.rows.dim, queries.dtype, self.device) * largest_row * norms + underflow(self.rows.dim)
        reach = kept.scores.topk(self.k, 1).values[:, -1] - 2 * error  # [q]
        possible = kept.scores >= reach[:, None]  # [q, c]
        if kept.limit == len(self.rows):
            return possible, torch.empty(0, dtype=torch.int64, device=self.device)
        undecided = possible.all(1)  # [q]
        return possible & ~undecided[:, None], undecided.nonzero()[:, 0]

    def _scores_of(self, queries: Tensor, indices: Tensor, wanted: Tensor, largest: float) -> Tensor:
        """The scores of some pairs, read in the order of the database.

        Args:
            queries: [q, D].
            indices: int64 [q, c].
            wanted: bool [q, c].
            largest: At least the product of the norms of any pair.

        Returns:
            float32 [q, c], -inf where not wanted.
        """
        scores = torch.full((indices.numel(),), float("-inf"), device=self.device)
        spots = wanted.view(-1).nonzero()[:, 0]  # [P] in the flattened table
        pairs = indices.view(-1)[spots]  # [P] rows of the database
        order = pairs.argsort()
        spots, pairs = spots[order], pairs[order]
        asking = spots // indices.shape[1]  # [P] queries
        bounds = list(self.rows.bounds(self.plan.database_rows))
        ends = torch.searchsorted(pairs, torch.tensor([stop for _, stop in bounds], device=self.device)).tolist()
        step, place, done = pairs_at_once(self.rows.dim, self.device), exact_device(self.device), 0
        for (start, stop), end in zip(bounds, ends, strict=True):
            for at in range(done, end, step):
                part = slice(at, min(at + step, end))
                rows = self._ready(self.rows.take(start, stop, pairs[part] - start))  # [p, D]
                exact = pair_scores(queries.index_select(0, asking[part]).to(place), rows.to(place), largest)
                scores[spots[part]] = exact.to(self.device)
            done = end
        return scores.view(indices.shape)

    def _by_all_scores(self, queries: Tensor, score: _Score, query_rows: int) -> tuple[Tensor, Tensor]:
        """Neighbours by scores that are right as they come.

        Args:
            queries: [q, D].
            score: Of two blocks, and the scores [q] that must be exceeded to matter.
            query_rows: Queries in a block.
        """
        kept = Kept(len(queries), self.k, self.device)
        for start, block in self._blocks():
            if self.similarity is not None:
                largest_norm(block, "database", start)
            for chunk in _chunks(len(queries), query_rows):
                above = kept.scores[chunk, -1] if kept.width == kept.limit else None
                kept.merge_stable(chunk, score(queries[chunk], block, above), start, self.plan.exact_rows)
            kept.advance(len(block))
        return kept.scores, kept.indices

    def _similarities(self, queries: Tensor, block: Tensor, above: Tensor | None) -> Tensor:
        """The caller's similarity of two blocks, checked."""
        del above
        assert self.similarity is not None
        scores = self.similarity(queries, block)
        if scores.shape != (len(queries), len(block)):
            raise OptionError(
                f"The similarity of blocks {list(queries.shape)} and {list(block.shape)} must have the shape "
                f"{[len(queries), len(block)]}, got {list(scores.shape)}."
            )
        scores = scores.to(torch.float32).contiguous()
        if scores.amax().isnan():
            raise OptionError("The similarity function returned NaN for finite features.")
        return scores


def _scores_of_block(queries: Tensor, block: Tensor, above: Tensor | None, largest: float) -> Tensor:
    """`block_scores` where float64 is available."""
    place = exact_device(queries.device)
    above = None if above is None else above.to(place)
    return block_scores(queries.to(place), block.to(place), largest, above).to(queries.device)


def _chunks(count: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, count, size))
