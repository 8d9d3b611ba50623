"""``amradio eval mode-switching | feature-stats | compare-features`` as a user runs them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from amradio.cli import main, parse
from amradio.evals.report import EvalReport

SMALL = ["--device", "cpu", "--workers", "1"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("data")
    for part, count in (("train", 3), ("val", 2)):
        for label in range(2):
            (folder / part / f"class{label}").mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)
                picture = Image.fromarray(pixels).resize((60, 48))
                picture.save(folder / part / f"class{label}" / f"{i}.png")
    return folder


@pytest.fixture
def checkpoint(goldens: Path) -> str:
    return str(goldens / "models" / "v25_p16.pth.tar")


def the_report(folder: Path) -> EvalReport:
    (path,) = folder.glob("*.json")
    return EvalReport.load(path)


def test_a_sweep_against_itself_with_all_files(
    pictures: Path, checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "eval",
        "mode-switching",
        "-m",
        checkpoint,
        "--images",
        str(pictures / "val"),
        "--from",
        "32",
        "--to",
        "96",
    ]
    words += ["--step", "32", "--reference", "64", "--limit", "3", "--strips", "2", "-o", str(tmp_path), *SMALL]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "against itself at 64 px" in out
    assert "No verdict" in out or "switch" in out.lower()
    report = the_report(tmp_path)
    assert report.dataset["eval"]["count"] == 3
    stem = next(tmp_path.glob("*.json")).with_suffix("")
    assert {path.name.removeprefix(stem.name) for path in tmp_path.iterdir()} == {
        ".json", ".md", ".csv", ".png", ".strips.png"
    }  # fmt: skip
    with Path(f"{stem}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["resolution"] for row in rows] == ["32", "64", "96"]
    assert rows[1]["fidelity"] == ""  # infinite
    assert float(rows[0]["mse"]) == report.details["curve"][0]["mse"]
    with Image.open(f"{stem}.strips.png") as strips:
        assert strips.width > 400


def test_a_sweep_against_a_teacher_with_accuracies(
    pictures: Path, checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", "mode-switching", "-m", checkpoint, "--images", str(pictures / "val"), "--resolution", "32"]
    words += ["--resolution", "64", "--teacher", checkpoint, "--knn-train", str(pictures / "train"), "--knn-eval"]
    words += [str(pictures / "val"), "--plots", "none", "-o", str(tmp_path), *SMALL]
    assert main(words) == 0
    capsys.readouterr()
    curve = the_report(tmp_path).details["curve"]
    assert [row["mse"] for row in curve] == [0, 0]  # the same model
    assert all(0 <= row["knn_top1"] <= 100 for row in curve)
    assert not list(tmp_path.glob("*.png"))


def test_statistics_with_all_files(
    pictures: Path, checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", "feature-stats", "-m", checkpoint, "--dataset", str(pictures / "val"), "--resolution", "32", "32"]
    words += ["--views", "1", "--cost-batches", "1", "--cost-batch-size", "1", "--plots", "svg", "-o", str(tmp_path)]
    assert main([*words, *SMALL]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[2].startswith("rankme ")
    assert "GFLOP" in out
    report = the_report(tmp_path)
    stem = next(tmp_path.glob("*.json")).with_suffix("")
    assert "<svg" in Path(f"{stem}.svg").read_text()
    stored = load_file(f"{stem}.covariance.safetensors")
    assert stored["covariance"].shape == (report.model["embed_dim"],) * 2
    assert stored["mean"].tolist() == report.details["distribution"]["mean"]
    with Path(f"{stem}.histograms.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5 * 100
    assert [float(r["share"]) for r in rows[:100]] == report.details["distribution"]["histograms"]["all"]["shares"]


def test_a_comparison(
    pictures: Path, checkpoint: str, goldens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", "compare-features", "-m", checkpoint, "--against", str(goldens / "models" / "v3_small.pth.tar")]
    words += ["--dataset", str(pictures / "val"), "--resolution", "160", "160", "-o", str(tmp_path), *SMALL, "--json"]
    assert main(words) == 0
    (found,) = json.loads(capsys.readouterr().out)["reports"]
    assert found["metrics"]["features_cka"]["value"] > 0
    assert found["details"]["second"]["name"]
    assert len(list(tmp_path.glob("*.png"))) == 1


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["mode-switching", "--teacher-option", "stride=16"], "need a --teacher"),
        (["mode-switching", "--teacher", "t", "--reference", "64"], "--reference is for sweeps without a teacher"),
        (["mode-switching", "--accuracy-adaptor", "clip"], "needs labelled pictures"),
        (["mode-switching", "--resolution", "32", "48"], "give each --resolution as one number"),
        (["mode-switching", "--step", "0"], "--step must be at least 1"),
        (["mode-switching", "--mode", "shortest"], "choose the mode 'crop' or 'exact'"),
        (["feature-stats", "--views", "-1"], "views of at least 0"),
    ],
)
def test_refusals(
    words: list[str], text: str, pictures: Path, checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", *words, "--dataset", str(pictures / "val"), "-m", checkpoint, *SMALL]) == 1
    assert text in capsys.readouterr().err


def test_plots_are_checked_before_anything_is_computed(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    words = ["eval", "feature-stats", "--dataset", str(pictures / "val"), "-m", "no such model", "-o", str(tmp_path)]
    assert main(words) == 1
    assert "pip install 'amradio[viz]'" in capsys.readouterr().err


def test_defaults() -> None:
    sweep = parse(["eval", "mode-switching", "--dataset", "d"]).protocol
    assert (sweep.first, sweep.last, sweep.step, sweep.limit) == (128, 1024, 64, 16)
    assert parse(["eval", "feature-stats", "--dataset", "d"]).protocol.limit == 100
    assert parse(["eval", "compare-features", "--dataset", "d", "--against", "m"]).protocol.limit == 1000
