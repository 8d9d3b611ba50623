"""The head: batch norm over frozen features, and a linear layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from amradio.distributed import Group

MOMENTUM = 0.1
EPS = 1e-5
INIT_STD = 0.01


class LinearMap(NamedTuple):
    """A fitted head.

    Attributes:
        weight: float32 [C, D].
        bias: float32 [C].
    """

    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Scores [..., C] of features [..., D]."""
        return torch.nn.functional.linear(features.to(self.weight), self.weight, self.bias)

    def to(self, device: torch.device) -> LinearMap:
        """The same on a device."""
        return LinearMap(self.weight.to(device), self.bias.to(device))


class BatchNormLinear(nn.Module):
    """Batch norm and a linear layer on features that nothing trains.

    As the features are constants, so are the statistics of a batch: no gradient goes through them, which makes batch
    norm over several processes a matter of two sums.

    Args:
        dim: D.
        classes: C.
        seed: Of the first weights.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, dim: int, classes: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.scale = nn.Parameter(torch.ones(dim))
        self.shift = nn.Parameter(torch.zeros(dim))
        self.weight = nn.Parameter(torch.randn(classes, dim, generator=generator) * INIT_STD)
        self.bias = nn.Parameter(torch.zeros(classes))
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("variance", torch.ones(dim))

    def observe(self, features: Tensor, group: Group | None = None) -> tuple[Tensor, Tensor]:
        """Take the statistics of a batch, and add them to the running ones.

        Args:
            features: [N, D] of this process; N may be 0.
            group: The processes that share the batch.

        Returns:
            Mean and variance [D] of the batch of all processes.
        """
        x = features.double()
        sums = torch.cat([x.new_tensor([float(len(x))]), x.sum(0), x.square().sum(0)])  # [1 + 2D]
        if group is not None:
            sums = group.all_reduce_sum(sums)
        count = sums[0]
        mean, second = (sums[1:] / count).chunk(2)
        variance = (second - mean.square()).clamp(min=0)
        unbiased = variance * (count / (count - 1).clamp(min=1))
        self.mean.lerp_(mean.to(self.mean), MOMENTUM)
        self.variance.lerp_(unbiased.to(self.variance), MOMENTUM)
        return mean.float(), variance.float()

    def forward(self, features: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        """Scores [N, C] of features [N, D], normalised by statistics [D]."""
        x = (features - mean) * (variance + EPS).rsqrt() * self.scale + self.shift  # [N, D]
        return torch.nn.functional.linear(x, self.weight, self.bias)

    @torch.no_grad()
    def folded(self) -> LinearMap:
        """The head with its running statistics, as one linear map."""
        gain = self.scale.double() * (self.variance.double() + EPS).rsqrt()  # [D]
        weight = self.weight.double() * gain  # [C, D]
        bias = self.bias.double() + self.weight.double() @ (self.shift.double() - gain * self.mean.double())
        return LinearMap(weight.float(), bias.float())
