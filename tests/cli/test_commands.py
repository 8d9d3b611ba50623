"""Commands as a user runs them, on real files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import amradio
from amradio.cli import main
from amradio.images import ResizePolicy, decode, to_tensor


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Five pictures, one of them broken."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i, (height, width) in enumerate([(64, 96), (96, 64), (64, 96), (80, 80)]):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:300])
    return folder


@pytest.fixture
def checkpoint(goldens: Path) -> str:
    return str(goldens / "models" / "v25_p16.pth.tar")


def test_features_of_a_folder(
    photos: Path, checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = [
        "features",
        str(photos),
        "-m",
        checkpoint,
        "-o",
        str(out),
        "-a",
        "clip",
        "--resolution",
        "64",
        "--pca",
        "--json",
    ]
    assert main(words) == 3
    result = json.loads(capsys.readouterr().out)
    assert (result["ok"], result["failed"], len(result["failures"])) == (4, 1, 1)
    assert result["failures"][0]["path"].endswith("broken.png")
    rows = pq.read_table(out / "index.parquet").to_pylist()
    assert [Path(r["path"]).name for r in rows] == ["0.png", "1.png", "2.png", "3.png", "broken.png"]
    model = amradio.load(checkpoint, "clip")
    for row in rows[:4]:
        stored = load_file(out / row["file"])
        image = ResizePolicy.parse([64], multiple=16).apply(decode(row["path"]))
        with torch.no_grad():
            expected = model(to_tensor(image)[None], feature_fmt="NCHW")
        torch.testing.assert_close(stored["backbone.summary"], expected["backbone"].summary[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(stored["clip.features"], expected["clip"].features[0], atol=1e-4, rtol=1e-4)
        with Image.open(out / "pca" / f"{row['id']}.png") as picture:
            assert picture.height == image.height
    assert rows[4]["status"] == "failed"
    assert rows[4]["reason"]


def test_a_second_run_needs_overwrite(
    photos: Path, checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["features", str(photos / "0.png"), "-m", checkpoint, "-o", str(tmp_path / "out")]
    assert main(words) == 0
    assert main(words) == 1
    assert "overwritten" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0


def test_mistakes_are_found_before_the_model_is_loaded(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("amradio.backbones.load.load", lambda *a, **k: pytest.fail("the model was loaded"))
    assert main(["features", str(photos / "nope.png"), "-o", str(tmp_path)]) == 1
    assert "nope.png" in capsys.readouterr().err
    assert main(["features", str(photos), "-o", str(tmp_path), "--pca", "--pca-of", "clip"]) == 1
    assert "Add --adaptors clip" in capsys.readouterr().err


def test_errors_are_json_with_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "c-radio_v5-h", "--json"]) == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["type"] == "UnknownModelError"
    assert "c-radio_v4-h" in error["message"]


def test_info_of_a_file(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", checkpoint]) == 0
    text = capsys.readouterr().out
    assert "layout: official" in text
    assert "summary tokens: 0, 1, 2" in text
    assert main(["info", checkpoint, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["network"] == {
        "kind": "ViT",
        "width": 64,
        "depth": 3,
        "heads": 4,
        "mlp": "gelu 256",
        "class tokens": 4,
        "registers": 4,
        "position grid": [8, 8],
    }
    assert set(record["adaptors"]) == {"clip", "siglip", "sam"}


def test_info_of_a_published_model_needs_no_download(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "nvidia/C-RADIOv4-H"]) == 0
    assert "NVIDIA Open Model License" in capsys.readouterr().out


def test_models_lists_licences(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--json"]) == 0
    everything = json.loads(capsys.readouterr().out)
    assert len(everything) == 21
    assert main(["models", "--commercial"]) == 0
    text = capsys.readouterr().out
    assert "c-radio_v3-b" in text
    assert "radio_v2.5-b" not in text


@pytest.mark.parametrize("layout", ["native", "official", "huggingface"])
def test_convert_there_and_back(
    layout: str, checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = tmp_path / (
        "there.pth.tar" if layout == "official" else "there.safetensors" if layout == "native" else "there"
    )
    assert main(["convert", checkpoint, str(there), "--to", layout]) == 0
    assert main(["convert", checkpoint, str(there), "--to", layout]) == 1
    assert "--overwrite" in capsys.readouterr().err
    images = torch.rand(1, 3, 64, 48)
    names = ["clip", "siglip", "sam"]
    with torch.no_grad():
        before, after = amradio.load(checkpoint, names)(images), amradio.load(there, names)(images)
    for name, output in before.items():
        assert torch.equal(output.summary, after[name].summary)
        assert torch.equal(output.features, after[name].features)


def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://user:secret@proxy:3128")
    assert main(["doctor", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert findings["packages"]["torch"] == torch.__version__
    assert "secret" not in json.dumps(findings)
    assert main(["doctor"]) == 0
    assert "everything required works" in capsys.readouterr().out


def test_version_and_module_entry_point(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"amradio {amradio.__version__}"
    done = subprocess.run(
        [sys.executable, "-m", "amradio", "models"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0
    assert "c-radio_v4-h" in done.stdout


def test_convert_keeps_what_only_the_catalog_knows(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from amradio.backbones.locate import Located
    from amradio.weights.catalog import resolve

    entry = resolve("radio_v2.5-b")
    found = Located(path=Path(checkpoint), source="somewhere", entry=entry, sha256="0" * 64)
    monkeypatch.setattr("amradio.backbones.locate.locate", lambda *_, **__: found)
    assert main(["convert", "radio_v2.5-b", str(tmp_path / "m.safetensors")]) == 0
    monkeypatch.undo()
    config = amradio.load(tmp_path / "m.safetensors").config
    assert config.preferred_resolution == entry.preferred_resolution
    assert config.max_resolution == entry.max_resolution
    assert config.version == "radio_v2.5-b"
