"""Streaming moments against NumPy on the whole."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from amradio.distributed import Group
from amradio.errors import CheckpointError, OptionError
from amradio.statistics import moments as module
from amradio.statistics.moments import ChannelMoments, Moments


def of(*batches: Tensor, dim: int = 5) -> Moments:
    moments = Moments(dim)
    for batch in batches:
        moments.update(batch)
    return moments


def check(moments: Moments, rows: Tensor, rtol: float = 1e-10) -> None:
    x = rows.double().numpy()
    assert moments.count == len(x)
    np.testing.assert_allclose(moments.mean.numpy(), x.mean(0), rtol=1e-12, atol=1e-12)
    expected = np.cov(x.T, ddof=1)
    np.testing.assert_allclose(moments.covariance.numpy(), expected, rtol=rtol, atol=rtol * np.abs(expected).max())
    assert moments.covariance.dtype == torch.float64


@settings(max_examples=40, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 60), max_size=4),
    offset=st.sampled_from([0.0, 1e3, -1e6]),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    at_once=st.sampled_from([1, 7, 8192]),
    seed=st.integers(0, 999),
)
def test_batches_and_merges_equal_the_whole(
    cuts: list[int], offset: float, scale: float, at_once: int, seed: int
) -> None:
    rows = torch.randn(60, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale + offset
    bounds = [0, *sorted(cuts), 60]
    parts = [rows[a:b] for a, b in itertools.pairwise(bounds)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_ROWS_AT_ONCE", at_once)
        streamed = of(*parts)
        merged = Moments(5)
        for part in parts:
            merged.merge(of(part))
    rtol = 1e-10 + 1e-14 * (offset / scale) ** 2 * 1e-4
    check(streamed, rows, rtol)
    check(merged, rows, rtol)


def test_what_is_far_from_zero_does_not_cancel() -> None:
    rows = torch.randn(1000, 5, dtype=torch.float64) + 1e7
    parts = rows.split(10)
    shifted = of(*(p - 1e7 for p in parts))
    torch.testing.assert_close(of(*parts).covariance, shifted.covariance, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_any_shape_and_dtype(dtype: torch.dtype) -> None:
    maps = torch.randn(3, 4, 2, 5).to(dtype)
    check(of(maps), maps.reshape(-1, 5))


def test_no_rows_add_nothing() -> None:
    rows = torch.randn(9, 5)
    check(of(rows[:0], rows, rows[:0]), rows)


class FakeGroup:
    """Processes whose values are known beforehand; adds them in rank order."""

    def __init__(self, everyone: list[Moments]) -> None:
        count = sum(m.count for m in everyone)
        mean = sum((m.mean * m.count for m in everyone), torch.zeros(5, dtype=torch.float64)) / max(count, 1)
        first = [torch.cat([m.mean * m.count, torch.tensor([float(m.count)])]) for m in everyone]
        second = [m._scatter + m.count * torch.outer(m.mean - mean, m.mean - mean) for m in everyone]
        self.answers = [torch.stack(first).sum(0), torch.stack(second).sum(0)]
        self.asked: list[Tensor] = []

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        self.asked.append(values)
        return self.answers[len(self.asked) - 1]


def test_processes_together_equal_the_whole() -> None:
    rows = torch.randn(50, 5) * torch.tensor([1.0, 2, 3, 4, 100]) + 30
    everyone = [of(rows[:20]), of(rows[20:20]), of(rows[20:])]
    for moments in everyone:
        group = FakeGroup([of(rows[:20]), of(rows[20:20]), of(rows[20:])])
        expected = torch.cat([moments.mean * moments.count, torch.tensor([float(moments.count)])])
        moments.all_reduce(group)  # type: ignore[arg-type]
        torch.testing.assert_close(group.asked[0], expected.double())
        check(moments, rows)


def test_one_process_and_no_process_with_rows(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        group = Group(0, 1, 0, torch.device("cpu"))
        rows = torch.randn(20, 5)
        moments = of(rows)
        moments.all_reduce(group)
        check(moments, rows)
        empty = Moments(5)
        empty.all_reduce(group)
        assert empty.count == 0
    finally:
        torch.distributed.destroy_process_group()


def test_state_goes_on_exactly() -> None:
    rows = torch.randn(40, 5)
    whole, first = of(rows[:20], rows[20:]), of(rows[:20])
    again = Moments(5)
    again.load_state_dict(first.state_dict())
    first.update(rows)  # does not reach what was loaded
    again.update(rows[20:])
    assert torch.equal(again.covariance, whole.covariance)
    assert torch.equal(again.mean, whole.mean)
    with pytest.raises(CheckpointError, match="of width 5, but the features are 4 wide"):
        Moments(4).load_state_dict(whole.state_dict())


def test_mistakes_are_explained() -> None:
    moments = of(torch.randn(1, 5))
    with pytest.raises(OptionError, match="at least 2 rows of features, got 1"):
        _ = moments.covariance
    bad = torch.randn(4, 5)
    bad[2, 3] = float("inf")
    with pytest.raises(OptionError, match="NaN or infinite"):
        moments.update(bad)
    assert moments.count == 1
    with pytest.raises(OptionError, match="width 5 in the last axis"):
        moments.update(torch.randn(4, 6))
    with pytest.raises(OptionError, match="widths 5 and 6"):
        moments.merge(Moments(6))
    with pytest.raises(OptionError, match="at least 1"):
        Moments(0)


def test_moments_of_channels_are_the_diagonal() -> None:
    rows = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 100
    found = ChannelMoments(4)
    assert found.variance.tolist() == [0, 0, 0, 0]
    for part in rows.split(7):
        found.update(part[None])
    found.update(rows[:0])
    assert found.count == 50
    assert np.allclose(found.mean.numpy(), rows.numpy().mean(0), rtol=1e-12)
    assert np.allclose(found.variance.numpy(), rows.numpy().var(0), rtol=1e-10)
