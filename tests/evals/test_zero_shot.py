"""Zero-shot classification: the golden case, a slow reference, names, caching, probabilities, missing text sides."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import amradio
from amradio.errors import CapabilityError, ConfigError, DatasetError, OptionError
from amradio.evals.classification import ClassificationTally
from amradio.evals.classifier_cache import ClassifierCache
from amradio.evals.runner import Setup, policy_for
from amradio.evals.texts import Calibration, calibration_of, check_text
from amradio.evals.zero_shot import (
    ZeroShotConfig,
    build_classifier,
    resolve_class_names,
    run_zero_shot,
    similarities,
)
from amradio.images import ImageSet, open_images
from amradio.text.prompts import fill, load_class_names, load_templates
from amradio.weights.checkpoint import Identity

TinyTextBackbone: Any = runpy.run_path(str(Path(__file__).parent / "two_processes.py"))["TinyTextBackbone"]
CLASSES = tuple(f"class{c}" for c in range(6))


class Nowhere:
    """Rows of an image set that nobody opens."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def source(self, row: int) -> None:
        raise AssertionError("not to be opened")

    def stamps(self, rows: np.ndarray):
        return (f"{row}".encode() for row in rows)


def labelled(labels, name: str = "things", class_names=None) -> ImageSet:
    return ImageSet(Nowhere(len(labels)), name=name, labels=np.array(labels), class_names=class_names)


@pytest.fixture
def speaker(reference_colours: np.ndarray):
    """A backbone whose texts lie about where the pictures of the class do."""
    return TinyTextBackbone({name: c.tolist() for name, c in zip(CLASSES, reference_colours, strict=True)})


@pytest.fixture(scope="session")
def reference_colours() -> np.ndarray:
    return np.random.default_rng(99).uniform(40, 215, (6, 3)) / 255 - 0.5  # as `pictures` draws them


def slow_classifier(backbone, names, templates) -> Tensor:
    rows = []
    for name in names:
        one_by_one = [backbone.encode_text(backbone.tokenizer([fill(t, name)]))[0].double() for t in templates]
        mean = torch.stack([v / v.norm() for v in one_by_one]).mean(0)
        rows.append(mean / mean.norm())
    return torch.stack(rows)


def test_the_golden_case(goldens: Path) -> None:
    t = load_file(goldens / "cases" / "metrics.safetensors")
    embeddings: Tensor = t["zs.prompt_embeddings"]  # [9, 5, 24]

    class Stored:
        summary_dim = 24

        def tokenizer(self, texts: list[str]) -> Tensor:
            return torch.tensor([[int(n) for n in text.split()] for text in texts])  # template, class

        def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
            return embeddings[tokens[:, 1], tokens[:, 0]]

    classifier = build_classifier(Stored(), [str(c) for c in range(9)], [f"{i} {{}}" for i in range(5)], batch_size=7)
    torch.testing.assert_close(classifier, t["zs.class_embeddings"], atol=1e-5, rtol=1e-5)
    tally = ClassificationTally(9)
    tally.update(similarities(t["zs.images"], classifier), t["zs.targets"])
    assert tally.accuracies() == pytest.approx({"top1": float(t["zs.top1"]), "top5": float(t["zs.top5"])})


@pytest.mark.parametrize("batch_size", [1, 3, 16, 1000])
@pytest.mark.parametrize("templates", ["base", "simple"])
def test_a_classifier_equals_the_slow_reference(speaker, batch_size: int, templates: str) -> None:
    texts = load_templates(templates)
    classifier = build_classifier(speaker, CLASSES, texts, batch_size=batch_size)
    assert max(speaker.batches) <= batch_size
    torch.testing.assert_close(classifier.double(), slow_classifier(speaker, CLASSES, texts), atol=1e-6, rtol=1e-5)
    assert (classifier.dtype, classifier.shape) == (torch.float32, (6, 3))


