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


def test_a_folder_without_photos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jpg").write_bytes(b"no photo")
    assert main(["demo", "--images", str(tmp_path), "-o", str(tmp_path / "out")]) == 1
    assert "None of the 1 photos could be read" in capsys.readouterr().err
