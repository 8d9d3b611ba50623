"""k-NN with PCA and equal votes, few-shot sets and mAP, against the numbers of FUNGI's scripts and of slow loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from amradio.errors import OptionError
from amradio.evals import retrieval_map, uniform_knn

BLOCKS = ("embeddings", "kl", "simclr")


@pytest.mark.parametrize("name", ["D_knn_pca", "D_knn_nopca", "D_knn_binary", "D_knn_fewshot"])
def test_every_combination(name: str, hbird_golden: Any) -> None:
    stored, features = hbird_golden(name), hbird_golden("D_knn_features")
    settings, values = stored.settings, stored.case["values"]
    labels, targets = stored["train_labels"].long(), stored["test_labels"].long()
    shots = settings["train_size"]
    chosen = torch.arange(len(labels)) if shots is None else uniform_knn.first_per_class(labels, shots)
    assert torch.equal(chosen, stored["train_indices"].long())
    labels = labels[chosen]
    combinations = [key.removesuffix(".predictions") for key in stored.tensors if key.endswith(".predictions")]
    assert len(combinations) == 7
    for combination in combinations:
        train, test = (
            uniform_knn.unit_blocks([features[f"{split}_{block}"] for block in combination.split("+")])
            for split in ("train", "test")
        )
        reduced = uniform_knn.reduce(train[chosen], test, settings["pca_dim"])
        assert (reduced.pca is not None) == values[f"{combination}.pca_applied"]["value"]
        if reduced.pca is not None:
            stored.check(f"{combination}.pca_mean", reduced.pca.mean)
            stored.check(f"{combination}.pca_explained_variance", reduced.pca.explained_variance)
            stored.check(f"{combination}.pca_test_gram", reduced.test @ reduced.test.T)
            stored.check(f"{combination}.pca_test_abs3", reduced.test[:, :3].abs())
        found = uniform_knn.nearest(reduced.train, reduced.test, settings["k"])
        expected = stored[f"{combination}.neighbours"].long()
        assert torch.equal(found.indices.sort(1).values, expected.sort(1).values)
        stored.check(f"{combination}.distances", -found.scores)
        shares = uniform_knn.class_shares(found, labels, int(labels.max()) + 1)
        predictions = shares.argmax(1)
        assert torch.equal(predictions, stored[f"{combination}.predictions"].long())
        assert uniform_knn.accuracy(predictions, targets) == pytest.approx(
            values[f"{combination}.accuracy"]["value"], abs=1e-9
        )
        assert uniform_knn.mean_class_accuracy(predictions, targets) == pytest.approx(
            values[f"{combination}.mean_per_class_accuracy"]["value"], abs=1e-9
        )
        if f"{combination}.auc" in values:
            auc = uniform_knn.binary_auc(shares[:, 1], targets)
            assert auc == pytest.approx(values[f"{combination}.auc"]["value"], abs=1e-9)


def test_map(hbird_golden: Any) -> None:
    stored = hbird_golden("D_retrieval_map")
    values = {key: described["value"] for key, described in stored.case["values"].items()}
    found = retrieval_map.score_ranking(
        stored["ranks"].long().T, values["ok"], values["junk"], stored.settings["kappas"]
    )
    assert found.mean_average_precision == pytest.approx(values["map"], abs=1e-9)
    assert found.mean_precision_at == pytest.approx(values["mean_precision_at"], abs=1e-9)
    np.testing.assert_allclose(found.average_precision, np.array(values["ap_per_query"], dtype=float), atol=1e-9)
    np.testing.assert_allclose(found.precision_at, np.array(values["precision_at_per_query"], dtype=float), atol=1e-9)


@given(st.permutations(range(9)), st.sets(st.integers(0, 8), min_size=1), st.sets(st.integers(0, 8)))
def test_average_precision_equals_a_loop(row: list[int], positives: set[int], junk: set[int]) -> None:
    right = positives - junk
    found = retrieval_map.score_ranking(torch.tensor([row]), [sorted(positives)], [sorted(junk)])
    kept = [i for i in row if i not in junk]
    total, hits, last = 0.0, 0, 1.0
    for place, i in enumerate(kept):
        if i in right:
            before = last if place == 0 else hits / place
            hits += 1
            total += (before + hits / (place + 1)) / 2
    if right:
        assert found.average_precision[0] == pytest.approx(total / len(right))
        assert found.mean_average_precision == found.average_precision[0]
    else:
        assert np.isnan(found.mean_average_precision)
        assert np.isnan(found.precision_at[0]).all()


def test_a_ranking_must_be_complete() -> None:
    with pytest.raises(OptionError, match="query 0 lacks some of its positives"):
        retrieval_map.score_ranking(torch.tensor([[0, 1]]), [[5]])
    with pytest.raises(OptionError, match="1 rankings, 2 lists of positives"):
        retrieval_map.score_ranking(torch.tensor([[0, 1]]), [[1], [0]])


def test_ranking_by_inner_product() -> None:
    queries, database = torch.randn(4, 6), torch.randn(11, 6)
    expected = (queries.double() @ database.double().T).argsort(1, descending=True)
    assert torch.equal(retrieval_map.ranking(queries, database), expected)


def test_nearest_equals_all_distances() -> None:
    train, test = torch.randn(50, 7) * 3 + 5, torch.randn(20, 7) * 3 + 5
    distances = torch.cdist(test.double(), train.double()).sort(1)
    found = uniform_knn.nearest(train, test, 8)
    assert torch.equal(found.indices, distances.indices[:, :8])
    torch.testing.assert_close(-found.scores, distances.values[:, :8].float())


def test_classes_that_do_not_occur_count_for_nothing() -> None:
    assert uniform_knn.mean_class_accuracy(torch.tensor([0, 2, 2, 1]), torch.tensor([0, 2, 2, 2])) == pytest.approx(
        (1 + 2 / 3) / 2
    )


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=2))
def test_auc_equals_counting_pairs(rows: list[tuple[int, bool]]) -> None:
    scores, targets = torch.tensor([float(s) for s, _ in rows]), torch.tensor([int(t) for _, t in rows])
    ones, zeros = scores[targets == 1].tolist(), scores[targets == 0].tolist()
    if not ones or not zeros:
        with pytest.raises(OptionError, match="both classes"):
            uniform_knn.binary_auc(scores, targets)
        return
    wins = sum((a > b) + (a == b) / 2 for a in ones for b in zeros)
    assert uniform_knn.binary_auc(scores, targets) == pytest.approx(wins / len(ones) / len(zeros))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.integers(1, 4))
def test_first_per_class_equals_a_loop(labels: list[int], count: int) -> None:
    seen: dict[int, int] = {}
    expected = []
    for i, label in enumerate(labels):
        seen[label] = seen.get(label, 0) + 1
        if seen[label] <= count:
            expected.append(i)
    assert uniform_knn.first_per_class(torch.tensor(labels), count).tolist() == expected
