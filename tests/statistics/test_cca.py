"""Canonical correlations and maps between spaces, against NumPy, least squares and the official values."""

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
from amradio.statistics.cca import (
    SecondMoments,
    cca,
    channel_errors,
    compare_spaces,
    explained_variance,
    fidelity,
    linear_cka,
)
from amradio.statistics.hadamard import equalizing_rotation
from amradio.statistics.moments import Moments
from amradio.statistics.phi_s import phi_s


@pytest.fixture(scope="module")
def golden(goldens: Path) -> dict[str, Tensor]:
    return load_file(goldens / "cases" / "metrics.safetensors")


def pair(n: int, da: int, db: int, shared: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of two spaces that share some directions."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    common = random(n, shared)
    a = common @ random(shared, da) + 0.3 * random(n, da) + random(da)
    b = common @ random(shared, db) + 0.3 * random(n, db) + random(db)
    return a, b


def joint(a: Tensor, b: Tensor) -> Moments:
    moments = Moments(a.shape[1] + b.shape[1])
    for part in torch.cat([a, b], 1).split(11):
        moments.update(part)
    return moments


def about_zero(a: Tensor, b: Tensor) -> SecondMoments:
    n = len(a)
    return SecondMoments(a.T @ a / n, a.T @ b / n, b.T @ b / n)


def test_fidelity_is_the_official_one(golden: dict[str, Tensor]) -> None:
    a, b, pa, pb = (golden[f"cca.{name}"].double() for name in ("a", "b", "pa", "pb"))
    assert fidelity(channel_errors(about_zero(a, b), pa, pb)) == pytest.approx(float(golden["cca.fidelity"]), rel=1e-5)


def test_phi_s_is_the_official_one(golden: dict[str, Tensor]) -> None:
    moments = Moments(24)
    moments.update(golden["phis.x"])
    weight, inverse = phi_s(moments.covariance)
    # Rotated back, the rows are the principal components, whose signs are arbitrary.
    rotation = equalizing_rotation(torch.linalg.eigvalsh(moments.covariance).clamp(min=0))
    assert torch.allclose((rotation.T @ weight).abs(), (rotation.T @ golden["phis.matrix"]).abs(), atol=1e-9)
    assert torch.allclose(weight @ inverse, torch.eye(24, dtype=torch.float64), atol=1e-9)
    assert torch.allclose((weight @ moments.covariance @ weight.T).diagonal(), torch.ones(24, dtype=torch.float64))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.integers(0, 99))
def test_correlations_against_orthonormal_bases(da: int, db: int, shared: int, seed: int) -> None:
    a, b = pair(60, da, db, shared, seed)
    found = cca(SecondMoments.of(joint(a, b), da))
    # Björck and Golub: cosines of the principal angles between the column spaces.
    qa, qb = (np.linalg.qr((x - x.mean(0)).numpy())[0] for x in (a, b))
    expected = np.linalg.svd(qa.T @ qb, compute_uv=False)
    assert np.allclose(found.correlations.numpy(), expected, atol=1e-8)
    assert found.rank == pytest.approx(expected.sum(), abs=1e-7)
    # The projections are what is correlated.
    left, right = (a - a.mean(0)) @ found.projection_a, (b - b.mean(0)) @ found.projection_b
    assert np.allclose((left.T @ right).numpy() / 59, np.diag(expected), atol=1e-8)


def test_errors_from_moments_are_those_of_rows() -> None:
    a, b = pair(80, 5, 4, 3)
    a, b = a - a.mean(0), b - b.mean(0)
    found = cca(about_zero(a, b))
    mapped = a @ (found.projection_a @ torch.linalg.pinv(found.projection_b))
    assert torch.allclose(channel_errors(about_zero(a, b), found.projection_a, found.projection_b),
                          (mapped - b).square().mean(0))  # fmt: skip


def test_a_comparison_against_rows() -> None:
    a, b = pair(90, 6, 4, 3)
    found = compare_spaces(joint(a, b), 6)

    def standardised(x: Tensor) -> Tensor:
        return (x - x.mean(0)) @ phi_s(torch.cov(x.T))[0].T

    x, y = standardised(a), standardised(b)
    maps = cca(SecondMoments(torch.cov(x.T), (x.T @ y) / 89, torch.cov(y.T)))
    forward = (x @ (maps.projection_a @ torch.linalg.pinv(maps.projection_b)) - y).square().mean(0)
    backward = (y @ (maps.projection_b @ torch.linalg.pinv(maps.projection_a)) - x).square().mean(0)
    assert found.fidelity_a_to_b == pytest.approx(float((1 / forward).mean()), rel=1e-7)
    assert found.fidelity_b_to_a == pytest.approx(float((1 / backward).mean()), rel=1e-7)
    best = x @ torch.linalg.lstsq(x, y).solution
    assert found.explained_a_to_b == pytest.approx(1 - float((best - y).square().sum() / y.square().sum()), rel=1e-7)
    gram_a, gram_b = (a - a.mean(0)) @ (a - a.mean(0)).T, (b - b.mean(0)) @ (b - b.mean(0)).T
    assert found.cka == pytest.approx(float((gram_a * gram_b).sum() / (gram_a.norm() * gram_b.norm())), rel=1e-9)
    values = np.linalg.svd((a - a.mean(0)).numpy(), compute_uv=False)
    shares = values / values.sum()
    assert found.rank_a == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-5)


def test_a_space_and_its_rotation_say_the_same() -> None:
    a, _ = pair(70, 5, 1, 2)
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64))[0]
    found = compare_spaces(joint(a, 2 * a @ rotation + 1), 5)
    assert found.correlations.numpy() == pytest.approx(1, abs=1e-6)
    assert found.cka == pytest.approx(1)
    assert found.fidelity_a_to_b > 1e9
    assert found.explained_b_to_a == pytest.approx(1)


def test_unrelated_spaces() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(4000, d, generator=generator, dtype=torch.float64) for d in (4, 3))
    found = compare_spaces(joint(a, b), 4)
    assert float(found.correlations.max()) < 0.1
    assert found.cka < 0.01
    assert found.explained_a_to_b < 0.01
    assert found.fidelity_a_to_b < 1  # the canonical map does not shrink what is not correlated


def test_directions_without_variance_are_left_out() -> None:
    a, b = pair(50, 4, 3, 2)
    flat = torch.cat([a, torch.full((50, 2), 7.0, dtype=torch.float64)], 1)
    wide = cca(SecondMoments.of(joint(flat, b), 6)).correlations
    assert torch.allclose(wide, cca(SecondMoments.of(joint(a, b), 4)).correlations)
    assert explained_variance(SecondMoments.of(joint(flat, b), 6)) <= 1
    assert linear_cka(SecondMoments.of(joint(flat, b), 6)) <= 1


def test_a_constant_space_cannot_be_compared() -> None:
    a, _ = pair(20, 3, 1, 1)
    with pytest.raises(OptionError, match="The second backbone says the same everywhere"):
        compare_spaces(joint(a, torch.ones(20, 2, dtype=torch.float64)), 3)
