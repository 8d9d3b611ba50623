"""One step of training as a function."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from amradio.distill.config import DistillConfig
from amradio.distill.draws import BatchDraws, Draw, positions_from
from amradio.distill.ema import MovingAverage
from amradio.distill.objective import Objective
from amradio.distill.optim import learning_rate
from amradio.distill.parallel import reduced, synchronised, touch
from amradio.distill.stream import Batch, Plan, Purpose, seed_for
from amradio.distill.student import Student
from amradio.distill.targets import Targets
from amradio.distill.teachers import Teacher
from amradio.distill.timing import StepClock
from amradio.distributed import Group
from amradio.errors import NonFiniteLossError


@dataclass(kw_only=True)
class Machine:
    """All that a step changes or uses.

    Attributes:
        config: Of the run.
        student: The student; sharded under FSDP2.
        model: What is called in training, see `amradio.distill.parallel.distributed`.
        teachers: By name.
        objective: What is minimised.
        optimizer: Of the student's weights.
        average: Moving average of the weights; None: not kept.
        device: Where it runs.
        group: The processes; None for a single one.
        clock: Of the stages.
    """

    config: DistillConfig
    student: Student
    model: nn.Module
    teachers: Mapping[str, Teacher]
    objective: Objective
    optimizer: torch.optim.Optimizer
    average: MovingAverage | None
    device: torch.device
    group: Group | None
    clock: StepClock

    def sizes(self, plan: Plan) -> set[int]:
        """At which sides in pixels the teachers need a plan's pictures: those whose targets are not in the cache."""
        slots = slots_of(plan)
        partition = self.config.partitions[plan.partition]
        return {
            self.teachers[t.name].side(plan.size)
            for t in self.config.teachers_of(partition)
            if not self._is_cached(self.teachers[t.name], slots)
        }

    def targets(self, batch: Batch) -> dict[str, Targets]:
        """What the teachers say of a batch, from the cache where all of it is there."""
        slots = slots_of(batch.plan)
        found = {}
        for config in self.config.teachers_of(self.config.partitions[batch.plan.partition]):
            teacher = self.teachers[config.name]
            side = teacher.side(batch.plan.size)
            known = teacher.cached(slots)
            found[config.name] = teacher.targets(batch.teachers[side], slots) if known is None else known
        return found

    @staticmethod
    def _is_cached(teacher: Teacher, slots: Sequence[int] | None) -> bool:
        return teacher.cache is not None and slots is not None and teacher.cache.has(slots)


def slots_of(plan: Plan) -> list[int] | None:
    """Slots of a plan's views in the cache of targets; None where views are not fixed."""
    slots = [s.slot for s in plan.samples if s.slot is not None]
    return slots if len(slots) == len(plan.samples) else None


def train_step(machine: Machine, step: int, batches: Sequence[Batch]) -> dict[str, float]:
    """Do one step.

    Args:
        machine: Changed in place.
        step: From 0.
        batches: This process's pictures, one batch a partition.

    Returns:
        Means over processes: ``loss``, ``PARTITION/TEACHER/WHAT``; and ``lr`` and ``gradient_norm``.

    Raises:
        NonFiniteLossError: A loss or the gradient is no number; nothing was changed.
    """
    machine.student.advance()
    machine.optimizer.zero_grad(set_to_none=True)
    numbers: dict[str, Tensor] = {"loss": torch.zeros((), device=machine.device)}
    for i, batch in enumerate(batches):
        with machine.clock.stage("teachers"):
            targets = machine.targets(batch)
        with machine.clock.stage("student"):
            for name, value in _partition(machine, batch, targets, last=i == len(batches) - 1).items():
                numbers[name] = numbers[name] + value if name in numbers else value
    with machine.clock.stage("optimizer"):
        found = reduced(numbers, machine.group)
        _check(machine, step, batches, found, {k: v for k, v in found.items() if not math.isfinite(v)})
        _complete_gradients(machine.student)
        norm = _clip(machine)
        _check(machine, step, batches, found, {} if math.isfinite(norm) else {"gradient_norm": norm})
        lr = _set_learning_rate(machine, step)
        machine.optimizer.step()
        if machine.average is not None:
            machine.average.update(machine.student)
        if machine.objective.balancer is not None:
            machine.objective.balancer.update(_by_term(machine, found))
    return found | {"lr": lr, "gradient_norm": norm}


