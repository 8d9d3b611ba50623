"""What all protocols share: sizes, labels, identities, broken pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import amradio
from amradio.errors import DatasetError, OptionError
from amradio.evals.knn import KnnConfig, run_knn
from amradio.evals.report import Metric
from amradio.evals.runner import Measurement, Setup, check_pair, model_record, policy_for
from amradio.features import ExtractOptions
from amradio.images import ImageFile, ImageSet, open_images


class Nowhere:
    """Rows of an image set that nobody opens."""

    def __init__(self, count: int, stamp: str) -> None:
        self.count, self.stamp = count, stamp

    def __len__(self) -> int:
        return self.count

    def source(self, row: int) -> ImageFile:
        return ImageFile(Path(f"{self.stamp}/{row}.png"), f"{row}.png")  # there is no such file

    def stamps(self, rows: np.ndarray):
        return (f"{self.stamp}{row}".encode() for row in rows)


def labelled(labels, name: str = "a", class_names=None) -> ImageSet:
    return ImageSet(Nowhere(len(labels), name), name=name, labels=np.array(labels), class_names=class_names)


def test_resolutions_become_policies(backbone) -> None:
    assert str(policy_for(backbone)) == "centre crop 16 x 16, to multiples of 4"
    assert str(policy_for(backbone, (378,))) == "shortest side 378, to multiples of 4"
    assert str(policy_for(backbone, (224, 448))) == "centre crop 224 x 448, to multiples of 4"
    assert str(policy_for(backbone, (512,), "longest", 16)) == "longest side 512, to multiples of 16"
    assert str(policy_for(backbone, (), "nearest")) == "own size, to multiples of 4"
    assert policy_for(backbone, (), "crop").size == (16, 16)


def test_a_backbone_without_a_preferred_resolution_needs_one(backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(backbone), "preferred_resolution", None)
    with pytest.raises(OptionError, match=r"TinyBackbone does not say which resolution suits it. Choose one"):
        policy_for(backbone)


def test_pairs_that_fit() -> None:
    for rule, evaluation in [("same", labelled([2, 0], "b")), ("subset", labelled([1], "b"))]:
        pair = check_pair(labelled([0, 1, 2]), evaluation, rule)
        assert (pair.evaluation, pair.num_classes, pair.notes) == (evaluation, 3, ())
    names = ["x", "y", "z"]
    assert check_pair(labelled([0, 1, 2], class_names=names), labelled([1], "b", names)).notes == ()


def test_classes_are_matched_by_name() -> None:
    train = labelled([0, 1, 2], class_names=["cat", "cow", "dog"])
    pair = check_pair(train, labelled([0, 1, 1], "b", ["cow", "dog"]), "subset")
    assert pair.evaluation.labels.tolist() == [1, 2, 2]
    assert pair.evaluation.class_names == ("cat", "cow", "dog")
    assert pair.notes == ("The classes of the two sets were matched by their names.",)
    turned = check_pair(train, labelled([0, 1, 2], "b", ["dog", "cat", "cow"]))
    assert turned.evaluation.labels.tolist() == [2, 0, 1]


def test_names_under_other_numbers() -> None:
    train, other = labelled([0, 1], class_names=["cat", "dog"]), labelled([0, 1], "b", ["Dog", "cat"])
    with pytest.raises(DatasetError, match="'cat' is class 0 of the one and class 1 of the other"):
        check_pair(train, other)
    assert check_pair(train, other, "numbers").evaluation.labels.tolist() == [0, 1]


def test_other_class_names_are_noted() -> None:
    pair = check_pair(labelled([0, 1], class_names=["cat", "dog"]), labelled([0, 1], "b", ["cat", "hound"]))
    assert pair.num_classes == 2
    assert "class 1 is 'dog' and 'hound'" in pair.notes[0]


def test_shared_pictures_are_noted() -> None:
    train = labelled([0, 1, 0, 1], "a")
    pair = check_pair(train, train.select([1, 2, 3]))
    assert pair.notes[0].startswith("3 of the 3 pictures to classify are in the train set too")


@pytest.mark.parametrize(
    ("train", "evaluation", "message"),
    [
        (labelled([0, 1]), labelled([0, 1, 2], "b"), "a has 2 classes and b has 3, so their labels may not mean the"),
        (labelled([0, 2]), labelled([1, 2], "b"), r"1 classes of b have no picture in a: 1\."),
        (labelled([0, 1]), labelled([0, 1]), r"are the same 2 pictures \(a\)"),
        (labelled([0, -1, -1]), labelled([0], "b"), "2 of 3 pictures of a have no label"),
        (labelled([0]), ImageSet(Nowhere(4, "b"), name="b", split="test"), "4 of 4 pictures of b, split 'test', have"),
    ],
)
def test_pairs_that_do_not_fit(train: ImageSet, evaluation: ImageSet, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        check_pair(train, evaluation)


def test_broken_pictures_are_counted_and_the_run_goes_on(backbone, sets, pictures) -> None:
    train, evaluation = (
        open_images(str(pictures("t", 20, broken=3))),
        open_images(str(pictures("e", 8, seed=1, broken=2))),
    )
    report = run_knn(backbone, train, evaluation)
    clean = run_knn(backbone, sets.train, sets.eval)
    assert report.metrics == clean.metrics
    assert report.per_class == clean.per_class
    assert {role: (d["count"], d["failed"]) for role, d in report.dataset.items()} == {
        "eval": (50, 2),
        "train": (123, 3),
    }
    assert report.failed == 5
    failure = report.dataset["eval"]["failures"][0]
    assert failure["path"].endswith("broken0.png")
    assert failure["reason"]


def test_nothing_but_broken_pictures(backbone, sets, pictures) -> None:
    folder = pictures("empty", 0, classes=1, broken=2)
    with pytest.raises(
        DatasetError, match=r"None of the 2 pictures of .* could be used\. The first one, .*broken0.png: "
    ):
        Measurement(backbone, Setup(policy_for(backbone))).features("eval", open_images(str(folder)))


def test_summaries_that_are_no_numbers(backbone, sets) -> None:
    backbone.projection.weight.data.fill_(torch.inf)
    with pytest.raises(OptionError, match=r"48 of 48 summaries of .* are not finite numbers, so .* in float32. Choose"):
        run_knn(backbone, sets.train, sets.eval)


def test_identity_of_a_model_and_of_its_adaptor(goldens) -> None:
    path = goldens / "models" / "v25_p16.pth.tar"
    model = amradio.load(path, ["clip"])
    record = model_record(model.view("clip"))
    assert record["adaptor"] == "clip"
    assert record["summary_dim"] == model.view("clip").summary_dim
    assert record["source"] == str(path)
    assert record["layout"] == "official"
    assert model_record(model.view("backbone"))["adaptor"] is None


def test_a_progress_bar_sees_each_picture(backbone, sets) -> None:
    seen: list[int] = []
    setup = Setup(policy_for(backbone), on_record=lambda record: seen.append(record.position))
    run_knn(backbone, sets.train, sets.eval, KnnConfig(k=(1,)), setup)
    assert len(seen) == len(sets.train) + len(sets.eval)


def test_options_that_only_cost_time_are_no_part_of_the_protocol(backbone, sets) -> None:
    setup = Setup(policy_for(backbone), ExtractOptions(batch_size=5, autocast=torch.bfloat16))
    measurement = Measurement(backbone, setup)
    measurement.features("eval", sets.eval)
    with measurement.stage("thinking"):
        pass
    report = measurement.report(task="t", protocol="p", config=KnnConfig(), metrics={"m": Metric(1.0)})
    assert report.config["autocast"] == "bfloat16"
    assert "batch_size" not in report.config
    assert report.environment["batch_size"] == 5
    assert "thinking_s" in report.timing
