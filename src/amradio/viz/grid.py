"""Captioned sheets of pictures, written as PNG, JPEG, SVG or PDF: the same sheet is always the same bytes.

In SVG and PDF, captions are text and pictures are embedded without loss. PNG, JPEG and PDF show Latin letters; what
their fonts lack becomes a box or a question mark there. SVG shows everything.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from amradio.errors import OptionError

if TYPE_CHECKING:
    from PIL.Image import Image

SHEET_SUFFIXES = (".png", ".jpg", ".jpeg", ".svg", ".pdf")

PAPER, INK, FAINT = (255, 255, 255), (32, 32, 32), (112, 112, 112)

_GAP = 10
_TEXT, _TITLE = 13, 18
_LINE = 1.35  # height of a line of text, in font sizes
_LEAST_COLUMN = 96  # so that captions of narrow pictures can be read
_JPEG_QUALITY = 90
_FIT = 0.94  # fonts of viewers may be wider than the one that is measured


@dataclass(frozen=True)
class Cell:
    """A picture and what is said below it.

    Attributes:
        picture: In RGB.
        caption: One line.
    """

    picture: Image
    caption: str = ""


@dataclass(frozen=True)
class Legend:
    """What colours mean.

    Attributes:
        bar: The colours from left to right, in RGB.
        low: What the first one means.
        high: What the last one means.
    """

    bar: Image
    low: str
    high: str


@dataclass(frozen=True)
class Sheet:
    """Pictures in rows and columns.

    Attributes:
        rows: Cells, left to right; rows may differ in length.
        heads: Above the columns; long ones become several lines.
        title: Above everything.
        note: Below everything.
        legend: Below the pictures.
    """

    rows: Sequence[Sequence[Cell]]
    heads: Sequence[str] = ()
    title: str = ""
    note: str = ""
    legend: Legend | None = None


@dataclass(frozen=True)
class PlacedPicture:
    """A picture with its top left corner, in pixels."""

    picture: Image
    x: int
    y: int


@dataclass(frozen=True)
class PlacedText:
    """A line of text with the left end of its base line, in pixels."""

    text: str
    x: int
    y: int
    size: int
    colour: tuple[int, int, int]


@dataclass
class Layout:
    """A sheet with everything in its place; what is written to a file.

    Attributes:
        width: In pixels.
        height: In pixels.
        pictures: What is drawn first.
        texts: What is drawn over them.
    """

    width: int = 0
    height: int = 0
    pictures: list[PlacedPicture] = field(default_factory=list)
    texts: list[PlacedText] = field(default_factory=list)

    def add_text(self, lines: Sequence[str], x: int, y: int, size: int, colour: tuple[int, int, int]) -> int:
        """Place lines below each other, the first one's top at `y`; returns where the next one's would be."""
        height = round(size * _LINE)
        self.texts += [PlacedText(t, x, y + i * height + size, size, colour) for i, t in enumerate(lines) if t]
        return y + height * len(lines)


def save_sheet(sheet: Sheet, path: str | os.PathLike[str]) -> Path:
    """Write a sheet.

    Args:
        sheet: With at least one picture.
        path: Its suffix is one of `SHEET_SUFFIXES`; folders that are missing are made.

    Returns:
        The path.

    Raises:
        OptionError: The suffix is none of these, or the sheet is empty.
    """
    target = check_sheet_path(path)
    layout = arrange_sheet(sheet)
    suffix = target.suffix.lower()
    target.parent.mkdir(parents=True, exist_ok=True)
    if suffix == ".svg":
        from amradio.viz.svg import to_svg

        target.write_text(to_svg(layout), encoding="utf-8")
    elif suffix == ".pdf":
        from amradio.viz.pdf import to_pdf

        target.write_bytes(to_pdf(layout))
    elif suffix == ".png":
        rasterise(layout).save(target, "PNG", optimize=True)
    else:
        rasterise(layout).save(target, "JPEG", quality=_JPEG_QUALITY)
    return target


def check_sheet_path(path: str | os.PathLike[str]) -> Path:
    """The path, if its suffix says how a sheet is written.

    Raises:
        OptionError: It does not.
    """
    target = Path(path)
    if target.suffix.lower() not in SHEET_SUFFIXES:
        raise OptionError(f"{target} does not say how it is written: end it with one of {', '.join(SHEET_SUFFIXES)}.")
    return target


def draw_sheet(sheet: Sheet) -> Image:
    """Draw a sheet as one picture.

    Raises:
        OptionError: It is empty.
    """
    return rasterise(arrange_sheet(sheet))


def arrange_sheet(sheet: Sheet) -> Layout:
    """Find the place of everything on a sheet.

    Raises:
        OptionError: It is empty.
    """
    if not any(sheet.rows):
        raise OptionError("A sheet needs at least one picture.")
    count = max(map(len, sheet.rows))
    widths = [max([_LEAST_COLUMN, *(row[i].picture.width for row in sheet.rows if i < len(row))]) for i in range(count)]
    lefts = [_GAP + sum(widths[:i]) + i * _GAP for i in range(count)]
    layout = Layout(width=lefts[-1] + widths[-1] + _GAP)
    inside = layout.width - 2 * _GAP
    y = _GAP
    if sheet.title:
        y = layout.add_text(wrapped(sheet.title, inside, _TITLE), _GAP, y, _TITLE, INK) + _GAP // 2
    heads = [wrapped(head, width, _TEXT) for head, width in zip(sheet.heads, widths, strict=False)]
    deepest = max(map(len, heads), default=0)
    for lines, left in zip(heads, lefts, strict=False):  # all end just above their column
        layout.add_text([*[""] * (deepest - len(lines)), *lines], left, y, _TEXT, INK)
    y += round(_TEXT * _LINE) * deepest + (_GAP // 2 if deepest else 0)
    for row in sheet.rows:
        bottom = y + max((cell.picture.height for cell in row), default=0)
        for cell, left, width in zip(row, lefts, widths, strict=False):
            layout.pictures.append(PlacedPicture(cell.picture, left, y))
            layout.add_text([cut(cell.caption, width, _TEXT)], left, bottom + 3, _TEXT, FAINT)
        y = bottom + _GAP + (round(_TEXT * _LINE) if any(cell.caption for cell in row) else 0)
    y = _add_legend(layout, sheet.legend, y)
    if sheet.note:
        y = layout.add_text(wrapped(sheet.note, inside, _TEXT), _GAP, y, _TEXT, FAINT) + _GAP // 2
    layout.height = y
    return layout


def rasterise(layout: Layout) -> Image:
    """Draw a layout as one picture in RGB."""
    from PIL import Image, ImageDraw, ImageFont

    page = Image.new("RGB", (layout.width, layout.height), PAPER)
    for placed in layout.pictures:
        page.paste(placed.picture, (placed.x, placed.y))
    draw = ImageDraw.Draw(page)
    for text in layout.texts:
        draw.text((text.x, text.y), text.text, text.colour, ImageFont.load_default(text.size), anchor="ls")
    return page


def cut(text: str, width: float, size: int) -> str:
    """A text as far as it fits into a width in pixels; what cannot be printed becomes a replacement character."""
    text = "".join(c if c.isprintable() else "\ufffd" for c in text)
    if text_width(text, size) <= width * _FIT:
        return text
    while len(text) > 1 and text_width(text + "…", size) > width * _FIT:
        text = text[:-1]
    return text + "…"


def wrapped(text: str, width: float, size: int) -> list[str]:
    """A text in lines that fit into a width in pixels; words that are too long are cut."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and text_width(longer, size) <= width * _FIT:
            lines[-1] = longer
        else:
            lines.append(word)
    return [cut(line, width, size) for line in lines]


def text_width(text: str, size: int) -> float:
    """How wide a text is, in pixels."""
    from PIL import ImageFont

    return ImageFont.load_default(size).getlength(text)


def _add_legend(layout: Layout, legend: Legend | None, y: int) -> int:
    if legend is None:
        return y
    low_end = _GAP + round(text_width(legend.low, _TEXT) / _FIT) + _GAP // 2
    layout.add_text([legend.low], _GAP, y, _TEXT, INK)
    layout.pictures.append(PlacedPicture(legend.bar, low_end, y + (round(_TEXT * _LINE) - legend.bar.height) // 2))
    high = low_end + legend.bar.width + _GAP // 2
    layout.add_text([legend.high], high, y, _TEXT, INK)
    layout.width = max(layout.width, high + round(text_width(legend.high, _TEXT) / _FIT) + _GAP)
    return y + round(_TEXT * _LINE) + _GAP // 2
