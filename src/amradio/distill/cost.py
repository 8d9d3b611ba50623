"""What a training costs, before it is started: floating-point operations, and hours of a device.

Method: models are run on tensors without data (device ``meta``) under PyTorch's operation counter, which counts matrix
products, convolutions and attention, two operations for each multiplication with its addition; norms, activations and
interpolations are left out. A backward pass counts twice a forward pass, recomputing activations once more. Hours
follow from a peak rate and the share of it that is reached, both stated with the result.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from amradio.errors import OptionError
from amradio.models.configs import RadioConfig

A100_PEAK = 312e12
"""Of an NVIDIA A100, dense bfloat16, in operations a second (its data sheet)."""
H100_PEAK = 989e12
"""Of an NVIDIA H100 SXM or H200, likewise."""
UTILISATION = 0.4
"""Share of the peak that large transformers reach in practice (our choice)."""


def forward_flops(model: nn.Module, height: int, width: int) -> int:
    """Count a forward pass for one picture.

    Args:
        model: Takes images [1, 3, H, W]; on the device ``meta``, or nothing is gained.
        height: In pixels.
        width: In pixels.

    Returns:
        Operations.
    """
    first = next(iter(model.parameters()))
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(torch.empty(1, 3, height, width, device=first.device, dtype=first.dtype))
    return int(counter.get_total_flops())


def radio_flops(
    config: RadioConfig, height: int, width: int, adaptors: Sequence[str] = (), window: int | None = None
) -> int:
    """Count a forward pass of a described model for one picture; no weights are made.

    Args:
        config: Of the model; a plain ViT teacher is one without adaptors.
        height: In pixels.
        width: In pixels.
        adaptors: Heads that are run.
        window: Side of ViTDet windows in patches; None: global attention.

    Returns:
        Operations.
    """
    from amradio.models.radio import RadioModel

    with torch.device("meta"):
        model = RadioModel(config, adaptors).eval()
    if window is not None:
        model.set_vitdet(window)
    return forward_flops(model, height, width)


@dataclass(frozen=True, kw_only=True)
class PartitionCost:
    """What one partition asks for in each step.

    Attributes:
        images: Pictures in a step.
        student: Operations of the student's forward pass, heads included, for one picture.
        teachers: Of each teacher's forward pass, for one picture of the student: a mosaic's share, 0 from a cache.
    """

    images: int
    student: float
    teachers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Operations of one training step.

    Attributes:
        student: Forward and backward.
        teachers: Forward, by name.
    """

    student: float
    teachers: Mapping[str, float]

    @property
    def total(self) -> float:
        """Student and teachers together."""
        return self.student + sum(self.teachers.values())


def step_cost(partitions: Iterable[PartitionCost], *, checkpointing: bool = False) -> StepCost:
    """Add up a training step.

    Args:
        partitions: Of the step; where sizes are drawn at random, with means over them.
        checkpointing: Whether activations are recomputed in the backward pass.

    Returns:
        The cost.
    """
    passes = 4 if checkpointing else 3
    student = 0.0
    teachers: dict[str, float] = {}
    for partition in partitions:
        student += partition.images * partition.student * passes
        for name, flops in partition.teachers.items():
            teachers[name] = teachers.get(name, 0.0) + partition.images * flops
    return StepCost(student=student, teachers=teachers)


def device_hours(flops: float, peak: float = A100_PEAK, utilisation: float = UTILISATION) -> float:
    """Turn operations into hours of one device; of many devices, their hours together.

    Args:
        flops: Of the whole training.
        peak: Operations a second of the device.
        utilisation: Share of the peak that is reached.

    Returns:
        Hours.

    Raises:
        OptionError: The rate is not positive.
    """
    if not (peak > 0 and 0 < utilisation <= 1):
        raise OptionError(f"A peak above 0 and a utilisation in (0, 1] are needed, got {peak} and {utilisation}.")
    return flops / (peak * utilisation) / 3600
