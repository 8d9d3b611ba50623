"""Hadamard matrices and rotations that equalise variances, against their definitions and the official patterns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from amradio.errors import OptionError
from amradio.statistics.hadamard import equalizing_rotation, hadamard

# Multiples of 4 up to 128 that the three constructions reach; the first ones that need others are 52, 92, 100 and 116.
ORDERS = [n for n in range(4, 129, 4) if n not in (52, 92, 100, 116)]
WIDTHS = [128, 320, 384, 512, 640, 768, 896, 1024, 1152, 1280, 1408, 1536]


@pytest.mark.parametrize("n", [1, 2, *ORDERS, *WIDTHS])
def test_rows_are_signs_and_orthogonal(n: int) -> None:
    h = hadamard(n)
    assert h is not None
    assert h.shape == (n, n)
    assert bool((h.abs() == 1).all())
    assert torch.equal(h @ h.T, n * torch.eye(n, dtype=torch.float64))  # sums of signs are exact


@pytest.mark.parametrize("n", [0, 3, 5, 6, 7, 9, 10, 14, 18, 22, 30, 52, 92, 100, 116])
def test_other_orders_have_none(n: int) -> None:
    assert hadamard(n) is None


def test_patterns_are_the_official_ones(goldens: Path) -> None:
    stored = load_file(goldens / "cases" / "metrics.safetensors")
    orders = [int(name.split(".")[1]) for name in stored if name.startswith("hadamard.")]
    assert len(orders) > 8
    for n in orders:
        h = hadamard(n)
        assert h is not None
        assert torch.equal(h, stored[f"hadamard.{n}"].double())


def check(variances: Tensor) -> Tensor:
    n = len(variances)
    rotation = equalizing_rotation(variances)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(n, dtype=torch.float64), atol=1e-12, rtol=0)
    spread = (rotation * variances.double()) @ rotation.T
    mean = variances.double().mean()
    torch.testing.assert_close(spread.diagonal(), mean.expand(n), atol=1e-12 * float(mean) + 1e-300, rtol=1e-12)
    return rotation


@pytest.mark.parametrize("n", [*range(1, 72), 100, 112, 116, 150, 320, 322, 384, 768, 999, 1000, 1001, 1152, 1280])
def test_every_width_is_equalised(n: int) -> None:
    variances = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) ** 6
    rotation = check(variances)
    # Where there is no Hadamard matrix, no channel keeps much of one direction to itself either.
    assert float(rotation.abs().max()) < 2.5 / n**0.5


@settings(max_examples=80, deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40))
def test_any_variances_are_equalised(values: list[float]) -> None:
    check(torch.tensor(values, dtype=torch.float64))


@pytest.mark.parametrize("n", [3, 7, 23, 52])
def test_one_direction_alone_is_equalised(n: int) -> None:
    variances = torch.zeros(n)
    variances[-1] = 1e8
    check(variances)


def test_equal_variances_need_no_more_than_the_start() -> None:
    check(torch.ones(7))
    check(torch.zeros(7))


@pytest.mark.parametrize("variances", [[-1.0, 2.0], [float("nan")], [float("inf"), 1.0], []])
def test_impossible_variances_are_refused(variances: list[float]) -> None:
    with pytest.raises(OptionError, match="finite numbers of at least 0"):
        equalizing_rotation(torch.tensor(variances))
