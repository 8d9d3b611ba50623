"""Filling a memory from training pictures, by one process or by many."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from amradio.errors import DatasetError, OptionError
from amradio.evals.in_context.config import InContextConfig
from amradio.evals.in_context.draws import make_draws
from amradio.evals.in_context.forward import Forward, PatchFeatures
from amradio.evals.in_context.loader import ReadOptions, ReadyPair, load_train
from amradio.evals.in_context.memory import MemoryBank, patches_per_picture, sampling_scores
from amradio.features.bucketing import in_order
from amradio.features.collect import Failure

if TYPE_CHECKING:
    from amradio.distributed import Group
    from amradio.images.segmentation import SegmentationSet

_ROWS_AT_ONCE = 65536  # exchanged between processes, so that little more than the memory itself is held


class Watch(Protocol):
    """What wants to know of pictures and times."""

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Time a stage."""
        ...

    def seen(self, pair: ReadyPair, reason: str | None) -> None:
        """A picture is done, or failed."""
        ...


@dataclass
class PassResult:
    """What went wrong on the way, in one process.

    Attributes:
        failures: Pictures that could not be used.
        not_finite: Ids of pictures with features that are NaN or infinite.
    """

    failures: list[Failure] = field(default_factory=list)
    not_finite: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _PictureRows:
    """Rows from one picture; none from one that failed."""

    order: int
    features: Tensor | None = None  # [n, D]
    counts: Tensor | None = None  # [n, C]
    patch: Tensor | None = None  # [n]
    rank: Tensor | None = None  # [n]
    about: tuple[list[int], list[float]] | None = None


