"""``amradio eval zero-shot``, ``retrieval`` and ``position`` as a user runs them."""

from __future__ import annotations

import json
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from amradio.cli import main, parse
from amradio.cli.common import BackboneOptions
from amradio.evals.report import EvalReport

CLASSES = ("cat", "dog", "great white shark")


@pytest.fixture
def talking(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    """Every model that the command line loads is a toy with a text side."""
    kind: Any = runpy.run_path(str(root / "tests" / "evals" / "two_processes.py"))["TinyTextBackbone"]
    monkeypatch.setattr(BackboneOptions, "load_backbone", lambda *_, **__: kind())


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("validation", 2)):
        for name in CLASSES:
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (20, 28, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / "photos" / split / name / f"{i}.png")
    return tmp_path / "photos"


def run_json(words: Sequence[str], capsys: pytest.CaptureFixture[str], code: int = 0) -> list[EvalReport]:
    assert main(["eval", *words, "--json"]) == code
    return [EvalReport.from_dict(r) for r in json.loads(capsys.readouterr().out)["reports"]]


@pytest.mark.usefixtures("talking")
def test_zero_shot(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["zero-shot", "--dataset", str(photos), "--templates", "simple", "--resolution", "16", "16"]
    reports = run_json([*words, "--resolution", "24", "-o", str(tmp_path / "out")], capsys)
    assert [r.size_label for r in reports] == ["16x16", "shortest 24"]
    assert all(r.dataset["eval"]["count"] == 6 and set(r.per_class or {}) == set(CLASSES) for r in reports)
    assert reports[0].dataset["eval"]["split"] == "validation"
    assert len(list((tmp_path / "out").glob("*.json"))) == 2
    (tmp_path / "names.txt").write_text("kitten\npuppy\nshark\n")
    (report,) = run_json([*words, "--class-names", str(tmp_path / "names.txt"), "--split", "train"], capsys)
    assert set(report.per_class or {}) == {"kitten", "puppy", "shark"}
    assert report.dataset["eval"]["count"] == 12


@pytest.mark.usefixtures("talking")
def test_a_table_for_people(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "zero-shot", "--dataset", str(photos), "--templates", "base", "-m", "one"]) == 0
    assert "top1 %" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("span", "message"),
    [
        ("1:x", "--drop-span takes a number or FIRST:LAST, got '1:x'"),
        ("3", "Blocks can be skipped in RADIO models"),
    ],
)
@pytest.mark.usefixtures("talking")
def test_blocks_left_out(photos: Path, span: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["zero-shot", "--dataset", str(photos), "--templates", "base", "--drop-span", span]
    assert main(["eval", *words]) == 1
    assert message in capsys.readouterr().err


def test_what_is_wrong_with_the_data_is_said_before_a_model_is_loaded(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(BackboneOptions, "load_backbone", lambda *_, **__: pytest.fail("loaded"))
    assert main(["eval", "zero-shot", "--dataset", str(photos), "--class-names", "imagenet"]) == 1
    assert "has 3 classes, and the class names of 'imagenet' are 1000" in capsys.readouterr().err


@pytest.mark.usefixtures("talking")
def test_retrieval(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"path": f"train/{c}/{i}.png", "captions": [f"a {c}", f"number {i}"]} for c in CLASSES for i in range(4)]
    path = photos / "captions.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    words = ["retrieval", "--captions", str(path), "--k", "1", "--k", "12"]
    (report,) = run_json(words, capsys)
    assert report.metrics["image_to_text_r12"].value <= 100.0
    assert report.metrics["text_to_image_r12"].value == 100.0
    assert report.details["captions"] == 24
    reports = run_json([*words, "--limit", "5", "--captions-per-image", "1", "-m", "a", "-m", "b"], capsys)
    assert [r.details["captions"] for r in reports] == [5, 5]
    assert reports[0].details["captions_sha256"] == reports[1].details["captions_sha256"]


@pytest.mark.usefixtures("talking")
@pytest.mark.parametrize("options", [["--solver", "ridge"], ["--epochs", "2", "--fit-batch-size", "4"]])
def test_position(photos: Path, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["position", "--dataset", str(photos), "--train-split", "train", "--eval-split", "validation", *options]
    (report,) = run_json(words, capsys)
    assert 0 <= report.metrics["mean_l1"].value < 1.5
    assert {role: d["count"] for role, d in report.dataset.items()} == {"train": 12, "eval": 6}
    assert report.config["solver"] == ("ridge" if "ridge" in options else "adam")


def test_words_of_the_recipes() -> None:
    words = (
        "eval zero-shot --model radio_v1 --adaptor clip --dataset imagenet-1k --split validation --resolution 378 378"
    )
    command = parse(words.split()).protocol
    assert (command.dataset, command.split, command.adaptor) == ("imagenet-1k", "validation", "clip")
    assert command.resolution == ((378, 378),)
    words = "eval position -m radio_v2.1 --dataset food101 --train-split train --resolution 432 432 --cache-gib 0.5"
    command = parse(words.split()).protocol
    assert (command.train, command.solver, command.cache_gib) == ("food101", "adam", 0.5)
