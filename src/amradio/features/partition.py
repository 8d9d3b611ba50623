"""Shards: runs of positions that are computed, stored and handed to processes as one piece."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from amradio.errors import OptionError

_WANTED_SHARDS = 128  # so many that even dozens of processes get nearly even shares
_LARGEST_SHARD = 1024


@dataclass(frozen=True)
class Partition:
    """Positions 0 to count in shards of one size; the last one may be shorter.

    What a shard holds depends on these two numbers only, not on how many processes there are or which of them is
    killed.

    Attributes:
        count: Of positions.
        size: Of a shard.
    """

    count: int
    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise OptionError(f"A shard must have at least 1 picture, got {self.size}.")

    def __len__(self) -> int:
        """How many shards there are."""
        return -(-self.count // self.size)

    def positions(self, shard: int) -> range:
        """The positions of a shard."""
        return range(shard * self.size, min((shard + 1) * self.size, self.count))

    def stream(self, shards: Sequence[int]) -> np.ndarray:
        """The positions of some shards, one after the other: int64 [n]."""
        parts = [np.arange(span.start, span.stop) for span in map(self.positions, shards)]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)


def balanced_shard_size(count: int, batch_size: int) -> int:
    """Choose a shard size for results that are held in memory, where it matters only for how evenly work is split.

    Args:
        count: Of pictures.
        batch_size: Most pictures in one forward pass.

    Returns:
        A multiple of `batch_size`, at least 4 of them, so that batches of pictures of one size are full.
    """
    wanted = min(count // _WANTED_SHARDS, _LARGEST_SHARD)
    return max(wanted // batch_size, 4) * batch_size
