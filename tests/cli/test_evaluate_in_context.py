"""``amradio eval in-context``, as typed on a command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from amradio.cli import main, parse
from amradio.evals.report import EvalReport


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    import torch

    import amradio
    from amradio.models.configs import RadioConfig, ViTConfig

    torch.manual_seed(0)
    trunk = ViTConfig(embed_dim=16, depth=2, num_heads=2, mlp_hidden_dim=32, patch_size=8, position_grid=(6, 6))
    return str(amradio.save(amradio.RadioModel(RadioConfig(backbone=trunk)), tmp_path / "model"))


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Pictures and masks in the layout of Pascal VOC, with two parts."""
    root, rng = tmp_path / "voc", np.random.default_rng(0)
    for name in ("images", "SegmentationClass", "sets"):
        (root / name).mkdir(parents=True)
    (root / "classes.txt").write_text("left\nright\n")
    for split, count in (("train", 5), ("val", 3)):
        names = [f"{split}{i}" for i in range(count)]
        (root / "sets" / f"{split}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            mask = np.zeros((40, 48), np.uint8)
            mask[:, rng.integers(10, 40) :] = 1
            mask[:3] = 255
            pixels = np.clip(np.where(mask[..., None] == 1, 200, 60) + rng.normal(0, 30, (40, 48, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(root / "images" / f"{name}.jpg")
            Image.fromarray(mask).save(root / "SegmentationClass" / f"{name}.png")
    return str(root)


def words(data: str, checkpoint: str, *more: str) -> list[str]:
    return ["eval", "in-context", "-m", checkpoint, "--data", data, "--device", "cpu", "--k", "5", *more]


def test_one_run_makes_reports_sheets_and_a_memory(
    data: str, checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, sheets, memory = tmp_path / "out", tmp_path / "sheets", tmp_path / "memory.safetensors"
    options = ["--resolution", "40", "48", "--memory-size", "20", "--memory-size", "0"]
    options += ["-o", str(out), "--pictures", "2", "--pictures-out", str(sheets), "--memory-out", str(memory)]
    assert main(words(data, checkpoint, *options)) == 0
    text = capsys.readouterr().out
    assert "protocol clean: void left out of the memory; mIoU over classes that occur" in text
    assert "memory of 20 patches of 5 pictures" in text
    assert "memory_patches" in text
    reports = [EvalReport.load(path) for path in sorted(out.glob("*.json"))]
    assert {r.config["memory_size"] for r in reports} == {20, None}
    assert all(set(r.per_class or {}) == {"left", "right"} for r in reports)
    assert sorted(p.name for p in sheets.iterdir()) == ["val0-2.png", "val0.png", "val2-2.png", "val2.png"]
    assert memory.is_file()

    again = ["--resolution", "40x48", "--memory-size", "20", "--memory-in", str(memory), "--json"]
    assert main(words(data, checkpoint, *again)) == 0
    (report,) = json.loads(capsys.readouterr().out)["reports"]
    small = next(r for r in reports if r.config["memory_size"] == 20)
    assert report["metrics"]["miou"]["value"] == small.metrics["miou"].value


@pytest.mark.parametrize("protocol", ["clean", "hbird-2.0", "fungi-paper"])
def test_protocols_and_resolutions_make_one_table(
    data: str, checkpoint: str, protocol: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--protocol", protocol, "--resolution", "40", "--resolution", "24", "32", "--num-train-samples", "4"]
    assert main(words(data, checkpoint, *options)) == 0
    text = capsys.readouterr().out
    assert f"protocol {protocol}: " in text
    assert "memory of all patches of 4 pictures" in text
    lines = [line for line in text.splitlines() if line.startswith("in-context  ")]
    assert ["exact 40x40" in lines[0], "exact 24x32" in lines[1]] == [True, True]


def test_other_options(data: str, checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text("train0\ntrain3\n")
    options = ["--resolution", "40", "48", "--layer", "0", "--no-layer-norm", "--storage", "float16"]
    options += ["--score-at", "original", "--augmentation", "none", "--train-list", str(listed), "--json"]
    assert main(words(data, checkpoint, *options)) == 0
    (report,) = json.loads(capsys.readouterr().out)["reports"]
    assert report["dataset"]["train"]["count"] == 2
    assert report["config"]["layer"] == 0
    assert not report["config"]["layer_norm"]
    assert "scored at the size of the masks" in report["protocol"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--train", "x", "--val", "y"], "Name one data set with several parts (--data DIR), or two"),
        (["--resolution", "41", "48"], "takes multiples of 8. Nearest: 40 x 48"),
        (["--resolution", "40", "--memory-size", "3"], "A memory of 3 patches cannot hold one of each of 5 pictures"),
        (["--resolution", "40", "--k", "900"], "k is 900, and the memory has only 125 patches"),
        (["--resolution", "40", "--num-leaves", "9"], "The exact search has no options, got num_leaves"),
        (["--resolution", "40", "--search", "scan"], "'scan' is no kind of index"),
        (["--resolution", "40", "--resolution", "48", "--memory-out", "m"], "A memory belongs to one model at one"),
        (["--resolution", "40", "--pictures", "-1"], "--pictures must be at least 0"),
        (["--resolution", "40", "--mode", "crop"], "A centre crop leaves out what is to be scored"),
        (
            ["--fungi-keep", "1", "--fungi-layer", "x"],
            "Without --fungi there are no gradients for --fungi-layer, --fungi",
        ),
        (["--fungi", "--fungi-projection", "sgn"], "Unknown projection 'sgn'. Known: sign, rank-one-4, tensor-sketch"),
        (["--fungi", "--fungi-negatives", "0"], "negatives_per_token must be at least 1, got 0"),
        (["--fungi", "--fungi-support-size", "0"], "--fungi-support-size must be at least 1, got 0"),
        (["--fungi", "--fungi-support-neighbours", "-1"], "--fungi-support-neighbours must be at least 1, got -1"),
        (["--stream-batch", "5"], "Under the protocol clean no result depends on a batch size"),
        (["--fungi", "--layer", "0"], "--fungi takes gradients of the whole backbone"),
        (
            ["--fungi", "--protocol", "fungi-paper", "--fungi-negatives", "9"],
            "--fungi-negatives 9 is more than the 5 neighbours that negatives are mixed from under fungi-paper",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    data: str, checkpoint: str, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(data, checkpoint, *more)) == 1
    assert message in " ".join(capsys.readouterr().err.split())


def test_gradients_with_a_support_index_of_an_earlier_run(
    data: str, checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memory, size = str(tmp_path / "memory.safetensors"), ["--resolution", "40", "48", "--memory-size", "60", "--json"]
    fungi = ["--fungi", "--fungi-projection", "rank-one-4", "--fungi-latent-dim", "8"]
    assert main(words(data, checkpoint, *size, "--memory-out", memory)) == 0
    capsys.readouterr()
    found = []
    for more in ([], ["--fungi-support", memory], ["--fungi-support-size", "20"], ["--protocol", "fungi-paper"]):
        assert main(words(data, checkpoint, *size, *fungi, *more)) == 0
        (report,) = json.loads(capsys.readouterr().out)["reports"]
        assert report["model"]["embed_dim"] == 32
        words_of_model = "interleaved, raw" if "fungi-paper" in more else "neighbours, tempered"
        assert f"dense FUNGI (rank-one-4, {words_of_model})" in report["model"]["name"]
        found.append((report["metrics"]["miou"]["value"], report["metrics"]["pixel_accuracy"]["value"]))
    assert found[0] == found[1]
    assert main(words(data, checkpoint, *size, "--memory-out", memory, "--layer", "0")) == 0
    capsys.readouterr()
    assert main(words(data, checkpoint, *size, *fungi, "--fungi-support", memory)) == 1
    assert "holds features of block 0 of" in capsys.readouterr().out


def test_a_support_index_of_another_model_is_refused(
    data: str, checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    import amradio

    model = amradio.load(checkpoint)
    with torch.no_grad():
        next(p for p in model.parameters() if p.ndim == 2).add_(1)
    other = str(amradio.save(model, tmp_path / "other"))
    memory = str(tmp_path / "memory.safetensors")
    assert main(words(data, other, "--resolution", "40", "--memory-out", memory)) == 0
    assert main(words(data, checkpoint, "--resolution", "40", "--fungi", "--fungi-support", memory)) == 1
    assert "needs this model's own, of the same weights" in " ".join(capsys.readouterr().err.split())


def test_search_options_reach_the_evaluation() -> None:
    options = ["--num-leaves", "64", "--num-leaves-to-search", "8", "--num-reordering-candidates", "50"]
    options += ["--anisotropic-quantization-threshold", "0.3", "--dimensions-per-block", "2"]
    command: Any = parse(["eval", "in-context", "--data", "d", "--search", "scann", *options])
    assert command.protocol._config().search_options == {
        "num_leaves": 64,
        "num_leaves_to_search": 8,
        "num_reordering_candidates": 50,
        "anisotropic_quantization_threshold": 0.3,
        "dimensions_per_block": 2,
    }


@pytest.mark.parametrize(
    "more", [["--fungi"], ["--fungi", "--augmentation-epochs", "2"], ["--augmentation-epochs", "3"]]
)
def test_the_bar_ends_where_it_should(
    data: str, checkpoint: str, more: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from contextlib import contextmanager

    seen = {"total": 0, "done": 0}

    @contextmanager
    def bar(total: int, what: str, *, enabled: bool = True) -> Any:
        def advance(count: int) -> None:
            seen["done"] += count

        seen["total"] = total
        yield advance

    monkeypatch.setattr("amradio.cli.evaluation.progress_bar", bar)
    small = ["--resolution", "40", "48", "--fungi-projection", "tensor-sketch"] if "--fungi" in more else []
    assert main(words(data, checkpoint, *(small or ["--resolution", "40", "48"]), *more)) == 0
    assert seen["done"] == seen["total"] > 0
