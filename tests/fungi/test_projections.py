"""Projections against explicitly materialised gradients, and their inner products against the true ones."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from amradio.errors import CapabilityError, OptionError
from amradio.fungi import projections
from amradio.fungi.projections import (
    ExactKernel,
    GradientShape,
    KernelSimilarity,
    RankOneProjection,
    SignProjection,
    TensorSketch,
    make_projection,
)
from amradio.search import top_k

SHAPE = GradientShape(outputs=12, inputs=9, bias=True)


def factors(count: int, rank: int = 1, shape: GradientShape = SHAPE) -> tuple[Tensor, Tensor, Tensor]:
    """Factors and the gradients [N, H, J] that they stand for."""
    upstream = torch.randn(count, rank, shape.outputs)
    inputs = shape.augmented(torch.randn(count, rank, shape.inputs))
    return upstream, inputs, torch.einsum("nvh,nvj->nhj", upstream, inputs)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("at_once", [1, 500, 2**22])
def test_sign_equals_the_materialised_product(rank: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projections, "_PRODUCTS_AT_ONCE", at_once)
    monkeypatch.setattr(projections, "_DRAWN_AT_ONCE", at_once)
    projection = make_projection("sign", SHAPE, 20, seed=5)
    matrix = torch.where(torch.rand(20, SHAPE.size, generator=torch.Generator().manual_seed(5)) > 0.5, 1.0, -1.0)
    upstream, inputs, gradients = factors(7, rank)
    expected = gradients.flatten(1) @ matrix.T / math.sqrt(20)
    torch.testing.assert_close(projection(upstream, inputs), expected, atol=2e-5, rtol=1e-5)


def test_sign_draws_what_one_call_of_the_generator_gives() -> None:
    torch.manual_seed(11)
    matrix = torch.rand(30, SHAPE.size) > 0.5
    drawn = SignProjection.random(SHAPE, 30, torch.Generator().manual_seed(11)).signs
    assert torch.equal(drawn.flatten(1) > 0, matrix)


@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 30))
def test_rank_one_equals_its_materialised_matrix(rank: int, views: int, dim: int) -> None:
    projection = make_projection(f"rank-one-{rank}", SHAPE, dim, seed=3)
    assert isinstance(projection, RankOneProjection)
    matrix = torch.einsum("reh,rej->ehj", projection.left, projection.right) / math.sqrt(dim * rank)
    upstream, inputs, gradients = factors(4, views)
    expected = gradients.flatten(1) @ matrix.flatten(1).T
    torch.testing.assert_close(projection(upstream, inputs), expected, atol=1e-4, rtol=1e-4)


@given(st.integers(1, 31), st.integers(1, 3))
def test_tensor_sketch_equals_a_circular_convolution(dim: int, views: int) -> None:
    projection = make_projection("tensor-sketch", SHAPE, dim, seed=3)
    assert isinstance(projection, TensorSketch)
    left, right = projection._left, projection._right
    assert (left.abs().sum(1) == 1).all()
    matrix = torch.zeros(dim, SHAPE.outputs, SHAPE.columns)
    for i in range(SHAPE.outputs):
        for j in range(SHAPE.columns):
            k, m = int(left[i].abs().argmax()), int(right[j].abs().argmax())
            matrix[(k + m) % dim, i, j] = left[i, k] * right[j, m]
    upstream, inputs, gradients = factors(4, views)
    expected = gradients.flatten(1) @ matrix.flatten(1).T
    torch.testing.assert_close(projection(upstream, inputs), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "largest"), [("sign", 0.06), ("rank-one-1", 0.075), ("rank-one-4", 0.065), ("tensor-sketch", 0.07)]
)
def test_cosines_are_kept_up_to_noise(name: str, largest: float) -> None:
    """Root mean square errors as in theory: about 1 / sqrt(E) = 0.051 for signs, a little more for the others."""
    shape = GradientShape(64, 64, True)
    upstream, inputs, gradients = factors(100, shape=shape)
    found = F.normalize(make_projection(name, shape, 384, seed=0)(upstream, inputs), dim=1)
    true = F.normalize(gradients.flatten(1), dim=1)
    error = (found @ found.T - true @ true.T)[~torch.eye(100, dtype=torch.bool)]
    assert error.square().mean().sqrt() < largest
    assert abs(error.mean()) < 0.01


def test_the_exact_kernel_has_no_noise() -> None:
    upstream, inputs, gradients = factors(30)
    tokens = F.normalize(torch.randn(30, 6), dim=1)
    rows = torch.cat([tokens, ExactKernel(SHAPE)(upstream, inputs)], dim=1)
    true = F.normalize(gradients.flatten(1), dim=1)
    expected = (tokens @ tokens.T + true @ true.T) / 2
    similarity = KernelSimilarity(6, SHAPE.outputs)
    torch.testing.assert_close(similarity(rows[:5], rows), expected[:5])
    found = top_k(rows[:5], rows, 4, similarity=similarity)
    torch.testing.assert_close(found.scores, expected[:5].topk(4).values)


def test_the_exact_kernel_is_for_single_tokens() -> None:
    upstream, inputs, _ = factors(2, 3)
    with pytest.raises(CapabilityError, match=r"these are sums of 3. Use 'sign' or 'rank-one-4'"):
        ExactKernel(SHAPE)(upstream, inputs)


def test_gradients_without_bias_have_one_column_less() -> None:
    shape = GradientShape(12, 9, False)
    assert (shape.columns, shape.size) == (9, 108)
    assert shape.augmented(torch.ones(2, 9, dtype=torch.float16)).shape == (2, 9)
    assert SHAPE.augmented(torch.zeros(2, 9))[:, -1].tolist() == [1, 1]


def test_what_is_refused() -> None:
    for name in ("signs", "rank-one-0", "rank-one-x", "rank-one-"):
        with pytest.raises(OptionError, match=f"Unknown projection '{name}'. Known: sign, rank-one-4"):
            make_projection(name, SHAPE, 4, 0)
    with pytest.raises(OptionError, match="projection_dim must be at least 1, got 0"):
        make_projection("sign", SHAPE, 0, 0)
    with pytest.raises(OptionError, match=r"Signs must be int8 \[E, H, J\], got torch.float32 \[2, 3\]"):
        SignProjection(torch.ones(2, 3))


def test_no_projection_is_a_part_of_the_state() -> None:
    for name in projections.PROJECTIONS:
        made = make_projection(name, SHAPE, 4, 0)
        assert isinstance(made, torch.nn.Module)
        assert not made.state_dict()
        assert not list(made.parameters())
