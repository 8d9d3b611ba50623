"""Sheets: the layout, and what is in the files."""

from __future__ import annotations

import base64
import hashlib
import io
import re
import time
import zlib
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from amradio.errors import OptionError
from amradio.viz import Cell, Legend, Sheet, colour_bar, draw_sheet, save_sheet
from amradio.viz.grid import arrange_sheet, cut, text_width, wrapped


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def sheet(caption: str = "a (photo) & <more>") -> Sheet:
    return Sheet(
        rows=[[Cell(photo(40, 60), caption), Cell(photo(40, 60, 1), "map")], [Cell(photo(120, 30, 2))]],
        heads=["photo", "a model with a long name · layer 3 · 448 px"],
        title="Title",
        note="What this is.",
        legend=Legend(colour_bar(), "0.10", "0.90"),
    )


def test_nothing_overlaps() -> None:
    layout = arrange_sheet(sheet())
    boxes = [(p.x, p.y, p.x + p.picture.width, p.y + p.picture.height) for p in layout.pictures]
    boxes += [(t.x, t.y - t.size, t.x + text_width(t.text, t.size), t.y + 1) for t in layout.texts]
    for i, (left, top, right, bottom) in enumerate(boxes):
        assert left >= 0
        assert top >= 0
        assert right <= layout.width
        assert bottom <= layout.height
        for other in boxes[:i]:
            assert left >= other[2] or right <= other[0] or top >= other[3] or bottom <= other[1], (boxes[i], other)


def test_png_has_the_pictures_at_their_places(tmp_path: Path) -> None:
    one = sheet()
    path = save_sheet(one, tmp_path / "new" / "sheet.png")
    page = np.asarray(Image.open(path))
    layout = arrange_sheet(one)
    assert page.shape == (layout.height, layout.width, 3)
    for placed in layout.pictures:
        part = page[placed.y : placed.y + placed.picture.height, placed.x : placed.x + placed.picture.width]
        np.testing.assert_array_equal(part, placed.picture)  # red is red
    np.testing.assert_array_equal(page, draw_sheet(one))


def test_svg_has_text_and_exact_pictures(tmp_path: Path) -> None:
    root = ElementTree.parse(save_sheet(sheet(), tmp_path / "sheet.svg")).getroot()
    space = "{http://www.w3.org/2000/svg}"
    texts = [t.text for t in root.iter(f"{space}text")]
    assert "a (photo) & <more>" in texts or any(t.startswith("a (photo) & ") for t in texts)
    assert {"Title", "What this is.", "0.10", "map"} <= set(texts)
    encoded = [i.attrib["href"].removeprefix("data:image/png;base64,") for i in root.iter(f"{space}image")]
    pictures = [Image.open(io.BytesIO(base64.b64decode(e))) for e in encoded]
    np.testing.assert_array_equal(pictures[0], photo(40, 60))


def pdf_streams(data: bytes) -> list[tuple[bytes, bytes]]:
    return [
        (head, zlib.decompress(body))
        for head, body in re.findall(rb"obj\n(<<.*?>>)\nstream\n(.*?)\nendstream", data, re.DOTALL)
    ]


def test_pdf_has_text_and_exact_pictures(tmp_path: Path) -> None:
    data = save_sheet(sheet("(a\\b) żółw"), tmp_path / "sheet.pdf").read_bytes()
    assert data.startswith(b"%PDF-1.4")
    assert data.endswith(b"%%EOF\n")
    starts = [int(n) for n in re.findall(rb"(\d{10}) 00000 n", data)]
    assert [data[s:].split(b"\n")[0] for s in starts] == [b"%d 0 obj" % i for i in range(1, len(starts) + 1)]
    assert int(re.search(rb"startxref\n(\d+)", data)[1]) == data.index(b"xref\n0 ")
    content, *pictures = pdf_streams(data)
    assert b"(Title) Tj" in content[1]
    assert b"(\\(a\\\\b\\) ?\xf3?w) Tj" in content[1]
    head, rows = pictures[0]
    assert b"/Width 60 /Height 40" in head
    assert np.array_equal(unfiltered(rows, 60, 40), np.asarray(photo(40, 60)))


def unfiltered(rows: bytes, width: int, height: int) -> np.ndarray:
    """The pixels behind PNG's row filters, by their definition."""
    lines = np.frombuffer(rows, np.uint8).reshape(height, 1 + 3 * width)
    found = np.zeros((height + 1, 3 * width + 3), int)  # with a row above and a pixel on the left
    for y, line in enumerate(lines, 1):
        for x, value in enumerate(line[1:], 3):
            a, b, c = found[y, x - 3], found[y - 1, x], found[y - 1, x - 3]
            nearest = min((a, b, c), key=lambda v: abs(a + b - c - v))
            found[y, x] = (int(value) + (0, a, b, (a + b) // 2, nearest)[line[0]]) % 256
    return found[1:, 3:].reshape(height, width, 3)


@pytest.mark.parametrize("suffix", ["png", "jpg", "svg", "pdf"])
def test_the_same_sheet_is_the_same_bytes_at_any_time(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def digest(name: str) -> str:
        return hashlib.sha256(save_sheet(sheet(), tmp_path / f"{name}.{suffix}").read_bytes()).hexdigest()

    first = digest("a")
    later = time.time() + 1e8
    monkeypatch.setattr(time, "time", lambda: later)
    assert digest("b") == first


def test_captions_are_cut_to_their_column() -> None:
    assert cut("short", 100, 13) == "short"
    found = cut("a name that is far too long for this column.jpg", 100, 13)
    assert found.endswith("…")
    assert text_width(found, 13) <= 100
    assert cut("a\x1b[31mb\udcff", 300, 13) == "a\ufffd[31mb\ufffd"
    lines = wrapped("several words that need several lines", 90, 13)
    assert " ".join(lines) == "several words that need several lines"
    assert len(lines) > 1


def test_a_single_narrow_picture_leaves_room_for_its_caption(tmp_path: Path) -> None:
    assert draw_sheet(Sheet([[Cell(photo(20, 1), "thin.png")]])).width > 96


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"sheet\.bmp does not say how it is written: end it with one of \.png"):
        save_sheet(sheet(), tmp_path / "sheet.bmp")
    with pytest.raises(OptionError, match="at least one picture"):
        draw_sheet(Sheet([]))
