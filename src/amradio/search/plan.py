"""How much memory a search takes, said before it starts, and the chunk sizes that keep to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from amradio.errors import OptionError
from amradio.search.scores import pairs_at_once
from amradio.search.select import TILE

DEFAULT_MEMORY_LIMIT = 2**30

# Products of such blocks run at the full speed of the device; larger ones only leave the cache.
_TARGETS = {"cpu": (1024, 8192), "other": (4096, 16384)}


@dataclass(frozen=True)
class MemoryPlan:
    """Chunk sizes of a search, and the bytes it holds at once at most, beside its arguments and its result.

    Under several processes, all of this is about one of them.

    Attributes:
        num_queries: Q.
        num_rows: N, rows of the database.
        dim: D.
        k: Neighbours.
        pass_rows: Queries for which the database is read once; of each process.
        query_rows: Queries of one matrix product.
        database_rows: Rows of one matrix product.
        exact_rows: Queries that are worked on together where fast products cannot decide.
        candidates: Rows kept for each query until their scores are settled.
        parts: Bytes by purpose.
        limit_bytes: What was allowed.
    """

    num_queries: int
    num_rows: int
    dim: int
    k: int
    pass_rows: int
    query_rows: int
    database_rows: int
    exact_rows: int
    candidates: int
    parts: Mapping[str, int]
    limit_bytes: int

    @property
    def total_bytes(self) -> int:
        """What the search holds at most."""
        return sum(self.parts.values())

    @property
    def passes(self) -> int:
        """How often the database is read."""
        return -(-self.num_queries // self.pass_rows)

    @property
    def result_bytes(self) -> int:
        """Scores and indices that the search returns."""
        return self.num_queries * self.k * 12

    @property
    def matrix_bytes(self) -> int:
        """What all scores together would take in float32; they are never held."""
        return self.num_queries * self.num_rows * 4

    def describe(self) -> str:
        """The plan in a few lines of text."""
        reads = f"{self.passes} times, for {self.pass_rows:,} queries each" if self.passes > 1 else "once"
        parts = ", ".join(f"{name} {_mib(size)}" for name, size in self.parts.items())
        return (
            f"{self.num_queries:,} queries x {self.num_rows:,} rows x {self.dim} features, k = {self.k}: "
            f"{_mib(self.total_bytes)} of {_mib(self.limit_bytes)} allowed, beside {_mib(self.result_bytes)} of "
            f"results; all scores at once would be {_mib(self.matrix_bytes)}.\n"
            f"The database is read {reads}; blocks of {self.query_rows:,} queries x {self.database_rows:,} rows.\n"
            f"At once: {parts}."
        )


def plan_memory(
    num_queries: int,
    num_rows: int,
    dim: int,
    k: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    memory_limit_bytes: int = DEFAULT_MEMORY_LIMIT,
    world_size: int = 1,
    shared_queries: bool = False,
) -> MemoryPlan:
    """Choose chunk sizes for a search.

    Args:
        num_queries: Q; under several processes, of the one that has most.
        num_rows: N, rows of the database; under several processes, of the largest part.
        dim: D.
        k: Neighbours.
        dtype: To which features are rounded.
        device: Where scores are computed.
        memory_limit_bytes: What may be held at once, beside the arguments and the result. On a GPU this is memory of
            the GPU, and a small share of it (blocks on their way) of the CPU.
        world_size: Processes that hold a part of the database each.
        shared_queries: Whether all processes ask the same.

    Returns:
        The plan. What a similarity function of the caller allocates within itself is not in it.

    Raises:
        OptionError: The limit is too small for any chunk size.
    """
    candidates = min(k + max(8, k // 4), max(num_rows, 1))
    device = torch.device(device)
    query_rows, database_rows = _TARGETS["cpu" if device.type == "cpu" else "other"]
    sizes = {
        "pass_rows": max(num_queries, 1),
        "query_rows": max(min(query_rows, num_queries * (1 if shared_queries else world_size)), 1),
        "database_rows": max(min(database_rows, num_rows), 1),
    }

    def parts(sizes: Mapping[str, int]) -> dict[str, int]:
        asked = sizes["pass_rows"] * (1 if shared_queries else world_size)
        found = _parts(
            asked=asked,
            query_rows=min(sizes["query_rows"], asked),
            database_rows=sizes["database_rows"],
            dim=dim,
            candidates=candidates,
            pair_bytes=pairs_at_once(dim, device) * dim * 8,
            half=dtype != torch.float32,
        )
        if world_size > 1:
            queries = 0 if shared_queries else 3 * asked * dim * 4
            found["exchange"] = queries + (2 * world_size + 6) * asked * k * 12
        return found

    while (total := sum(parts(sizes).values())) > memory_limit_bytes:
        halved = {name: max(size // 2, 1) for name, size in sizes.items()}
        costs = {name: sum(parts({**sizes, name: halved[name]}).values()) for name in sizes}
        best = min(costs, key=lambda name: costs[name])
        if costs[best] >= total:
            raise OptionError(
                f"memory_limit_bytes={memory_limit_bytes:,} is too small: even one query at a time against one row at "
                f"a time, with {dim} features and k = {k}, needs {total:,} bytes."
            )
        sizes[best] = halved[best]
    asked = sizes["pass_rows"] * (1 if shared_queries else world_size)
    sizes["query_rows"] = min(sizes["query_rows"], asked)
    return MemoryPlan(
        num_queries=num_queries,
        num_rows=num_rows,
        dim=dim,
        k=k,
        **sizes,
        exact_rows=_exact_rows(sizes["query_rows"]),
        candidates=candidates,
        parts=parts(sizes),
        limit_bytes=memory_limit_bytes,
    )


def _exact_rows(query_rows: int) -> int:
    return max(query_rows // 8, 1)


def _parts(
    *, asked: int, query_rows: int, database_rows: int, dim: int, candidates: int, pair_bytes: int, half: bool
) -> dict[str, int]:
    """Bytes by purpose. The factors are the sizes of the tensors that are alive together at the worst moment."""
    looked_at = min(database_rows, (TILE + 1) * candidates)  # columns that get a second look
    exact_rows = _exact_rows(query_rows)
    return {
        "queries": asked * dim * (6 if half else 4),
        "candidates": asked * (candidates * 64 + 64),
        # as stored, rounded, in float32; or in float32, and in float64 for exact scores
        "database block": database_rows * dim * 16,
        # float32 scores, those of the rows that change, tile maxima; places and keys of what gets a second look
        "scores": query_rows * (database_rows * 10 + looked_at * 32 + candidates * 48),
        "exact scores": exact_rows * (database_rows * 96 + dim * 8),
        "pairs": 4 * pair_bytes,
    }


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
