"""What a configured run will cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from amradio.distill.config import DistillConfig, PartitionConfig, TeacherConfig
from amradio.distill.cost import (
    A100_PEAK,
    H100_PEAK,
    UTILISATION,
    PartitionCost,
    device_hours,
    forward_flops,
    radio_flops,
    step_cost,
)
from amradio.distill.student import Widths, radio_config
from amradio.distill.teachers import Teacher
from amradio.models.configs import RadioConfig, ViTConfig, from_json


@dataclass(frozen=True)
class RunCost:
    """The cost of a run.

    Attributes:
        record: Numbers, as JSON can hold them.
    """

    record: Mapping[str, Any]

    @property
    def text(self) -> str:
        """For people."""
        r = self.record
        teachers = ", ".join(f"{name} {_si(flops)}" for name, flops in r["teachers"].items())
        return (
            f"{r['steps']:,} steps, {r['images']:,} pictures shown; a step takes {_si(r['student'])} for the student, "
            f"and for teachers: {teachers}\n"
            f"{_si(r['total'])} in all: {r['a100_hours']:,.3g} hours of an A100 or {r['h100_hours']:,.3g} hours of an "
            f"H100, at {UTILISATION:.0%} of their dense bfloat16 peak\n"
            "(matrix products, convolutions and attention are counted, a backward pass as two forward passes)"
        )


def run_cost(config: DistillConfig) -> RunCost:
    """Compute the cost of a run. Teachers whose shape is not configured are loaded.

    Args:
        config: Of the run.

    Returns:
        Operations of a step and of the run, and hours of usual devices. Teachers whose targets are in a cache
        cost nothing again, which is not counted.
    """
    loaded = {t.name: Teacher(t, torch.device("cpu")) for t in config.teachers if t.shape is None}
    for teacher in loaded.values():
        teacher.backbone.to("meta")  # where attention is counted whatever kernel this machine would use
    widths = {t.name: _widths(t, loaded) for t in config.teachers}
    description = radio_config(config, widths)
    parts = [_partition(config, p, description, loaded) for p in config.partitions]
    step = step_cost(parts, checkpointing=config.student.checkpointing)
    steps = config.schedule.steps
    total = step.total * steps
    images = sum(p.batch_size for p in config.partitions) * steps
    return RunCost(
        {
            "steps": steps,
            "images": images,
            "student": step.student,
            "teachers": dict(step.teachers),
            "total": total,
            "a100_hours": device_hours(total, A100_PEAK),
            "h100_hours": device_hours(total, H100_PEAK),
            "utilisation": UTILISATION,
        }
    )


def _si(flops: float) -> str:
    for factor, unit in ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP")):
        if flops >= factor:
            return f"{flops / factor:.3g} {unit}"
    return f"{flops / 1e9:.3g} GFLOP"


def _widths(config: TeacherConfig, loaded: Mapping[str, Teacher]) -> Widths:
    if config.shape is not None:
        return Widths(config.shape.summary_dim, config.shape.embed_dim)
    teacher = loaded[config.name]
    return Widths(teacher.summary_dim, teacher.feature_dim)


def _partition(
    config: DistillConfig, p: PartitionConfig, description: RadioConfig, loaded: Mapping[str, Teacher]
) -> PartitionCost:
    """Means over the sizes and windows that a step may draw."""
    teachers = config.teachers_of(p)
    names = [t.name for t in teachers]
    patch = description.backbone.patch_size
    runs = [(s, w if w and s % (w * patch) == 0 else None) for s in p.sizes for w in p.windows]
    student = sum(radio_flops(description, s, s, names, window=w) for s, w in runs) / len(runs)
    return PartitionCost(
        images=p.batch_size,
        student=student,
        teachers={t.name: sum(_teacher(t, s, loaded) for s in p.sizes) / len(p.sizes) for t in teachers},
    )


def _teacher(config: TeacherConfig, student_side: int, loaded: Mapping[str, Teacher]) -> float:
    """Operations of a teacher for one picture of the student."""
    k = config.mosaic
    if config.shape is None:
        teacher = loaded[config.name]
        side = teacher.side(student_side) * k
        return forward_flops(teacher.backbone, side, side) / k**2
    side = (config.resolution or student_side) * k
    vit = from_json(ViTConfig, dict(config.shape.vit), f"teacher {config.name}: shape.vit")
    step = vit.patch_size * (config.shape.window or 1)
    side = max(round(side / step), 1) * step
    return radio_flops(RadioConfig(backbone=vit), side, side, window=config.shape.window) / k**2
