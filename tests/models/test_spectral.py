"""Folding of spectral parametrisations against torch's own parametrisation machinery."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from amradio.errors import CheckpointError
from amradio.weights.spectral import SpectralSettings, fold_parametrizations


class Spectral(nn.Module):
    """A weight with a learned spectral norm, with power iterations in training mode."""

    def __init__(self, weight: Tensor, version: int, eps: float, iterations: int) -> None:
        super().__init__()
        self.eps, self.iterations = eps, iterations
        self.scale = nn.Parameter(torch.rand(1, 1) + 0.5)
        self.register_buffer("_u", nn.functional.normalize(torch.randn(weight.shape[0]), dim=0))
        self.register_buffer("_v", nn.functional.normalize(torch.randn(weight.shape[1]), dim=0))
        if version == 2:
            self.register_buffer("_sn_version", torch.tensor(2))

    def forward(self, weight: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                for _ in range(self.iterations):
                    u = torch.mv(weight, self._v)
                    self._u.copy_(u / max(u.norm().item(), self.eps))
                    v = torch.mv(weight.t(), self._u)
                    self._v.copy_(v / max(v.norm().item(), self.eps))
        sigma = torch.dot(self._u, torch.mv(weight, self._v)) + self.eps
        factor = self.scale.exp().add(1).log() + 0.05 if hasattr(self, "_sn_version") else self.scale
        return weight * factor / sigma


class InParts(nn.Module):
    """Equal parts of rows, each with a norm of its own."""

    def __init__(self, weight: Tensor, count: int, *args: Any) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Spectral(w, *args) for w in weight.chunk(count))

    def forward(self, weight: Tensor) -> Tensor:
        return torch.cat([part(w) for part, w in zip(self.parts, weight.chunk(len(self.parts)), strict=True)])


class Nothing(nn.Module):
    """What DAMP is outside training."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight


def network(
    parts: dict[str, int], version: int, eps: float = 1e-6, iterations: int = 1, damp: bool = False
) -> nn.ModuleDict:
    torch.manual_seed(0)
    rows = {"qkv": 12, "w12": 10, "fc1": 7, "plain": 3}
    net = nn.ModuleDict({name: nn.Linear(4, n) for name, n in rows.items()})
    for name, count in parts.items():
        linear, settings = net[name], (version, eps, iterations)
        weight = linear.weight.detach()
        module = InParts(weight, count, *settings) if count > 1 else Spectral(weight, *settings)
        parametrize.register_parametrization(linear, "weight", module)
        if damp:
            parametrize.register_parametrization(linear, "weight", Nothing())
    return net


PARTS = {"qkv": 3, "w12": 2, "fc1": 1}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("damp", [False, True])
@pytest.mark.parametrize(
    ("setting", "eps", "iterations"),
    [
        (True, 1e-6, 1),
        ({}, 1e-12, 1),
        ({"eps": 1e-2, "n_power_iterations": 3}, 1e-2, 3),
        ({"n_power_iterations": 0}, 1e-12, 0),
    ],
)
def test_folding_is_one_forward_in_training_mode(
    version: int, damp: bool, setting: Any, eps: float, iterations: int
) -> None:
    net = network(PARTS, version, eps, iterations, damp)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    folded = fold_parametrizations(state, SpectralSettings.of(setting))
    net.train()
    want = {name: linear.weight.detach() for name, linear in net.items()}
    assert set(folded) == {f"{n}.{p}" for n in want for p in ("weight", "bias")}
    for name, weight in want.items():
        torch.testing.assert_close(folded[f"{name}.weight"], weight, atol=1e-6, rtol=1e-5)
        assert torch.equal(folded[f"{name}.bias"], state[f"{name}.bias"])


def test_settings_must_be_numbers() -> None:
    with pytest.raises(
        CheckpointError, match=r"have spectral_reparam=\{'eps': 'x'\}: could not convert string to float"
    ):
        SpectralSettings.of({"eps": "x"})


