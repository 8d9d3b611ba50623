"""Batches of one shape out of a mixed stream, and the stream's order back again. Pure functions on iterators.

Memory is bounded by the look-ahead: an item waits for others of its shape only until the stream is `look_ahead` items
ahead of it, so that at most this many items wait here, and at most this many results (and one batch) in `in_order`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def batches_by_shape(
    items: Iterable[T],
    shape: Callable[[T], Hashable],
    batch_size: int,
    look_ahead: int,
    shard_size: int | None = None,
) -> Iterator[list[T]]:
    """Group a stream into lists of equal shape. Which items come together depends on nothing but their shapes.

    Args:
        items: Any stream; read lazily.
        shape: What items of one batch have in common.
        batch_size: Longest list.
        look_ahead: How many items may be read after one before its list is given out, full or not.
        shard_size: No list holds items from both sides of a multiple of this, so that the lists of a shard are the same
            whatever else is in the stream; None: there are no such borders.

    Yields:
        Lists of 1 to `batch_size` items, each in the stream's order; every item exactly once.
    """
    # Dicts keep the order of insertion, which is the order of the lists' first items: the first list is the oldest.
    waiting: dict[Hashable, list[T]] = {}
    born: dict[Hashable, int] = {}
    for position, item in enumerate(items):
        if shard_size is not None and position % shard_size == 0:
            yield from waiting.values()
            waiting.clear()
            born.clear()
        key = shape(item)
        born.setdefault(key, position)
        waiting.setdefault(key, []).append(item)
        if len(waiting[key]) == batch_size:
            del born[key]
            yield waiting.pop(key)
        while born and position - next(iter(born.values())) >= look_ahead:
            oldest = next(iter(born))
            del born[oldest]
            yield waiting.pop(oldest)
    yield from waiting.values()


def in_order(items: Iterable[T], position: Callable[[T], int]) -> Iterator[T]:
    """Bring items back into order as early as possible.

    Args:
        items: In any order; their positions are 0, 1, 2, ... without gaps.
        position: Of an item.

    Yields:
        The items by rising position.
    """
    early: dict[int, T] = {}
    turn = 0
    for item in items:
        early[position(item)] = item
        while turn in early:
            yield early.pop(turn)
            turn += 1
