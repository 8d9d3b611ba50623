"""``amradio data`` as a user runs it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from amradio.cli import main
from amradio.cli.data import _LAYOUTS
from amradio.images import open_images
from amradio.images.segmentation import open_segmentation
from amradio.images.segmentation.recognise import LAYOUTS


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Sixteen pictures with masks of two classes, of which one is never there."""
    folder = tmp_path / "data"
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    (folder / "classes.txt").write_text("sky\nroad\n")
    for i in range(16):
        (folder / "images" / f"{i}.png").write_bytes(png(np.full((4, 5, 3), 10 * i)))
        (folder / "masks" / f"{i}.png").write_bytes(png(np.repeat([0, 255], 10).reshape(4, 5)))
    return folder


def test_the_layouts_are_those_that_there_are() -> None:
    assert get_args(_LAYOUTS) == ("auto", *LAYOUTS)


def test_check_prints_what_is_there(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(data), "--sample", "3"]) == 0
    assert capsys.readouterr().out == (
        f"layout folder in {data}\n\n"
        "split  pictures  with mask  opened  void %  problems\n"
        "-----  --------  ---------  ------  ------  --------\n"
        "(all)        16         16       3    50.0         0\n\n"
        "2 classes: sky, road\n\n"
        "in no mask opened of all: road\n\n"
        "no problems in what was opened; --all opens the rest\n"
    )


def test_check_prints_problems(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(12):
        (data / "masks" / f"{i}.png").unlink()
    (data / "masks" / "15.png").write_bytes(png(np.full((4, 5), 7)))
    assert main(["data", "check", str(data), "--all"]) == 3
    out = capsys.readouterr().out
    assert "picture-without-mask (12):\n  images/0.png has no mask; expected masks/0.png.\n" in out
    assert "  and 2 more; --json has all\n" in out
    assert "unknown-id (1):\n" in out
    assert main(["data", "check", str(data), "--all", "--json"]) == 3
    report = json.loads(capsys.readouterr().out)
    assert (report["ok"], len(report["splits"][0]["problems"])) == (False, 13)


def test_check_says_what_is_missing(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "masks").rename(data / "other")
    assert main(["data", "check", str(data)]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert "Of what is needed, voc lacks SegmentationClass (masks); folder lacks masks (masks)." in err
    assert main(["data", "check", str(data), "--layout", "ade20k", "--json"]) == 1
    assert "ade20k lacks images/training" in json.loads(capsys.readouterr().out)["error"]["message"]


def test_check_with_options(data: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    (tmp_path / "list.txt").write_text("3\n5.png\n")
    words = ["--classes", str(tmp_path / "names.txt"), "--list-file", str(tmp_path / "list.txt"), "--json"]
    assert main(["data", "check", *words, str(data)]) == 0
    split = json.loads(capsys.readouterr().out)["splits"][0]
    assert (split["pictures"], split["class_names"]) == (2, ["a", "b", "c"])


def test_check_says_what_the_published_data_set_has(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "masks").rename(data / "SegmentationClass")
    (data / "classes.txt").unlink()
    assert main(["data", "check", str(data)]) == 0
    out = capsys.readouterr().out
    assert "not here, though the published data set has it:\n  SegmentationClassAug (masks of trainaug)\n" in out


def test_a_subset_can_be_used_as_a_list(data: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["data", "subset", str(data), "--size", "1/4", "--seed", "42"]) == 0
    out = capsys.readouterr().out
    (tmp_path / "list.txt").write_text(out)
    few = open_segmentation(data, list_file=tmp_path / "list.txt")
    assert few.names == open_segmentation(data).subset("1/4", 42).names == tuple(out.split())
    assert len(few) == 4
    assert main(["data", "subset", str(data), "--size", "4", "--seed", "42", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["names"] == list(few.names)
    assert main(["data", "subset", str(data), "--size", "17"]) == 1
    assert "17 pictures were asked for" in capsys.readouterr().err


def test_packing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(4):
        folder = tmp_path / "photos" / ("cats", "dogs")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (400, 300), (60 * i, 0, 0)).save(folder / f"{i}.jpg")
    words = ["data", "pack", str(tmp_path / "photos"), "--short-side", "96"]
    assert main([*words, "-o", str(tmp_path / "out")]) == 0
    assert "packed 4 pictures into 1 shards of 0.0 MiB in all in" in capsys.readouterr().out
    images = open_images(tmp_path / "out")
    assert images.class_names == ("cats", "dogs")
    assert images[0].decode(max_pixels=10**6, background=(0, 0, 0)).size == (128, 96)
    assert main([*words, "-o", str(tmp_path / "few"), "--limit", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pictures"] == 2
    (tmp_path / "photos" / "cats" / "x.jpg").write_bytes(b"no picture")
    assert main([*words, "-o", str(tmp_path / "again"), "--json"]) == 3
    record = json.loads(capsys.readouterr().out)
    assert (record["pictures"], len(record["shards"]), len(record["failed"])) == (4, 1, 1)