def test_folding_twice_gives_the_same() -> None:
    state = network(PARTS, 2).state_dict()
    before = {k: v.clone() for k, v in state.items()}
    first, second = (fold_parametrizations(state, SpectralSettings()) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert all(torch.equal(state[k], before[k]) for k in before)
    again = fold_parametrizations(first, SpectralSettings())
    assert all(torch.equal(again[k], first[k]) for k in first)


def test_half_precision_is_folded_in_float32() -> None:
    state = {k: v.half() if v.is_floating_point() else v for k, v in network(PARTS, 2).state_dict().items()}
    folded = fold_parametrizations(state, SpectralSettings())
    widened = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    want = fold_parametrizations(widened, SpectralSettings())
    assert folded["qkv.weight"].dtype == torch.float32
    assert torch.equal(folded["qkv.weight"], want["qkv.weight"])


def test_the_folded_norm_is_the_learned_one() -> None:
    state = network({"fc1": 1}, 2).state_dict()
    folded = fold_parametrizations(state, SpectralSettings(iterations=200))
    scale = state["fc1.parametrizations.weight.0.scale"].item()
    norm = torch.linalg.matrix_norm(folded["fc1.weight"], 2)
    assert norm.item() == pytest.approx(torch.nn.functional.softplus(torch.tensor(scale)).item() + 0.05, rel=1e-4)


def test_any_stored_version_number_means_version_two() -> None:
    state = network({"fc1": 1}, 2).state_dict()
    want = fold_parametrizations(state, SpectralSettings())["fc1.weight"]
    state["fc1.parametrizations.weight.0._sn_version"] = torch.tensor(1)
    assert torch.equal(fold_parametrizations(state, SpectralSettings())["fc1.weight"], want)


def test_damp_alone_is_the_weight() -> None:
    weight = torch.randn(3, 4)
    folded = fold_parametrizations({"fc1.parametrizations.weight.original": weight}, SpectralSettings())
    assert list(folded) == ["fc1.weight"]
    assert torch.equal(folded["fc1.weight"], weight)


def test_a_vector_is_scaled_by_its_length() -> None:
    weight = torch.randn(5)
    unit = {"scale": torch.full((1, 1), 2.0)}
    state = {f"x.parametrizations.weight.0.{k}": v for k, v in unit.items()}
    folded = fold_parametrizations(state | {"x.parametrizations.weight.original": weight}, SpectralSettings(eps=0.0))
    torch.testing.assert_close(folded["x.weight"], 2 * weight / weight.norm())


def test_vectors_without_a_weight_are_left_to_be_reported() -> None:
    state = network({"fc1": 1}, 2).state_dict()
    del state["fc1.parametrizations.weight.original"]
    folded = fold_parametrizations(state, SpectralSettings())
    assert "fc1.weight" not in folded
    assert any(k.startswith("fc1.parametrizations.weight") and k.endswith("_u") for k in folded)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("fc1.parametrizations.weight.0._u", "of fc1 is incomplete: it lacks _u of part 0."),
        ("fc1.parametrizations.weight.0.scale", "of fc1 is incomplete: it lacks scale of part 0."),
        ("qkv.parametrizations.weight.0.parts.1._v", "of qkv is incomplete: it lacks _v of part 1."),
    ],
)
def test_incomplete_units_are_named(key: str, message: str) -> None:
    state = network(PARTS, 2).state_dict()
    del state[key]
    with pytest.raises(CheckpointError, match=re.escape(f"The spectral parametrisation {message}")):
        fold_parametrizations(state, SpectralSettings())


def test_a_missing_part_is_named() -> None:
    state = {k: v for k, v in network(PARTS, 2).state_dict().items() if ".parts.0." not in k}
    with pytest.raises(CheckpointError, match=r"of qkv is incomplete: it lacks part 0\."):
        fold_parametrizations(state, SpectralSettings())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("fc1.parametrizations.weight.0._u", torch.ones(6), r"vectors of shapes \[\[6\], \[4\]\] in part 0"),
        ("fc1.parametrizations.weight.0._v", torch.ones(4, 1), r"do not fit its weight \[7, 4\]"),
        ("fc1.parametrizations.weight.0.scale", torch.ones(7, 1), r"of fc1 has a scale of shape \[7, 1\]"),
        ("qkv.parametrizations.weight.original", torch.ones(11, 4), r"of qkv has 3 equal parts of rows"),
        ("fc1.parametrizations.weight.original", torch.ones(7, 4, 1), r"of fc1 has 1 equal parts .* \[7, 4, 1\]"),
        ("fc1.parametrizations.weight.original", torch.ones(()), r"of fc1 has 1 equal parts of rows"),
    ],
)
def test_units_that_do_not_fit_their_weight_are_named(key: str, value: Tensor, message: str) -> None:
    state = network(PARTS, 2).state_dict() | {key: value}
    with pytest.raises(CheckpointError, match=message):
        fold_parametrizations(state, SpectralSettings())
