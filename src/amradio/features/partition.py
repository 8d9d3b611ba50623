"""Shards: runs of positions that are computed, stored and handed to processes as one piece."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from amradio.errors import OptionError

if TYPE_CHECKING:
    from amradio.distributed import Group
    from amradio.images.dataset import ImageSet

_WANTED_SHARDS = 128  # so many that even dozens of processes get nearly even shares
_FEWEST_SHARDS = 16  # as long as there are as many batches
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


def check_same_set(images: ImageSet, group: Group | None) -> None:
    """Check that all processes opened the same pictures; a share of another set would give wrong numbers.

    Args:
        images: The set of this process.
        group: The processes; None = alone.

    Raises:
        OptionError: They differ; the same on all processes.
    """
    if group is None:
        return
    found = group.all_gather_objects((len(images), images.fingerprint))
    if len(set(found)) > 1:
        other = next(rank for rank, one in enumerate(found) if one != found[0])
        raise OptionError(
            f"The processes do not see the same pictures under {images.name}: process 0 has {found[0][0]} and process "
            f"{other} has {found[other][0]}, or their names, labels, sizes or times of change differ. Give all of them "
            "the same files."
        )


def balanced_shard_size(count: int, batch_size: int) -> int:
    """Choose a shard size for results that are held in memory, where it matters only for how evenly work is split.

    Args:
        count: Of pictures.
        batch_size: Most pictures in one forward pass.

    Returns:
        A multiple of `batch_size`: at least 4 batches of a large set, so that batches of pictures of one size are full;
        fewer of a small one, so that each of a few processes has something to do.
    """
    wanted = min(count // _WANTED_SHARDS, _LARGEST_SHARD)
    batches = max(wanted // batch_size, min(4, max(count // (_FEWEST_SHARDS * batch_size), 1)))
    return batches * batch_size
