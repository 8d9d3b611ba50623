"""Exact nearest neighbours: nothing of size queries x database is ever held, and every result has one right answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from amradio.search.engine import ExactSearch, Similarity, check_arguments, check_k
from amradio.search.neighbours import Neighbours, empty_neighbours
from amradio.search.plan import DEFAULT_MEMORY_LIMIT, MemoryPlan, plan_memory
from amradio.search.rows import Database, common_dtype
from amradio.search.sharded import sharded_top_k

if TYPE_CHECKING:
    from amradio.distributed import Group


def top_k(
    queries: Tensor,
    database: Database,
    k: int,
    *,
    similarity: Similarity | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    memory_limit_bytes: int = DEFAULT_MEMORY_LIMIT,
    plan: MemoryPlan | None = None,
    group: Group | None = None,
    shared_queries: bool = False,
    offset: int | None = None,
) -> Neighbours:
    """Find the k rows of a database with the highest inner product with each query.

    The result is a function of the features alone: chunk sizes, memory limit, threads, device and number of processes
    change no bit of it. A score is the inner product of features rounded to `dtype`, itself rounded to float32 once;
    rows of equal score come in the order of the database. See `amradio.search.scores` for how fast float32 products
    are enough for that.

    Args:
        queries: [Q, D] features, on any device; none is fine. For cosine similarity pass unit vectors on both sides.
        database: [N, D] a tensor, a NumPy array or memory map, or anything with a length whose slices are one of
            these; it may lie on disk, and is read block by block.
        k: Neighbours, 1 to N.
        similarity: Another similarity than the inner product: a function of blocks [q, D] and [d, D] that returns
            [q, d], higher is nearer. Its values are taken as they are (as float32), so the result is independent of
            the chunks if it gives a pair the same value in any two blocks.
        dtype: To which features are rounded: float32, bfloat16 or float16. None: as they are stored (float32 if the two
            sides differ). On a CPU the arithmetic is float32 in any case; scores are added up in float32 or better.
        device: Where scores are computed. None: the process's device under a group, else where the database is, or
            the queries if it is on the CPU.
        memory_limit_bytes: What may be held beside the arguments and the result; see `plan_memory`.
        plan: Chunk sizes from `plan_memory`, instead of the limit.
        group: Processes that hold a part of the database each; every one calls this with its own part and its own
            queries, and gets the neighbours of its queries in the whole database.
        shared_queries: All processes of the group pass the same queries; each gets all results.
        offset: Added to indices. None: 0, and under a group the number of rows in the processes before this one.

    Returns:
        Scores and indices [Q, k], best first, on the device of `queries`.

    Raises:
        OptionError: Shapes, dtypes or k do not fit; a feature or a similarity is NaN or infinite (the message names
            the row); the memory limit is too small. Under a group, every process raises what one of them found.
    """
    if group is not None:
        return sharded_top_k(
            queries,
            database,
            k,
            similarity=similarity,
            dtype=dtype,
            device=device,
            memory_limit_bytes=memory_limit_bytes,
            plan=plan,
            group=group,
            shared_queries=shared_queries,
            offset=offset,
        )
    rows = check_arguments(queries, database)
    check_k(k, len(rows))
    target = torch.device(device or (queries.device if rows.device.type == "cpu" else rows.device))
    rounded = common_dtype(queries.dtype, rows.dtype, dtype)
    plan = plan or plan_memory(
        len(queries), len(rows), rows.dim, k, dtype=rounded, device=target, memory_limit_bytes=memory_limit_bytes
    )
    search = ExactSearch(rows, k, plan, target, rounded, similarity)
    result = empty_neighbours(len(queries), k, queries.device)
    for start in range(0, len(queries), plan.pass_rows):
        part = slice(start, start + plan.pass_rows)
        result.scores[part], result.indices[part] = search.run(queries[part], start)
    if offset:
        result.indices.add_(offset)
    return result
