"""HTML of the page: cards with photos and what lies over them, bars, boards to paint on, empty places.

Pictures are inside the HTML, as data URLs: the server has no address at which a file could be read. Everything that
came from outside is escaped, braces included, as Gradio's templates have a meaning for them.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from amradio.app.photos import data_url

if TYPE_CHECKING:
    from PIL.Image import Image

    from amradio.app.photos import Photo

_BRACES = str.maketrans({"{": "&#123;", "}": "&#125;", "$": "&#36;", "`": "&#96;", "\\": "&#92;"})


@dataclass(frozen=True, kw_only=True)
class Card:
    """A photo in a grid.

    Attributes:
        photo: The photo, as a data URL.
        size: (width, height) of it.
        title: Below it.
        note: Below the title, smaller.
        key: Of the photo in the session, if it can be clicked.
        layer: What lies over the photo, as a data URL.
        save_as: Name of the file that the layer (or photo) is saved as; None: no link.
        mark: (x, y) of a ring, as shares of width and height.
        badge: A word in the corner.
        can_click: Whether a place in it can be clicked.
    """

    photo: str
    size: tuple[int, int]
    title: str
    note: str = ""
    key: int | None = None
    layer: str | None = None
    save_as: str | None = None
    mark: tuple[float, float] | None = None
    badge: str = ""
    can_click: bool = False


def escaped(text: str) -> str:
    """Text as HTML that means nothing but itself."""
    return html.escape(text).translate(_BRACES)


def card_of(
    photo: Photo, *, layer: Image | None = None, kind: str = "JPEG", ending: str = "", **fields: object
) -> Card:
    """A card of a photo of the session.

    Args:
        photo: The photo.
        layer: What lies over it.
        kind: File format of the layer: PNG where parts of it are transparent.
        ending: Appended to the photo's name where the layer is saved.
        **fields: Further fields of `Card`.
    """
    file = f"{photo.stem}-{ending}.{'jpg' if kind == 'JPEG' else 'png'}" if layer is not None and ending else None
    return Card(
        photo=photo.url,
        size=photo.shown.size,
        title=photo.name,
        key=photo.key,
        layer=None if layer is None else data_url(layer, kind),
        save_as=file,
        **fields,  # type: ignore[arg-type]
    )


def grid(cards: Sequence[Card], *, blend: float | None = None, legend: str = "", hint: str = "") -> str:
    """Cards side by side.

    Args:
        cards: Any number.
        blend: Opacity of the layers to begin with, from 0 to 1; the page then has a slider for it. None: there is none.
        legend: HTML that explains colours.
        hint: A sentence above.
    """
    head = "".join([f'<p class="hint">{escaped(hint)}</p>' if hint else "", legend, _blend(blend)])
    style = "" if blend is None else f' style="--blend:{blend:g}"'
    bar = f'<div class="toolbar">{head}</div>' if head else ""
    return f'{bar}<div class="grid"{style}>{"".join(map(_card, cards))}</div>'


def strip(photos: Iterable[Photo], limit: int, notes: Sequence[str] = ()) -> str:
    """Small photos in a row, each with a button that removes it; below, sentences that can be dismissed."""
    cells = [
        f'<figure class="thumb"><img src="{p.thumbnail_url}" alt="{escaped(p.name)}" title="{escaped(p.name)}">'
        f'<button type="button" class="remove" data-remove="{p.key}" aria-label="Remove {escaped(p.name)}">&times;'
        f"</button></figure>"
        for p in photos
    ]
    count = f'<span class="count">{len(cells)} of {limit}</span>' if cells else ""
    row = f'<div class="strip">{"".join(cells)}{count}</div>' if cells else ""
    if not notes:
        return row
    lines = "".join(f"<li>{escaped(note)}</li>" for note in notes)
    button = '<button type="button" class="dismiss" data-dismiss aria-label="Dismiss">&times;</button>'
    return f'{row}<div class="notes" role="status"><ul>{lines}</ul>{button}</div>'


def empty(title: str, text: str, icon: str = "◍") -> str:
    """A place where something will be."""
    return (
        f'<div class="empty"><div class="icon" aria-hidden="true">{escaped(icon)}</div>'
        f"<h3>{escaped(title)}</h3><p>{escaped(text)}</p></div>"
    )


def scale(low: str, high: str, colours: Image) -> str:
    """A bar of colours with words at its ends."""
    url = data_url(colours, "PNG")
    return f'<span class="scale">{escaped(low)}<img src="{url}" alt="">{escaped(high)}</span>'


def bars(photo: Photo, rows: Sequence[tuple[str, float, str]]) -> str:
    """A photo with a bar for each of several words.

    Args:
        photo: The photo.
        rows: Word, length of its bar from 0 to 1, and the number as it is shown; the best one first.
    """
    lines = "".join(
        f'<li><button type="button" class="bar" data-word="{escaped(word)}" title="Show where it is">'
        f'<span class="fill" style="width:{max(min(share, 1), 0) * 100:.1f}%"></span>'
        f'<span class="word">{escaped(word)}</span><span class="value">{escaped(value)}</span></button></li>'
        for word, share, value in rows
    )
    return (
        f'<article class="words"><img src="{photo.url}" alt="{escaped(photo.name)}"><div><h4>{escaped(photo.name)}'
        f"</h4><ol>{lines}</ol></div></article>"
    )


def board(
    photo: Photo,
    photos: Sequence[Photo],
    *,
    colours: Sequence[tuple[str, str]] = (),
    marked: Iterable[int] = (),
    epoch: str = "",
    hint: str = "",
) -> str:
    """A large photo to paint on, or to draw a box on, with small ones to choose from.

    Args:
        photo: The large one.
        photos: All.
        colours: Names and CSS colours to paint with, the first one for label 0; none: a box can be drawn.
        marked: Keys of photos that were worked on.
        epoch: When it changes, the page forgets what was painted.
        hint: A sentence above.
    """
    worked_on = set(marked)
    thumbs = "".join(
        f'<button type="button" class="pick{" on" if p.key == photo.key else ""}" data-choose="{p.key}" '
        f'title="{escaped(p.name)}"><img src="{p.thumbnail_url}" alt="{escaped(p.name)}">'
        f"{'<i></i>' if p.key in worked_on else ''}</button>"
        for p in photos
    )
    width, height = photo.shown.size
    picture = f'<img class="photo" src="{photo.url}" alt="{escaped(photo.name)}" draggable="false">'
    if colours:
        over = (
            f'<canvas class="ink" data-photo="{photo.key}" data-epoch="{escaped(epoch)}" width="{2 * width}" '
            f'height="{2 * height}"></canvas>'
        )
    else:
        over = f'<div class="boxes" data-photo="{photo.key}"><div class="box"></div></div>'
    stage = f'<div class="stage" style="aspect-ratio:{width}/{height}">{picture}{over}</div>'
    above = f'<p class="hint above">{escaped(hint)}</p>' if hint else ""
    return f'{above}{_palette(colours)}<div class="board">{stage}</div><div class="picks">{thumbs}</div>'


def _palette(colours: Sequence[tuple[str, str]]) -> str:
    if not colours:
        return ""
    brushes = "".join(
        f'<button type="button" class="brush" data-label="{i}" data-colour="{colour}" '
        f'style="--ink:{colour}"><i></i>{escaped(name)}</button>'
        for i, (name, colour) in enumerate(colours)
    )
    return (
        f'<div class="palette">{brushes}<span class="gap"></span>'
        '<label class="size">Brush <input type="range" class="radius" min="4" max="60" value="20" '
        'aria-label="Size of the brush"></label>'
        '<button type="button" class="tool" data-undo>Undo</button>'
        '<button type="button" class="tool" data-clear>Clear</button></div>'
    )


def _blend(blend: float | None) -> str:
    if blend is None:
        return ""
    return (
        '<label class="blend-label">Photo<input type="range" class="blend" min="0" max="100" '
        f'value="{round(blend * 100)}" aria-label="How much of the photo is covered">Map</label>'
    )


def _card(card: Card) -> str:
    width, height = card.size
    layer = f'<img class="layer" src="{card.layer}" alt="" draggable="false">' if card.layer else ""
    mark = f'<span class="mark" style="left:{card.mark[0]:.2%};top:{card.mark[1]:.2%}"></span>' if card.mark else ""
    badge = f'<span class="badge">{escaped(card.badge)}</span>' if card.badge else ""
    click = f' data-click="{card.key}" tabindex="0" role="button"' if card.can_click else ""
    save = ""
    if card.save_as:
        url = card.layer or card.photo
        save = f'<a class="save" download="{escaped(card.save_as)}" href="{url}" title="Save this picture">Save</a>'
    note = f'<span class="note">{escaped(card.note)}</span>' if card.note else ""
    return (
        f'<figure class="card" style="--a:{width / height:.3f}">'
        f'<div class="stage"{click} style="aspect-ratio:{width}/{height}">'
        f'<img class="photo" src="{card.photo}" alt="{escaped(card.title)}" draggable="false">'
        f"{layer}{mark}{badge}</div>"
        f'<figcaption><span class="title">{escaped(card.title)}</span>{note}{save}</figcaption></figure>'
    )
