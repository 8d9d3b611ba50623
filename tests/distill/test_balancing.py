"""Standardisations: what they promise on their own data, on other data, backwards, and inside a linear layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from amradio.distill.balancing import BALANCING, Balancing, BalancingKind
from amradio.errors import OptionError
from amradio.statistics.moments import Moments

WHITENING = ("pca", "zca", "hadamard")
KINDS: Any = pytest.mark.parametrize("kind", BALANCING)


def features(rows: int, dim: int, seed: int = 0, rank: int | None = None) -> Tensor:
    """Correlated rows with very different scales, far from zero; float64."""
    g = torch.Generator().manual_seed(seed)
    latent = torch.randn(rows, rank or dim, generator=g, dtype=torch.float64)
    mix = torch.randn(rank or dim, dim, generator=g, dtype=torch.float64)
    scales = torch.logspace(-2, 2, dim, dtype=torch.float64)[torch.randperm(dim, generator=g)]
    return latent @ mix * scales + 20 * torch.randn(dim, generator=g, dtype=torch.float64)


def fitted(kind: BalancingKind, x: Tensor) -> Balancing:
    moments = Moments(x.shape[-1])
    for part in x.split(97):
        moments.update(part)
    return Balancing.fit(kind, moments)


@pytest.mark.parametrize("dim", [*range(1, 72), 112, 320, 384, 768, 1152, 1280])
def test_phi_s_gives_every_channel_variance_one(dim: int) -> None:
    x = features(2 * dim + 60 if dim < 200 else 300, dim, seed=dim)
    balancing = fitted("phi-s", x)
    y = balancing(x)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y.var(0), torch.ones(dim, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(y.mean(0), torch.zeros(dim, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(balancing.inverse(y), x, atol=1e-8, rtol=1e-8)
    # One scale for all directions: an isometry up to a factor.
    gram = balancing.weight @ balancing.weight.T
    torch.testing.assert_close(gram / gram[0, 0], torch.eye(dim, dtype=torch.float64), atol=1e-9, rtol=0)


@settings(max_examples=30, deadline=None)
@given(dim=st.integers(2, 40), rank=st.integers(1, 40), rows=st.integers(2, 90), seed=st.integers(0, 999))
def test_phi_s_also_where_directions_are_missing(dim: int, rank: int, rows: int, seed: int) -> None:
    x = features(rows, dim, seed, min(rank, dim))
    y = fitted("phi-s", x)(x)
    torch.testing.assert_close(y.var(0), torch.ones(dim, dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dim", [23, 64, 112])
def test_phi_s_in_float32(dim: int) -> None:
    x = features(4000, dim).float()
    y = fitted("phi-s", x)(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double().var(0), torch.ones(dim, dtype=torch.float64), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dim", [24, 30, 65])
def test_phi_s_on_other_data_within_the_sampling_error(dim: int) -> None:
    rows = 20_000
    x = features(2 * rows, dim, seed=3)
    y = fitted("phi-s", x[:rows])(x[rows:])
    # The variance of a normal sample has the standard error sqrt(2 / n); both halves have one.
    error = (2 / rows) ** 0.5 * 2**0.5
    assert float((y.var(0) - 1).abs().max()) < 5 * error
    assert float(y.mean(0).abs().max()) < 5 * (2 / rows) ** 0.5


def test_phi_s_is_the_official_one(goldens: Path) -> None:
    stored = load_file(goldens / "cases" / "metrics.safetensors")
    x = stored["phis.x"]
    balancing = fitted("phi-s", x)
    torch.testing.assert_close(balancing.mean, stored["phis.mean"].double())
    # Rows of Uᵀ, behind the Hadamard matrix, have arbitrary signs.
    components, theirs = (
        stored["hadamard.24"].double().T @ m for m in (balancing.weight, stored["phis.matrix"].double())
    )
    torch.testing.assert_close(components.abs(), theirs.abs(), atol=1e-6, rtol=1e-6)
    covariance = torch.cov(balancing(x).double().T)
    torch.testing.assert_close(covariance.diagonal(), stored["phis.out_cov"].double().diagonal(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dim", [7, 24, 30])
@pytest.mark.parametrize("kind", WHITENING)
def test_whitening_leaves_no_correlation(kind: Any, dim: int) -> None:
    x = features(600, dim)
    x = x / x.std(0)  # within the range that the floor leaves alone
    balancing = fitted(kind, x)
    covariance = torch.cov(balancing(x).T)
    torch.testing.assert_close(covariance, torch.eye(dim, dtype=torch.float64), atol=1e-6, rtol=0)
    if kind == "zca":
        torch.testing.assert_close(balancing.weight, balancing.weight.T, atol=1e-8, rtol=0)


def test_hadamard_whitening_spreads_directions_evenly() -> None:
    x = features(600, 24)
    pca, spread = fitted("pca", x), fitted("hadamard", x)
    rotation = spread.weight @ pca.inverse_weight
    torch.testing.assert_close(rotation.abs(), torch.full((24, 24), 24**-0.5, dtype=torch.float64), atol=1e-8, rtol=0)


def test_scaling_kinds() -> None:
    x = features(500, 9)
    y = fitted("per-channel", x)(x)
    torch.testing.assert_close(y.var(0), torch.ones(9, dtype=torch.float64))
    y = fitted("global", x)(x)
    torch.testing.assert_close(y.var(0).mean(), torch.ones((), dtype=torch.float64))
    torch.testing.assert_close(y.var(0) / x.var(0), (1 / x.var(0).mean()).expand(9))
    assert torch.equal(fitted("none", x)(x), x)


@KINDS
@pytest.mark.parametrize("dim", [1, 10, 24])
def test_the_inverse_restores(kind: BalancingKind, dim: int) -> None:
    x = features(300, dim)
    balancing = fitted(kind, x)
    maps = x.reshape(3, 10, 10, dim)
    restored = balancing.inverse(balancing(maps))
    assert restored.shape == maps.shape
    torch.testing.assert_close(restored, maps, atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(balancing.inverse(balancing(maps.float())), maps.float(), atol=2e-2, rtol=1e-4)


@KINDS
@pytest.mark.parametrize("u", [1, 2])
def test_folding_equals_the_inverse_of_the_output(kind: BalancingKind, u: int) -> None:
    x = features(300, 10)
    balancing = fitted(kind, x)
    linear = nn.Linear(6, u * u * 10).double()
    z = torch.randn(5, 6, dtype=torch.float64)
    weight, bias = linear.weight.clone(), linear.bias.clone()
    expected = balancing.inverse(linear(z).reshape(5, u * u, 10)).reshape(5, -1)
    balancing.fold(linear)
    torch.testing.assert_close(linear(z), expected, atol=1e-9, rtol=1e-9)
    balancing.unfold(linear)
    torch.testing.assert_close(linear.weight, weight, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(linear.bias, bias, atol=1e-8, rtol=1e-8)
    assert linear.weight.requires_grad


def test_folding_in_float32() -> None:
    balancing = fitted("phi-s", features(300, 24).div(100))
    linear = nn.Linear(6, 24)
    z = torch.randn(5, 6)
    expected = balancing.inverse(linear(z))
    balancing.fold(linear)
    torch.testing.assert_close(linear(z), expected, atol=1e-4, rtol=1e-5)


def test_what_cannot_be_folded() -> None:
    balancing = fitted("phi-s", features(50, 10))
    for linear in (
        nn.Linear(4, 10, bias=False),
        nn.Linear(4, 12),
        torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 10)),
    ):
        with pytest.raises(OptionError, match="with a bias, a multiple of 10 outputs and no parametrisation"):
            balancing.fold(linear)


@KINDS
def test_state_is_saved_and_starts_as_the_identity(kind: BalancingKind) -> None:
    x = features(100, 6)
    balancing, again = fitted(kind, x), Balancing(kind, 6)
    assert torch.equal(again(x), x)
    assert torch.equal(again.inverse(x), x)
    again.load_state_dict(balancing.state_dict())
    assert torch.equal(again(x), balancing(x))
    assert all(b.dtype == torch.float64 for b in again.buffers())
    assert not list(again.parameters())
    assert repr(again) == f"Balancing({kind!r}, dim=6)"


def test_autocast_and_half_inputs_are_standardised_in_float32() -> None:
    x = features(400, 24).float()
    balancing = fitted("phi-s", x)
    with torch.autocast("cpu", torch.bfloat16):
        y = balancing(x)
        restored = balancing.inverse(y.bfloat16())
    assert y.dtype == restored.dtype == torch.float32
    assert torch.equal(y, balancing(x))
    half = x.bfloat16()
    assert torch.equal(balancing(half), balancing(half.float()))


def test_channels_without_variance_are_only_centred() -> None:
    x = features(100, 6)
    x[:, 2] = 7.0
    y = fitted("per-channel", x)(x)
    torch.testing.assert_close(y[:, 2], torch.zeros(100, dtype=torch.float64))
    for kind in ("pca", "zca", "hadamard"):
        balancing = fitted(kind, x)  # type: ignore[arg-type]
        assert bool(torch.isfinite(balancing(x)).all())
        torch.testing.assert_close(balancing.inverse(balancing(x)), x, atol=1e-6, rtol=1e-6)


def test_mistakes_are_explained() -> None:
    with pytest.raises(OptionError, match=r"Unknown balancing 'phis'. Nearest names: phi-s"):
        Balancing("phis", 4)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="at least 2 rows"):
        Balancing.fit("phi-s", Moments(4))
    with pytest.raises(OptionError, match="said the same for all 5 rows"):
        fitted("phi-s", torch.ones(5, 4))
