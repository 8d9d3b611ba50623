"""``amradio convert --to onnx`` and ``--to aoti``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import amradio
from amradio.cli import main
from amradio.models.radio import RadioModel


@pytest.fixture
def checkpoint(toy: Callable[..., RadioModel], tmp_path: Path) -> str:
    return str(amradio.save(toy(["clip", "sam"], depth=1), tmp_path / "toy.safetensors"))


def test_what_is_written_and_said(checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    target = tmp_path / "m.onnx"
    words = ["convert", checkpoint, str(target), "--to", "onnx", "--size", "16", "24", "--adaptors", "sam"]
    assert main([*words, "--vitdet-window-size", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {k: report[k] for k in ("target", "layout", "precision", "sizes")} == {
        "target": str(target),
        "layout": "onnx",
        "precision": "fp32",
        "sizes": "16x24",
    }
    parts = ["backbone summary", "backbone features", "sam summary", "sam features"]
    assert list(report["difference"]) == list(report["cosine"]) == parts
    assert max(report["difference"].values()) < 1e-5
    model = amradio.load(checkpoint, ["sam"], vitdet_window_size=1)
    images = torch.rand(1, 3, 16, 24)
    found = amradio.load_backbone(f"onnx:{target}", adaptor="sam")(images)
    with torch.inference_mode():
        torch.testing.assert_close(found.features, model(images)["sam"].features, rtol=0, atol=1e-5)
    assert main(words) == 1
    assert "--overwrite" in capsys.readouterr().err


def test_a_file_that_cannot_be_run_here_is_written_all_the_same(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxscript")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    target = tmp_path / "m.onnx"
    assert main(["convert", checkpoint, str(target), "--to", "onnx", "--size", "16", "--batch", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"wrote {target} (onnx, fp32, 16x16)"
    assert lines[1].startswith("not compared with torch: ONNX files are run by the package onnxruntime")
    assert target.is_file()


def test_a_file_that_is_off_is_not_kept(
    toy: Callable[..., RadioModel], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    model = toy(depth=1)
    model.model.blocks[0].mlp.fc1.bias.add_(1e5)  # more than float16 holds
    checkpoint = str(amradio.save(model, tmp_path / "toy.safetensors"))
    target = tmp_path / "out" / "m.onnx"
    target.parent.mkdir()
    target.write_bytes(b"an earlier file")
    words = ["convert", checkpoint, str(target), "--to", "onnx", "--size", "16", "--precision", "fp16"]
    assert main([*words, "--external-data", "--overwrite"]) == 1
    assert f"{target} does not compute what the model does: backbone" in capsys.readouterr().err
    assert [p.read_bytes() for p in target.parent.iterdir()] == [b"an earlier file"]


@pytest.mark.parametrize(("name", "kind"), [("y.onnx", "onnx"), ("y.PT2", "aoti")])
def test_weights_do_not_get_the_name_of_an_exported_file(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, kind: str
) -> None:
    assert main(["convert", checkpoint, str(tmp_path / name)]) == 1
    assert f"--to native writes weights. Add --to {kind}" in capsys.readouterr().err
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--precision", "int8", "-a", "clip"],
            "--adaptors, --precision goes with --to onnx or --to aoti, not with",
        ),
        (["--to", "onnx", "--device", "cuda"], "--device goes with --to aoti"),
        (["--to", "aoti", "--opset", "18"], "--opset and --external-data go with --to onnx"),
        (["--to", "aoti", "--precision", "int8"], "precision must be one of fp32, fp16, bf16, got 'int8'"),
        (["--to", "onnx", "--precision", "bf16"], "precision must be one of fp32, fp16, int8, got 'bf16'"),
        (["--to", "onnx", "--backbone-only"], "--backbone-only goes with layouts of weights, not with --to onnx"),
        (["--to", "onnx", "--opset", "17"], "opset must be from 18 to 2"),
        (["--to", "onnx", "--size", "20"], "the nearest supported size is 16x16"),
    ],
)
def test_options_that_do_not_go_together(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert main(["convert", checkpoint, str(tmp_path / "m.pt2"), *words]) == 1
    assert said in capsys.readouterr().err
