"""What a step consists of, how weights are updated, how the machine runs it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from amradio.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PartitionConfig:
    """A part of every training step: pictures of one size for some of the teachers.

    Attributes:
        name: For reports.
        sizes: Sides in pixels of the student's square pictures; each step draws one.
        batch_size: Pictures in a step, over all processes.
        teachers: Which teachers take part; None: all.
        windows: Sides of ViTDet windows in patches, of which each step draws one; 0 means global attention. Sizes that
            a window does not divide are run globally.
        weight: Factor of this partition's loss.
    """

    name: str = "main"
    sizes: tuple[int, ...]
    batch_size: int
    teachers: tuple[str, ...] | None = None
    windows: tuple[int, ...] = (0,)
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.sizes or min(self.sizes) < 1 or self.batch_size < 1 or not self.windows or min(self.windows) < 0:
            raise ConfigError(
                f"The partition {self.name!r} needs sizes and a batch_size of at least 1 and windows of at least 0, "
                f"got {list(self.sizes)}, {self.batch_size} and {list(self.windows)}."
            )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How weights are updated.

    Attributes:
        kind: ``adamw`` or ``lamb``.
        lr: Peak learning rate.
        betas: Of both kinds.
        eps: Of both kinds.
        weight_decay: Decoupled; norms, biases, tokens and positions have none.
        layer_decay: Factor of the learning rate from one block to the one before it; None: none.
        clip: Bound on the gradient's norm; None: none.
    """

    kind: Literal["adamw", "lamb"] = "adamw"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.02
    layer_decay: float | None = None
    clip: float | None = 1.0

    def __post_init__(self) -> None:
        _check("optimizer.lr", self.lr, "above 0", self.lr > 0)
        _check("optimizer.betas", list(self.betas), "at least 0 and below 1", all(0 <= b < 1 for b in self.betas))
        _check("optimizer.eps", self.eps, "above 0", self.eps > 0)
        _check("optimizer.weight_decay", self.weight_decay, "at least 0", self.weight_decay >= 0)
        if self.layer_decay is not None:
            _check("optimizer.layer_decay", self.layer_decay, "above 0 and at most 1", 0 < self.layer_decay <= 1)
        if self.clip is not None:
            _check("optimizer.clip", self.clip, "above 0 (or null: no bound)", self.clip > 0)


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over time: a linear warm-up, then half a cosine.

    Attributes:
        steps: Optimiser steps in all.
        warmup: Steps until the peak.
        floor: The last learning rate, as a share of the peak.
    """

    steps: int
    warmup: int = 0
    floor: float = 0.01

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 <= self.warmup <= self.steps:
            raise ConfigError(
                f"A schedule needs at least 1 step and a warm-up within it, got {self.steps} and {self.warmup}."
            )
        _check("schedule.floor", self.floor, "a share from 0 to 1", 0 <= self.floor <= 1)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How the machine runs it.

    Attributes:
        accumulate: Micro-batches that each partition's batch is cut into.
        precision: ``bfloat16`` computes the student in mixed precision.
        parallel: ``ddp`` copies the student to every process, ``fsdp`` shards it (FSDP2).
        teacher_dropping: Probability that a teacher's loss on a picture is left out; the largest loss of each picture
            never is (UNIC, arXiv 2408.05088).
        loss_balancing: Scale each loss by its running magnitude.
        shift: Largest shift between what student and teacher see, in student patches (C-RADIOv4, arXiv 2601.17237).
        statistics: Pictures from which distributions of targets are estimated before training.
        checkpoint_minutes: Time between two saved states.
        checkpoint_steps: Steps between two saved states; None: by time only.
        keep: Saved states that are kept.
        state_file_mib: Bound of each file of a state, for transfers that take small files only; None: a few files a
            process.
        log_steps: Steps between two lines of the log.
        tensorboard: Write TensorBoard files, if it is installed.
        wandb: Project of Weights & Biases to log to; None: no connection is made.
    """

    accumulate: int = 1
    precision: Literal["float32", "bfloat16"] = "float32"
    parallel: Literal["ddp", "fsdp"] = "ddp"
    teacher_dropping: float = 0.0
    loss_balancing: bool = False
    shift: int = 0
    statistics: int = 1024
    checkpoint_minutes: float = 30.0
    checkpoint_steps: int | None = None
    keep: int = 2
    state_file_mib: float | None = None
    log_steps: int = 10
    tensorboard: bool = True
    wandb: str | None = None

    def __post_init__(self) -> None:
        for name in ("accumulate", "statistics", "keep", "log_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"run.{name} must be at least 1, got {getattr(self, name)}.")
        _check("run.checkpoint_minutes", self.checkpoint_minutes, "above 0", self.checkpoint_minutes > 0)
        if self.checkpoint_steps is not None:
            _check("run.checkpoint_steps", self.checkpoint_steps, "at least 1", self.checkpoint_steps >= 1)
        if self.state_file_mib is not None and not self.state_file_mib >= 0.1:
            raise ConfigError(f"run.state_file_mib must be at least 0.1, got {self.state_file_mib}.")
        if not 0 <= self.teacher_dropping < 1 or self.shift < 0:
            raise ConfigError(
                f"run.teacher_dropping must be in [0, 1) and run.shift at least 0, got {self.teacher_dropping} and "
                f"{self.shift}."
            )


@dataclass(frozen=True, kw_only=True)
class HookConfig:
    """Something that is done to the student now and then, such as an evaluation.

    Attributes:
        kind: What; the command line knows ``knn``, ``in-context``, ``zero-shot`` and ``pca``.
        name: For reports; default the kind. No two hooks have the same.
        every: Steps between two times; it is also done at the end.
        options: Of the kind.
    """

    kind: str
    name: str | None = None
    every: int
    options: Mapping[str, Any] = field(default_factory=dict)


def _check(name: str, value: object, wanted: str, fits: bool) -> None:
    """Refuse a number that is out of its range or no number at all (NaN and infinity are not)."""
    numbers = value if isinstance(value, list) else [value]
    if not fits or not all(isinstance(n, (int, float)) and math.isfinite(n) for n in numbers):
        raise ConfigError(f"{name} must be {wanted}, got {value}.")
