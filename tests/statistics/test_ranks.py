"""Effective ranks against NumPy and the official values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from amradio.errors import OptionError
from amradio.statistics.moments import Moments
from amradio.statistics.ranks import Lidar, lidar, rankme, rankme_of_moments, smooth_rank


@pytest.fixture(scope="module")
def golden(goldens: Path) -> dict[str, Tensor]:
    return load_file(goldens / "cases" / "metrics.safetensors")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_rankme_is_the_official_one(golden: dict[str, Tensor]) -> None:
    assert rankme(golden["rankme.embeddings"]) == pytest.approx(float(golden["rankme.value"]), rel=1e-9)


def test_lidar_is_the_official_one(golden: dict[str, Tensor]) -> None:
    assert lidar(golden["lidar.embeddings"]) == pytest.approx(float(golden["lidar.value"]), rel=1e-7)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 30), st.integers(1, 12), st.integers(0, 99))
def test_rankme_against_numpy(n: int, k: int, seed: int) -> None:
    x = random(n, k, seed=seed) + 3
    s = np.linalg.svd(x.numpy(), compute_uv=False)
    p = s / (s.sum() + 1e-7)
    assert rankme(x) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-9)
    assert 1 - 1e-6 <= rankme(x) <= min(n, k) + 1e-6


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 60), st.integers(1, 12), st.floats(-5, 5), st.integers(0, 99))
def test_rankme_of_rows_that_streamed_by(n: int, k: int, offset: float, seed: int) -> None:
    x = random(n, k, seed=seed) * torch.logspace(0, -3, k) + offset
    moments = Moments(k)
    for part in x.split(7):
        moments.update(part)
    assert rankme_of_moments(moments) == pytest.approx(rankme(x), rel=1e-5)


def test_equal_directions_count_in_full() -> None:
    assert smooth_rank(torch.ones(17)) == pytest.approx(17, rel=1e-6)
    assert smooth_rank(torch.tensor([3.0, 0.0, -1.0])) == pytest.approx(1, rel=1e-6)
    assert smooth_rank(torch.zeros(3)) == 0


def test_lidar_against_its_definition() -> None:
    x = (random(20, 5, 6) + 2 * random(20, 1, 6, seed=1)).numpy()
    means = x.mean(1)
    deviations = (x - means[:, None]).reshape(-1, 6)
    between = np.cov(means.T)
    within = deviations.T @ deviations / (20 * 5 - 1) + 1e-8 * np.eye(6)
    values = np.linalg.eigvals(np.linalg.solve(within, between)).real + 1e-8  # similar to the symmetric form
    p = values / (values.sum() + 1e-7)
    assert lidar(torch.from_numpy(x)) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-7)


def test_lidar_of_pictures_one_by_one() -> None:
    x = random(9, 4, 5)
    streamed = Lidar(5)
    for views in x:
        streamed.update(views)
    assert streamed.count == 9
    assert streamed.value() == lidar(x)


def test_lidar_does_not_exceed_the_number_of_pictures() -> None:
    assert lidar(random(4, 6, 40)) <= 3 + 1e-3


def test_too_little_for_lidar() -> None:
    with pytest.raises(OptionError, match="several views of several pictures, got 3 views of 3 pictures"):
        lidar(random(3, 1, 4))
    with pytest.raises(OptionError, match="got 5 views of 1 pictures"):
        lidar(random(1, 5, 4))


def test_what_is_no_set_of_embeddings() -> None:
    with pytest.raises(OptionError, match=r"must have 2 axes and values, got the shape \[3\]"):
        rankme(torch.ones(3))
    with pytest.raises(OptionError, match="some embeddings are NaN or infinite"):
        rankme(torch.tensor([[1.0, torch.nan]]))
