"""``amradio eval`` and ``amradio compare`` as a user runs them, on one process and on two."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from amradio.cli import main, parse
from amradio.evals.report import EvalReport

CLASSES = 4


def make_pictures(folder: Path, per_class: int, seed: int, broken: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).uniform(40, 215, (CLASSES, 3))
    for c in range(CLASSES):
        (folder / f"class{c}").mkdir(parents=True)
        for i in range(per_class):
            colour = np.clip(centres[c] + rng.normal(0, 30, 3), 0, 255)
            height, width = 32 + 16 * (i % 2), 48
            pixels = np.clip(colour + rng.normal(0, 8, (height, width, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"class{c}" / f"{i}.png")
    for i in range(broken):
        (folder / "class0" / f"broken{i}.png").write_bytes(b"not a picture at all")
    return folder


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_pictures(tmp_path_factory.mktemp("data") / "train", 9, 0))


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_pictures(tmp_path_factory.mktemp("data") / "eval", 5, 1))


@pytest.fixture
def checkpoint(goldens: Path) -> str:
    return str(goldens / "models" / "v25_p16.pth.tar")


def run_json(words: Sequence[str], capsys: pytest.CaptureFixture[str], code: int = 0) -> list[EvalReport]:
    assert main([*words, "--json"]) == code
    return [EvalReport.from_dict(r) for r in json.loads(capsys.readouterr().out)["reports"]]


# ---- FUNGI ----


def test_gradients_beside_the_summary(
    train: str, evaluation: str, checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--train", train, "--eval", evaluation, "-m", checkpoint, "--resolution", "32", "32", "--k", "3"]
    (plain,) = run_json(["eval", "knn", *data], capsys)
    (fungi,) = run_json(["eval", "knn", *data, "--fungi", "kl", "--fungi", "simclr", "--seed", "3"], capsys)
    (only,) = run_json(["eval", "linear", *data[:-2], "--fungi", "kl", "--fungi-only"], capsys)
    assert "FUNGI" not in str(plain.model["version"])
    assert "FUNGI (kl, simclr; clean, sign)" in str(fungi.model["version"])
    assert only.metrics["top1"].value > 25
    assert "fungi" not in plain.config
    record = fungi.config["fungi"]
    assert (record["kind"], record["seed"], record["layer"]) == ("image", 3, "model.blocks.2.attn.proj")
    assert record["objectives"]["simclr"]["temperature"] == 0.07
    assert len(record["objectives"]["simclr"]["sha256"]) == 64
    assert only.config["fungi"]["include_embedding"] is False
    (other,) = run_json(["eval", "knn", *data, "--fungi", "kl", "--fungi", "simclr", "--seed", "4"], capsys)
    assert other.config["fungi"]["objectives"] != record["objectives"]


def test_uniform_knn(train: str, evaluation: str, checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["eval", "knn", "--train", train, "--eval", evaluation, "-m", checkpoint, "--resolution", "32", "32"]
    (report,) = run_json([*data, "--protocol", "fungi", "--k", "3", "--pca", "8", "--fungi", "kl"], capsys)
    assert "protocol fungi" in report.protocol
    assert report.config["pca"] == 8
    assert set(report.metrics) == {"top1", "mean_per_class"}
    (few,) = run_json([*data, "--protocol", "fungi", "--k", "3", "--shots", "2"], capsys)
    assert few.dataset["train"]["count"] == 8
    for more, words in (
        (["--pca", "8"], "Under --protocol weighted there is no --pca"),
        (["--protocol", "fungi", "--temperature", "1", "--draws", "2"], "there is no --temperature, --draws"),
    ):
        assert main([*data, *more]) == 1
        assert words in " ".join(capsys.readouterr().err.split())


def test_retrieval_map(
    train: str, evaluation: str, checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["eval", "retrieval-map", "--database", train, "-m", checkpoint, "--resolution", "32", "32"]
    (alone,) = run_json([*data, "--pca", "8", "-o", str(tmp_path)], capsys)
    (asked,) = run_json([*data, "--queries", evaluation, "--fungi", "kl", "--fungi-projection", "rank-one-4"], capsys)
    assert alone.metrics.keys() == asked.metrics.keys() == {"map", "mp1", "mp5", "mp10"}
    assert asked.dataset["queries"]["count"] == 20
    assert asked.config["fungi"]["projection"] == "rank-one-4"
    assert len(list(tmp_path.glob("retrieval-map-*.json"))) == 1
    gnd = tmp_path / "gnd.json"
    gnd.write_text(json.dumps({"imlist": ["0"], "qimlist": [], "gnd": []}))
    for more, words in (
        (["--ground-truth", str(gnd)], "1 of the 1 pictures that gnd.json lists are not exactly once"),
        (["--ground-truth", str(gnd), "--limit", "3"], "--limit leaves out pictures"),
        (["--queries-split", "val"], "--queries-split needs --queries"),
    ):
        assert main([*data, *more]) == 1
        assert words in " ".join(capsys.readouterr().err.split())


def test_gradients_alone_need_a_loss(train: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "knn", "--train", train, "--eval", train, "--fungi-only"]) == 1
    assert "--fungi-only evaluates gradients alone, and no --fungi says which" in capsys.readouterr().err


# ---- words ----


@pytest.mark.parametrize(
    "words",
    [
        ["--resolution", "224", "--resolution", "378", "378", "--train", "t", "--eval", "e", "-m", "a", "--model", "b"],
        ["-m", "a", "--resolution", "224", "-m", "b", "--train=t", "--resolution", "378x378", "--eval=e"],
        ["--dataset", "t", "--eval-dataset", "e", "-m", "a", "-m", "b", "--resolution", "224", "--resolution=378x378"],
    ],
)
def test_models_and_resolutions_are_repeated(words: list[str]) -> None:
    command = parse(["eval", "knn", *words, "--k", "10", "--k", "20", "--json"]).protocol
    assert command.model == ("a", "b")
    assert command.resolution == ((224,), (378, 378))
    assert (command.train, command.evaluation, command.k) == ("t", "e", (10, 20))
    assert command.json


@pytest.mark.parametrize(
    "words",
    [
        ["eval"],
        ["eval", "knnn", "--train", "t"],
        ["eval", "knn"],
        ["eval", "knn", "--train", "t", "stray"],
        ["eval", "knn", "--train", "t", "--resolution", "378", "378", "378"],
        ["eval", "linear", "--train", "t", "--k", "20"],
    ],
)
def test_wrong_usage_is_exit_code_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err


@pytest.mark.parametrize("protocol", ["knn", "linear"])
def test_help_of_inner_commands(protocol: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", protocol, "--help"]) == 0
    text = capsys.readouterr().out
    assert "--resolution SIDE | HEIGHT WIDTH" in text
    assert "--eval" in text


def test_help_of_inner_commands_needs_no_torch() -> None:
    code = "import sys; from amradio.cli import main; main(['eval', 'knn', '--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False)
    assert done.returncode == 0


# ---- runs ----


def test_models_times_resolutions_make_one_table(
    train: str, evaluation: str, checkpoint: str, goldens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", "knn", "-m", checkpoint, "-m", str(goldens / "models" / "v3_small.pth.tar"), "--train", train]
    words += ["--eval", evaluation, "--resolution", "32", "--resolution", "32", "48", "--k", "5", "--k", "3"]
    words += ["-o", str(tmp_path / "out"), "--csv-out", str(tmp_path / "sweep.csv"), "--device", "cpu"]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("  ")[0] == "task"
    assert all(f"{m} %" in lines[0] for m in ("top1", "top5", "top1_k3", "top5_k3"))
    sizes = [("shortest 32" in line, "32x48" in line) for line in lines[2:6]]
    assert sizes == [(True, False), (False, True)] * 2
    files = sorted((tmp_path / "out").glob("*.json"))
    assert len(files) == 4
    assert all(f.with_suffix(".md").exists() for f in files)
    with (tmp_path / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    reports = [EvalReport.load(f) for f in files]
    assert sorted(float(r["top1 %"]) for r in rows) == sorted(r.metrics["top1"].value for r in reports)
    assert main(words) == 0  # an earlier report is not replaced
    assert len(list((tmp_path / "out").glob("*.json"))) == 8
    capsys.readouterr()

    assert main(["compare", *map(str, files[:2])]) == 0
    text = capsys.readouterr().out
    assert "top1 %" in text
    assert "config.resize.size" in text
    assert main(["compare", "--json", *map(str, files)]) == 0
    assert len(json.loads(capsys.readouterr().out)["reports"]) == 4
    assert main(["compare", "--markdown", *map(str, files)]) == 0
    assert capsys.readouterr().out.startswith("| metric |")
    assert main(["compare", str(files[0])]) == 1
    assert "at least two reports" in capsys.readouterr().err


def test_other_protocols_are_named(
    train: str, evaluation: str, checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["-m", checkpoint, "--train", train, "--eval", evaluation, "--resolution", "32", "-o", str(tmp_path)]
    assert main(["eval", "knn", *words, "--k", "5"]) == 0
    assert main(["eval", "linear", *words, "--c", "1"]) == 0
    capsys.readouterr()
    assert main(["compare", *map(str, sorted(tmp_path.glob("*.json")))]) == 0
    assert "note: measured under different protocols or data (task, protocol, " in capsys.readouterr().out


def test_an_adaptor_is_evaluated(
    train: str, evaluation: str, checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", "knn", "-m", checkpoint, "--train", train, "--eval", evaluation, "--resolution", "32", "--k", "3"]
    backbone, adaptor = (run_json([*words, *more], capsys)[0] for more in ([], ["--adaptor", "clip"]))
    assert (backbone.model["adaptor"], adaptor.model["adaptor"]) == (None, "clip")
    assert backbone.model["summary_dim"] != adaptor.model["summary_dim"]
    assert adaptor.model_label.endswith("/clip")


def test_parts_of_one_data_set(
    train: str, evaluation: str, checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train").symlink_to(train)
    (tmp_path / "validation").symlink_to(evaluation)
    words = ["eval", "knn", "-m", checkpoint, "--dataset", str(tmp_path), "--resolution", "32", "--k", "3"]
    report = run_json(words, capsys)[0]
    assert {role: (d["split"], d["count"]) for role, d in report.dataset.items()} == {
        "eval": ("validation", 20),
        "train": ("train", 36),
    }


def test_a_limit_takes_some_pictures(
    train: str, evaluation: str, checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", "knn", "-m", checkpoint, "--train", train, "--eval", evaluation, "--resolution", "32", "--k", "3"]
    report = run_json([*words, "--limit", "18"], capsys)[0]
    assert [report.dataset[role]["count"] for role in ("train", "eval")] == [18, 18]
    assert report.config["limit"] == 18


def test_broken_pictures_and_the_exit_code(
    train: str, checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_pictures(tmp_path / "odd", 5, 1, broken=2)
    words = ["eval", "knn", "-m", checkpoint, "--train", train, "--eval", str(folder), "--resolution", "32", "--k", "3"]
    assert main(words) == 3
    captured = capsys.readouterr()
    assert "broken0.png: " in captured.err
    assert captured.out.splitlines()[2].split()[-2] == "2"
    assert main([*words, "--max-failed", "0.05"]) == 0
    assert main([*words, "--max-failed", "0.01"]) == 3


def test_mistakes_are_found_before_a_model_is_loaded(
    train: str, evaluation: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("amradio.backbones.dispatch.load_backbone", lambda *a, **k: pytest.fail("a model was loaded"))
    assert main(["eval", "knn", "--train", train, "--eval", train]) == 1
    assert "are the same 36 pictures" in capsys.readouterr().err
    assert main(["eval", "knn", "--train", train, "--eval", f"{evaluation}/nope"]) == 1
    assert "nope" in capsys.readouterr().err
    assert main(["eval", "knn", "--train", train, "--eval", f"{evaluation}/nope", "--json"]) == 1
    assert "nope" in json.loads(capsys.readouterr().out)["error"]["message"]


# ---- several processes ----


def torchrun(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        [*command, "-m", "amradio", *words],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=environment,
    )


def comparable(report: EvalReport) -> dict[str, Any]:
    data = {role: (d["count"], d["failed"], d["fingerprint"]) for role, d in report.dataset.items()}
    return {"metrics": report.metrics, "classes": report.per_class, "data": data}


@pytest.mark.slow
@pytest.mark.parametrize("protocol", [["knn", "--k", "5", "--k", "2"], ["linear", "--c", "0.01", "--c", "1"]])
def test_two_processes_give_what_one_gives(
    protocol: list[str], train: str, checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_pictures(tmp_path / "odd", 5, 1, broken=1)
    words = ["eval", *protocol, "-m", checkpoint, "--train", train, "--eval", str(folder), "--resolution", "32"]
    words += ["--device", "cpu", "--batch-size", "2"]  # small, so that both processes get a part
    alone = run_json(words, capsys, code=3)[0]
    done = torchrun([*words, "--json", "-o", str(tmp_path / "out"), "--csv-out", str(tmp_path / "sweep.csv")])
    assert "exitcode  : 3" in done.stderr, done.stderr  # torchrun itself ends with 1
    together = EvalReport.from_dict(json.loads(done.stdout)["reports"][0])  # printed once
    assert together.environment["world_size"] == 2
    assert comparable(together) == comparable(alone)
    assert together.details["confusion"] == alone.details["confusion"]
    assert [f.suffix for f in sorted((tmp_path / "out").iterdir())] == [".json", ".md"]
    assert len((tmp_path / "sweep.csv").read_text().splitlines()) == 2


@pytest.mark.slow
def test_processes_without_pictures(
    train: str, checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = make_pictures(tmp_path / "few", 1, 1)
    words = ["eval", "knn", "-m", checkpoint, "--train", str(few), "--eval", train, "--resolution", "32", "--k", "2"]
    words += ["--device", "cpu", "--batch-size", "2"]
    alone = run_json(words, capsys)[0]
    done = torchrun([*words, "--json"])
    assert done.returncode == 0, done.stderr
    assert comparable(EvalReport.from_dict(json.loads(done.stdout)["reports"][0])) == comparable(alone)


# ---- what is refused early, and what is kept late ----


def test_outputs_that_cannot_be_written_are_refused_first(
    train: str, evaluation: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    words = ["eval", "knn", "--train", train, "--eval", evaluation, "-m", "radio_v9"]
    for option, path, message in [("-o", tmp_path / "file", "is a file"), ("--csv-out", tmp_path, "is a folder")]:
        assert main([*words, option, str(path)]) == 1
        assert message in capsys.readouterr().err


def test_a_csv_file_with_other_columns_does_not_lose_the_table(
    train: str, evaluation: str, checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "o.csv").write_text("a,b\n")
    words = ["eval", "knn", "--train", train, "--eval", evaluation, "-m", checkpoint, "--resolution", "32", "32"]
    assert main([*words, "--csv-out", str(tmp_path / "o.csv"), "--k", "3"]) == 1
    out, err = capsys.readouterr()
    assert "top1 %" in out
    assert "could not all be written: " in err
    assert (tmp_path / "o.csv").read_text() == "a,b\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--limit", "0"], "--limit must be at least 1, got 0"),
        (["--limit", "-5"], "--limit must be at least 1, got -5"),
        (["--max-failed", "2"], "--max-failed is a share from 0 to 1, got 2"),
    ],
)
def test_wrong_counts(train: str, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "knn", "--train", train, "--eval", train, *words]) == 1
    assert message in capsys.readouterr().err


def test_a_limit_keeps_every_class(
    train: str, evaluation: str, checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--train", train, "--eval", evaluation, "-m", checkpoint, "--resolution", "32", "32", "--k", "1"]
    (report,) = run_json(["eval", "knn", *words, "--limit", str(CLASSES + 1)], capsys)
    assert report.dataset["train"]["count"] == CLASSES + 1
    assert report.config["limit_seed"] == 0


def test_compare_takes_folders(
    train: str, evaluation: str, checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", "knn", "--train", train, "--eval", evaluation, "-m", checkpoint, "--k", "3", "-o", str(tmp_path)]
    assert main([*words, "--resolution", "32", "32", "--resolution", "48", "48"]) == 0
    capsys.readouterr()
    assert main(["compare", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "top1 %" in out
    assert max(map(len, out.splitlines())) < 160
    assert main(["compare", str(tmp_path / "none")]) == 1
    (tmp_path / "empty").mkdir()
    assert main(["compare", str(tmp_path / "empty")]) == 1
    assert "has no reports" in capsys.readouterr().err
