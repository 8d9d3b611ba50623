"""`amradio distill`."""

import json
import shutil
import signal

import numpy as np
import pytest
import yaml
from PIL import Image

import amradio
from amradio.cli import main
from amradio.cli.distill_hooks import make_hooks
from amradio.distill.config import HookConfig
from amradio.distill.logging import read_log
from amradio.errors import ConfigError
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

    def command(*words, **changes):
        path.write_text(yaml.safe_dump(data | changes))
        return main(["distill", str(path), "-o", str(tmp_path / "out"), "--device", "cpu", *words])

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


def test_hooks(run, tmp_path, capsys):
    photos = str(tmp_path / "photos")
    shutil.copytree(photos, tmp_path / "others")
    (tmp_path / "others" / "cats" / "00.png").unlink()  # a set that one has learned from is refused
    options = {"train": photos, "eval": str(tmp_path / "others"), "resolution": 32}
    hooks = [
        {"kind": "knn", "every": 2, "options": {**options, "k": 3}},
        {"kind": "pca", "name": "maps", "every": 100, "options": {"eval": photos, "resolution": 32, "limit": 2}},
    ]
    code = run(hooks=hooks)
    assert code == 0, capsys.readouterr().err
    values = [entry["knn/top1"] for entry in read_log(tmp_path / "out") if "knn/top1" in entry]
    assert len(values) == 2
    assert all(0 <= v <= 100 for v in values)
    assert len(list((tmp_path / "out" / "pictures" / "step-00000004").glob("*.png"))) == 2
    assert "knn/top1" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        ({"kind": "knnn", "every": 1}, "no hook 'knnn'. Nearest names: knn"),
        ({"kind": "knn", "every": 1, "options": {"trian": "x"}}, "no option 'trian'. Nearest names: train"),
        ({"kind": "zero-shot", "every": 1, "options": {"eval": "x"}}, "missing 1 required .* argument: 'adaptor'"),
        ({"kind": "knn", "every": 1, "options": {"train": "x"}}, "missing 1 required keyword-only argument: 'eval'"),
    ],
)
def test_hooks_that_do_not_exist(hook, message):
    with pytest.raises(ConfigError, match=message):
        make_hooks([HookConfig(**hook)])


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
