"""What a backbone costs: parameters, operations of a forward pass, pictures a second."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from amradio.backbones.protocol import Backbone


@dataclass(frozen=True)
class Cost:
    """What was counted and measured.

    Attributes:
        height: Of the pictures, in pixels.
        width: Likewise.
        parameters: Of everything that was loaded, adaptors included, trained or not.
        flops: Of a forward pass for one picture: matrix products, convolutions and attention, two for each
            multiplication with its addition.
        batch_size: Of the measurement.
        images_per_s: Forward passes only: pictures are in memory already.
    """

    height: int
    width: int
    parameters: int
    flops: int
    batch_size: int
    images_per_s: float


def measure_cost(
    backbone: Backbone,
    height: int,
    width: int,
    *,
    batch_size: int = 8,
    batches: int = 3,
    device: torch.device | None = None,
    autocast: torch.dtype | None = None,
) -> Cost:
    """Count and measure.

    Args:
        backbone: On the device.
        height: In pixels; a size that the backbone accepts.
        width: Likewise.
        batch_size: Pictures in each timed pass.
        batches: Timed passes, after one that is not timed.
        device: Where it is.
        autocast: Computes in mixed precision.

    Returns:
        The cost.
    """
    place = device or torch.device("cpu")
    module = backbone if isinstance(backbone, nn.Module) else None
    images = torch.rand(batch_size, 3, height, width, generator=torch.Generator().manual_seed(0)).to(place)
    counter = FlopCounterMode(display=False)
    # Some kernels of attention are unknown to the counter; written out as matrix products, every one is counted.
    with torch.no_grad(), torch.autocast(place.type, autocast, enabled=autocast is not None):
        with sdpa_kernel(SDPBackend.MATH), counter:
            backbone(images[:1])
        seconds = _timed(backbone, images, batches)
    return Cost(
        height=height,
        width=width,
        parameters=0 if module is None else sum(p.numel() for p in module.parameters()),
        flops=int(counter.get_total_flops()),
        batch_size=batch_size,
        images_per_s=batch_size * batches / seconds,
    )


def _timed(backbone: Any, images: torch.Tensor, batches: int) -> float:
    with torch.inference_mode():
        backbone(images)
        _wait(images.device)
        start = time.perf_counter()
        for _ in range(batches):
            backbone(images)
        _wait(images.device)
        return max(time.perf_counter() - start, 1e-9)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
