"""Losses against loops in float64, and their gradients against plain autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from amradio.errors import OptionError
from amradio.fungi import losses
from amradio.fungi.clusters import assign, kmeans
from amradio.fungi.heads import Head


def slow_info_nce(positives: Tensor, negatives: Tensor, tau: float, tempered: bool) -> Tensor:
    """One image, with loops."""
    p, n = F.normalize(positives, dim=-1), F.normalize(negatives, dim=-1)
    terms = []
    for i in range(len(p)):
        own = [p[i] @ p[j] for j in range(len(p)) if j != i]
        everyone = own + [p[i] @ row for row in n]
        scale = tau if tempered else 1.0
        terms.append(-sum(own) / len(own) / tau + torch.stack([s / scale for s in everyone]).logsumexp(0))
    return sum(terms) / len(terms)  # type: ignore[return-value]


@pytest.mark.parametrize("denominator", ["tempered", "raw"])
@pytest.mark.parametrize("at_once", [1, 2**24])
@pytest.mark.parametrize("shared", [False, True])
def test_info_nce_equals_loops(denominator: Any, at_once: int, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_SCORES_AT_ONCE", at_once)
    positives = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    negatives = torch.randn(1 if shared else 3, 6, 4, dtype=torch.float64)
    keep = torch.rand(3, 6) < 0.5
    keep[1] = False
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    found = losses.info_nce(positives, negatives, keep, temperature=0.1, denominator=denominator)
    (gradient,) = torch.autograd.grad((found * weights).sum(), positives)
    own = negatives.expand(3, -1, -1)
    expected = torch.stack(
        [slow_info_nce(positives[i], own[i][keep[i]], 0.1, denominator == "tempered") for i in range(3)]
    )
    (slow,) = torch.autograd.grad((expected * weights).sum(), positives)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, slow)


def test_info_nce_has_the_right_gradient_numerically() -> None:
    negatives = torch.randn(2, 3, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda p: losses.info_nce(p, negatives, temperature=0.5),
        torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True),
    )


@given(st.integers(2, 6), st.integers(0, 5), st.integers(0, 2**31))
def test_info_nce_of_an_image_depends_on_no_other(views: int, negatives: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    p, n = torch.randn(4, views, 3, generator=generator), torch.randn(4, negatives, 3, generator=generator)
    together = losses.info_nce(p, n)
    for i in range(4):
        torch.testing.assert_close(losses.info_nce(p[i : i + 1], n[i : i + 1])[0], together[i])


def test_half_precision_rounds_latents_only() -> None:
    p, n = torch.randn(2, 8, 16), torch.randn(2, 9, 16)
    rough = losses.info_nce(p, n, dtype="float16")
    torch.testing.assert_close(rough, losses.info_nce(p.half().float(), n.half().float()))
    assert not torch.equal(rough, losses.info_nce(p, n))


def test_what_info_nce_refuses() -> None:
    with pytest.raises(OptionError, match="needs at least 2 of them, got 1"):
        losses.info_nce(torch.randn(1, 1, 4), torch.randn(1, 3, 4))
    with pytest.raises(OptionError, match="temperature must be above 0, got 0"):
        losses.info_nce(torch.randn(1, 2, 4), torch.randn(1, 3, 4), temperature=0)


def test_kl_equals_the_definition() -> None:
    latents = torch.randn(3, 7, dtype=torch.float64)
    p = (latents / 2).softmax(-1)
    uniform = torch.full_like(p, 1 / 7)
    expected = (uniform * (uniform / p).log()).sum(-1) / 7
    torch.testing.assert_close(losses.kl_to_uniform(latents, 2.0), expected)
    assert losses.kl_to_uniform(torch.zeros(1, 5)).item() == pytest.approx(0, abs=1e-7)


def test_dino_equals_loops() -> None:
    student = torch.randn(2, 4, 6, dtype=torch.float64)
    teacher = torch.randn(2, 2, 6, dtype=torch.float64, requires_grad=True)
    expected = torch.zeros(2, dtype=torch.float64)
    for t in range(2):
        for s in range(4):
            target = (teacher[:, t] / 0.07).softmax(-1)
            expected = expected - (target * (student[:, s] / 0.1).log_softmax(-1)).sum(-1)
    found = losses.dino_loss(student, teacher)
    torch.testing.assert_close(found, expected.detach())
    assert not found.requires_grad  # none flows into the teacher


def test_cluster_loss_equals_cross_entropy() -> None:
    latents = F.normalize(torch.randn(2, 3, 5), dim=-1)
    prototypes = [torch.randn(4, 5), torch.randn(6, 5)]
    targets = torch.tensor([[1, 5], [3, 0]])
    expected = [
        sum(F.cross_entropy(latents[i] @ c.T / 0.1, targets[i, h].expand(3)) for h, c in enumerate(prototypes)) / 2
        for i in range(2)
    ]
    torch.testing.assert_close(losses.cluster_loss(latents, prototypes, targets), torch.stack(expected))


@given(st.integers(2, 20), st.integers(1, 5), st.integers(0, 2**31))
def test_kmeans_equals_loops(rows: int, k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 3, generator=generator, dtype=torch.float64)
    initial = torch.randperm(rows, generator=generator)[:k]
    expected = [x[i] for i in initial]
    for _ in range(4):
        which = [max(range(len(expected)), key=lambda c: float(row @ expected[c])) for row in x]
        groups = [[row for row, w in zip(x, which, strict=True) if w == c] for c in range(len(expected))]
        expected = [sum(g) / len(g) if g else e for g, e in zip(groups, expected, strict=True)]
    found = kmeans(x, initial, 4)
    torch.testing.assert_close(found, torch.stack(expected))
    assert assign(x, found).shape == (rows,)


def test_more_clusters_than_rows() -> None:
    with pytest.raises(OptionError, match=r"more clusters \(3\) than pictures \(2\)"):
        kmeans(torch.randn(2, 3), torch.tensor([0, 1, 1]))


def test_heads_are_what_linear_layers_get() -> None:
    torch.manual_seed(42)
    linear = torch.nn.Linear(10, 6)
    head = Head.random(10, 6, torch.Generator().manual_seed(42))
    assert torch.equal(head.weight, linear.weight)
    assert torch.equal(head.bias, linear.bias)
    assert not list(head.parameters())
    torch.testing.assert_close(head(torch.ones(1, 10)), linear(torch.ones(1, 10)).detach())
