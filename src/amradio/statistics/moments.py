"""Mean and covariance of features that stream by, in float64, over batches and processes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from amradio.distributed import Group
from amradio.errors import CheckpointError, OptionError

_ROWS_AT_ONCE = 8192


class Moments:
    """Running mean and covariance.

    Batches are merged by the pairwise update of Chan, Golub and LeVeque (1979): scatter is always taken about a mean,
    so nothing cancels when features are far from zero.

    Args:
        dim: Width D of the features.

    Attributes:
        dim: See above.
        count: Rows seen.
        mean: float64 [D].
    """

    def __init__(self, dim: int) -> None:
        if dim < 1:
            raise OptionError(f"Moments need a width of at least 1, got {dim}.")
        self.dim = dim
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64)

    @property
    def covariance(self) -> Tensor:
        """float64 [D, D], with divisor N - 1, as `torch.cov` and the official code have it.

        Raises:
            OptionError: Fewer than two rows were seen.
        """
        if self.count < 2:
            raise OptionError(f"A covariance needs at least 2 rows of features, got {self.count}.")
        return self._scatter / (self.count - 1)

    def update(self, features: Tensor) -> None:
        """Add rows.

        Args:
            features: [..., D]; computed on its device, kept on the CPU.

        Raises:
            OptionError: The width is another one, or some features are not finite. Nothing was added.
        """
        if features.shape[-1:] != (self.dim,):
            raise OptionError(f"Expected features of width {self.dim} in the last axis, got {list(features.shape)}.")
        rows = features.detach().reshape(-1, self.dim)  # [N, D]
        if not bool(torch.isfinite(rows).all()):
            raise OptionError(
                "The statistics cannot be updated: some features are NaN or infinite. Check the model's dtype; "
                "float16 overflows above 65,504."
            )
        for part in rows.split(_ROWS_AT_ONCE):  # a copy in float64 of some rows only
            x = part.double()
            mean = x.mean(0)
            x = x - mean
            self._merge(len(x), mean.cpu(), (x.T @ x).cpu())

    def merge(self, other: Moments) -> None:
        """Add what another one has seen.

        Args:
            other: Of the same width.

        Raises:
            OptionError: Of another width.
        """
        if other.dim != self.dim:
            raise OptionError(f"Moments of widths {self.dim} and {other.dim} cannot be merged.")
        self._merge(other.count, other.mean, other._scatter)

    def all_reduce(self, group: Group) -> None:
        """Make these the moments of what all processes have seen.

        Args:
            group: The processes; each calls this once.
        """
        sums = group.all_reduce_sum(torch.cat([self.mean * self.count, self.mean.new_tensor([self.count])]))
        count = int(sums[-1])
        if not count:
            return
        mean = sums[:-1] / count
        offset = self.mean - mean
        self._scatter = group.all_reduce_sum(self._scatter + self.count * torch.outer(offset, offset))
        self.count, self.mean = count, mean

    def state_dict(self) -> dict[str, Tensor]:
        """Everything, as tensors."""
        return {"count": torch.tensor(self.count), "mean": self.mean.clone(), "scatter": self._scatter.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state_dict` gave.

        Raises:
            CheckpointError: It is not of this width.
        """
        if state["mean"].shape != (self.dim,) or state["scatter"].shape != (self.dim, self.dim):
            raise CheckpointError(
                f"The saved statistics are of width {len(state['mean'])}, but the features are {self.dim} wide. They "
                "belong to another teacher."
            )
        self.count = int(state["count"])
        self.mean, self._scatter = state["mean"].cpu().double().clone(), state["scatter"].cpu().double().clone()

    def _merge(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if not count:
            return
        total = self.count + count
        offset = mean - self.mean
        self._scatter = self._scatter + scatter + torch.outer(offset, offset) * (self.count * count / total)
        self.mean = self.mean + offset * (count / total)
        self.count = total


class ChannelMoments:
    """Running mean and variance of each channel: `Moments` without what lies off the diagonal.

    Args:
        dim: Width D of the features.

    Attributes:
        dim: See above.
        count: Rows seen.
        mean: float64 [D].
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self._scatter = torch.zeros(dim, dtype=torch.float64)

    @property
    def variance(self) -> Tensor:
        """float64 [D], with divisor N: the mean squared distance from the mean."""
        return self._scatter / max(self.count, 1)

    def update(self, features: Tensor) -> None:
        """Add rows [..., D]."""
        rows = features.detach().reshape(-1, self.dim).double().cpu()  # [N, D]
        if not len(rows):
            return
        mean = rows.mean(0)
        total = self.count + len(rows)
        offset = mean - self.mean
        self._scatter += (rows - mean).square().sum(0) + offset.square() * (self.count * len(rows) / total)
        self.mean = self.mean + offset * (len(rows) / total)
        self.count = total
