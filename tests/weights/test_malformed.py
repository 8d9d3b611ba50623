"""Descriptions that make no sense are refused in words, whichever field is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import amradio
from amradio.errors import AmradioError, CheckpointError, ConfigError, UnknownModelError
from amradio.weights.convert import save
from amradio.weights.tensorfiles import read_header, read_tensors, write_tensors

MODELS = Path(__file__).parents[1] / "goldens" / "radio" / "models"


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from amradio.weights.layouts import read_checkpoint

    path = tmp_path_factory.mktemp("native") / "m.safetensors"
    return save(read_checkpoint(MODELS / "p14_single.pth.tar"), path)


@pytest.fixture(scope="module")
def huggingface(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from amradio.weights.layouts import read_checkpoint

    return save(
        read_checkpoint(MODELS / "p14_single.pth.tar"), tmp_path_factory.mktemp("hf") / "m", layout="huggingface"
    )


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("teachers", [{"x": 1}], "A teacher's record must be an object with a name"),
        ("teachers", [3], "teachers"),
        ("summary_idxs", [], "summary_idxs is empty"),
        ("dtype", "float8_e4m3fn", "dtype must be one of float32, float16, bfloat16, float64"),
        ("patch_size", "16", "patch_size"),
        ("preferred_resolution", 5, r"preferred_resolution must be \[height, width\]"),
    ],
)
def test_our_layout(native: Path, tmp_path: Path, field: str, value: Any, message: str) -> None:
    metadata = dict(read_header(native).metadata)
    config = json.loads(metadata["config"])
    config[field] = value
    write_tensors(read_tensors(native), tmp_path / "m.safetensors", {**metadata, "config": json.dumps(config)})
    with pytest.raises(ConfigError, match=message):
        amradio.load(tmp_path / "m.safetensors")


@pytest.mark.parametrize(("field", "value"), [("upsample_factor", 0), ("output_dim", -3), ("num_inner", -1)])
def test_impossible_heads(native: Path, tmp_path: Path, field: str, value: int) -> None:
    metadata = dict(read_header(native).metadata)
    config = json.loads(metadata["config"])
    head = {"input_dim": 4, "hidden_dim": 4, "output_dim": 4, field: value}
    config["adaptors"]["x"] = {"head_idx": 0, "summary": head, "features": head}
    write_tensors(read_tensors(native), tmp_path / "m.safetensors", {**metadata, "config": json.dumps(config)})
    with pytest.raises(ConfigError, match=f"{field} of a head must be at least"):
        amradio.load(tmp_path / "m.safetensors")


def test_json_without_end(native: Path, tmp_path: Path) -> None:
    metadata = {**read_header(native).metadata, "config": "[" * 100_000}
    write_tensors(read_tensors(native), tmp_path / "m.safetensors", metadata)
    with pytest.raises(AmradioError, match="no usable 'config'"):
        amradio.load(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("version", 5, r"The version in the config.json of .* must be of type str, got 5"),
        ("preferred_resolution", 5, r"must be \[height, width\], got 5"),
        ("preferred_resolution", [1, 2, 3], r"must be \[height, width\]"),
        ("patch_size", "16", "patch_size .* must be of type int, got '16'"),
        ("max_resolution", [], "max_resolution .* must be of type int"),
    ],
)
def test_the_hugging_face_layout(huggingface: Path, tmp_path: Path, field: str, value: Any, message: str) -> None:
    folder = tmp_path / "m"
    shutil.copytree(huggingface, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(CheckpointError, match=message):
        amradio.load(folder)


@pytest.mark.parametrize("name", ["a" * 5000, "~nobody/x.tar", "a\0b"])
def test_names_that_are_no_paths(name: str) -> None:
    with pytest.raises(UnknownModelError):
        amradio.load(name)
