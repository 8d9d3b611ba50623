"""Confusion, IoU and the matching of classes, against loops and brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from amradio.errors import DatasetError
from amradio.evals.in_context.assignment import best_assignment
from amradio.evals.in_context.metrics import Confusion, iou, mean_iou


@given(st.integers(1, 6), st.integers(0, 2**32 - 1), st.booleans())
def test_the_best_assignment_is_that_of_brute_force(n: int, seed: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 3, (n, n)) if ties else rng.normal(size=(n, n))
    found = best_assignment(torch.from_numpy(values.astype(float))).tolist()
    assert sorted(found) == list(range(n))
    best = max(sum(values[i, p] for i, p in enumerate(order)) for order in itertools.permutations(range(n)))
    assert sum(values[i, p] for i, p in enumerate(found)) == pytest.approx(best)


def test_large_assignments_agree_with_scipy() -> None:
    scipy = pytest.importorskip("scipy.optimize")
    values = np.random.default_rng(0).random((151, 151))
    rows, columns = scipy.linear_sum_assignment(values, maximize=True)
    found = best_assignment(torch.from_numpy(values)).numpy()
    assert values[rows, found].sum() == pytest.approx(values[rows, columns].sum())


@settings(max_examples=30)
@given(st.integers(1, 5), st.integers(0, 2**32 - 1), st.sampled_from([255, 0]))
def test_scores_are_those_of_loops(classes: int, seed: int, ignored: int) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, classes, (3, 7, 9)).astype(np.uint8)
    truth[rng.random(truth.shape) < 0.2] = 255
    truth[0, 0, 0] = classes - 1 if ignored == 0 and classes > 1 else 0
    predicted = rng.integers(0, classes, truth.shape).astype(np.uint8)
    if ignored == 0 and classes == 1:
        return
    confusion = Confusion(classes, ignored)
    for t, p in zip(truth, predicted, strict=True):
        confusion.update(torch.from_numpy(t), torch.from_numpy(p))
    pairs = [(t, p) for t, p in zip(truth.ravel().tolist(), predicted.ravel().tolist(), strict=True)]
    pairs = [(t, p) for t, p in pairs if t not in (255, ignored)]
    expected = []
    for c in range(classes):
        both = sum(t == p == c for t, p in pairs)
        either = sum(c in (t, p) for t, p in pairs)
        expected.append(both / either if either else 0.0)
    assert iou(confusion.counts).tolist() == pytest.approx(expected)
    occurring = {t for t, _ in pairs}
    metrics = confusion.metrics("present")
    assert metrics["miou"].value == pytest.approx(100 * np.mean([expected[c] for c in sorted(occurring)]))
    assert metrics["pixel_accuracy"].value == pytest.approx(100 * np.mean([t == p for t, p in pairs]))
    assert mean_iou(confusion.counts, "hungarian") >= mean_iou(confusion.counts, "all") - 1e-12
    assert set(confusion.metrics("hungarian")) == {"miou", "pixel_accuracy", "miou_present", "miou_all"}


def test_nothing_but_void_cannot_be_scored() -> None:
    confusion = Confusion(3)
    confusion.update(torch.full((4, 4), 255, dtype=torch.uint8), torch.zeros(4, 4, dtype=torch.uint8))
    with pytest.raises(DatasetError, match="No pixel of the evaluation set has a class"):
        confusion.metrics("present")
