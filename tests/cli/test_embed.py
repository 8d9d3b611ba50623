"""``amradio embed``, as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import amradio
from amradio.cli import main, parse
from amradio.features import load_embeddings
from amradio.images import ResizePolicy, decode, to_tensor

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Eight pictures in two classes, of several sizes, and a broken one."""
    rng = np.random.default_rng(0)
    for i, (height, width) in enumerate([(64, 96), (96, 64), (64, 64), (80, 80)] * 2):
        folder = tmp_path / "photos" / ("cat" if i < 4 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    (tmp_path / "photos" / "dog" / "broken.png").write_bytes(b"no picture")
    return tmp_path / "photos"


@pytest.fixture
def checkpoint(goldens: Path) -> str:
    return str(goldens / "models" / "v25_p16.pth.tar")


def test_embeddings_of_a_folder(photos: Path, checkpoint: str, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    words = ["embed", str(photos), "-m", checkpoint, "-o", str(out), "-a", "clip,siglip", "--resolution", "64"]
    assert main([*words, "--shard-size", "5", "--json"]) == 3
    result = json.loads(capsys.readouterr().out)
    assert (result["images"], result["ok"], result["failed"], result["shards"]) == (9, 8, 1, 2)
    assert result["failures"][0]["path"].endswith("broken.png")

    embeddings = load_embeddings(out)
    assert embeddings.names == ("backbone", "clip", "siglip")
    assert embeddings.class_names == ("cat", "dog")
    assert embeddings.labels is not None
    assert embeddings.labels.tolist() == [0] * 4 + [1] * 4
    model = amradio.load(checkpoint, ["clip", "siglip"])
    for i, path in enumerate(embeddings.paths):
        image = ResizePolicy.parse([64], multiple=16).apply(decode(path))
        with torch.no_grad():
            expected = model(to_tensor(image)[None])
        for name in embeddings.names:
            torch.testing.assert_close(
                embeddings.summaries(name)[i : i + 1], expected[name].summary, atol=1e-4, rtol=1e-4
            )

    assert main([*words, "--shard-size", "5", "--max-failed", "0.2"]) == 0
    text = capsys.readouterr()
    assert "8 of 9 pictures worked, 9 were done earlier" in text.out
    assert "broken.png" in text.err
    assert main([*words, "--shard-size", "6"]) == 1
    assert "shard_size was 5 and is 6 now" in capsys.readouterr().err
    assert main([*words, "--shard-size", "6", "--overwrite"]) == 3


def test_any_backbone_and_other_options(photos: Path, checkpoint: str, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    words = ["embed", str(photos / "cat"), str(photos / "dog" / "4.png"), "-m", checkpoint, "-o", str(out)]
    options = ["--resolution", "64", "64", "--keep", "all", "--store", "bfloat16", "--shuffle", "1", "--limit", "3"]
    assert main([*words, *options, "--autocast", "bfloat16", "--json"]) == 0
    embeddings = load_embeddings(out)
    assert len(embeddings) == 3
    assert embeddings.features(0).shape == (64, 4, 4)
    assert embeddings.features(0).dtype == torch.bfloat16
    assert embeddings.labels is None
    config = embeddings.manifest["config"]
    assert config["resize"] == {"mode": "crop", "size": [64, 64], "multiple": 16}
    assert (config["autocast"], config["keep"], config["store"]) == ("bfloat16", "all", "bfloat16")
    assert config["model"]["config"]["backbone"]["depth"] == 3
    assert len(config["model"]["weights_sha256"]) == 64
    capsys.readouterr()
    changed = ["--position-interpolation", "align_corners", "--vitdet-window-size", "2"]
    assert main([*words, *options, "--json", *changed]) == 1
    message = json.loads(capsys.readouterr().out)["error"]["message"]
    assert "model.vitdet_window_size was None and is 2 now" in message
    assert "autocast was bfloat16 and is None now" in message
    assert "model.config.position_interpolation was half_pixel and is align_corners now" in message


def test_nothing_works(tmp_path: Path, checkpoint: str, capsys: Capture) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    words = ["embed", str(tmp_path / "a.png"), "-m", checkpoint, "-o", str(tmp_path / "out"), "--resolution", "64"]
    assert main(words) == 1
    assert "0 of 1 pictures worked" in capsys.readouterr().out


def test_mistakes(photos: Path, checkpoint: str, tmp_path: Path, capsys: Capture) -> None:
    words = ["embed", str(photos), "-o", str(tmp_path / "out")]
    assert main(["embed", str(photos / "nothing"), "-o", str(tmp_path / "out")]) == 1
    assert "There is no file or folder" in capsys.readouterr().err
    assert main([*words, "-m", checkpoint, "--split", "train"]) == 1
    assert "no split 'train'" in capsys.readouterr().err
    assert main([*words, "-m", checkpoint]) == 1
    assert "does not say which resolution suits it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        parse(["embed", str(photos)])  # no output


@pytest.mark.slow
def test_two_processes_write_what_one_writes(photos: Path, checkpoint: str, tmp_path: Path) -> None:
    words = [str(photos), "-m", checkpoint, "--resolution", "64", "--shard-size", "2", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(Path(amradio.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "-m", "amradio", "embed", *words, "-o", str(tmp_path / "two"), "--max-failed", "0.5"],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("8 of 9 pictures worked") == 1
    assert main(["embed", *words, "-o", str(tmp_path / "one")]) == 3
    one, two = (sorted((tmp_path / name).iterdir()) for name in ("one", "two"))
    assert [p.name for p in one] == [p.name for p in two]
    for a, b in zip(one, two, strict=True):
        assert a.read_bytes() == b.read_bytes(), a.name


def test_embeddings_are_not_written_among_the_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "photos" / "a.png")
    for output in (tmp_path / "photos", tmp_path / "photos" / "out"):
        assert main(["embed", str(tmp_path / "photos"), "-o", str(output), "-m", "radio_v9"]) == 1
        assert "is inside the folder of pictures" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "photos").iterdir()] == ["a.png"]


def test_other_backbones_have_no_adaptors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    words = ["embed", str(tmp_path / "a.png"), "-o", str(tmp_path / "o"), "-m", "efficientnet-lite0", "-a", "clip"]
    assert main(words) == 1
    assert "efficientnet-lite0 has no adaptors (clip); only RADIO models have" in capsys.readouterr().err
