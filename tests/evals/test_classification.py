"""Counting right answers, checked against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, confusion_matrix, recall_score, top_k_accuracy_score

from amradio.evals.classification import ClassificationTally, class_labels, mean_metrics


@pytest.mark.parametrize("batch", [1, 7, 200])
def test_agrees_with_scikit_learn(batch: int) -> None:
    classes = 9
    scores, targets = torch.randn(200, classes), torch.randint(0, classes - 1, (200,))  # the last class never occurs
    tally = ClassificationTally(classes)
    for part, wanted in zip(scores.split(batch), targets.split(batch), strict=True):
        tally.update(part, wanted)
    labels = list(range(classes))
    accuracies = tally.accuracies()
    assert tally.count == 200
    assert accuracies["top1"] == pytest.approx(100 * accuracy_score(targets, scores.argmax(1)))
    assert accuracies["top5"] == pytest.approx(100 * top_k_accuracy_score(targets, scores, k=5, labels=labels))
    recalls = recall_score(targets, scores.argmax(1), labels=labels[:-1], average=None)
    assert tally.per_class() == pytest.approx({str(i): 100 * r for i, r in enumerate(recalls)})
    dense = np.zeros((classes, classes), int)
    for true, predicted, count in tally.confusion():
        dense[true, predicted] = count
    np.testing.assert_array_equal(dense, confusion_matrix(targets, scores.argmax(1), labels=labels))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40), st.integers(0, 40))
def test_two_tallies_add_up_to_one(answers: list[tuple[int, int]], cut: int) -> None:
    def tally_of(part: list[tuple[int, int]]) -> ClassificationTally:
        tally = ClassificationTally(4)
        if part:
            predicted, targets = torch.tensor(part).unbind(1)
            tally.update(torch.nn.functional.one_hot(predicted, 4).float(), targets)
        return tally

    whole, first, second = (tally_of(part) for part in (answers, answers[:cut], answers[cut:]))
    first.add(second)
    assert (first.accuracies(), first.per_class(), first.confusion()) == (
        whole.accuracies(),
        whole.per_class(),
        whole.confusion(),
    )


def test_equal_scores_are_ranked_by_class_number() -> None:
    tally = ClassificationTally(7)
    tally.update(torch.zeros(7, 7), torch.arange(7))
    assert tally.accuracies() == pytest.approx({"top1": 100 / 7, "top5": 500 / 7})
    assert tally.confusion() == [[true, 0, 1] for true in range(7)]


@pytest.mark.parametrize("nothing", [-torch.inf, torch.nan])
def test_a_class_without_a_score_is_no_answer(nothing: float) -> None:
    scores = torch.full((2, 3), nothing)
    scores[:, 1] = 0.5
    tally = ClassificationTally(3)
    tally.update(scores, torch.tensor([2, 1]))
    assert tally.accuracies()["top5"] == 50.0


def test_classes_of_one_name_stay_apart() -> None:
    assert class_labels(4, ["crane", "maillot", "crane", "kite"]) == ["crane (0)", "maillot", "crane (2)", "kite"]
    assert class_labels(2, None) == ["0", "1"]


def test_means_over_repetitions() -> None:
    runs = [{"top1": 90.0}, {"top1": 92.0}, {"top1": 97.0}]
    metric = mean_metrics(runs)["top1"]
    assert (metric.value, metric.unit) == (93.0, "%")
    assert metric.std == pytest.approx(np.std([90, 92, 97], ddof=1))
    assert mean_metrics(runs[:1])["top1"].std is None