def test_a_run_equals_the_slow_reference(speaker, sets) -> None:
    report = run_zero_shot(speaker, sets.eval, ZeroShotConfig(templates="simple"), use_cache=False)
    weights = slow_classifier(speaker, CLASSES, load_templates("simple")).numpy()
    predicted, best_five, probabilities = [], [], []
    for i in range(len(sets.eval)):
        from amradio.images import ResizePolicy, to_tensor

        image = sets.eval[i].decode(max_pixels=10**6, background=(255, 255, 255))
        pixels = to_tensor(ResizePolicy.parse((16, 16), multiple=4).apply(image))
        summary = (pixels.mean((1, 2)) - 0.5).double().numpy()
        scores = weights @ (summary / np.linalg.norm(summary))
        order = np.argsort(-scores)
        predicted.append(order[0])
        best_five.append(order[:5])
        logits = np.exp(np.exp(2.0) * scores)
        probabilities.append(logits[sets.eval.labels[i]] / logits.sum())
    labels = np.array(sets.eval.labels)
    hit = np.array(predicted) == labels
    assert report.metrics["top1"].value == pytest.approx(100 * hit.mean())
    five = [label in best for label, best in zip(labels, best_five, strict=True)]
    assert report.metrics["top5"].value == pytest.approx(100 * np.mean(five))
    assert list(report.metrics) == ["top1", "top5"]
    assert report.metrics["top1"].value > 35  # chance is 17
    assert report.per_class == pytest.approx({f"class{c}": 100 * hit[labels == c].mean() for c in range(6)})
    assert report.details["mean_probability_of_true_class"] == pytest.approx(np.mean(probabilities), rel=1e-4)
    assert (report.details["logit_scale"], report.details["logit_bias"]) == (2.0, None)
    assert report.details["templates"] == list(load_templates("simple"))
    assert report.details["class_names_from"] == "dataset"
    assert report.task == "zero-shot"
    assert "templates: simple (7), class names: dataset" in report.protocol


def test_a_teacher_without_a_scale(speaker, sets) -> None:
    speaker.text.logit_scale = None
    report = run_zero_shot(speaker, sets.eval, ZeroShotConfig(templates="base"), use_cache=False)
    assert report.details["mean_probability_of_true_class"] is None
    with pytest.raises(CapabilityError, match="has no logit scale stored, so similarities give no probabilities"):
        calibration_of(speaker).probabilities(torch.rand(2, 3))


def test_broken_pictures_are_left_out(speaker, sets, pictures) -> None:
    clean = run_zero_shot(speaker, sets.eval, ZeroShotConfig(templates="base"), use_cache=False)
    broken = open_images(str(pictures("zero-shot-broken", 8, seed=1, broken=3)))
    report = run_zero_shot(speaker, broken, ZeroShotConfig(templates="base"), use_cache=False)
    assert report.metrics == clean.metrics
    assert report.failed == 3