def _partition(machine: Machine, batch: Batch, targets: Mapping[str, Targets], *, last: bool) -> dict[str, Tensor]:
    """Forward and backward passes of one partition, in micro-batches; returns its numbers."""
    config, plan = machine.config, batch.plan
    partition = config.partitions[plan.partition]
    count = len(plan.samples) // config.run.accumulate
    if machine.student.radio.window_size != plan.window:
        machine.student.radio.set_vitdet(plan.window)
    patch = machine.student.radio.patch_size
    grid = (plan.size // patch, plan.size // patch)
    positions, dropping = (
        seed_for(config.seed, purpose, plan.step, plan.partition) for purpose in (Purpose.POSITIONS, Purpose.DROPPING)
    )
    numbers: dict[str, Tensor] = {}
    for m in range(config.run.accumulate):
        part = slice(m * count, (m + 1) * count)
        first = plan.start + part.start  # in the batch of all processes
        final = last and m == config.run.accumulate - 1
        # Weight noise is the same in all processes and micro-batches: what one process would draw for the whole batch.
        torch.manual_seed(seed_for(config.seed, Purpose.MODEL, plan.step, plan.partition))
        images = batch.student[part].to(machine.device, non_blocking=True).float() / 255  # [b, 3, h, w]
        with synchronised(machine.model, final):
            with _autocast(machine), positions_from(machine.student, BatchDraws(positions, first, plan.total)):
                said = machine.model(images, tuple(targets))
            theirs = {name: _rows(t, part) for name, t in targets.items()}
            loss, found = machine.objective(said, theirs, plan.shift, grid, Draw(dropping, first, plan.total))
            loss = loss * partition.weight
            # Every process averages over its own pictures; means over processes are means over all.
            total = loss / config.run.accumulate
            if final:
                total = total + touch(machine.model)
            total.backward()
        numbers = _added(numbers, {"loss": loss.detach(), **_named(partition.name, found)}, config.run.accumulate)
    return numbers


def _added(numbers: dict[str, Tensor], found: Mapping[str, Tensor], parts: int) -> dict[str, Tensor]:
    return {k: numbers[k] + v / parts if k in numbers else v / parts for k, v in found.items()}


def _named(partition: str, numbers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{partition}/{name}": value for name, value in numbers.items()}


def _rows(targets: Targets, part: slice) -> Targets:
    return Targets(*(None if t is None else t[part] for t in targets))


def _autocast(machine: Machine) -> Any:
    if machine.config.run.precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(machine.device.type, torch.bfloat16)


def _complete_gradients(student: Student) -> None:
    """Give a gradient of zero to what no loss depends on, so that the optimiser has a state for all that it was given.

    A saved state could not be told from a damaged one otherwise.
    """
    for parameter in student.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def _clip(machine: Machine) -> float:
    """Bound the gradient; returns its norm before."""
    bound = machine.config.optimizer.clip
    parameters = [p for p in machine.student.parameters() if p.grad is not None]
    norm: Any = torch.nn.utils.clip_grad_norm_(parameters, math.inf if bound is None else bound)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def _set_learning_rate(machine: Machine, step: int) -> float:
    """Set each group's rate, its own factor included; returns the rate itself."""
    optimizer, schedule = machine.config.optimizer, machine.config.schedule
    lr = learning_rate(
        step, base=optimizer.lr, warmup=schedule.warmup, total=schedule.steps, floor=schedule.floor * optimizer.lr
    )
    for group in machine.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    return lr


def _by_term(machine: Machine, numbers: Mapping[str, float]) -> dict[str, float]:
    """Mean loss of each term over the partitions that have it."""
    found: dict[str, list[float]] = {}
    for name, value in numbers.items():
        term = name.partition("/")[2]
        if term in machine.objective.weights:
            found.setdefault(term, []).append(value)
    return {term: sum(values) / len(values) for term, values in found.items()}


def _check(
    machine: Machine, step: int, batches: Sequence[Batch], losses: Mapping[str, float], bad: Mapping[str, float]
) -> None:
    if not bad:
        return
    names = [machine.config.partitions[b.plan.partition].name for b in batches]
    ids = {name: b.ids for name, b in zip(names, batches, strict=True)}
    what = ", ".join(f"{name} = {value}" for name, value in bad.items())
    raise NonFiniteLossError(
        f"Step {step}: {what}. The weights are those before this step. Lower optimizer.lr, lengthen the warm-up, or "
        f"look at the pictures: {'; '.join(f'{n}: {list(i)[:4]} ...' for n, i in ids.items())}",
        step,
        ids,
        losses,
    )
