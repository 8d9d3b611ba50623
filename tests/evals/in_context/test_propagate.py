"""Attention, mixing and upsampling, against formulas written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from amradio.errors import OptionError
from amradio.evals.in_context import propagate as module
from amradio.evals.in_context.propagate import attention, label_map, mix_labels


def test_attention_is_the_softmax_of_cosines() -> None:
    queries = torch.randn(5, 8) * torch.tensor([0.0, 1e-3, 1.0, 10.0, 1e3])[:, None]
    rows = F.normalize(torch.randn(5, 7, 8), dim=2)
    scores = (rows @ queries[..., None])[..., 0]
    found = attention(scores, torch.linalg.vector_norm(queries, dim=1), 0.05)
    expected = (F.cosine_similarity(queries[:, None], rows, dim=2).double() / 0.05).softmax(1)
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=0)


def test_neighbours_that_were_not_found_have_no_weight() -> None:
    scores = torch.tensor([[0.5, float("-inf")], [0.2, 0.1]])
    assert attention(scores, None, 0.1)[0].tolist() == [1.0, 0.0]
    with pytest.raises(OptionError, match=r"The index found no neighbour for 1 of 2 patches. .*num_leaves_to_search"):
        attention(torch.tensor([[float("-inf")] * 2, [0.2, 0.1]]), None, 0.1)


def test_labels_are_mixed_by_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = torch.randint(0, 50, (20, 4), dtype=torch.int16)
    counts[3] = 0
    indices, weights = torch.randint(-1, 20, (9, 6)), torch.rand(9, 6)
    weights[indices < 0] = 0
    expected = torch.zeros(9, 4)
    for q in range(9):
        for w, i in zip(weights[q].tolist(), indices[q].tolist(), strict=True):
            if i >= 0 and counts[i].sum() > 0:
                expected[q] += w * counts[i] / counts[i].sum()
    torch.testing.assert_close(mix_labels(weights, indices, counts), expected)
    monkeypatch.setattr(module, "_VALUES_AT_ONCE", 50)
    torch.testing.assert_close(mix_labels(weights, indices, counts), expected)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 23), st.integers(1, 23), st.integers(0, 2**31))
def test_label_maps_are_those_of_full_upsampling(h: int, w: int, height: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.rand(h, w, 9, generator=generator) * (torch.rand(9, generator=generator) < 0.5)
    full = F.interpolate(labels.permute(2, 0, 1)[None], (height, width), mode="bilinear", align_corners=False)[0]
    best = full.topk(2, 0).values
    clear = best[0] - best[1] > 1e-5
    whole = label_map(labels, (height, width))
    assert torch.equal(whole[clear].long(), full.argmax(0)[clear])
    before, module._VALUES_AT_ONCE = module._VALUES_AT_ONCE, 40
    try:
        assert torch.equal(label_map(labels, (height, width)), whole)
    finally:
        module._VALUES_AT_ONCE = before


def test_labels_without_any_weight_are_class_0() -> None:
    assert label_map(torch.zeros(2, 2, 3), (4, 4)).sum() == 0
