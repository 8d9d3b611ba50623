"""A moving average of weights, which is better than the last ones and is what gets exported."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class MovingAverage:
    """``average = decay * average + (1 - decay) * weights`` after each step; buffers are copied.

    Early on the decay is ``(1 + step) / (10 + step)`` where that is smaller, so that the first, random weights are
    forgotten soon.

    Args:
        module: Whose weights are averaged; sharded weights stay sharded.
        decay: For each step.

    Attributes:
        tensors: By the names of the module's state dict.
        steps: Updates so far.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self.tensors = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take in the module's present weights."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        averaged, current = [], []
        trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
        for name, tensor in module.state_dict().items():
            if name in trained:
                averaged.append(self.tensors[name])
                current.append(tensor.detach())
            else:
                self.tensors[name].copy_(tensor)
        torch._foreach_lerp_(averaged, current, 1 - decay)

    def load(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Go on from saved values."""
        for name, tensor in tensors.items():
            self.tensors[name].copy_(tensor)
        self.steps = steps
