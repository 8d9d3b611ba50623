"""Which pictures a step sees, and how they come from files to tensors ahead of their use.

Everything is a pure function of the seed and the step: the order of pictures, the crop of each, the size and window of
a partition. A run that stops and goes on, or that is spread over another number of processes, sees the same.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from amradio.distill.config import DataConfig, DistillConfig, PartitionConfig, digest
from amradio.distill.crops import View, draw_view, epoch_order
from amradio.errors import DatasetError, ImageError
from amradio.images import MAX_PIXELS, WHITE, ImageSet, ImageSource
from amradio.images.sources import EncodedImage, ImageFile

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_BROKEN_RUN = 16  # so many broken pictures in a row are no accident
_LOOK_AHEAD_STEPS = 2
_CONTENTS_SAMPLE = 256
_SMALLEST_CROP = 1e-3  # of a side: below that, pictures are decoded in full anyway


class Purpose:
    """What a random number is for, so that no two uses share a stream."""

    SIZE, WINDOW, SHIFT, MODEL, DROPPING, POSITIONS, STREAM = range(7)


def seed_for(seed: int, *key: int) -> int:
    """A 63-bit seed for one use, the same on every platform and version.

    Args:
        seed: Of the run.
        *key: What it is for: a `Purpose`, the step, the partition, ...
    """
    state = np.random.SeedSequence((seed, *key)).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


class Pictures:
    """All sources of a run as one list of pictures.

    Args:
        sets: Opened sets.
        repeats: How often each one's pictures count.

    Attributes:
        identity: A digest of the number, names and order of all pictures; their place does not count.
    """

    def __init__(self, sets: Sequence[ImageSet], repeats: Sequence[int]) -> None:
        self._sets = [s for s, n in zip(sets, repeats, strict=True) for _ in range(n)]
        self._ends = np.cumsum([len(s) for s in self._sets])
        if not len(self):
            raise DatasetError("The sources have no pictures.")
        self._distinct = list(zip(sets, repeats, strict=True))
        self.identity = digest([(len(s), n, _names_digest(s)) for s, n in self._distinct])

    def __len__(self) -> int:
        return int(self._ends[-1])

    @cached_property
    def contents(self) -> str:
        """A digest of `identity`, the sizes of all picture files, and the contents of some pictures spread evenly.

        It tells other pictures of the same names, which targets that were computed before must not be used for. It does
        not read all pictures, for that may take longer than the targets.
        """
        found = hashlib.sha256(self.identity.encode())
        for images, _ in self._distinct:
            step = max(1, len(images) // _CONTENTS_SAMPLE)
            for i, source in enumerate(images):
                if isinstance(source, ImageFile):
                    found.update(_size(source.path))
                if i % step == 0:
                    found.update(_content(source))
        return found.hexdigest()

    def __getitem__(self, index: int) -> ImageSource:
        which = int(np.searchsorted(self._ends, index, side="right"))
        return self._sets[which][index - (int(self._ends[which - 1]) if which else 0)]


def _names_digest(images: ImageSet) -> str:
    found = hashlib.sha256()
    for source in images:
        found.update(source.id.encode("utf-8", "surrogatepass") + b"\0")
    return found.hexdigest()


def _size(path: Path) -> bytes:
    try:
        return path.stat().st_size.to_bytes(8, "little")
    except OSError:
        return b"cannot be read"


def _content(source: ImageSource) -> bytes:
    """A digest of a picture's file, or of its pixels where it has none of its own."""
    try:
        if isinstance(source, ImageFile):
            content = source.path.read_bytes()
        elif isinstance(source, EncodedImage):
            content = source.read()
        else:
            content = source.decode(max_pixels=MAX_PIXELS, background=WHITE).tobytes()
    except (ImageError, OSError):
        return b"cannot be read"
    return hashlib.sha256(content).digest()


def open_pictures(config: DataConfig) -> Pictures:
    """Open the sources of a run.

    Args:
        config: What to open.

    Raises:
        DatasetError: A source cannot be opened, or there are no pictures.
    """
    from amradio.images import open_images

    sets = [open_images(s.path, s.split) for s in config.sources]
    limited = [s if c.limit is None else s.head(c.limit) for s, c in zip(sets, config.sources, strict=True)]
    return Pictures(limited, [c.repeat for c in config.sources])


