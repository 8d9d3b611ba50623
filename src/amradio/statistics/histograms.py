"""Histograms of values that stream by, between limits that are known before."""

from __future__ import annotations

import torch
from torch import Tensor

from amradio.errors import OptionError

_VALUES_AT_ONCE = 2**22


class Histogram:
    """Counts in bins of equal width; as `numpy.histogram`, the last bin holds its upper edge too.

    Args:
        low: Lower edge of the first bin.
        high: Upper edge of the last one.
        bins: How many.

    Attributes:
        low: See above.
        high: See above.
        counts: int64 [bins].
        outside: Values beyond the edges.
    """

    def __init__(self, low: float, high: float, bins: int = 100) -> None:
        if not (low < high and bins >= 1):
            raise OptionError(f"A histogram needs low < high and at least one bin, got {low}, {high} and {bins}.")
        self.low, self.high = low, high
        self.counts = torch.zeros(bins, dtype=torch.int64)
        self.outside = 0

    @property
    def edges(self) -> Tensor:
        """float64 [bins + 1]."""
        return torch.linspace(self.low, self.high, len(self.counts) + 1, dtype=torch.float64)

    @property
    def shares(self) -> Tensor:
        """float64 [bins] of all values, those outside included."""
        return self.counts.double() / max(int(self.counts.sum()) + self.outside, 1)

    def update(self, values: Tensor) -> None:
        """Count values of any shape."""
        edges = self.edges.to(values.device)
        for part in values.detach().flatten().split(_VALUES_AT_ONCE):
            x = part.double()
            bins = torch.bucketize(x, edges, right=True) - 1  # the bin that begins at or below the value
            bins = bins.where(x != edges[-1], len(self.counts) - 1)
            inside = bins[(bins >= 0) & (bins < len(self.counts))]
            self.counts += torch.bincount(inside, minlength=len(self.counts)).cpu()
            self.outside += len(x) - len(inside)
