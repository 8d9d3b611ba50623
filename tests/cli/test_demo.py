"""``amradio demo`` with the model of the package."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

import amradio.cli.demo as demo
from amradio.cli import main


@pytest.mark.slow
def test_a_folder_of_photos(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = pytest.importorskip("skimage.data")
    (tmp_path / "photos").mkdir()
    Image.fromarray(data.cat()).save(tmp_path / "photos" / "cat.png")
    Image.effect_noise((900, 20), 60).save(tmp_path / "photos" / "strip.png")
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"no photo")
    monkeypatch.setattr(demo, "_SCENES", {"train": 3, "val": 1})
    code = main(
        [
            "demo",
            "--images",
            str(tmp_path / "photos"),
            "-o",
            str(tmp_path / "out"),
            "--words",
            "cat",
            "--words",
            "truck",
        ]
    )
    out = capsys.readouterr().out
    assert code == 0
    assert "broken.jpg" in out
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<td>cat.png</td><td>cat (" in page
    assert "segmentation by example, mIoU" in page
    assert "they take 3 to 5 points of mIoU from amradio-tiny" in page
    assert "drawn smaller: strip.png is 900 x 20, more than 4 times as long as wide" in out


def test_a_folder_without_photos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jpg").write_bytes(b"no photo")
    assert main(["demo", "--images", str(tmp_path), "-o", str(tmp_path / "out")]) == 1
    assert "None of the 1 photos could be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("size", "expected"),
    [((640, 480), (448, 592)), ((900, 225), (448, 1792)), ((900, 20), (32, 1792)), ((1, 50_000), (1792, 16))],
)
def test_maps_of_strips_are_bounded(size: tuple[int, int], expected: tuple[int, int]) -> None:
    policy = demo._map_policy(Image.new("RGB", size), 16)
    assert policy.target_size(size[1], size[0]) == expected


def test_the_demo_needs_a_radio_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "-m", "dino_vits16", "-o", str(tmp_path)]) == 1
    err = " ".join(capsys.readouterr().err.split())
    assert "The demo shows what a RADIO model can do, and dino_vits16 is none." in err
