"""What the adapters of approximate search libraries share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amradio.errors import OptionError
from amradio.search.neighbours import Neighbours
from amradio.search.rows import Rows, largest_norm

_BLOCK_BYTES = 2**26


def float_blocks(rows: Rows) -> Iterator[np.ndarray[Any, np.dtype[np.float32]]]:
    """The database in blocks, float32 [d, D] in C order, checked for NaN."""
    for start, stop in rows.bounds(block_rows(rows)):
        yield _float_array(rows.block(start, stop), "database", start)


def block_rows(rows: Rows) -> int:
    """Rows of a block."""
    return max(_BLOCK_BYTES // (4 * rows.dim), 1)


def sample_rows(rows: Rows, count: int, seed: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Rows to train on: all, or a random sample in the order of the database.

    Args:
        rows: The database.
        count: At most so many.
        seed: The sample is a function of it and of the number of rows.

    Returns:
        float32 [min(count, N), D].
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(rows), generator=generator)[:count].sort().values  # [n]
    parts = []
    for start, stop in rows.bounds(block_rows(rows)):
        first, last = torch.searchsorted(chosen, torch.tensor([start, stop])).tolist()
        if last > first:
            parts.append(_float_array(rows.take(start, stop, chosen[first:last] - start), "training sample", first))
    return np.concatenate(parts)


def query_array(queries: Tensor, dim: int, k: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Queries as float32 [Q, D] in C order, checked.

    Raises:
        OptionError: Their shape does not fit, one holds NaN, or k is below 1.
    """
    if queries.ndim != 2 or queries.shape[1] != dim:
        raise OptionError(f"Queries must have the shape [Q, {dim}] as the index was built, got {list(queries.shape)}.")
    if k < 1:
        raise OptionError(f"k must be at least 1, got {k}.")
    return _float_array(queries, "queries", 0)


def as_neighbours(scores: Any, indices: Any, missing: Any, k: int, device: torch.device) -> Neighbours:
    """What a library returned, with the places that it could not fill marked.

    Args:
        scores: [Q, n] with n at most k.
        indices: [Q, n].
        missing: bool [Q, n].
        k: What was asked for.
        device: Where the result goes.
    """
    found = Neighbours(torch.full((len(scores), k), float("-inf")), torch.full((len(scores), k), -1, dtype=torch.int64))
    width = scores.shape[1]
    found.scores[:, :width] = torch.from_numpy(np.where(missing, np.float32("-inf"), scores))
    found.indices[:, :width] = torch.from_numpy(np.where(missing, -1, indices.astype(np.int64)))
    return Neighbours(found.scores.to(device), found.indices.to(device))


def require_rows(rows: Rows) -> None:
    """Refuse an empty database."""
    if len(rows) == 0:
        raise OptionError("The database has no rows; there is nothing to make an index of.")


def _float_array(features: Tensor, name: str, first: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    features = features.detach().to("cpu", torch.float32).contiguous()
    largest_norm(features, name, first)
    return features.numpy()
