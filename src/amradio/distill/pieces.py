"""Saved states in files of bounded size, for transfers that take small files only."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType


class PiecePlanner(DefaultSavePlanner):
    """Plans a state of `torch.distributed.checkpoint` so that no part of it is larger than asked for.

    Larger tensors, or shards of them, are written as several chunks. Such a state is loaded as any other one.

    Args:
        piece_bytes: Most bytes of a part.
    """

    def __init__(self, piece_bytes: int) -> None:
        super().__init__()
        self.piece_bytes = piece_bytes
        self._pieces: dict[tuple[str, torch.Size], tuple[WriteItem, tuple[int, ...]]] = {}

    def create_local_plan(self) -> SavePlan:
        """Plan what this process writes."""
        plan = super().create_local_plan()
        self.plan = dataclasses.replace(plan, items=[part for item in plan.items for part in self._cut(item)])
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Any:
        """The data of one part."""
        key = (write_item.index.fqn, write_item.index.offset)
        if write_item.tensor_data is None or key not in self._pieces:
            return super().resolve_data(write_item)
        whole, start = self._pieces[key]
        tensor: Any = super().resolve_data(whole)
        for dim, (first, length) in enumerate(zip(start, write_item.tensor_data.chunk.sizes, strict=True)):
            tensor = tensor.narrow(dim, first, length)
        return tensor.clone()  # a view would bring all of its storage along

    def _cut(self, item: WriteItem) -> Iterator[WriteItem]:
        data, size = item.tensor_data, item.tensor_storage_size()
        if data is None or size is None or size <= self.piece_bytes:
            yield item
            return
        chunk = data.chunk
        dim = max(range(len(chunk.sizes)), key=lambda i: chunk.sizes[i])
        rows = max(self.piece_bytes * chunk.sizes[dim] // size, 1)  # of a piece
        for first in range(0, chunk.sizes[dim], rows):
            start = [first if i == dim else 0 for i in range(len(chunk.sizes))]
            lengths = list(chunk.sizes)
            lengths[dim] = min(rows, chunk.sizes[dim] - first)
            offsets = torch.Size([a + b for a, b in zip(chunk.offsets, start, strict=True)])
            self._pieces[(item.index.fqn, offsets)] = (item, tuple(start))
            yield dataclasses.replace(
                item,
                index=dataclasses.replace(item.index, offset=offsets),
                type=WriteItemType.SHARD,
                tensor_data=dataclasses.replace(data, chunk=ChunkStorageMetadata(offsets, torch.Size(lengths))),
            )


def bounded_files(tensors: Sequence[Tensor], file_bytes: int) -> tuple[int, int]:
    """How a process keeps its files below a size.

    The writer spreads parts over files so that each gets about as much: at most the mean and one part more. A file is
    half full on average, a part is a quarter of it, and a quarter is left for what describes the parts.

    Args:
        tensors: All that this process may write.
        file_bytes: Bound of a file.

    Returns:
        Number of files, and most bytes of a part.
    """
    total = sum(t.numel() * t.element_size() for t in tensors)
    return max(1, math.ceil(total / (file_bytes // 2))), file_bytes // 4
