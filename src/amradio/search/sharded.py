"""Exact search over processes that hold a part of the database each.

Each process asks in turn for a bounded number of its queries; every one answers from its part, and the partial answers
are merged by score and index. Scores do not depend on who computes them, so the result is that of one process.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from amradio.errors import AmradioError, OptionError
from amradio.search.engine import ExactSearch, Similarity, check_arguments, check_k
from amradio.search.neighbours import Neighbours, empty_neighbours
from amradio.search.plan import MemoryPlan, plan_memory
from amradio.search.rows import Database, Rows, common_dtype, largest_norm
from amradio.search.select import order_by_score

if TYPE_CHECKING:
    from amradio.distributed import Group

_NO_ROW = torch.iinfo(torch.int64).max  # fills up short answers; sorts behind every row


@dataclass(frozen=True)
class _Share:
    """What a process says about itself before the search starts."""

    queries: int
    rows: int
    dim: int
    query_dtype: torch.dtype
    row_dtype: torch.dtype
    offset: int | None
    options: tuple[object, ...]


def sharded_top_k(
    queries: Tensor,
    database: Database,
    k: int,
    *,
    similarity: Similarity | None,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    memory_limit_bytes: int,
    plan: MemoryPlan | None,
    group: Group,
    shared_queries: bool,
    offset: int | None,
) -> Neighbours:
    """`top_k` under a group; every process calls it. See there."""
    rows, shares = _introduce(queries, database, group, offset, (k, dtype, memory_limit_bytes, plan, shared_queries))
    check_k(k, sum(share.rows for share in shares))
    if shared_queries and len({share.queries for share in shares}) > 1:
        raise OptionError(
            "With shared_queries every process passes the same queries; the processes passed "
            f"{[share.queries for share in shares]}."
        )
    own = shares[group.rank]
    rounded = common_dtype(_promoted(s.query_dtype for s in shares), _promoted(s.row_dtype for s in shares), dtype)
    target = torch.device(device) if device is not None else group.device
    plan = plan or plan_memory(
        max(share.queries for share in shares),
        max(share.rows for share in shares),
        own.dim,
        k,
        dtype=rounded,
        device=target,
        memory_limit_bytes=memory_limit_bytes,
        world_size=group.world_size,
        shared_queries=shared_queries,
    )
    search = ExactSearch(rows, min(k, len(rows)), plan, target, rounded, similarity)
    first_row = _first_row(shares, group.rank)
    result = empty_neighbours(len(queries), k, queries.device)
    for start in range(0, max(share.queries for share in shares), plan.pass_rows):
        part = slice(start, start + plan.pass_rows)
        asked, mine = _ask(queries[part].to(rounded), group, shared_queries)
        scores, indices = _answer(search, asked, k, first_row, group)
        scores = torch.cat([s[mine] for s in group.all_gather_rows(scores)], 1)  # [q, W * k]
        indices = torch.cat([i[mine] for i in group.all_gather_rows(indices)], 1)
        result.scores[part], result.indices[part] = order_by_score(scores, indices, k)
    return result


def _introduce(
    queries: Tensor, database: Database, group: Group, offset: int | None, options: tuple[object, ...]
) -> tuple[Rows, list[_Share]]:
    """Check the arguments of all processes, so that none waits for one that has given up."""
    rows, share, error = None, None, None
    try:
        rows = check_arguments(queries, database)
        largest_norm(queries, "queries")
        share = _Share(len(queries), len(rows), rows.dim, queries.dtype, rows.dtype, offset, options)
    except AmradioError as e:
        error = str(e)
    said = group.all_gather_objects((share, error))
    _raise_first([error for _, error in said])
    shares: list[_Share] = [share for share, _ in said]
    for rank, other in enumerate(shares):
        if (other.dim, other.options) != (shares[0].dim, shares[0].options):
            raise OptionError(
                f"Processes 0 and {rank} search with different options: {shares[0].dim} features and "
                f"{shares[0].options} against {other.dim} and {other.options} (k, dtype, memory limit, plan, "
                "shared_queries)."
            )
    _first_row(shares, group.rank)  # refuses what overlaps, on every process
    assert rows is not None
    return rows, shares


def _first_row(shares: list[_Share], rank: int) -> int:
    """The global number of a process's first row."""
    given = [share.offset for share in shares if share.offset is not None]
    if not given:
        return sum(share.rows for share in shares[:rank])
    if len(given) < len(shares):
        raise OptionError("Either every process gives an offset or none does.")
    spans = sorted((offset, offset + share.rows) for offset, share in zip(given, shares, strict=True) if share.rows)
    for (_, end), (begin, _) in itertools.pairwise(spans):
        if begin < end:
            raise OptionError(f"Parts of the database overlap: one ends before row {end}, another begins at {begin}.")
    return given[rank]


def _ask(queries: Tensor, group: Group, shared: bool) -> tuple[Tensor, slice]:
    """The queries of all processes in this round, and which of them are this one's."""
    if shared:
        return queries, slice(0, len(queries))
    parts = group.all_gather_rows(queries)
    before = sum(len(part) for part in parts[: group.rank])
    return torch.cat(parts), slice(before, before + len(queries))


def _answer(search: ExactSearch, asked: Tensor, k: int, first_row: int, group: Group) -> tuple[Tensor, Tensor]:
    """The best k of this process's part for all that is asked, filled up with -inf; errors reach every process."""
    scores = torch.full((len(asked), k), float("-inf"), device=search.device)
    indices = torch.full((len(asked), k), _NO_ROW, device=search.device)
    error = None
    try:
        if search.k:
            scores[:, : search.k], found = search.run(asked)
            indices[:, : search.k] = found + first_row
    except AmradioError as e:
        error = str(e)
    _raise_first(group.all_gather_objects(error))
    return scores.to(asked.device), indices.to(asked.device)


def _raise_first(errors: list[str | None]) -> None:
    for rank, error in enumerate(errors):
        if error is not None:
            raise OptionError(f"Process {rank}: {error}")


def _promoted(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    return functools.reduce(torch.promote_types, dtypes)