def test_summaries_that_are_no_numbers(speaker, sets, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = type(speaker).forward
    monkeypatch.setattr(
        type(speaker), "forward", lambda self, images, feature_fmt: forward(self, images * torch.inf, feature_fmt)
    )
    with pytest.raises(OptionError, match=r"The features of 48 of 48 pictures of .* are not finite numbers"):
        run_zero_shot(speaker, sets.eval, ZeroShotConfig(templates="base"), use_cache=False)


# ---- probabilities ----


@given(st.floats(-2, 5), st.one_of(st.none(), st.floats(-20, 0)), st.integers(1, 7))
def test_scale_and_bias_never_change_the_order(scale: float, bias: float | None, classes: int) -> None:
    scores = torch.rand(5, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(classes)) * 2 - 1
    calibration = Calibration(scale, bias)
    assert torch.equal(calibration.logits(scores).argsort(1), scores.argsort(1))
    probabilities = calibration.probabilities(scores)
    assert ((probabilities >= 0) & (probabilities <= 1)).all()
    if bias is None:
        torch.testing.assert_close(probabilities.sum(1), torch.ones(5, dtype=torch.float64))
    else:
        expected = 1 / (1 + np.exp(-(scores.numpy() * np.exp(scale) + bias)))
        np.testing.assert_allclose(probabilities, expected, rtol=1e-12)


# ---- the words ----


def test_names_of_classes() -> None:
    imagenet = load_class_names("imagenet")
    own = labelled([0, 1, 1], class_names=["cat", "dog"])
    assert resolve_class_names(own) == ("dataset", ("cat", "dog"))
    ids = sorted(f"n{10_000_000 + i}" for i in range(1000))
    assert resolve_class_names(labelled([0, 999], class_names=ids)) == ("imagenet", imagenet)
    assert resolve_class_names(labelled([0, 999], class_names=ids), "dataset") == ("dataset", tuple(ids))
    hub = labelled([5], "imagenet-1k", class_names=[f"{name.lower()}, Tinca tinca" for name in imagenet])
    assert resolve_class_names(hub)[0] == "imagenet"
    other_order = labelled([5], "/data/imagenet/val", class_names=sorted(imagenet))
    assert resolve_class_names(other_order) == ("dataset", tuple(sorted(imagenet)))
    assert resolve_class_names(labelled([0, 999], class_names=ids[::-1]))[0] == "dataset"
    assert resolve_class_names(labelled([0, 999], "/data/ImageNet-sample"))[0] == "imagenet"
    assert resolve_class_names(labelled([0, 700], "a part"), "imagenet")[0] == "imagenet"
    assert resolve_class_names(labelled([0], class_names=["n01440764"])) == ("dataset", ("n01440764",))


def test_names_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_text("a cat\na dog\n")
    assert resolve_class_names(labelled([0, 1], class_names=["0", "1"]), str(path)) == (str(path), ("a cat", "a dog"))


def test_names_that_do_not_belong_to_the_labels(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("a cat\na dog\n")
    with pytest.raises(
        DatasetError, match=r"things has 3 classes, and the class names of '.*names.txt' are 2: the label"
    ):
        resolve_class_names(labelled([0, 2]), str(tmp_path / "names.txt"))
    with pytest.raises(DatasetError, match="things has 2 classes, and the class names of 'imagenet' are 1000"):
        resolve_class_names(labelled([0, 1], class_names=["cat", "dog"]), "imagenet")
    with pytest.raises(DatasetError, match=r"things has labels, but no names for its classes, and zero-shot .* a file"):
        resolve_class_names(labelled([0, 1]))


def test_pictures_without_labels(speaker, pictures) -> None:
    with pytest.raises(DatasetError, match="1 of 2 pictures of things have no label"):
        run_zero_shot(speaker, labelled([0, -1], class_names=["a"]))


# ---- the text side ----


def test_no_text_side(backbone, sets, goldens: Path) -> None:
    with pytest.raises(
        CapabilityError,
        match=r"TinyBackbone has no text side, so its summaries cannot be compared with texts\. Backbones with one: ",
    ):
        run_zero_shot(backbone, sets.eval)
    model = amradio.load(goldens / "models" / "v3_small.pth.tar")
    with pytest.raises(CapabilityError, match=r"Choose an adaptor whose .*: clip, siglip2-g, dino_v2, sam\."):
        check_text(model)


@pytest.mark.parametrize(
    ("name", "message"), [("backbone", "The backbone has no text side"), ("sam", "The teacher 'sam' ")]
)
def test_views_without_a_text_side(goldens: Path, sets, name: str, message: str) -> None:
    view = amradio.load(goldens / "models" / "v3_small.pth.tar", ["sam"]).view(name).eval()
    with pytest.raises(CapabilityError, match=message):
        run_zero_shot(view, sets.eval, setup=Setup(policy_for(view, (32, 32))))


def test_a_text_side_of_another_teacher(speaker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(speaker), "summary_dim", 4)
    with pytest.raises(ConfigError, match="of TinyTextBackbone embeds texts in 3 dimensions, and its summaries have 4"):
        build_classifier(speaker, CLASSES, ["{}"])


# ---- the cache ----


@pytest.fixture
def known(speaker):
    """The same, with a content that is known."""
    speaker.identity = Identity(source="somewhere", layout="official", sha256="12" * 32)
    return speaker


def test_a_classifier_is_kept(known, sets, tmp_path: Path) -> None:
    config = ZeroShotConfig(templates="simple")
    first = run_zero_shot(known, sets.eval, config, cache_dir=tmp_path)
    assert first.details["classifier_cached"] is False
    known.batches.clear()
    known.text = SimpleNamespace()  # as if it were not there
    second = run_zero_shot(known, sets.eval, config, cache_dir=tmp_path)
    assert (second.details["classifier_cached"], known.batches) == (True, [])
    assert second.metrics == first.metrics
    assert second.details["logit_scale"] == 2.0
    third = run_zero_shot(known, sets.eval, config, cache_dir=tmp_path, use_cache=False)
    assert third.details["classifier_cached"] is False
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1


def test_the_place_of_a_classifier_depends_on_everything(known, tmp_path: Path) -> None:
    def place(backbone=known, names=CLASSES, templates=("a {}",)) -> Path | None:
        return ClassifierCache.of(backbone, names, templates, tmp_path).path

    other = TinyTextBackbone()
    other.identity = Identity(source="somewhere", layout="official", sha256="34" * 32)
    moved = TinyTextBackbone()
    moved.identity = Identity(source="elsewhere", layout="official", sha256="12" * 32)
    nobody = TinyTextBackbone()
    nobody.identity = Identity(source="somewhere", layout="official")
    assert place() == place(moved)
    places = {place(), place(other), place(names=CLASSES[::-1]), place(templates=("the {}",)), place(names=("a", "b"))}
    assert len(places) == 5
    changed = TinyTextBackbone()
    changed.identity = nobody.identity
    assert place(nobody) == place(changed)
    changed.register_buffer("more", torch.ones(1))
    assert len({place(nobody), place(changed), place()}) == 3


def test_a_damaged_file_is_replaced(known, sets, tmp_path: Path) -> None:
    config = ZeroShotConfig(templates="base")
    expected = run_zero_shot(known, sets.eval, config, cache_dir=tmp_path).metrics
    (path,) = tmp_path.rglob("*.safetensors")
    for damage in (b"", b"not a file", path.read_bytes()[:-4]):
        path.write_bytes(damage)
        report = run_zero_shot(known, sets.eval, config, cache_dir=tmp_path)
        assert (report.details["classifier_cached"], report.metrics) == (False, expected)
    save_file({"classifier": torch.zeros(6, 3)}, path, {"key": "of something else"})
    assert run_zero_shot(known, sets.eval, config, cache_dir=tmp_path).metrics == expected


def test_a_cache_that_cannot_be_written(known, sets, tmp_path: Path) -> None:
    (tmp_path / "amradio").write_text("a file where a folder should be")
    with pytest.warns(RuntimeWarning, match="The classifier could not be kept in .*: "):
        run_zero_shot(known, sets.eval, ZeroShotConfig(templates="base"), cache_dir=tmp_path)


# ---- blocks left out ----


def test_blocks_left_out(goldens: Path, sets, tmp_path: Path) -> None:
    view = amradio.load(goldens / "models" / "v3_small.pth.tar", ["clip"]).view("clip").eval()
    vocabulary = torch.nn.functional.normalize(torch.randn(6, view.summary_dim), dim=1)

    class Words:
        logit_scale = logit_bias = None

        def tokenizer(self, texts: list[str]) -> Tensor:
            return torch.tensor([int(text[-1]) for text in texts])

        def to(self, device: torch.device) -> Words:
            return self

        def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
            return vocabulary[tokens]

    view.radio.adaptors["clip"].attach_text(lambda device: Words())
    templates = tmp_path / "only-the-name.txt"
    templates.write_text("{}")
    setup = Setup(policy_for(view, (32, 32)))
    depth = len(view.radio.blocks)
    seen = {}
    for span in ((), (0, depth - 1), (-1,)):
        config = ZeroShotConfig(templates=str(templates), drop_span=span)
        report = run_zero_shot(view, sets.eval, config, setup, use_cache=False)
        seen[span] = report.details["confusion"]["true_predicted_count"]
        assert len(view.radio.blocks) == depth
        assert ("without blocks" in report.protocol) == bool(span)
    assert seen[()] != seen[(0, depth - 1)]
