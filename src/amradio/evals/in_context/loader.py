"""Pictures with masks, from files to tensors, in threads; the order is that of the set."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor

from amradio.errors import DatasetError, ImageError, ResolutionError
from amradio.evals.in_context.draws import Drawn, Draws
from amradio.evals.in_context.memory import patch_counts
from amradio.evals.in_context.protocol import InContextProtocol
from amradio.evals.in_context.transforms import Change, apply_jitter, resize_exactly, resize_mask, resize_picture
from amradio.images.decode import upright_size

if TYPE_CHECKING:
    from PIL.Image import Image

    from amradio.evals.in_context.config import ScoreAt
    from amradio.images.resize import ResizePolicy
    from amradio.images.segmentation import SegmentationSample, SegmentationSet

A = TypeVar("A")
B = TypeVar("B")


@dataclass(frozen=True)
class ReadOptions:
    """How pictures are read.

    Attributes:
        policy: To which size they are brought.
        snap: Maps (height, width) to the nearest size that the backbone supports.
        patch_size: Pixels between two features.
        max_pixels: Budget of one picture.
        background: RGB colour 0..255 behind transparent parts.
        workers: Threads.
        ahead: Pictures that are held ready.
    """

    policy: ResizePolicy
    snap: Callable[[int, int], tuple[int, int]]
    patch_size: int
    max_pixels: int
    background: tuple[int, int, int]
    workers: int
    ahead: int


@dataclass(frozen=True)
class ReadPair:
    """A picture and its mask as they are in their files, or the reason why not.

    Attributes:
        position: In its set.
        sample: Where both come from.
        size: (height, width) of both; None if the mask is unusable.
        target: (height, width) that it is to be resized to.
        patches: Features that it will have; 0 if there is no target.
        picture: In RGB; None if only sizes were asked for.
        mask: uint8 [H, W].
        reason: Why it is unusable.
    """

    position: int
    sample: SegmentationSample
    size: tuple[int, int] | None = None
    target: tuple[int, int] | None = None
    patches: int = 0
    picture: Image | None = None
    mask: np.ndarray | None = None
    reason: str | None = None


@dataclass(frozen=True)
class ReadyPair:
    """A picture as the backbone sees it.

    Attributes:
        position: In its set.
        sample: Where it comes from.
        size: See `ReadPair`.
        pixels: [3, H, W], uint8, or float32 in [0, 1]; None if it is unusable.
        labels: For a picture of the memory, the pixels of each class in each patch, [P, C]; for one that is scored, its
            mask, uint8 [H, W].
        change: What was done to it.
        noise: See `Drawn`.
        reason: Why it is unusable.
    """

    position: int
    sample: SegmentationSample
    size: tuple[int, int] | None = None
    pixels: Tensor | None = None
    labels: Tensor | None = None
    change: Change = Change()  # noqa: RUF009  immutable
    noise: Tensor | None = None
    reason: str | None = None

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Of the pixels."""
        return None if self.pixels is None else tuple(self.pixels.shape)


