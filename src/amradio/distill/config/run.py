"""A whole run, and what tells it from another one."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from amradio.distill.config.data import DataConfig
from amradio.distill.config.student import StudentConfig
from amradio.distill.config.teachers import TeacherConfig
from amradio.distill.config.training import HookConfig, OptimizerConfig, PartitionConfig, RunConfig, ScheduleConfig
from amradio.errors import ConfigError, nearest_names
from amradio.models.configs import to_json


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """A whole run.

    Attributes:
        name: Of the student.
        seed: Of everything random.
        data: Pictures.
        student: What is trained.
        teachers: What it is trained from.
        partitions: What a step consists of.
        optimizer: How weights are updated.
        schedule: How long.
        run: How the machine runs it.
        hooks: What is done now and then.
        licence: Of the student's weights, for the model card.
        notes: For the model card.
    """

    name: str
    seed: int = 0
    data: DataConfig
    student: StudentConfig
    teachers: tuple[TeacherConfig, ...]
    partitions: tuple[PartitionConfig, ...]
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig
    run: RunConfig = field(default_factory=RunConfig)
    hooks: tuple[HookConfig, ...] = ()
    licence: str | None = None
    notes: str = ""

    def __post_init__(self) -> None:
        check_unique("teacher", [t.name for t in self.teachers])
        check_unique("partition", [p.name for p in self.partitions])
        check_unique("hook", [h.name or h.kind for h in self.hooks])
        known = [t.name for t in self.teachers]
        if not known or not self.partitions:
            raise ConfigError("A run needs at least one teacher and one partition.")
        for partition in self.partitions:
            for name in partition.teachers or ():
                if name not in known:
                    raise ConfigError(
                        f"The partition {partition.name!r} has the unknown teacher {name!r}. "
                        f"{nearest_names(name, known)}"
                    )
        taught = {t.name for p in self.partitions for t in self.teachers_of(p)}
        for name in known:
            if name not in taught:
                raise ConfigError(f"The teacher {name!r} is in no partition.")
        if self.data.cache_dir is not None:
            for teacher in self.teachers:
                if teacher.resolution is None or teacher.mosaic > 1 or self.run.shift:
                    raise ConfigError(
                        f"data.cache_dir: the targets of {teacher.name!r} cannot be cached. A cached teacher needs a "
                        "resolution of its own, no mosaic, and run.shift: 0."
                    )

    def teachers_of(self, partition: PartitionConfig) -> tuple[TeacherConfig, ...]:
        """The teachers that take part in a partition, in the order of the run."""
        return tuple(t for t in self.teachers if partition.teachers is None or t.name in partition.teachers)

    @property
    def decoded_side(self) -> int | None:
        """The side in pixels that pictures are decoded for where targets are cached: the largest that any part sees.

        What a view looks like then depends neither on which targets are there already nor on which partition asks
        first. None where nothing is cached: each plan then decodes for what it needs.
        """
        if self.data.cache_dir is None:
            return None
        sides = [side for p in self.partitions for side in p.sizes]
        return max(*sides, *(t.resolution for t in self.teachers if t.resolution is not None))

    @property
    def identity(self) -> dict[str, str]:
        """A digest of each part that a saved state depends on, by name; a state is resumed only if all are equal."""
        run = {
            name: getattr(self.run, name)
            for name in ("accumulate", "precision", "teacher_dropping", "loss_balancing", "shift", "statistics")
        }
        elsewhere = ("sources", "workers", "cache_dir")  # pictures are compared by their number and names
        data = {k: v for k, v in to_json(self.data).items() if k not in elsewhere}
        teachers = [dataclasses.replace(t, shape=None, licence=None) for t in self.teachers]
        student = dataclasses.replace(self.student, checkpointing=False, compile=False)
        # What the optimiser's own memory was built under; the rate, its bound and the schedule may change on the way.
        optimizer = to_json(self.optimizer)
        fixed = ("kind", "betas", "eps", "weight_decay", "layer_decay")
        parts = {
            "seed": self.seed,
            "data": data,
            "student": to_json(student),
            "teachers": [to_json(t) for t in teachers],
            "partitions": [to_json(p) for p in self.partitions],
            **{f"optimizer.{name}": optimizer[name] for name in fixed},
            "run": run,
        }
        return {name: digest(part) for name, part in parts.items()}


def digest(value: Any) -> str:
    """SHA-256, in hexadecimal, of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def check_unique(what: str, names: Sequence[str]) -> None:
    """Refuse names that are there twice.

    Args:
        what: Has these names.
        names: All of them.

    Raises:
        ConfigError: Two are equal.
    """
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"There are {names.count(name)} {what}s named {name!r}.")
