"""Random numbers of the pictures that go into a memory: each picture's own, or all from one stream."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from amradio.evals.in_context.transforms import Change, draw_change

if TYPE_CHECKING:
    from amradio.evals.in_context.config import InContextConfig
    from amradio.evals.in_context.loader import ReadPair
    from amradio.images.segmentation import SegmentationSet


@dataclass(frozen=True)
class Drawn:
    """A picture and what was drawn for it.

    Attributes:
        pair: The picture and its mask.
        change: Of colours and frame.
        noise: float32 [P] in [0, 1), by which patches are chosen; None where a protocol draws none.
    """

    pair: ReadPair
    change: Change = Change()  # noqa: RUF009  immutable
    noise: Tensor | None = None


class PictureDraws:
    """Numbers that are a function of seed, id of the picture and epoch, so that order and company do not matter.

    Args:
        train: The pictures.
        config: Seed and augmentation.
    """

    needs_all = False
    """Whether the pictures before one must be drawn for as well."""

    def __init__(self, train: SegmentationSet, config: InContextConfig) -> None:
        self._train = train
        self._config = config

    def order(self, epoch: int) -> list[int]:
        """The positions of an epoch's pictures; called once an epoch, before its draws."""
        del epoch
        return list(range(len(self._train)))

    def draw(self, epoch: int, pairs: Iterable[ReadPair]) -> Iterator[Drawn]:
        """Draw for pictures of an epoch."""
        for pair in pairs:
            if pair.size is None or pair.target is None:
                yield Drawn(pair)
                continue
            change = Change()
            if self._config.augmentation != "none":
                change = draw_change(pair.size, pair.target, self._generator(pair, epoch, "change"))
            yield Drawn(pair, change, torch.rand(pair.patches, generator=self._generator(pair, epoch, "patches")))

    def _generator(self, pair: ReadPair, epoch: int, purpose: str) -> torch.Generator:
        key = repr((self._config.seed, pair.sample.id, epoch, purpose))
        digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


class StreamDraws:
    """Numbers from one generator, in the order of the published code without worker processes.

    A pass over a set begins with a number that seeds workers; shuffling draws a seed of its own. In each batch come the
    changes of all pictures, and then, if patches are chosen, a number for each patch.

    Args:
        train: The pictures.
        config: Seed, augmentation, protocol, and whether patches are chosen.
    """

    needs_all = True

    def __init__(self, train: SegmentationSet, config: InContextConfig) -> None:
        self._count = len(train)
        self._config = config
        self._batch = config.used_protocol.stream_batch
        self._generator = torch.Generator().manual_seed(config.seed)

    def order(self, epoch: int) -> list[int]:
        """See `PictureDraws.order`; epochs follow one another."""
        del epoch
        self._draw_seed()
        if self._config.protocol.randomness != "shuffled-stream":
            return list(range(self._count))
        shuffling = torch.Generator().manual_seed(self._draw_seed())
        order: list[int] = torch.randperm(self._count, generator=shuffling).tolist()
        return order

    def draw(self, epoch: int, pairs: Iterable[ReadPair]) -> Iterator[Drawn]:
        """Draw for the pictures of an epoch, from its first one on."""
        del epoch
        stream = iter(pairs)
        while batch := list(itertools.islice(stream, self._batch)):
            changes = [self._change(pair) for pair in batch]
            counts = [pair.patches for pair in batch]
            noises: Any = [None] * len(batch)
            if self._config.limited:
                noises = torch.rand(sum(counts), generator=self._generator).split(counts)
            yield from map(Drawn, batch, changes, noises)

    def _change(self, pair: ReadPair) -> Change:
        if self._config.augmentation == "none" or pair.size is None or pair.target is None:
            return Change()
        return draw_change(pair.size, pair.target, self._generator)

    def _draw_seed(self) -> int:
        return int(torch.empty((), dtype=torch.int64).random_(generator=self._generator))


Draws = PictureDraws | StreamDraws


def make_draws(train: SegmentationSet, config: InContextConfig) -> Draws:
    """The kind of numbers that a config asks for."""
    return StreamDraws(train, config) if config.protocol.is_stream else PictureDraws(train, config)