def read_pair(position: int, sample: SegmentationSample, options: ReadOptions, *, sizes_only: bool = False) -> ReadPair:
    """Read a picture and its mask; what is wrong with either is noted.

    Args:
        position: In the set.
        sample: Both.
        options: How.
        sizes_only: Read the mask alone, which has the size of the picture.
    """
    pair = ReadPair(position, sample)
    try:
        # The mask first: what is drawn must not depend on whether a process decodes the picture too.
        mask = sample.mask.read()
        size = (mask.shape[0], mask.shape[1])
        target = options.snap(*options.policy.target_size(*size))
        patches = (target[0] // options.patch_size) * (target[1] // options.patch_size)
        pair = replace(pair, size=size, target=target, patches=patches)
        if sizes_only:
            return pair
        picture = sample.image.decode(max_pixels=options.max_pixels, background=options.background)
        if upright_size(picture) != size:
            sample.mask.read(upright_size(picture))  # which says what is wrong
    except (ImageError, DatasetError, ResolutionError) as error:
        return replace(pair, reason=str(error))
    return replace(pair, picture=picture, mask=mask)


def changed(pair: ReadPair, change: Change, protocol: InContextProtocol) -> tuple[Tensor, np.ndarray]:
    """Apply a change to a picture that was read.

    Returns:
        [3, H, W], uint8, or float32 in [0, 1] as protocols that follow published code need it; uint8 [H, W].
    """
    assert pair.picture is not None
    assert pair.mask is not None
    assert pair.target is not None
    picture = apply_jitter(pair.picture, change)
    resize = resize_exactly if protocol.is_stream and change.crop is not None else resize_picture
    mask = resize_mask(pair.mask, pair.target, change.crop, protocol.nearest)
    return resize(picture, pair.target, change.crop), mask


def load_train(
    train: SegmentationSet,
    positions: Sequence[int],
    own: slice,
    epoch: int,
    draws: Draws,
    protocol: InContextProtocol,
    options: ReadOptions,
) -> Iterator[ReadyPair]:
    """Load pictures for the memory.

    Args:
        train: The set.
        positions: Of an epoch's pictures, in order.
        own: Which of these are wanted.
        epoch: Which.
        draws: Crops, colours and so on.
        protocol: About void and sampling of masks.
        options: How they are read.

    Yields:
        Those wanted, in order.
    """
    classes = len(train.class_names)
    first = 0 if draws.needs_all else own.start

    def read(place: int) -> ReadPair:
        position = positions[place]
        return read_pair(position, train[position], options, sizes_only=place < own.start)

    def make(drawn: Drawn) -> ReadyPair:
        pair = drawn.pair
        if pair.reason is not None:
            return ReadyPair(pair.position, pair.sample, reason=pair.reason)
        pixels, mask = changed(pair, drawn.change, protocol)
        counts = patch_counts(torch.from_numpy(mask)[None], options.patch_size, classes, protocol.void)[0]
        return ReadyPair(pair.position, pair.sample, pair.size, pixels, counts, drawn.change, drawn.noise)

    with _pool(options.workers) as pool:
        pairs = _ordered(pool, read, range(first, own.stop), options.ahead)
        wanted = (drawn for i, drawn in enumerate(draws.draw(epoch, pairs), first) if i >= own.start)
        yield from _ordered(pool, make, wanted, options.ahead)


def load_val(
    val: SegmentationSet, own: range, score_at: ScoreAt, protocol: InContextProtocol, options: ReadOptions
) -> Iterator[ReadyPair]:
    """Load pictures that are scored.

    Args:
        val: The set.
        own: Positions of those wanted.
        score_at: Which size their masks have.
        protocol: About sampling of masks.
        options: How they are read.

    Yields:
        Those wanted, in order.
    """

    def load(position: int) -> ReadyPair:
        pair = read_pair(position, val[position], options)
        if pair.reason is not None:
            return ReadyPair(position, pair.sample, reason=pair.reason)
        pixels, mask = changed(pair, Change(), protocol)
        if score_at == "original":
            assert pair.mask is not None
            mask = pair.mask
        return ReadyPair(position, pair.sample, pair.size, pixels, torch.from_numpy(mask))

    with _pool(options.workers) as pool:
        yield from _ordered(pool, load, own, options.ahead)


@contextmanager
def _pool(workers: int) -> Iterator[Executor]:
    pool = ThreadPoolExecutor(workers, thread_name_prefix="amradio-masks")
    try:
        yield pool
    finally:  # also when the consumer stops early
        pool.shutdown(wait=True, cancel_futures=True)


def _ordered(pool: Executor, function: Callable[[A], B], items: Iterable[A], ahead: int) -> Iterator[B]:
    """Results in the order of the items, with a bounded number of them in the making or ready."""
    pending: deque[Future[B]] = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
