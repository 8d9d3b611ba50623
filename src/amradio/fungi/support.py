"""The support index: unit patch features of other pictures, among which the negatives of a token are found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from amradio.errors import OptionError
from amradio.fungi.wrapper import tensor_digest
from amradio.search import Neighbours, top_k

Negatives = Literal["neighbours", "interleaved"]
Search = Callable[[Tensor, int], Neighbours]
"""Queries [Q, D] and k to neighbours [Q, k], such as the method ``search`` of an index of `amradio.search`."""

PUBLISHED_NEIGHBOURS = 5


@dataclass(frozen=True)
class SupportIndex:
    """Rows to draw negatives from, and how they are found.

    Attributes:
        rows: [M, D] on any device, in any floating point dtype.
        search: Finds the rows nearest to queries by inner product; None: the exact search.
        neighbours: How many neighbours the original's index is asked for, whatever number of negatives is used. It
            matters to ``interleaved`` negatives, which mix all of them.
        search_name: What `search` is, for records.

    Raises:
        OptionError: There are fewer rows than neighbours.
    """

    rows: Tensor
    search: Search | None = None
    neighbours: int = PUBLISHED_NEIGHBOURS
    search_name: str | None = None

    def __post_init__(self) -> None:
        if self.rows.ndim != 2:
            raise OptionError(f"The rows of a support index are [M, D], got {list(self.rows.shape)}.")
        if not 1 <= self.neighbours <= len(self.rows):
            raise OptionError(
                f"A support index of {len(self.rows)} rows cannot give {self.neighbours} neighbours of each token."
            )

    @property
    def dim(self) -> int:
        """D."""
        return self.rows.shape[1]

    @cached_property
    def record(self) -> dict[str, Any]:
        """Number, width and digest of the rows, and how they are searched, as JSON can hold it."""
        named = self.search_name or getattr(self.search, "__qualname__", type(self.search).__qualname__)
        return {
            "rows": len(self.rows),
            "sha256": tensor_digest(self.rows),
            "search": "exact" if self.search is None else named,
            "neighbours": self.neighbours,
        }

    def find(self, queries: Tensor, k: int) -> Neighbours:
        """The k nearest rows of queries [Q, D] of any length."""
        return top_k(queries, self.rows, k) if self.search is None else self.search(queries, k)

    def negatives(self, queries: Tensor, count: int, kind: Negatives) -> tuple[Tensor, Tensor]:
        """Negatives of some tokens.

        Args:
            queries: [Q, D].
            count: n, negatives of a token.
            kind: ``neighbours``: the n nearest rows. ``interleaved``: what the original takes for that (see
                `interleave`).

        Returns:
            float32 [Q, n, D] on the device of the queries, and bool [Q, n]: which were found (approximate indices may
            find fewer).

        Raises:
            OptionError: More are asked for than there are neighbours.
        """
        wanted = count if kind == "neighbours" else self.neighbours
        if count > wanted or wanted > len(self.rows):
            raise OptionError(
                f"{count} negatives of each token were asked for, and the support index gives "
                f"{min(self.neighbours if kind == 'interleaved' else len(self.rows), len(self.rows))} neighbours."
            )
        indices = self.find(queries.detach(), wanted).indices  # [Q, K]
        found = indices >= 0
        rows = self.rows[indices.clamp(min=0).to(self.rows.device)].to(queries.device, torch.float32)  # [Q, K, D]
        found = found.to(queries.device)
        if kind == "neighbours":
            return rows, found
        return interleave(rows)[:, :count], found.all(1, keepdim=True).expand(-1, count)


def interleave(rows: Tensor) -> Tensor:
    """What the original code takes for the neighbours of a token: its reshape deals their numbers out in turn.

    Of neighbours written one after the other as ``u``, the j-th vector is ``u[j], u[N + j], u[2 N + j], ...``: with
    N = 1 the neighbour, otherwise a mixture of the components of all.

    Args:
        rows: [Q, N, D].

    Returns:
        [Q, N, D].
    """
    q, n, d = rows.shape
    return rows.reshape(q, d, n).transpose(1, 2)  # [Q, N, D]
