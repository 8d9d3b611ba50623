"""k-NN with PCA and equal votes, few-shot sets and mAP, against the numbers of FUNGI's scripts and of slow loops."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from amradio.errors import DatasetError, OptionError
from amradio.evals import retrieval_map, uniform_knn
from amradio.evals.retrieval_map import RetrievalMapConfig, run_retrieval_map
from amradio.evals.retrieval_task import labelled_task, read_ground_truth
from amradio.evals.runner import Setup, policy_for
from amradio.evals.uniform_knn import UniformKnnConfig, run_uniform_knn
from amradio.features import ExtractOptions, collect
from amradio.images import open_images

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


# ---- the runners, against loops over the features themselves ----


def summaries(backbone: Any, images: Any) -> torch.Tensor:
    table = collect(images, backbone, policy_for(backbone), ExtractOptions(batch_size=7))
    rows: torch.Tensor = table.summaries["backbone"].double()
    return rows / rows.norm(dim=1, keepdim=True)


def test_uniform_knn_of_pictures(backbone: Any, sets: SimpleNamespace) -> None:
    report = run_uniform_knn(backbone, sets.train, sets.eval, UniformKnnConfig(k=(5, 1)))
    train, test = summaries(backbone, sets.train), summaries(backbone, sets.eval)
    nearest = torch.cdist(test, train).argsort(1)
    for name, k in (("top1", 5), ("top1_k1", 1)):
        voted = torch.from_numpy(sets.train.labels.copy())[nearest[:, :k]]
        predicted = torch.tensor([np.bincount(row.numpy()).argmax() for row in voted])
        right = (predicted.numpy() == sets.eval.labels).mean()
        assert report.metrics[name].value == pytest.approx(100 * right)
    assert set(report.metrics) == {"top1", "mean_per_class", "top1_k1", "mean_per_class_k1"}
    assert report.per_class is not None
    assert np.mean(list(report.per_class.values())) == pytest.approx(report.metrics["mean_per_class"].value)
    assert "equal votes by Euclidean distance" in report.protocol
    assert "PCA" not in report.protocol


def test_uniform_knn_with_few_shots_and_pca(backbone: Any, sets: SimpleNamespace) -> None:
    report = run_uniform_knn(backbone, sets.train, sets.eval, UniformKnnConfig(k=(1,), pca=4, shots=3))
    assert report.dataset["train"]["count"] == 18
    assert "PCA to 4 components" in report.protocol
    assert "the first 3 pictures of each class" in report.protocol
    chosen = [i for i in range(120) if i % 20 < 3]  # of folders of 20
    train, test = summaries(backbone, sets.train)[chosen], summaries(backbone, sets.eval)
    _, _, components = torch.linalg.svd(train - train.mean(0), full_matrices=False)
    train, test = ((rows - train.mean(0)) @ components[:4].T for rows in (train, test))
    nearest = torch.cdist(test, train).argmin(1)
    right = (sets.train.labels[chosen][nearest] == sets.eval.labels).mean()
    assert report.metrics["top1"].value == pytest.approx(100 * right)
    wide = run_uniform_knn(backbone, sets.train, sets.eval, UniformKnnConfig(k=(1,), pca=500))
    assert any("No PCA was applied: 500 components are not fewer" in note for note in wide.notes)


def test_uniform_knn_of_two_classes_has_an_auc(backbone: Any, pictures: Any) -> None:
    train, test = (open_images(str(pictures("two", 8, classes=2, seed=seed))) for seed in (0, 1))
    report = run_uniform_knn(backbone, train, test, UniformKnnConfig(k=(3,)))
    assert 0 <= report.metrics["auc"].value <= 100
    with pytest.raises(OptionError, match="k is 30, and the database has only 16 pictures"):
        run_uniform_knn(backbone, train, test, UniformKnnConfig(k=(30,)))


@pytest.mark.parametrize("changes", [{"k": ()}, {"k": (0,)}, {"pca": 0}, {"shots": 0}])
def test_wrong_options_of_uniform_knn(changes: Any) -> None:
    with pytest.raises(OptionError, match="must be"):
        UniformKnnConfig(**changes)


def average_precision(order: list[int], right: set[int]) -> float:
    """The published loop, written out."""
    total, hits = 0.0, 0
    for place, i in enumerate(order):
        if i in right:
            before = 1.0 if place == 0 else hits / place
            hits += 1
            total += (before + hits / (place + 1)) / 2
    return total / len(right)


def test_each_picture_among_all_others(backbone: Any, sets: SimpleNamespace) -> None:
    report = run_retrieval_map(backbone, labelled_task(sets.eval))
    rows, labels = summaries(backbone, sets.eval), sets.eval.labels
    found = []
    for i, similarities in enumerate(rows.float() @ rows.float().T):
        order = [j for j in similarities.argsort(descending=True, stable=True).tolist() if j != i]
        found.append(average_precision(order, {j for j in order if labels[j] == labels[i]}))
    assert report.metrics["map"].value == pytest.approx(100 * np.mean(found), abs=1e-3)
    assert list(report.metrics) == ["map", "mp1", "mp5", "mp10"]
    assert report.dataset.keys() == {"database"}
    assert report.details["queries_with_positives"] == {"all": 48}


def test_pictures_that_fail_are_found_last(backbone: Any, pictures: Any, sets: SimpleNamespace) -> None:
    broken = open_images(str(pictures("broken", 4, broken=2)))
    whole = run_retrieval_map(backbone, labelled_task(broken, sets.eval))
    assert whole.dataset["database"]["failed"] == 2
    rows, database = summaries(backbone, sets.eval), summaries(backbone, broken)
    good = [i for i in range(len(broken)) if not Path(broken[i].location).name.startswith("broken")]
    bad = [i for i in range(len(broken)) if i not in good]
    found = []
    for i, similarities in enumerate(rows.float() @ database.float().T):
        order = [good[j] for j in similarities.argsort(descending=True, stable=True).tolist()] + bad
        found.append(average_precision(order, {j for j in order if broken.labels[j] == sets.eval.labels[i]}))
    assert whole.metrics["map"].value == pytest.approx(100 * np.mean(found), abs=1e-3)


@pytest.fixture
def oxford(tmp_path: Path) -> SimpleNamespace:
    """Eight pictures in one folder and a list as ROxford has it: two queries, which are not in the database."""
    (tmp_path / "jpg").mkdir()
    rng = np.random.default_rng(0)
    for i in range(9):
        pixels = np.clip(np.array([40 + 20 * i, 120, 200 - 15 * i]) + rng.normal(0, 4, (20, 20, 3)), 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "jpg" / f"p{i}.png")
    about = {
        "imlist": ["p3", "p0", "p4", "p1", "p2", "p7"],
        "qimlist": ["p5", "p6"],
        "gnd": [{"easy": [0], "hard": [2, 4], "junk": [5]}, {"easy": [5], "hard": [], "junk": []}],
    }
    path = tmp_path / "gnd.json"
    path.write_text(json.dumps(about))
    return SimpleNamespace(images=open_images(str(tmp_path / "jpg")), path=path, about=about, folder=tmp_path / "jpg")


def test_a_ground_truth_is_judged_twice(backbone: Any, oxford: SimpleNamespace) -> None:
    task = read_ground_truth(oxford.path, oxford.images, oxford.images)
    report = run_retrieval_map(backbone, task, RetrievalMapConfig(kappas=(1, 2)))
    names = oxford.about["imlist"]
    by_name = {
        Path(s.location).stem: row for s, row in zip(oxford.images, summaries(backbone, oxford.images), strict=True)
    }
    rankings = []
    for query in oxford.about["qimlist"]:
        similarities = torch.stack([by_name[n] for n in names]).float() @ by_name[query].float()
        rankings.append(similarities.argsort(descending=True).tolist())
    medium = [
        average_precision([i for i in rankings[0] if i != 5], {0, 2, 4}),
        average_precision(rankings[1], {5}),
    ]
    hard = [average_precision([i for i in rankings[0] if i not in (5, 0)], {2, 4})]
    assert report.metrics["map_medium"].value == pytest.approx(100 * np.mean(medium), abs=1e-3)
    assert report.metrics["map_hard"].value == pytest.approx(100 * np.mean(hard), abs=1e-3)
    assert list(report.metrics) == ["map_medium", "mp1_medium", "mp2_medium", "map_hard", "mp1_hard", "mp2_hard"]
    assert report.details["queries_with_positives"] == {"medium": 2, "hard": 1}
    assert report.dataset["database"]["count"] == 6
    assert report.dataset["queries"]["count"] == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x04}q", "is no ground truth: it must be a JSON object .*convert one that you trust to JSON"),
        (b'{"imlist": []}', "is no ground truth: it must be a JSON object with imlist, qimlist and gnd"),
        (b'{"imlist": 1, "qimlist": [], "gnd": []}', "must be lists"),
        (b'{"imlist": [], "qimlist": ["a"], "gnd": []}', "contradicts itself: 1 names of queries and 0 answers"),
    ],
)
def test_what_is_no_ground_truth(oxford: SimpleNamespace, content: bytes, message: str) -> None:
    oxford.path.write_bytes(content)
    with pytest.raises(OptionError, match=message):
        read_ground_truth(oxford.path, oxford.images, oxford.images)


def test_pictures_that_a_ground_truth_lists_must_be_there_once(oxford: SimpleNamespace) -> None:
    (oxford.folder / "p7.png").unlink()
    with pytest.raises(
        DatasetError, match=r"1 of the 6 pictures that gnd.json lists are not exactly once.*p7 \(0 times"
    ):
        read_ground_truth(oxford.path, open_images(str(oxford.folder)), oxford.images)
    (oxford.folder / "more").mkdir()
    shutil.copy(oxford.folder / "p5.png", oxford.folder / "more" / "p5.png")
    with pytest.raises(DatasetError, match=r"p5 \(2 times"):
        read_ground_truth(oxford.path, oxford.images, open_images(str(oxford.folder)))
    with pytest.raises(OptionError, match="cannot be read: No such file"):
        read_ground_truth(oxford.folder / "none.json", oxford.images, oxford.images)


def test_what_cannot_be_judged_by_labels(sets: SimpleNamespace, oxford: SimpleNamespace, backbone: Any) -> None:
    with pytest.raises(DatasetError, match="have no label"):
        labelled_task(oxford.images)
    with pytest.raises(DatasetError, match="do not have the same names"):
        labelled_task(sets.train, oxford.images)
    alone = sets.eval.select([0, 8])  # one of each class: nothing is left to find
    with pytest.raises(DatasetError, match=r"No query of .* has a picture to find"):
        run_retrieval_map(backbone, labelled_task(alone), None, Setup(policy_for(backbone)))
