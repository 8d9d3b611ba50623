"""Every command line that the README of the published RADIO examples prints, unchanged, on small local data."""

from __future__ import annotations

import os
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from amradio.cli.common import BackboneOptions

COMMANDS = """
python zero_shot_imagenet.py
torchrun --nproc-per-node 8 zero_shot_imagenet.py
torchrun --nproc-per-node 8 zero_shot_imagenet.py --resolution 378 --dataset imagenet_sketch --split train
torchrun --nproc-per-node 8 zero_shot_imagenet.py --resolution 378 378
python knn_classification.py --dataset food101
python knn_classification.py --dataset "jonathancui/oxford-pets" --eval-split test
torchrun --nproc-per-node 8 knn_classification.py --dataset imagenet-1k
torchrun --nproc-per-node 8 knn_classification.py --dataset imagenet-1k \
    --eval-dataset imagenet_sketch --eval-split train
torchrun --nproc-per-node 8 position_predictor.py
"""
DATA = {
    "imagenet-1k": ("train", "validation"),
    "imagenet_sketch": ("train",),
    "food101": ("train", "validation"),
    "jonathancui/oxford-pets": ("train", "test"),
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder in which the names of the datasets are folders."""
    rng = np.random.default_rng(0)
    for name, splits in DATA.items():
        for split in splits:
            for label, colour in (("cat", 60), ("dog", 190)):
                folder = tmp_path / name / split / label
                folder.mkdir(parents=True)
                for i in range(10):
                    pixels = rng.integers(colour - 40, colour + 40, (24, 32, 3)).astype(np.uint8)
                    Image.fromarray(pixels).save(folder / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def talking(monkeypatch: pytest.MonkeyPatch, root: Path) -> list[Any]:
    """Every model that is loaded is a toy with a text side; the names asked for are listed."""
    kind: Any = runpy.run_path(str(root / "tests" / "evals" / "two_processes.py"))["TinyTextBackbone"]
    asked: list[Any] = []

    def load(_: BackboneOptions, spec: str, adaptor: str | None = None, *__: Any, **___: Any) -> Any:
        asked.append((spec, adaptor))
        return kind()

    monkeypatch.setattr(BackboneOptions, "load_backbone", load)
    monkeypatch.setenv("AMRADIO_CACHE", "cache")
    return asked


@pytest.fixture
def run(root: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], None]:
    def runs(words: list[str]) -> None:
        script = next(i for i, word in enumerate(words) if word.endswith(".py"))
        monkeypatch.setattr(sys, "argv", words[script:])
        monkeypatch.syspath_prepend(str(root / "examples"))
        runpy.run_path(str(root / "examples" / words[script]), run_name="__main__")

    return runs


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("command", COMMANDS.strip().splitlines())
def test_runs_unchanged(
    command: str, talking: list[Any], run: Callable[[list[str]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    run(shlex.split(command))
    out = capsys.readouterr().out
    assert talking == [("radio_v2", "clip" if "zero_shot" in command else None)]
    if "position" in command:
        assert out.startswith("mean_l1: ")
    else:
        first, top1, *_ = out.splitlines()
        assert first == "Accuracy:"
        assert 0 <= float(top1.removeprefix("\tTop 1: ")) <= 100


@pytest.mark.usefixtures("here")
def test_every_other_option(
    talking: list[Any], run: Callable[[list[str]], None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run(
        shlex.split(
            "zero_shot_imagenet.py -v c-radio_v3-b --adaptor-name siglip2-g -r 16 32 -d imagenet-1k --templates simple "
            "--resize-multiple 8 --batch-size 4 -w 2 --amp --csv-out scores.csv --invalidate-cache --use-local-lib "
            "--torchhub-repo NVlabs/RADIO"
        )
    )
    assert talking == [("c-radio_v3-b", "siglip2-g")]
    assert "Top 1:" in capsys.readouterr().out
    assert len((tmp_path / "scores.csv").read_text().splitlines()) == 2
    run(shlex.split("knn_classification.py -v x -k 3 --train-split train --eval-split validation --force-reload"))
    run(shlex.split("position_predictor.py -e 1 -lr 0.1 --eval-dataset imagenet-1k --train-split train"))


@pytest.mark.usefixtures("here", "talking")
def test_what_is_wrong_is_said_in_a_line(run: Callable[[list[str]], None]) -> None:
    with pytest.raises(SystemExit, match=r"error: .*nowhere"):
        run(["knn_classification.py", "--dataset", "./nowhere"])


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_several_real_processes(root: Path, goldens: Path) -> None:
    model = goldens / "models" / "v25_p16.pth.tar"
    script = root / "examples" / "knn_classification.py"
    words = [str(script), "-v", str(model), "--dataset", "food101", "--resolution", "32", "32"]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    outs = []
    for launch in ([], torchrun):
        done = subprocess.run(
            [sys.executable, *launch, *words],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            env={**os.environ, "PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        outs.append(done.stdout)
    assert outs[0].startswith("Accuracy:\n\tTop 1: ")
    assert outs[0] == outs[1]
