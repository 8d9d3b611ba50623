"""k-NN: the golden case, scikit-learn, and whole runs on small pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from sklearn.neighbors import KNeighborsClassifier
from torch.nn.functional import normalize

from amradio.errors import DatasetError, OptionError
from amradio.evals import knn
from amradio.evals.knn import KnnConfig, classify, run_knn, vote
from amradio.evals.report import EvalReport
from amradio.evals.runner import Setup, policy_for
from amradio.search import Neighbours, top_k


def sklearn_knn(k: int, temperature: float = 0.07) -> KNeighborsClassifier:
    return KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distances: np.exp((1 - distances) / temperature)
    )


def top5(probabilities: np.ndarray, targets: np.ndarray) -> float:
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :5]
    hit = (order == targets[:, None]) & (np.take_along_axis(probabilities, order, 1) > 0)
    return 100 * hit.any(1).mean()


def test_the_golden_case(goldens: Path) -> None:
    t = load_file(goldens / "cases" / "metrics.safetensors")
    queries, database = (normalize(t[f"knn.{name}"], dim=1) for name in ("query", "train"))
    found = top_k(queries, database, 20)
    scores = vote(found.scores, t["knn.train_labels"][found.indices], 7)
    assert torch.equal(scores.argmax(1), t["knn.vote"])
    tally = classify(found, t["knn.train_labels"], t["knn.query_labels"], 7, KnnConfig())[20]
    assert sum(n for true, predicted, n in tally.confusion() if true == predicted) == int(t["knn.num_correct"])


@pytest.mark.parametrize("k", [1, 5, 20, 300])
@pytest.mark.parametrize("temperature", [0.07, 1.0, 0.0005])
def test_votes_are_scikit_learns(goldens: Path, k: int, temperature: float) -> None:
    t = load_file(goldens / "cases" / "metrics.safetensors")
    query, train, labels = t["knn.query"].double(), t["knn.train"].double(), t["knn.train_labels"]
    similarities, indices = (normalize(query, dim=1) @ normalize(train, dim=1).T).topk(k, dim=1)
    scores = vote(similarities, labels[indices], 7, temperature)
    if temperature > 0.001:  # exp overflows in the reference below that, not in ours
        reference = sklearn_knn(k, temperature).fit(train, labels)
        np.testing.assert_allclose(scores.softmax(1), reference.predict_proba(query), atol=1e-9)
        np.testing.assert_array_equal(scores.argmax(1), reference.predict(query))
    assert not scores.isnan().any()
    assert ((scores > -torch.inf).sum(1) <= k).all()


@given(st.data())
def test_a_vote_does_not_depend_on_the_order_of_classes(data: st.DataObject) -> None:
    k, classes = data.draw(st.integers(1, 6)), data.draw(st.integers(2, 5))
    labels = torch.tensor([data.draw(st.lists(st.integers(0, classes - 1), min_size=k, max_size=k))])
    similarities = torch.tensor([data.draw(st.lists(st.floats(-1, 1), min_size=k, max_size=k))])
    names = torch.tensor(data.draw(st.permutations(range(classes))))
    torch.testing.assert_close(
        vote(similarities, names[labels], classes)[:, names], vote(similarities, labels, classes), equal_nan=True
    )


def test_blocks_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    labels, targets = torch.randint(0, 4, (50,)), torch.randint(0, 4, (33,))
    found = Neighbours(torch.rand(33, 9).sort(descending=True).values, torch.randint(0, 50, (33, 9)))
    config = KnnConfig(k=(9, 3))
    whole = {k: t.confusion() for k, t in classify(found, labels, targets, 4, config).items()}
    monkeypatch.setattr(knn, "_VOTES_AT_ONCE", 20)
    assert {k: t.confusion() for k, t in classify(found, labels, targets, 4, config).items()} == whole


def test_a_run_equals_scikit_learn(backbone, sets, reference) -> None:
    report = run_knn(backbone, sets.train, sets.eval, KnnConfig(k=(20, 1, 7)))
    (train, train_labels), (queries, targets) = reference(sets.train), reference(sets.eval)
    for k, suffix in ((20, ""), (1, "_k1"), (7, "_k7")):
        model = sklearn_knn(k).fit(train, train_labels)
        assert report.metrics[f"top1{suffix}"].value == pytest.approx(100 * model.score(queries, targets))
        assert report.metrics[f"top5{suffix}"].value == pytest.approx(top5(model.predict_proba(queries), targets))
    assert list(report.metrics)[:2] == ["top1", "top5"]
    assert 50 < report.metrics["top1"].value < 100  # the problem is neither trivial nor hopeless
    predicted = sklearn_knn(20).fit(train, train_labels).predict(queries)
    expected = {f"class{c}": 100 * (predicted[targets == c] == c).mean() for c in range(6)}
    assert report.per_class == pytest.approx(expected)
    confusion = report.details["confusion"]
    assert confusion["k"] == 20
    assert sum(n for *_, n in confusion["true_predicted_count"]) == 48


def test_the_report_says_what_was_done(backbone, sets, tmp_path: Path) -> None:
    setup = Setup(policy_for(backbone, (18,)))
    report = run_knn(backbone, sets.train, sets.eval, setup=setup)
    assert (report.task, report.size_label) == ("knn", "shortest 18")
    assert "exp(similarity / 0.07)" in report.protocol
    assert report.config["k"] == (20,)
    assert report.config["resize"] == {"mode": "shortest", "size": [18], "multiple": 4}
    assert report.model["name"] == "TinyBackbone"
    assert {role: (d["count"], d["failed"], d["classes"]) for role, d in report.dataset.items()} == {
        "eval": (48, 0, 6),
        "train": (120, 0, 6),
    }
    assert report.dataset["train"]["fingerprint"] == sets.train.fingerprint
    assert report.environment["world_size"] == 1
    assert report.environment["torch"] == torch.__version__
    assert {"train_features", "eval_features", "search_s", "vote_s"} <= set(report.timing)
    assert report.images_per_s > 0
    assert backbone.sizes == {(16, 24)}  # 20 x 28, shortest side 18, to multiples of 4
    again = EvalReport.load(report.save(tmp_path / "r")[0])
    assert again.metrics == report.metrics
    json.dumps(report.to_dict(), allow_nan=False)


def test_few_shot_is_averaged_over_draws(backbone, sets) -> None:
    config = KnnConfig(k=(3,), shots=4, draws=3, seed=7)
    report = run_knn(backbone, sets.train, sets.eval, config)
    seeds = np.random.SeedSequence(7).generate_state(3, np.uint64)
    single = [run_knn(backbone, sets.train.per_class(4, int(seed)), sets.eval, KnnConfig(k=(3,))) for seed in seeds]
    values = [r.metrics["top1"].value for r in single]
    assert report.metrics["top1"].value == pytest.approx(np.mean(values))
    assert report.metrics["top1"].std == pytest.approx(np.std(values, ddof=1))
    assert single[0].metrics["top1"].std is None
    assert len(set(values)) > 1
    assert report.dataset["train"]["count"] == 3 * 6 * 4
    assert len(report.dataset["train"]["fingerprints"]) == 3
    assert sum(n for *_, n in report.details["confusion"]["true_predicted_count"]) == 3 * 48
    next_seed = KnnConfig(k=(3,), shots=4, draws=3, seed=8)
    other = run_knn(backbone, sets.train, sets.eval, next_seed).dataset["train"]["fingerprints"]
    assert not set(other) & set(report.dataset["train"]["fingerprints"])


def test_more_neighbours_than_pictures(backbone, sets) -> None:
    with pytest.raises(OptionError, match=r"k is 20, and the database has only 6 pictures. Choose a smaller k or more"):
        run_knn(backbone, sets.train, sets.eval, KnnConfig(shots=1))


def test_more_shots_than_pictures(backbone, sets) -> None:
    with pytest.raises(DatasetError, match="21 pictures of each class"):
        run_knn(backbone, sets.train, sets.eval, KnnConfig(shots=21))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": ()}, r"k must be one or several different numbers of at least 1, got \[\]"),
        ({"k": (5, 5)}, r"different numbers of at least 1, got \[5, 5\]"),
        ({"k": (0,)}, "at least 1"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"temperature": float("nan")}, "temperature must be above 0"),
        ({"shots": 0}, "shots and draws must be at least 1, got 0 and 5"),
    ],
)
def test_impossible_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        KnnConfig(**options)  # type: ignore[arg-type]
