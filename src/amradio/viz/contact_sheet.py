"""Contact sheets of segmentations: a picture, its truth, what was predicted, and the patches that decided."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

VOID_COLOUR = (224, 224, 192)
"""Of pixels without a class, as borders are drawn in Pascal VOC."""

_MAPS_HEIGHT = 320  # of each of the three large pictures
_TILE = 112
_GAP = 8
_TEXT = 13
_BACKGROUND, _INK = (255, 255, 255), (32, 32, 32)
_MARKS = ((230, 25, 75), (0, 130, 200), (245, 130, 48), (145, 30, 180), (60, 180, 75), (0, 128, 128), (128, 0, 0))


class Neighbour(Protocol):
    """A patch of another picture; see `amradio.evals.in_context.sheets.SheetNeighbour`."""

    @property
    def pixels(self) -> np.ndarray:
        """uint8 [h, w, 3]: the patch and what is around it."""
        ...

    @property
    def box(self) -> tuple[int, int, int, int]:
        """(top, left, height, width) of the patch in it."""
        ...

    @property
    def weight(self) -> float:
        """Its share in the vote."""
        ...

    @property
    def label(self) -> int:
        """Its class."""
        ...


class Patch(Protocol):
    """A patch of the picture, and its neighbours."""

    @property
    def box(self) -> tuple[int, int, int, int]:
        """(top, left, height, width) in the picture."""
        ...

    @property
    def label(self) -> int:
        """The class that it is given."""
        ...

    @property
    def neighbours(self) -> Sequence[Neighbour]:
        """Nearest first."""
        ...


class Segmentation(Protocol):
    """What is drawn; see `amradio.evals.in_context.sheets.Sheet`."""

    @property
    def id(self) -> str:
        """Name of the picture."""
        ...

    @property
    def title(self) -> str:
        """What was evaluated."""
        ...

    @property
    def image(self) -> np.ndarray:
        """uint8 [H, W, 3]."""
        ...

    @property
    def truth(self) -> np.ndarray:
        """uint8 [H', W'] classes, and 255 for void."""
        ...

    @property
    def prediction(self) -> np.ndarray:
        """uint8 [H', W'] classes."""
        ...

    @property
    def class_names(self) -> Sequence[str]:
        """C of them."""
        ...

    @property
    def patches(self) -> Sequence[Patch]:
        """Some of its patches."""
        ...


def class_colours(count: int = 256) -> np.ndarray:
    """Colours of classes: those of Pascal VOC, whose bits are those of the class, dealt out to red, green and blue.

    Args:
        count: How many, up to 256.

    Returns:
        uint8 [count, 3]; the last of 256 is that of void.
    """
    numbers = np.arange(count)
    colours = np.zeros((count, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= (((numbers >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    if count == 256:
        colours[255] = VOID_COLOUR
    return colours


def contact_sheet(sheet: Segmentation) -> Image:
    """Draw the sheet of one picture.

    On top the picture with some patches marked, its truth and the prediction, and the classes that occur; below, for
    each marked patch, its neighbours with their classes and shares in the vote.

    Args:
        sheet: What is drawn.

    Returns:
        An RGB picture.
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(_TEXT)
    colours = class_colours()
    scale = _MAPS_HEIGHT / sheet.image.shape[0]
    width = round(sheet.image.shape[1] * scale)
    present = np.union1d(np.unique(sheet.truth), np.unique(sheet.prediction)).tolist()
    most = max((len(patch.neighbours) for patch in sheet.patches), default=0)
    total = max(3 * width + 4 * _GAP, _GAP + (most + 1) * (_TILE + _GAP) + _GAP)
    columns = max((total - _GAP) // 160, 1)
    legend = -(-len(present) // columns) * (_TEXT + 6)
    head = _TEXT + 3 * _GAP
    rows_top = head + _MAPS_HEIGHT + 2 * _GAP + legend
    page = Image.new("RGB", (total, rows_top + len(sheet.patches) * (_TILE + _TEXT + 2 * _GAP) + _GAP), _BACKGROUND)
    draw = ImageDraw.Draw(page)
    draw.text((_GAP, _GAP), f"{sheet.id}: picture, truth, prediction ({sheet.title})", _INK, font)

    size = (width, _MAPS_HEIGHT)
    page.paste(Image.fromarray(sheet.image).resize(size, Image.Resampling.BICUBIC), (_GAP, head))
    for i, labels in enumerate((sheet.truth, sheet.prediction), 1):
        shown = Image.fromarray(colours[labels]).resize(size, Image.Resampling.NEAREST)
        page.paste(shown, (_GAP + i * (width + _GAP), head))
    for i, patch in enumerate(sheet.patches):
        _outline(draw, patch.box, (_GAP, head), scale, _MARKS[i % len(_MARKS)])
    for i, label in enumerate(present):
        row, column = divmod(i, columns)
        left, top = _GAP + column * 160, head + _MAPS_HEIGHT + _GAP + row * (_TEXT + 6)
        draw.rectangle((left, top + 2, left + _TEXT, top + 2 + _TEXT), tuple(colours[label].tolist()), _INK)
        draw.text((left + _TEXT + 6, top), _name(label, sheet.class_names), _INK, font)
    for i, patch in enumerate(sheet.patches):
        _row(page, draw, sheet, patch, rows_top + i * (_TILE + _TEXT + 2 * _GAP), _MARKS[i % len(_MARKS)], font)
    return page


def _row(
    page: Image,
    draw: ImageDraw,
    sheet: Segmentation,
    patch: Patch,
    top: int,
    mark: tuple[int, int, int],
    font: FreeTypeFont | ImageFont,
) -> None:
    """A patch with what is around it, and its neighbours."""
    window, box = _around(sheet.image, patch.box)
    _tile(page, draw, window, box, (_GAP, top), mark)
    draw.text((_GAP, top + _TILE + 2), _name(patch.label, sheet.class_names), mark, font)
    for i, neighbour in enumerate(patch.neighbours, 1):
        left = 2 * _GAP + i * (_TILE + _GAP)
        _tile(page, draw, neighbour.pixels, neighbour.box, (left, top), _INK)
        text = f"{100 * neighbour.weight:.0f}% {_name(neighbour.label, sheet.class_names)}"
        draw.text((left, top + _TILE + 2), _cut(text, font), _INK, font)


def _tile(
    page: Image,
    draw: ImageDraw,
    pixels: np.ndarray,
    box: tuple[int, int, int, int],
    place: tuple[int, int],
    mark: tuple[int, int, int],
) -> None:
    from PIL import Image

    scale = _TILE / max(pixels.shape[:2])
    size = max(round(pixels.shape[1] * scale), 1), max(round(pixels.shape[0] * scale), 1)
    page.paste(Image.fromarray(np.ascontiguousarray(pixels)).resize(size, Image.Resampling.BICUBIC), place)
    _outline(draw, box, place, scale, mark)


def _outline(
    draw: ImageDraw,
    box: tuple[int, int, int, int],
    place: tuple[int, int],
    scale: float,
    mark: tuple[int, int, int],
) -> None:
    top, left, height, width = (value * scale for value in box)
    x, y = place[0] + left, place[1] + top
    draw.rectangle((x - 1, y - 1, x + width + 1, y + height + 1), None, _BACKGROUND, 4)  # seen on any picture
    draw.rectangle((x, y, x + width, y + height), None, mark, 2)


def _around(image: np.ndarray, box: tuple[int, int, int, int]) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """The part of a picture around a patch, five times as large, and the patch in it."""
    top, left, height, width = box
    first_row = min(max(top - 2 * height, 0), max(image.shape[0] - 5 * height, 0))
    first_column = min(max(left - 2 * width, 0), max(image.shape[1] - 5 * width, 0))
    part = image[first_row : first_row + 5 * height, first_column : first_column + 5 * width]
    return part, (top - first_row, left - first_column, height, width)


def _name(label: int, names: Sequence[str]) -> str:
    return names[label] if label < len(names) else "void"


def _cut(text: str, font: FreeTypeFont | ImageFont) -> str:
    """A text as far as it fits under a tile."""
    if font.getlength(text) <= _TILE + _GAP:
        return text
    while len(text) > 1 and font.getlength(text + "…") > _TILE + _GAP:
        text = text[:-1]
    return text + "…"