class MemoryBuilder:
    """Fills a memory.

    Args:
        train: The pictures.
        config: What goes in.
        forward: The backbone.
        options: How pictures are read.
        patches: Of each picture, if all have as many.
        normalise: Whether features are scaled to length 1.
        watch: Is told of pictures and times.
    """

    def __init__(
        self,
        train: SegmentationSet,
        config: InContextConfig,
        forward: Forward,
        options: ReadOptions,
        patches: int | None,
        normalise: bool,
        watch: Watch,
    ) -> None:
        self._train = train
        self._config = config
        self._forward = forward
        self._options = options
        self._patches = patches
        self._normalise = normalise
        self._watch = watch
        sizes = [s for s in config.memory_sizes if s is not None]
        shares = [patches_per_picture(s, len(train), None, config.augmentation_epochs) for s in sizes]
        self._most = None if len(sizes) < len(config.memory_sizes) else max(shares)  # patches of a picture; None: all
        self._result = PassResult()

    def build(self, own: range) -> tuple[MemoryBank, PassResult]:
        """Fill the part of one process.

        Args:
            own: Which of the pictures of all epochs, one epoch after the other.

        Returns:
            The rows of these, in order; `MemoryBank.about` is empty.
        """
        each = self._patches or 0  # where pictures differ, room grows
        rows = _Rows(self._config.storage_dtype, len(own) * (each if self._most is None else min(self._most, each)))
        draws = make_draws(self._train, self._config)
        count = len(self._train)
        for epoch in range(self._config.augmentation_epochs):
            start, stop = (min(max(edge - epoch * count, 0), count) for edge in (own.start, own.stop))
            order = draws.order(epoch)
            if start == stop and (stop == 0 or not draws.needs_all):
                continue
            pairs = load_train(
                self._train, order, slice(start, stop), epoch, draws, self._config.protocol, self._options
            )
            places = {position: place for place, position in enumerate(order[start:stop])}
            for picture in in_order(self._rows(pairs, places, epoch), lambda found: found.order):
                rows.append(picture)
        return rows.bank(len(self._train.class_names)), self._result

    def _rows(self, pairs: Iterator[ReadyPair], places: dict[int, int], epoch: int) -> Iterator[_PictureRows]:
        batches = self._forward.batches(pairs)
        while True:
            with self._watch.stage("train_forward"):  # and waiting for pictures
                batch = next(batches, None)
            if batch is None:
                return
            with self._watch.stage("memory"):
                yield from self._of_batch(batch, places, epoch)

    def _of_batch(self, batch: PatchFeatures, places: dict[int, int], epoch: int) -> list[_PictureRows]:
        if batch.features is None:
            found = []
            for pair in batch.pairs:
                reason = pair.reason or batch.reason or ""
                self._fail(pair, reason)
                found.append(_PictureRows(places[pair.position]))
            return found
        counts = torch.stack([pair.labels for pair in batch.pairs if pair.labels is not None])  # [B, P, C]
        chosen, rank, valid = self._choose(batch.pairs, counts)  # [B, n] each
        features, finite = unit_rows(batch.features, self._normalise)
        taken = features.gather(1, chosen.to(features.device)[..., None].expand(-1, -1, features.shape[2]))
        taken = taken.to(self._config.storage_dtype).cpu()  # [B, n, D]
        counts = counts.gather(1, chosen[..., None].expand(-1, -1, counts.shape[2]))  # [B, n, C]
        rows = []
        for i, pair in enumerate(batch.pairs):
            place = places[pair.position]
            if not bool(finite[i]):
                self._result.not_finite.append(pair.sample.id)
                self._watch.seen(pair, None)
                rows.append(_PictureRows(place))
                continue
            keep = valid[i]
            about = _about(pair, epoch)
            whole = bool(keep.all())
            f, c, p, r = (t[i] if whole else t[i][keep] for t in (taken, counts, chosen, rank))
            rows.append(_PictureRows(place, f, c, p, r, about))
            self._watch.seen(pair, None)
        return rows

    def _choose(self, pairs: Sequence[ReadyPair], counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Patches that go in, how early each was chosen, and whether it has a class at all: [B, n] each."""
        b, patches, _ = counts.shape
        if pairs[0].noise is None:
            every = torch.arange(patches).expand(b, -1)
            return every, every, (counts > 0).any(2)
        noise = torch.stack([pair.noise for pair in pairs if pair.noise is not None])  # [B, P]
        scores, order = sampling_scores(counts, noise).sort(dim=1, stable=True)  # [B, P]
        if self._most is not None:
            n = min(self._most, patches)
            return order[:, :n], torch.arange(n).expand(b, -1), scores[:, :n].isfinite()
        rank = torch.empty_like(order).scatter_(1, order, torch.arange(patches).expand(b, -1))
        return torch.arange(patches).expand(b, -1), rank, (counts > 0).any(2)

    def _fail(self, pair: ReadyPair, reason: str) -> None:
        failure = Failure(pair.position, pair.sample.id, pair.sample.image.location, reason)
        self._result.failures.append(failure)
        self._watch.seen(pair, reason)


def unit_rows(features: Tensor, normalise: bool) -> tuple[Tensor, Tensor]:
    """Scale features to length 1.

    Args:
        features: [B, P, D].
        normalise: False leaves their length be.

    Returns:
        float32 [B, P, D], and bool [B]: whether all features of a picture are finite.
    """
    features = features.float()
    norms = torch.linalg.vector_norm(features, dim=2, keepdim=True)  # [B, P, 1]
    finite = norms.isfinite().flatten(1).all(1)
    return features / norms.clamp(min=1e-12) if normalise else features, finite


def check_capacity(config: InContextConfig, pictures: int, patches: int | None) -> list[str]:
    """Check memory sizes and k before any picture is read.

    Args:
        config: The options.
        pictures: In the train set.
        patches: Of each picture, if all have as many.

    Returns:
        Notes for the report; each is warned of as well.

    Raises:
        OptionError: A memory is smaller than the number of pictures, or smaller than k.
    """
    notes = []
    for size in config.memory_sizes:
        share = patches
        if size is not None:
            share = patches_per_picture(size, pictures, patches, config.augmentation_epochs)
            if patches is not None and share > patches:
                capacity = pictures * config.augmentation_epochs * patches
                notes.append(
                    f"A memory of {size:,} patches is larger than all there are: {pictures:,} pictures x "
                    f"{config.augmentation_epochs} epochs x {patches:,} patches = {capacity:,}. It holds these."
                )
                share = patches
        if share is not None:
            check_k(config.k, share * pictures * config.augmentation_epochs)
    for note in notes:
        warnings.warn(note, stacklevel=3)
    return notes


def check_filled(config: InContextConfig, bank: MemoryBank, pictures: int, patch_size: int) -> list[str]:
    """Say which memories could not take as many patches of each picture as they should, where pictures differ in size.

    Args:
        config: The options.
        bank: The largest memory.
        pictures: In the train set.
        patch_size: Pixels between two features.

    Returns:
        Notes for the report; each is warned of as well.
    """
    grids = bank.pictures[:, 2:4] // patch_size
    patches = grids[:, 0] * grids[:, 1]  # [I]
    notes = []
    for size in config.memory_sizes:
        share = 0 if size is None else patches_per_picture(size, pictures, None, config.augmentation_epochs)
        short = int((patches < share).sum())
        if short:
            notes.append(
                f"A memory of {size:,} patches would take {share} of each picture, and {short} of {len(patches)} "
                "pictures have fewer. It holds all of these."
            )
    for note in notes:
        warnings.warn(note, stacklevel=3)
    return notes


def check_k(k: int, rows: int) -> None:
    """Refuse more neighbours than there are.

    Raises:
        OptionError: The message says what to change.
    """
    if k > rows:
        raise OptionError(
            f"k is {k}, and the memory has only {rows:,} patches. Choose a smaller k, or a larger memory."
        )


def gathered(bank: MemoryBank, group: Group | None) -> MemoryBank:
    """The rows of all processes, one process after the other, on each of them."""
    if group is None:
        return bank
    before = [len(part) for part in group.all_gather_rows(bank.pictures[:, :1])][: group.rank]
    names = ("features", "counts", "item", "patch", "rank", "pictures", "jitter")
    widths = group.all_gather_objects(bank.features.shape[1] if len(bank) else 0)
    features = bank.features if len(bank) else bank.features.new_empty(0, max(widths))
    own = {name: getattr(bank, name) for name in names} | {"features": features, "item": bank.item + sum(before)}
    every: dict[str, Any] = {name: _all_rows(tensor, group) for name, tensor in own.items()}
    return MemoryBank(**every)


def _all_rows(rows: Tensor, group: Group) -> Tensor:
    counts = group.all_gather_objects(len(rows))
    starts = [sum(counts[:r]) for r in range(len(counts))]
    every = rows.new_empty(sum(counts), *rows.shape[1:])
    # As bytes, because not every dtype can be sent.
    sent, kept = (t.view(torch.uint8) if t.ndim > 1 else t for t in (rows.contiguous(), every))
    for first in range(0, max(counts), _ROWS_AT_ONCE):
        for start, part in zip(starts, group.all_gather_rows(sent[first : first + _ROWS_AT_ONCE]), strict=True):
            kept[start + first : start + first + len(part)] = part
    return every


def require_rows(bank: MemoryBank, train: SegmentationSet) -> None:
    """Refuse an empty memory.

    Raises:
        DatasetError: No patch has a class.
    """
    if len(bank) == 0:
        raise DatasetError(
            f"No patch of the {len(train):,} training pictures of {train.name} has a class: their masks are void "
            "everywhere. Is void the right meaning of their ids?"
        )


class _Rows:
    """Rows that are written into their final place, so that a large memory is not held twice.

    Args:
        dtype: Of the features.
        capacity: Expected rows; room for more is made when needed.
    """

    def __init__(self, dtype: torch.dtype, capacity: int) -> None:
        self._dtype = dtype
        self._capacity = capacity
        self._tensors: dict[str, Tensor] = {}
        self._count = 0
        self._pictures: list[list[int]] = []
        self._jitter: list[list[float]] = []

    def append(self, rows: _PictureRows) -> None:
        if rows.features is None or rows.about is None:
            return
        n = len(rows.features)
        assert rows.counts is not None
        assert rows.patch is not None
        assert rows.rank is not None
        parts = {
            "features": rows.features,
            "counts": rows.counts,
            "item": torch.full((n,), len(self._pictures), dtype=torch.int32),
            "patch": rows.patch.to(torch.int32),
            "rank": rows.rank.to(torch.int32),
        }
        for name, part in parts.items():
            self._room(name, part)[self._count : self._count + n] = part
        self._count += n
        self._pictures.append(rows.about[0])
        self._jitter.append(rows.about[1])

    def bank(self, classes: int) -> MemoryBank:
        empty = {
            "features": torch.empty(0, 0, dtype=self._dtype),
            "counts": torch.empty(0, classes, dtype=torch.int16),
            **{name: torch.empty(0, dtype=torch.int32) for name in ("item", "patch", "rank")},
        }
        rows: dict[str, Any] = {name: tensor[: self._count] for name, tensor in (self._tensors or empty).items()}
        pictures = torch.tensor(self._pictures, dtype=torch.int32).view(-1, 8)
        return MemoryBank(**rows, pictures=pictures, jitter=torch.tensor(self._jitter).view(-1, 4))

    def _room(self, name: str, part: Tensor) -> Tensor:
        old = self._tensors.get(name)
        needed = self._count + len(part)
        if old is None or needed > len(old):
            room = self._capacity if needed <= self._capacity else 2 * needed
            self._tensors[name] = part.new_empty(room, *part.shape[1:])
            if old is not None:
                self._tensors[name][: self._count] = old[: self._count]
        return self._tensors[name]


def _about(pair: ReadyPair, epoch: int) -> tuple[list[int], list[float]]:
    assert pair.pixels is not None
    assert pair.size is not None
    crop = pair.change.crop or (0, 0, *pair.size)
    numbers = [pair.position, epoch, *pair.pixels.shape[-2:], *crop]
    return numbers, [float("nan") if factor is None else factor for factor in pair.change.jitter]
