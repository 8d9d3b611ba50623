"""Keeping the best k of a stream of blocks of scores, at the price of little more than one look at each score.

A plain ``topk`` of each block costs about as much as the matrix product that makes the block. Here the maxima of small
tiles of columns are taken first: the best k scores lie in the k tiles with the highest maxima, and a tile whose maximum
is not above what is already kept needs no second look.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

TILE = 32  # columns that share a maximum; fewer are slower to reduce
_POSITIONS = 2**32 - 1


class Kept:
    """The best so far of some queries. Blocks come in the order of the database.

    Attributes:
        scores: float32 [Q, limit]; the first `width` columns count.
        indices: int64 [Q, limit] rows of the database.
        width: Columns in use: rows seen so far, at most `limit`.
        limit: How many are kept.
    """

    def __init__(self, count: int, limit: int, device: torch.device) -> None:
        self.scores = torch.empty(count, limit, dtype=torch.float32, device=device)
        self.indices = torch.empty(count, limit, dtype=torch.int64, device=device)
        self.width = 0
        self.limit = limit

    def advance(self, columns: int) -> None:
        """Say that all queries have taken in a block of so many columns."""
        self.width = min(self.limit, self.width + columns)

    def merge_candidates(self, rows: slice, scores: Tensor, first: int) -> None:
        """Take in a block; among equal scores any may be kept, and the kept ones are in no order.

        Args:
            rows: The queries that the block is about.
            scores: float32 [q, d], finite.
            first: Database row of the block's first column.
        """
        held = self.scores[rows, : self.width]  # [q, w]
        lowest = held.amin(1) if self.width == self.limit else None
        best = _best(held, scores, lowest, self.limit, ordered=False)
        if best is not None:
            self._write(rows, best.part, best.keys, best.places, first)

    def merge_stable(self, rows: slice, scores: Tensor, first: int, rows_at_once: int) -> None:
        """Take in a block; the best stay in order, and of equal scores the lower database row comes first.

        Args:
            rows: The queries that the block is about.
            scores: float32 [q, d], without NaN.
            first: Database row of the block's first column.
            rows_at_once: Queries that are worked on together; bounds the memory.
        """
        held, full = self.scores[rows, : self.width], self.width == self.limit  # [q, w]
        changed = torch.arange(len(scores), device=scores.device)
        if full:
            changed = changed[scores.amax(1) > held[:, -1]]  # a score equal to the last has a higher row: too late
        for part in changed.split(rows_at_once):
            old, new = held[part], scores[part]
            old_keys, new_keys = _unique_keys(old, 0), _unique_keys(new, self.width)
            best = _best(old_keys, new_keys, old_keys[:, -1] if full else None, self.limit, ordered=True)
            if best is None:
                continue
            if best.part is not None:
                old, new, part = old[best.part], new[best.part], part[best.part]
            self._write(rows, part, torch.cat([old, new], 1).gather(1, best.places), best.places, first)

    def _write(self, rows: slice, part: Tensor | None, scores: Tensor, places: Tensor, first: int) -> None:
        """Store what was selected from the kept columns followed by those of a block."""
        old = self.indices[rows, : self.width]  # [q, w]
        old = old if part is None else old[part]  # [h, w]
        indices = places + (first - self.width)  # [h, m]
        if self.width:
            from_old = places < self.width
            indices = torch.where(from_old, old.gather(1, places.clamp(max=self.width - 1)), indices)
        columns = scores.shape[1]
        if part is None:
            self.scores[rows, :columns], self.indices[rows, :columns] = scores, indices
        else:
            self.scores[rows, :columns].index_copy_(0, part, scores)
            self.indices[rows, :columns].index_copy_(0, part, indices)


class _Best(NamedTuple):
    """The best keys of some rows.

    Attributes:
        part: int64 [h] the rows; None for all.
        keys: [h, m].
        places: int64 [h, m] in the held keys followed by the block's.
    """

    part: Tensor | None
    keys: Tensor
    places: Tensor


def _best(held: Tensor, block: Tensor, lowest: Tensor | None, limit: int, *, ordered: bool) -> _Best | None:
    """The best of held and new keys together, for the rows where that changes anything.

    Args:
        held: [q, w].
        block: [q, d], contiguous.
        lowest: [q] the lowest of the held ones, if there are as many as may be kept; only keys above it matter.
        limit: How many to keep.
        ordered: Best first.

    Returns:
        The best; None if no key of the block is above the lowest.
    """
    count, columns = block.shape
    keep = min(limit, held.shape[1] + columns)
    tiles = -(-columns // TILE)
    if lowest is None and tiles <= 2 * limit:  # nothing to gain from tiles
        return _best_of_all(held, block, keep, ordered)
    if columns % TILE:  # in the last block only, or in tiny ones
        block = pad(block, (0, tiles * TILE - columns), value=_least(block.dtype))
    maxima = block.view(count, tiles, TILE).amax(2)  # [q, T]
    # With nothing to beat yet: as many keys as there are tiles with such a maximum reach the limit-th highest maximum.
    above, bar = (torch.gt, lowest) if lowest is not None else (torch.ge, maxima.topk(limit, 1).values[:, -1])
    tile = above(maxima, bar[:, None]).view(-1).nonzero()[:, 0]  # [H] tiles that have something to offer
    if len(tile) == 0:
        return None
    if 2 * len(tile) > count * tiles:
        return _best_of_all(held, block, keep, ordered)
    row = tile // tiles  # [H]
    keys = block.view(-1, TILE).index_select(0, tile)  # [H, TILE]
    entry = above(keys, bar.index_select(0, row)[:, None]).view(-1).nonzero()[:, 0]  # [E] keys that do
    row = row[entry // TILE]  # [E]
    column = tile[entry // TILE] % tiles * TILE + entry % TILE  # [E]
    return _best_of_few(held, keys.view(-1)[entry], row, column, keep, ordered)


def _best_of_all(held: Tensor, block: Tensor, keep: int, ordered: bool) -> _Best:
    top = torch.cat([held, block], 1).topk(keep, 1, sorted=ordered)
    return _Best(None, top.values, top.indices)


def _best_of_few(held: Tensor, keys: Tensor, row: Tensor, column: Tensor, keep: int, ordered: bool) -> _Best:
    """The best of held keys and a few others, given as a list [E] in the order of their rows."""
    part, counts = row.unique_consecutive(return_counts=True)  # [h] each
    ends = counts.cumsum(0)
    compact = torch.repeat_interleave(counts)  # [E] 0 to h - 1
    slot = torch.arange(len(row), device=row.device) - (ends - counts)[compact] + held.shape[1]  # [E]
    width = held.shape[1] + int(counts.max())
    pool = torch.full((len(part), width), _least(keys.dtype), dtype=keys.dtype, device=keys.device)  # [h, w + n]
    places = torch.arange(width, device=row.device).repeat(len(part), 1)  # [h, w + n]
    pool[:, : held.shape[1]] = held.index_select(0, part)
    pool[compact, slot] = keys
    places[compact, slot] = column + held.shape[1]
    top = pool.topk(keep, 1, sorted=ordered)
    return _Best(part, top.values, places.gather(1, top.indices))


def _unique_keys(scores: Tensor, first_place: int) -> Tensor:
    """int64 keys in the order of the scores, of equal ones the earlier column higher; no two of a row are equal.

    The upper half holds the score: the bits of a float32 are in the order of its values, those of negative ones turned
    around. The lower half counts columns down.
    """
    bits = (scores + 0.0).view(torch.int32)  # -0.0 becomes 0.0, its equal
    rank = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    places = torch.arange(first_place, first_place + scores.shape[1], device=scores.device)
    return (rank << 32) | (_POSITIONS - places)


def _least(dtype: torch.dtype) -> float:
    return float("-inf") if dtype.is_floating_point else torch.iinfo(dtype).min


def order_by_score(scores: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The best k columns of each row: by score, of equal scores by index.

    Args:
        scores: float32 [q, n].
        indices: int64 [q, n], different in each row.
        k: At most n.

    Returns:
        Scores and indices, [q, k] each.
    """
    indices, by_index = indices.sort(1)
    scores = (scores + 0.0).gather(1, by_index)  # -0.0 equals 0.0, and must not come after it
    scores, by_score = scores.sort(dim=1, descending=True, stable=True)
    return scores[:, :k].contiguous(), indices.gather(1, by_score)[:, :k].contiguous()
