"""Random numbers of a batch that is spread over processes and micro-batches: the same as those of the whole batch."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from amradio.distill.student import Student
from amradio.models.vit import VisionTransformer


class Draw(NamedTuple):
    """Where the random numbers of a part of a batch come from.

    Attributes:
        seed: Of the batch of all processes.
        start: Position of the part's first picture in that batch.
        total: Size of that batch.
    """

    seed: int
    start: int
    total: int


class BatchDraws:
    """Uniform numbers for a part of a batch. Each part gets the rows that one process would draw for all at once.

    Args:
        seed: Of the batch.
        start: Position of the part's first picture.
        total: Pictures of the whole batch.
    """

    def __init__(self, seed: int, start: int, total: int) -> None:
        self.start, self.total = start, total
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        """Draw the next numbers.

        Args:
            shape: (b, ...): b pictures of the part.

        Returns:
            float32 of that shape in [0, 1), on the CPU.
        """
        drawn = torch.rand((self.total, *shape[1:]), generator=self._generator)  # [total, ...]
        return drawn[self.start : self.start + shape[0]]


def positions_from(student: Student, draws: BatchDraws) -> AbstractContextManager[None]:
    """Let the position crops of a student's forward passes be drawn from `draws`.

    Args:
        student: Whose patch generator draws; other trunks than transformers draw nothing.
        draws: What it draws from.
    """
    trunk = student.radio.model
    return trunk.patch_generator.drawing_from(draws) if isinstance(trunk, VisionTransformer) else nullcontext()
