"""`amradio distill`."""

import json
import shutil
import signal

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import amradio
from amradio.cli import main
from amradio.cli.distill_hooks import make_hooks
from amradio.distill.config import load_config
from amradio.distill.logging import read_log
from amradio.errors import ConfigError
from amradio.evals.knn import KnnConfig, run_knn
from amradio.evals.report import EvalReport
from amradio.evals.runner import Setup
from amradio.images import ResizePolicy, open_images
from amradio.images.scenes import write_scenes
from amradio.models.configs import RadioConfig, ViTConfig
from amradio.models.radio import RadioModel


@pytest.fixture
def run(tmp_path):
    """A small configuration file, pictures in two classes, and a teacher."""
    generator = np.random.default_rng(0)
    for i in range(16):
        folder = tmp_path / "photos" / ("cats", "dogs")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
    backbone = ViTConfig(embed_dim=16, depth=1, num_heads=2, mlp_hidden_dim=32, patch_size=8, position_grid=(8, 8))
    amradio.save(RadioModel(RadioConfig(backbone=backbone)), tmp_path / "teacher.safetensors")
    data = {
        "name": "small",
        "data": {"sources": [{"path": str(tmp_path / "photos")}]},
        "student": {"model": {"backbone": {"embed_dim": 16, "depth": 1, "num_heads": 2, "mlp_hidden_dim": 32,
                                           "patch_size": 8, "position_grid": [8, 8]}}},
        "teachers": [{"name": "one", "backbone": str(tmp_path / "teacher.safetensors")}],
        "partitions": [{"sizes": [32], "batch_size": 4}],
        "schedule": {"steps": 4},
        "run": {"statistics": 8, "log_steps": 1, "tensorboard": False},
    }  # fmt: skip
    path = tmp_path / "small.yaml"

    def written(**changes):
        path.write_text(yaml.safe_dump(data | changes))
        return path

    def command(*words, **changes):
        return main(["distill", str(written(**changes)), "-o", str(tmp_path / "out"), "--device", "cpu", *words])

    command.written = written
    return command


def test_training_in_slices(run, tmp_path, capsys):
    assert run("--json", "--max-minutes", "0") == 0
    first = json.loads(capsys.readouterr().out)
    assert (first["step"], first["total"], first["reason"], first["model"]) == (1, 4, "time", None)
    assert run("--max-minutes", "0") == 0
    captured = capsys.readouterr()
    assert "stopped after step 2 of 4 (time); the same command goes on from" in captured.out
    assert "going on from step 1 of 4" in captured.err
    assert run() == 0
    assert "trained 4 steps in 0:00:0" in capsys.readouterr().out
    assert (tmp_path / "out" / "README.md").is_file()
    assert [entry["step"] for entry in read_log(tmp_path / "out")] == [1, 2, 3, 4]
    assert amradio.load(str(tmp_path / "out" / "model.safetensors"), ["one"]).adaptors


def test_settings_and_other_pictures(run, tmp_path, capsys):
    shutil.copytree(tmp_path / "photos" / "cats", tmp_path / "cats")
    words = ("--data", str(tmp_path / "cats"), "--set", "schedule.steps=2", "--set", "optimizer.lr=1e-4")
    assert run("--json", "--threads", "1", *words) == 0
    assert json.loads(capsys.readouterr().out)["total"] == 2
    assert "8 pictures" in (tmp_path / "out" / "README.md").read_text()


def test_what_is_wrong_is_said(run, capsys):
    assert run("--set", "schedule.stesp=2") == 1
    assert "There is no setting 'schedule.stesp'. Nearest names: steps" in capsys.readouterr().err
    assert run("--set", "nothing") == 1
    assert "KEY=VALUE" in capsys.readouterr().err


def test_the_cost(run, capsys):
    assert run("--cost", "--json") == 0
    assert json.loads(capsys.readouterr().out)["images"] == 16
    assert run("--cost") == 0
    assert "GFLOP for the student" in capsys.readouterr().out


@pytest.fixture
def other_photos(tmp_path, run):
    """A set that shares no file list with the one that is learned from."""
    shutil.copytree(tmp_path / "photos", tmp_path / "others")
    (tmp_path / "others" / "cats" / "00.png").unlink()
    return str(tmp_path / "others")


class Words(torch.nn.Module):
    """A text tower as wide as the teacher's summary; embeddings depend on the text's length."""

    loaded = 0
    tokenizer = staticmethod(lambda texts: torch.tensor([[float(len(t))] for t in texts]))

    def __init__(self, record, device=None):
        super().__init__()
        assert record == {"name": "one", "type": "sentence", "model": "all-MiniLM-L6-v2"}
        Words.loaded += 1

    def encode_text(self, tokens, normalize=False):
        embeddings = torch.sin(tokens * torch.arange(1, 17))
        return torch.nn.functional.normalize(embeddings, dim=-1) if normalize else embeddings