@dataclass(frozen=True)
class Sample:
    """One picture's place in a run.

    Attributes:
        position: In the partition's stream.
        view: What is shown of which picture.
        slot: Of the cache of targets; None where views are not fixed.
    """

    position: int
    view: View
    slot: int | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one process does of one partition in one step.

    Attributes:
        step: From 0.
        partition: Its position in the run.
        size: Side in pixels of the student's pictures.
        window: Side of the ViTDet windows in patches; None: global attention.
        shift: (rows, columns) in student patches by which the teachers' window is moved.
        samples: This process's pictures.
        start: Position of the first one in the global batch.
        total: Pictures of the global batch.
    """

    step: int
    partition: int
    size: int
    window: int | None
    shift: tuple[int, int]
    samples: tuple[Sample, ...]
    start: int
    total: int


class Planner:
    """Says what each step consists of.

    Args:
        config: Of the run.
        count: Pictures in the set.
        step_of_size: What sizes are multiples of, in pixels (the student's patch size).
        rank: Of this process.
        world_size: Processes.
    """

    def __init__(
        self, config: DistillConfig, count: int, step_of_size: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.config, self.count, self.patch = config, count, step_of_size
        self.rank, self.world_size = rank, world_size

    def plan(self, step: int, partition: int) -> Plan:
        """What this process does of a partition in a step."""
        p = self.config.partitions[partition]
        share = p.batch_size // self.world_size
        start = self.rank * share
        first = step * p.batch_size + start
        size = self._choice(p.sizes, Purpose.SIZE, step, partition)
        return Plan(
            step=step,
            partition=partition,
            size=size,
            window=self._window(p, size, step, partition),
            shift=self._shift(step, partition),
            samples=tuple(self.sample(partition, first + i) for i in range(share)),
            start=start,
            total=p.batch_size,
        )

    def sample(self, partition: int, position: int) -> Sample:
        """The picture at a position of a partition's endless stream."""
        seed = seed_for(self.config.seed, Purpose.STREAM, partition)
        epoch, place = divmod(position, self.count)
        index = int(_order(self.count, seed, epoch)[place])
        fixed = self.config.data.fixed_views
        # Fixed views are the same in all partitions, so that partitions share the targets in the cache.
        key = epoch if fixed is None else epoch % fixed
        view_seed = seed if fixed is None else self.config.seed
        view = draw_view(self.config.data.crops, view_seed, key, index, self.count)
        return Sample(position, view, None if fixed is None else key * self.count + index)

    def _choice(self, values: Sequence[int], purpose: int, step: int, partition: int) -> int:
        return values[seed_for(self.config.seed, purpose, step, partition) % len(values)]

    def _window(self, p: PartitionConfig, size: int, step: int, partition: int) -> int | None:
        window = self._choice(p.windows, Purpose.WINDOW, step, partition)
        return window if window and size % (window * self.patch) == 0 else None

    def _shift(self, step: int, partition: int) -> tuple[int, int]:
        largest = self.config.run.shift
        if not largest:
            return 0, 0
        draw = seed_for(self.config.seed, Purpose.SHIFT, step, partition)
        span = 2 * largest + 1
        return draw % span - largest, draw // span % span - largest


@lru_cache(maxsize=8)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    return epoch_order(count, seed, epoch)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One process's pictures of one partition in one step.

    Attributes:
        plan: What was asked for.
        ids: Of the pictures.
        student: uint8 [B, 3, h, w].
        teachers: By side in pixels, uint8 [B, 3, H, W]: what teachers see at that size.
        broken: Locations of pictures that could not be read and were replaced by the next ones of the set.
    """

    plan: Plan
    ids: tuple[str, ...]
    student: Tensor
    teachers: dict[int, Tensor]
    broken: tuple[str, ...]


class Sizes(Protocol):
    """Says at which sides in pixels the teachers' pictures of a plan are needed."""

    def __call__(self, plan: Plan) -> set[int]:
        """The sides."""
        ...


class Loader:
    """Decodes and crops in threads, ahead of the training.

    Args:
        pictures: The set.
        planner: What each step consists of.
        config: How pictures are read.
        sizes: At which sides teachers need them.
        pin: Put batches where a GPU can fetch them by itself.
    """

    def __init__(
        self, pictures: Pictures, planner: Planner, config: DataConfig, sizes: Sizes, *, pin: bool = False
    ) -> None:
        self.pictures, self.planner, self.config, self.sizes, self.pin = pictures, planner, config, sizes, pin

    def batches(self, first: int, last: int, partitions: Sequence[int]) -> Generator[list[Batch], None, None]:
        """Load steps in order.

        Args:
            first: First step.
            last: Step to stop before.
            partitions: Which partitions are loaded, by position.

        Yields:
            For each step one batch a partition.

        Raises:
            DatasetError: Many pictures in a row cannot be read.
        """
        pool = ThreadPoolExecutor(self.config.workers, thread_name_prefix="amradio-distill")
        pending: deque[list[_Pending]] = deque()
        steps = iter(range(first, last))
        try:
            while True:
                for step in steps:
                    pending.append([self._submit(pool, self.planner.plan(step, p)) for p in partitions])
                    if len(pending) > _LOOK_AHEAD_STEPS:
                        break
                if not pending:
                    return
                yield [batch.result(self.pin) for batch in pending.popleft()]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _submit(self, pool: ThreadPoolExecutor, plan: Plan) -> _Pending:
        sizes = tuple(sorted(self.sizes(plan)))
        return _Pending(plan, sizes, [pool.submit(self._load, sample.view, plan, sizes) for sample in plan.samples])

    def _load(self, view: View, plan: Plan, sizes: Sequence[int]) -> _Loaded:
        # The largest size that any part needs, as if the whole picture were shown; a crop is a part of it.
        side = self.planner.config.decoded_side or max((plan.size, *sizes))
        needed = round(side / max(view.smallest_side, _SMALLEST_CROP))
        at_least = (needed, needed) if self.config.decode == "draft" else None
        found = [self._decode(i, at_least) for i in view.indices]
        pictures = [image for image, _, _ in found]
        cell = self.planner.patch / plan.size  # of a student patch, as a share of the side
        moved = {s: (round(plan.shift[0] * cell * s), round(plan.shift[1] * cell * s)) for s in sizes}
        student = view.render(pictures, (plan.size, plan.size))  # [3, h, w]
        same = plan.size if plan.shift == (0, 0) else None
        return _Loaded(
            id="+".join(source_id for _, source_id, _ in found),
            student=student,
            teachers=[student if s == same else view.render(pictures, (s, s), moved[s]) for s in sizes],
            broken=tuple(location for _, _, broken in found for location in broken),
        )

    def _decode(self, index: int, at_least: tuple[int, int] | None) -> tuple[Image, str, list[str]]:
        """Decode a picture, or the next one of the set that can be."""
        broken: list[str] = []
        while True:
            source = self.pictures[(index + len(broken)) % len(self.pictures)]
            try:
                image = source.decode(max_pixels=MAX_PIXELS, background=WHITE, at_least=at_least)
            except ImageError as e:
                broken.append(f"{source.location}: {e}")
                if len(broken) >= MAX_BROKEN_RUN:
                    raise DatasetError(
                        f"{len(broken)} pictures in a row cannot be read, the last one {broken[-1]}. Check the source."
                    ) from e
                continue
            return image, source.id, broken


@dataclass(frozen=True, kw_only=True)
class _Loaded:
    id: str
    student: Tensor
    teachers: list[Tensor]
    broken: tuple[str, ...]


@dataclass(frozen=True)
class _Pending:
    plan: Plan
    sizes: tuple[int, ...]
    futures: list[Future[_Loaded]]

    def result(self, pin: bool) -> Batch:
        loaded = [f.result() for f in self.futures]
        teachers = {s: _stacked([item.teachers[i] for item in loaded], pin) for i, s in enumerate(self.sizes)}
        return Batch(
            plan=self.plan,
            ids=tuple(item.id for item in loaded),
            student=_stacked([item.student for item in loaded], pin),
            teachers=teachers,
            broken=tuple(location for item in loaded for location in item.broken),
        )


def _stacked(images: Sequence[Tensor], pin: bool) -> Tensor:
    """Pictures [3, h, w] as a batch [B, 3, h, w], in memory that a GPU can read by itself if it is pinned."""
    batch = torch.stack(list(images))  # [B, 3, h, w]
    return batch.pin_memory() if pin else batch
