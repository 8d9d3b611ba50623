"""Sheets as PDF: one page, no dates, nothing random."""

from __future__ import annotations

import io
import struct
import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

    from amradio.viz.grid import Layout, PlacedPicture, PlacedText

_POINTS = 0.75  # in a pixel: 96 pixels are an inch, 72 points too
_FIRST_PICTURE = 6  # object number


def to_pdf(layout: Layout) -> bytes:
    """Write a layout as a PDF of one page.

    Pictures are embedded without loss. Text is set in Helvetica, which every reader has; letters outside of Windows
    code page 1252 become question marks.
    """
    pictures, height = layout.pictures, layout.height
    content = "\n".join(
        [
            f"{_POINTS} 0 0 {_POINTS} 0 0 cm",
            *(_place(p, i, height) for i, p in enumerate(pictures)),
        ]
    ).encode("ascii") + b"".join(_text(t, height) for t in layout.texts)
    names = " ".join(f"/P{i} {_FIRST_PICTURE + i} 0 R" for i in range(len(pictures)))
    page = (
        f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 {layout.width * _POINTS:g} {height * _POINTS:g}] /Contents 4 0 R "
        f"/Resources << /Font << /F 5 0 R >> /XObject << {names} >> >> >>"
    )
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        page.encode("ascii"),
        _stream("", zlib.compress(content), "/FlateDecode"),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>",
        *(_picture(p.picture) for p in pictures),
    ]
    return _file(objects)


def _file(objects: list[bytes]) -> bytes:
    """Objects 1, 2, ... with the table of where they begin."""
    data = io.BytesIO()
    data.write(b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\n")
    starts = []
    for number, content in enumerate(objects, 1):
        starts.append(data.tell())
        data.write(b"%d 0 obj\n%b\nendobj\n" % (number, content))
    table = data.tell()
    data.write(b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1))
    data.write(b"".join(b"%010d 00000 n \n" % start for start in starts))
    data.write(b"trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, table))
    return data.getvalue()


def _place(placed: PlacedPicture, number: int, height: int) -> str:
    width, tall = placed.picture.size
    return f"q {width} 0 0 {tall} {placed.x} {height - placed.y - tall} cm /P{number} Do Q"


def _text(text: PlacedText, height: int) -> bytes:
    letters = text.text.encode("cp1252", "replace")
    for special in (b"\\", b"(", b")"):
        letters = letters.replace(special, b"\\" + special)
    colour = " ".join(f"{c / 255:.3f}" for c in text.colour)
    return b"\nBT /F %d Tf %b rg %d %d Td (%b) Tj ET" % (
        text.size,
        colour.encode("ascii"),
        text.x,
        height - text.y,
        letters,
    )


def _picture(picture: Image) -> bytes:
    """A picture object. PDF reads the compressed rows of a PNG file as they are."""
    encoded = io.BytesIO()
    picture.convert("RGB").save(encoded, "PNG", optimize=True)
    width, height = picture.size
    return _stream(
        f"/Type /XObject /Subtype /Image /Width {width} /Height {height} /ColorSpace /DeviceRGB /BitsPerComponent 8 "
        f"/DecodeParms << /Predictor 15 /Colors 3 /BitsPerComponent 8 /Columns {width} >> ",
        b"".join(_idat(encoded.getvalue())),
        "/FlateDecode",
    )


def _idat(png: bytes) -> list[bytes]:
    """The parts of a PNG file that hold its rows."""
    found, at = [], 8
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        if png[at + 4 : at + 8] == b"IDAT":
            found.append(png[at + 8 : at + 8 + length])
        at += length + 12
    return found


def _stream(entries: str, data: bytes, coding: str) -> bytes:
    head = f"<< {entries}/Filter {coding} /Length {len(data)} >>".encode("ascii")
    return head + b"\nstream\n" + data + b"\nendstream"
