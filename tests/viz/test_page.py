"""A page of its own: text is escaped, pictures are inside."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

from PIL import Image

from amradio.viz.page import Page


def test_everything_is_in_one_file(tmp_path: Path) -> None:
    page = Page("A <b>title</b>")
    page.heading("Part & parcel")
    page.text("1 < 2")
    page.picture(Image.new("RGB", (8, 4), (255, 0, 0)), 'a "red" one')
    page.picture(Image.new("RGB", (16, 16)), "photo", photo=True)
    page.table(["a", "b"], [["<", ">"]])
    text = page.save(tmp_path / "p.html").read_text(encoding="utf-8")
    assert "A &lt;b&gt;title&lt;/b&gt;" in text
    assert "Part &amp; parcel" in text
    assert "1 &lt; 2" in text
    assert 'alt="a &quot;red&quot; one"' in text
    assert "<td>&lt;</td><td>&gt;</td>" in text
    assert not re.search(r'(?:src|href)="(?!data:)', text)
    png, jpeg = (Image.open(io.BytesIO(base64.b64decode(d))) for d in re.findall(r'base64,([^"]+)"', text))
    assert (png.format, png.size, png.getpixel((0, 0))) == ("PNG", (8, 4), (255, 0, 0))
    assert (jpeg.format, jpeg.size) == ("JPEG", (16, 16))
