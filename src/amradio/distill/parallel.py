"""The student on one or several processes: copied (DDP) or sharded (FSDP2)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from amradio.distill.config import DistillConfig
from amradio.distill.student import Student
from amradio.distributed import Group
from amradio.errors import ConfigError, OptionError
from amradio.models.vit import VisionTransformer


def check_sizes(config: DistillConfig, world_size: int) -> None:
    """Refuse batches that cannot be cut evenly.

    Args:
        config: Of the run.
        world_size: Processes.

    Raises:
        ConfigError: A batch is not a multiple of processes times micro-batches, or a mosaic does not fill one.
    """
    for p in config.partitions:
        parts = world_size * config.run.accumulate
        if p.batch_size % parts:
            raise ConfigError(
                f"The partition {p.name!r} has batch_size {p.batch_size}, which {world_size} processes x "
                f"{config.run.accumulate} micro-batches cannot share evenly. Choose a multiple of {parts}."
            )
        for teacher in config.teachers_of(p):
            if (p.batch_size // world_size) % teacher.mosaic**2:
                raise ConfigError(
                    f"The partition {p.name!r} has {p.batch_size // world_size} pictures a process, which do not fill "
                    f"mosaics of {teacher.mosaic} x {teacher.mosaic} for the teacher {teacher.name!r}."
                )


def distributed(student: Student, config: DistillConfig, group: Group | None) -> nn.Module:
    """Put the student on its processes.

    Args:
        student: On its device; FSDP2 shards it in place.
        config: Of the run.
        group: The processes; None for a single one.

    Returns:
        What is called in training: the student itself, or DDP around it.

    Raises:
        OptionError: FSDP2 was asked for without processes to shard over.
    """
    if config.student.compile:
        for block in student.radio.blocks:
            block.compile()
    if config.run.parallel == "fsdp":
        if group is None:
            raise OptionError("run.parallel: fsdp needs several processes; start the command with torchrun.")
        return _sharded(student, config, group)
    if group is None:
        return student
    from torch.nn.parallel import DistributedDataParallel

    ids = [group.local_rank] if group.device.type == "cuda" else None
    return DistributedDataParallel(student, device_ids=ids)


def _sharded(student: Student, config: DistillConfig, group: Group) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(group.device.type, (group.world_size,))
    low = config.run.precision == "bfloat16"
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if low else MixedPrecisionPolicy()
    blocks: Iterable[nn.Module] = student.radio.blocks if isinstance(student.radio.model, VisionTransformer) else ()
    for part in (*blocks, *student.radio.adaptors.values()):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    fully_shard(student, mesh=mesh, mp_policy=policy)
    return student


@contextmanager
def no_view_warnings() -> Iterator[None]:
    """Keep FSDP2 from warning of views, which nothing here changes in place."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
        yield


@contextmanager
def synchronised(model: nn.Module, last: bool) -> Iterator[None]:
    """Exchange DDP's gradients in the last backward pass of a step only; FSDP2 adds up its shards in each."""
    no_sync: Any = getattr(model, "no_sync", None)
    if no_sync is None or last:
        yield
        return
    with no_sync():
        yield


def touch(model: nn.Module) -> Tensor | float:
    """Zero, but made of every parameter: DDP waits for a gradient of each, and some heads may have no part in a batch.

    Args:
        model: What `distributed` gave.
    """
    from torch.nn.parallel import DistributedDataParallel

    if not isinstance(model, DistributedDataParallel):
        return 0.0
    firsts = [p.reshape(-1)[0] for p in model.parameters() if p.requires_grad]
    return torch.stack(firsts).sum() * 0.0


def reduced(values: dict[str, Tensor], group: Group | None) -> dict[str, float]:
    """Means over processes of numbers that each process has, in one exchange.

    Args:
        values: Scalars; the same names everywhere.
        group: The processes.
    """
    if not values:
        return {}
    stacked = torch.stack([v.detach().double() for v in values.values()])  # [N]
    if group is not None:
        stacked = group.all_reduce_sum(stacked) / group.world_size
    return dict(zip(values, stacked.tolist(), strict=True))