def test_hooks(run, tmp_path, capsys, other_photos, monkeypatch):
    monkeypatch.setattr("amradio.text.towers.load_text_tower", Words)
    photos, scenes = str(tmp_path / "photos"), write_scenes(tmp_path / "scenes", {"train": 1, "val": 1})
    segmentation = {"train": str(scenes / "train"), "eval": str(scenes / "val"), "resolution": [32, 48]}
    hooks = [
        {"kind": "knn", "every": 2, "options": {"train": photos, "eval": other_photos, "resolution": 32, "k": 3}},
        {"kind": "in-context", "every": 2, "options": {**segmentation, "k": 5, "memory_size": 40, "sheets": 1}},
        {"kind": "in-context", "name": "dense", "every": 100, "options": {**segmentation, "adaptor": "one",
                                                                          "augmentation_epochs": 2}},
        {"kind": "zero-shot", "every": 2, "options": {"eval": other_photos, "adaptor": "one", "resolution": 32,
                                                      "templates": "base"}},
        {"kind": "pca", "name": "maps", "every": 100, "options": {"eval": photos, "resolution": 32, "limit": 2}},
    ]  # fmt: skip
    teachers = [{"name": "one", "backbone": str(tmp_path / "teacher.safetensors"),
                 "text": {"type": "sentence", "model": "all-MiniLM-L6-v2"}}]  # fmt: skip
    code = run(hooks=hooks, teachers=teachers)
    assert code == 0, capsys.readouterr().err
    assert Words.loaded == 1
    out, log = tmp_path / "out", read_log(tmp_path / "out")
    wanted = {"knn/top1": [2, 4], "zero-shot/top1": [2, 4], "in-context/miou": [2, 4], "dense/miou": [4]}
    for name, steps in wanted.items():
        found = {entry["step"]: entry[name] for entry in log if name in entry}
        assert list(found) == steps
        assert all(0 <= value <= 100 for value in found.values())
    pictures = out / "pictures" / "step-00000004"
    assert len(list(pictures.glob("maps/**/*.png"))) == 2
    assert len(list(pictures.glob("in-context/*.png"))) == 1
    # The last report, the card and an evaluation of the exported file say the same.
    report = EvalReport.load(out / "evaluations" / "step-00000004" / "in-context.json")
    card = (out / "README.md").read_text()
    assert f"| in-context/miou | {report.metrics['miou'].value:.4g} % | 4 | 4 pictures of {scenes}/val, from 4 " in card
    assert "; exact 32x48, k = 5, memory of 40 patches |" in card
    assert f"| zero-shot/top1 | {found_in(log, 'zero-shot/top1'):.4g} % | 4 | 15 pictures of {other_photos}; " in card
    again = run_knn(
        amradio.load_backbone(str(out / "model.safetensors")), open_images(photos), open_images(other_photos),
        KnnConfig(k=(3,)), Setup(ResizePolicy.parse([32, 32], "crop", 8)),
    )  # fmt: skip
    assert again.metrics["top1"].value == found_in(log, "knn/top1")


def found_in(log, name):
    return next(entry[name] for entry in reversed(log) if name in entry)


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        ({"kind": "knnn"}, "no hook 'knnn'. Nearest names: knn"),
        ({"kind": "knn", "options": {"trian": "x"}}, "The hook 'knn': There is no setting 'trian'. Nearest names: tr"),
        ({"kind": "zero-shot", "options": {"eval": "x"}}, "'zero-shot': .*missing 1 required .* argument: 'adaptor'"),
        ({"kind": "knn", "options": {"train": "x"}}, "missing 1 required keyword-only argument: 'eval'"),
        (
            {"kind": "knn", "name": "n", "options": {"train": "x", "eval": "x", "k": "two"}},
            "'n': k must be int, got 't",
        ),
        ({"kind": "pca", "options": {"eval": "x", "adaptor": "won"}}, "no teacher 'won'. Nearest names: one"),
        (
            {"kind": "pca", "options": {"eval": "x", "resolution": [1, 2, 3]}},
            r"one number or \[height, width\], got \[1",
        ),
        ({"kind": "zero-shot", "options": {"eval": "x", "adaptor": "one"}}, "the teacher 'one' has no text side"),
    ],
)
def test_hooks_that_do_not_exist(run, tmp_path, hook, message):
    config = load_config(
        str(run.written()), [f"hooks={yaml.safe_dump([{'every': 1, **hook}], default_flow_style=True)}"]
    )
    with pytest.raises(ConfigError, match=message):
        make_hooks(config)


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        ({"kind": "pca", "options": {"eval": "nowhere"}}, "nowhere"),
        ({"kind": "knn", "options": {"train": "PHOTOS", "eval": "PHOTOS"}}, "are the same 16 pictures"),
        ({"kind": "in-context", "options": {"eval": "PHOTOS"}}, "PHOTOS"),
    ],
)
def test_pictures_of_hooks_are_looked_at_before_the_training(run, tmp_path, capsys, hook, message):
    photos = str(tmp_path / "photos")
    options = {k: v.replace("PHOTOS", photos) for k, v in hook["options"].items()}
    assert run(hooks=[{"every": 100, **hook, "options": options}]) == 1
    assert message.replace("PHOTOS", photos) in capsys.readouterr().err
    assert not (tmp_path / "out" / "states").exists()


def test_a_signal_stops_after_the_step(run, tmp_path, capsys, monkeypatch):
    import amradio.distill.loop as loop

    step = loop.train_step

    def interrupted(machine, number, batches):
        if number == 1:
            signal.raise_signal(signal.SIGTERM)
        return step(machine, number, batches)

    monkeypatch.setattr(loop, "train_step", interrupted)
    handler = signal.getsignal(signal.SIGTERM)
    assert run("--json") == 0
    assert signal.getsignal(signal.SIGTERM) is handler
    outcome = json.loads(capsys.readouterr().out)
    assert (outcome["step"], outcome["reason"]) == (2, "signal")
