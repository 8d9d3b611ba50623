"""The random linear maps on top of a backbone that the objectives are computed on. They are never trained."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def random_linear(in_features: int, out_features: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Weight and bias as `torch.nn.Linear` draws them.

    Args:
        in_features: Width of what comes in.
        out_features: Width of what goes out.
        generator: On the CPU. With the state of torch's own generator this gives what `torch.nn.Linear` would get.

    Returns:
        float32 [out, in] and [out].
    """
    weight = nn.init.kaiming_uniform_(torch.empty(out_features, in_features), a=math.sqrt(5), generator=generator)
    bound = 1 / math.sqrt(in_features)
    return weight, nn.init.uniform_(torch.empty(out_features), -bound, bound, generator=generator)


class Head(nn.Module):
    """A fixed linear map; its tensors are buffers, so nothing here can be trained.

    Args:
        weight: [out, in].
        bias: [out].
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach().clone())
        self.register_buffer("bias", bias.detach().clone())

    @classmethod
    def random(cls, in_features: int, out_features: int, generator: torch.Generator) -> Head:
        """A head as `random_linear` draws it."""
        return cls(*random_linear(in_features, out_features, generator))

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out], in float32."""
        return nn.functional.linear(x, self.weight, self.bias)
