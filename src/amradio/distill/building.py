"""From a configuration to all that a step needs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from amradio.distill.config import DistillConfig, digest
from amradio.distill.ema import MovingAverage
from amradio.distill.objective import Objective
from amradio.distill.optim import Lamb, parameter_groups
from amradio.distill.parallel import distributed
from amradio.distill.steps import Machine
from amradio.distill.stream import Pictures
from amradio.distill.student import Widths, build_student
from amradio.distill.targets import TargetCache
from amradio.distill.teachers import Teacher
from amradio.distill.timing import StepClock
from amradio.distributed import Group
from amradio.models.configs import RadioConfig, to_json


def identity_of(config: DistillConfig, pictures: Pictures, teachers: Mapping[str, Teacher]) -> dict[str, str]:
    """Digests of all that a saved state depends on, by name: the configuration, the pictures, the teachers' weights."""
    weights = {name: {k: v for k, v in t.facts.items() if k != "source"} for name, t in teachers.items()}
    return config.identity | {"pictures": pictures.identity, "teachers' weights": digest(weights)}


def attach_caches(config: DistillConfig, pictures: Pictures, teachers: Mapping[str, Teacher]) -> None:
    """Give teachers their caches of targets, which depend on the teacher, the pictures and the crops.

    Args:
        config: Of the run; without a folder for caches nothing is done.
        pictures: Of the run.
        teachers: By name; changed in place.

    Raises:
        ConfigError: A folder has targets of something else.
    """
    if config.data.cache_dir is None or config.data.fixed_views is None:
        return
    for name, teacher in teachers.items():
        t = teacher.config
        identity = {
            "teacher": {k: v for k, v in teacher.facts.items() if k != "source"},
            "adaptor": t.adaptor,
            "options": dict(t.options),
            "resolution": t.resolution,
            "dtype": t.dtype,
            "targets": [t.summary is not None, t.features is not None],
            "pictures": pictures.contents,
            "views": config.data.fixed_views,
            "crops": to_json(config.data.crops),
            "decode": config.data.decode,
            # Draft decoding depends on the largest size that is needed, also on the student's.
            "decoded_side": config.decoded_side if config.data.decode == "draft" else None,
            "seed": config.seed,
        }
        folder = Path(config.data.cache_dir).expanduser() / name
        teacher.cache = TargetCache(folder, config.data.fixed_views * len(pictures), identity)


def build_machine(
    config: DistillConfig,
    description: RadioConfig,
    widths: Mapping[str, Widths],
    teachers: Mapping[str, Teacher],
    device: torch.device,
    group: Group | None,
) -> tuple[Machine, frozenset[str]]:
    """Build all that a step needs.

    Args:
        config: Of the run.
        description: Of the student.
        widths: Of the teachers' targets, by name.
        teachers: By name.
        device: Where this process trains.
        group: The processes; None for a single one.

    Returns:
        The machine at the start, and the adaptors whose weights came from a checkpoint.

    Raises:
        AmradioError: The checkpoint to start from cannot be used, or processes are missing.
    """
    student, from_init = build_student(config, description)
    student.to(device)
    model = distributed(student, config, group)
    o = config.optimizer
    groups = parameter_groups(student.named_parameters(), o.weight_decay, o.layer_decay)
    optimizer: torch.optim.Optimizer
    if o.kind == "lamb":
        optimizer = Lamb(groups, lr=o.lr, betas=o.betas, eps=o.eps)
    else:
        optimizer = torch.optim.AdamW(groups, lr=o.lr, betas=o.betas, eps=o.eps, fused=device.type in ("cpu", "cuda"))
    machine = Machine(
        config=config,
        student=student,
        model=model,
        teachers=teachers,
        objective=Objective(config, widths).to(device),
        optimizer=optimizer,
        average=None if config.student.ema is None else MovingAverage(student, config.student.ema),
        device=device,
        group=group,
        clock=StepClock(device),
    )
    return machine, from_init
