"""The summaries of a set of pictures in one table, computed by one process or by many."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from amradio.features.extract import extract
from amradio.features.partition import Partition, balanced_shard_size, check_same_set
from amradio.features.runner import ExtractOptions, FeatureModel, FeatureRecord
from amradio.features.timing import StageTimer

if TYPE_CHECKING:
    from amradio.distributed import Group
    from amradio.images.dataset import ImageSet
    from amradio.images.resize import ResizePolicy

_ROWS_AT_ONCE = 16384  # exchanged between processes, so that little more than the table itself is held


@dataclass(frozen=True)
class Failure:
    """A picture without features.

    Attributes:
        position: In the set.
        id: See `amradio.images.ImageSource`.
        location: See `amradio.images.ImageSource`.
        reason: What went wrong.
    """

    position: int
    id: str
    location: str
    reason: str

    @classmethod
    def of(cls, record: FeatureRecord) -> Failure:
        """The failure that a record is about."""
        return cls(record.position, record.source.id, record.source.location, record.reason or "")


@dataclass(frozen=True)
class FeatureTable:
    """Summaries of the pictures that worked, in the order of the set.

    Attributes:
        positions: int64 [N]: where each row's picture is in the set.
        labels: int64 [N]; None if the set has none.
        summaries: For ``backbone`` and each adaptor float32 [N, C] on the CPU. Empty if no picture worked anywhere.
        failures: Pictures that did not work, in the order of the set.
        timing: See `StageTimer.record`. Of this process, but for ``wall_s``, which is the slowest process's, and
            ``images_per_s``, which is of all together.
    """

    positions: Tensor
    labels: Tensor | None
    summaries: dict[str, Tensor]
    failures: list[Failure]
    timing: dict[str, Any]

    def __len__(self) -> int:
        return len(self.positions)


def collect(
    images: ImageSet,
    model: FeatureModel,
    policy: ResizePolicy,
    options: ExtractOptions | None = None,
    *,
    group: Group | None = None,
    gather: bool = True,
    shard_size: int | None = None,
    on_record: Callable[[FeatureRecord], None] | None = None,
) -> FeatureTable:
    """Compute the summaries of a set of pictures.

    Under a group the processes take shards of the set in turn. Batches do not cross the borders of shards, so the
    result is the same to the last bit for any number of processes on equal machines.

    Args:
        images: The pictures.
        model: In evaluation mode, on the device of the options.
        policy: To which sizes pictures are brought.
        options: Batch size, device and so on; `ExtractOptions.keep` is ``summary`` here whatever it says.
        group: The processes that share the work; all of them must call this. None = alone.
        gather: Whether every process gets all rows and failures, or only its own.
        shard_size: Pictures in a shard; default a size that splits evenly, whatever the number of processes.
        on_record: Called for each picture of this process, in order; its position counts in the whole set.

    Returns:
        The table.

    Raises:
        OptionError: See `extract`; or the processes opened different sets.
    """
    check_same_set(images, group)
    options = dataclasses.replace(options or ExtractOptions(), keep="summary")
    partition = Partition(len(images), shard_size or balanced_shard_size(len(images), options.batch_size))
    rank, world_size = (0, 1) if group is None else (group.rank, group.world_size)
    own = partition.stream(range(rank, len(partition), world_size))  # [N_r]
    timer = StageTimer()
    rows = _Rows(len(own))
    failures = []
    sources = (images[int(i)] for i in own)
    with closing(extract(sources, model, policy, options, timer, partition.size)) as records:
        for found in records:
            record = dataclasses.replace(found, position=int(own[found.position]))
            if record.ok:
                rows.append(record)
            else:
                failures.append(Failure.of(record))
            if on_record is not None:
                on_record(record)
    positions, summaries = rows.tensors()
    timing = timer.record(options.batch_size)
    if group is not None:
        positions, summaries, failures = _exchanged(positions, summaries, failures, group, gather)
        timing = together(timing, timer, group)
    labels = None if images.labels is None else torch.from_numpy(images.labels.copy())[positions]
    return FeatureTable(positions, labels, summaries, failures, timing)


class _Rows:
    """Rows that are written into their final place, so that a large table is never held twice."""

    def __init__(self, capacity: int) -> None:
        self._positions = torch.empty(capacity, dtype=torch.int64)
        self._summaries: dict[str, Tensor] = {}
        self._count = 0

    def append(self, record: FeatureRecord) -> None:
        for name, output in record.outputs.items():
            if name not in self._summaries:
                self._summaries[name] = torch.empty(len(self._positions), output.summary.shape[0])  # [N, C]
            self._summaries[name][self._count] = output.summary
        self._positions[self._count] = record.position
        self._count += 1

    def tensors(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The rows that were written: positions [n], summaries [n, C]."""
        return self._positions[: self._count], {name: rows[: self._count] for name, rows in self._summaries.items()}


def _exchanged(
    positions: Tensor, summaries: dict[str, Tensor], failures: list[Failure], group: Group, gather: bool
) -> tuple[Tensor, dict[str, Tensor], list[Failure]]:
    """What all processes have, in the order of the set; or only what this one has."""
    known: dict[str, int] = {}
    for widths in group.all_gather_objects({name: rows.shape[1] for name, rows in summaries.items()}):
        known |= widths
    # A process may have had no picture at all, and takes part all the same.
    summaries = {name: summaries.get(name, torch.empty(0, width)) for name, width in known.items()}
    if not gather:
        return positions, summaries, failures
    found = group.all_gather_rows(positions)
    all_positions, order = torch.cat(found).sort()
    target = torch.empty_like(order)
    target[order] = torch.arange(len(order))  # the row in the result of each row in rank order
    targets = target.split([len(f) for f in found])
    gathered = {name: torch.empty(len(order), width) for name, width in known.items()}
    for start in range(0, max(map(len, targets)), _ROWS_AT_ONCE):
        for name, rows in summaries.items():
            parts = group.all_gather_rows(rows[start : start + _ROWS_AT_ONCE])
            for rank, part in enumerate(parts):
                gathered[name][targets[rank][start : start + _ROWS_AT_ONCE]] = part
    everyones = [f for part in group.all_gather_objects(failures) for f in part]
    return all_positions, gathered, sorted(everyones, key=lambda f: f.position)


def together(timing: dict[str, Any], timer: StageTimer, group: Group) -> dict[str, Any]:
    """Wall time and speed of all processes together."""
    found = group.all_gather_objects((timing["wall_s"], timer.pictures))
    wall_s = max(seconds for seconds, _ in found)
    return {**timing, "wall_s": wall_s, "images_per_s": sum(count for _, count in found) / wall_s}
