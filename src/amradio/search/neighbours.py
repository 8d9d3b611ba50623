"""What a search returns, and how much of the truth an approximate one finds."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from amradio.errors import OptionError

_COMPARISONS_AT_ONCE = 2**24


class Neighbours(NamedTuple):
    """The nearest rows of a database for each query.

    Attributes:
        scores: float32 [Q, k] best first; -inf where an approximate index found fewer than k rows.
        indices: int64 [Q, k] rows of the database; -1 where an approximate index found fewer than k rows.
    """

    scores: Tensor
    indices: Tensor


def recall_at_k(found: Neighbours, exact: Neighbours) -> float:
    """Share of the true neighbours that an approximate search found.

    Rows are compared by index: of rows with equal scores at the end of the list, the exact search takes those with the
    lowest index, and an index that returns another of them is counted as if it had missed one.

    Args:
        found: What the approximate search returned, [Q, k'] with any k'.
        exact: What the exact search returned, [Q, k].

    Returns:
        Mean over queries of |found and exact| / k, in [0, 1].

    Raises:
        OptionError: The two do not answer the same number of queries, or there is none.
    """
    if len(found.indices) != len(exact.indices) or exact.indices.numel() == 0:
        raise OptionError(
            f"Recall compares the answers to the same queries, got {tuple(found.indices.shape)} found and "
            f"{tuple(exact.indices.shape)} exact indices."
        )
    count, k = exact.indices.shape
    step = max(_COMPARISONS_AT_ONCE // (k * max(found.indices.shape[1], 1)), 1)
    truth = exact.indices.to(found.indices.device)
    hits = 0
    for start in range(0, count, step):
        rows = slice(start, start + step)
        same = truth[rows, :, None] == found.indices[rows, None, :]  # [q, k, k']
        hits += int((same.any(2) & (truth[rows] >= 0)).sum())
    return hits / (count * k)


def empty_neighbours(count: int, k: int, device: torch.device) -> Neighbours:
    """Room for the answers to some queries."""
    return Neighbours(
        torch.empty(count, k, dtype=torch.float32, device=device),
        torch.empty(count, k, dtype=torch.int64, device=device),
    )
