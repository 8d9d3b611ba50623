from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from amradio.errors import OptionError
from amradio.statistics.histograms import Histogram


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-3, 3), max_size=60), st.floats(-2, 0), st.floats(0.1, 2), st.integers(1, 20))
def test_counts_are_those_of_numpy(values: list[float], low: float, width: float, bins: int) -> None:
    found = Histogram(low, low + width, bins)
    x = torch.tensor([*values, low, low + width], dtype=torch.float64)
    for part in x.split(7):
        found.update(part.reshape(1, -1))
    expected, _ = np.histogram(x.numpy(), bins=found.edges.numpy())
    assert found.counts.tolist() == expected.tolist()
    assert int(found.counts.sum()) + found.outside == len(x)
    assert float(found.shares.sum()) == pytest.approx(expected.sum() / len(x))


def test_edges_must_differ() -> None:
    with pytest.raises(OptionError, match=r"low < high and at least one bin, got 1\.0, 1\.0 and 5"):
        Histogram(1.0, 1.0, 5)
