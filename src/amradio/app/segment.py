"""The tab Segment: what is painted on one photo is carried to the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from amradio.app.gallery import Upload
from amradio.app.limits import Limits
from amradio.app.markup import board, card_of, empty, grid
from amradio.app.photos import Photo, encoded
from amradio.app.visit import Visit
from amradio.errors import OptionError

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from amradio.evals.propagate_strokes import Stroke

TAB = "segment"
BRUSHES = ("Background", "Thing A", "Thing B", "Thing C", "Thing D")

_MOST_CLASSES = 24
_BACKGROUND_INK = (150, 150, 160)
_OPAQUE = 255


def colours() -> list[tuple[int, int, int]]:
    """The colour of each class."""
    from amradio.viz.colours import distinct_colours

    return [_BACKGROUND_INK, *distinct_colours(_MOST_CLASSES - 1)]


def show_board(visit: Visit) -> str:
    """The photo to paint on."""
    photo = visit.session.current(TAB)
    if photo is None:
        return empty("Paint once, see it everywhere", "Drop photos above, or take the sample photos.", "✎")
    inks = [f"rgb({r} {g} {b})" for r, g, b in colours()]
    worked_on = [*(k for k, s in visit.session.strokes.items() if s), *visit.session.masks]
    return board(
        photo,
        list(visit.session.photos.values()),
        colours=list(zip(BRUSHES, inks, strict=False)),
        marked=worked_on,
        epoch=visit.session.epoch,
    )


def choose(visit: Visit) -> str:
    """Take another photo to paint on."""
    visit.session.chosen[TAB] = visit.session.photo(visit.event.get("photo")).key
    return show_board(visit)


def take_strokes(visit: Visit) -> None:
    """Take what was painted on a photo."""
    photo = visit.session.photo(visit.event.get("photo"))
    visit.session.strokes[photo.key] = strokes_of(visit.event.get("strokes"), visit.house.limits)
    visit.session.changed()


def take_mask(visit: Visit, uploads: Sequence[Upload] | None) -> str:
    """Take a mask for the photo that is shown large.

    Returns:
        The board.
    """
    photo, limits = visit.session.current(TAB), visit.house.limits
    contents = [(u.name, visit.house.uploads.take(u.path, limits.file_bytes)) for u in uploads or []]
    if photo is None:
        raise OptionError("Add photos first; the mask then belongs to the one that is shown large.")
    if contents:
        name, content = contents[0]
        visit.session.masks[photo.key] = mask_of(content, name, photo, limits)
        visit.session.changed()
        visit.on_notice(f"The mask {name} now belongs to {photo.name}.")
    return show_board(visit)


def forget(visit: Visit) -> str:
    """Forget everything that was painted, and all masks.

    Returns:
        The board.
    """
    visit.session.wipe()
    return show_board(visit)


def carry_over(visit: Visit, resolution: Any, output: Any, gradients: Any, strict: Any) -> str:
    """Carry strokes and masks to all photos."""
    from amradio.evals.propagate_strokes import BACKGROUND, carry, remember, settle
    from amradio.images.segmentation.masks import VOID

    session, photos = visit.session, dict(visit.session.photos)
    labelled = [k for k in photos if session.strokes.get(k) or k in session.masks]
    if not labelled:
        return _nothing_painted(visit)
    maps = visit.house.model.maps(visit, photos, output, resolution, gradients=bool(gradients))
    masks = {key: _mask(visit, key, (maps[key].photo.height, maps[key].photo.width)) for key in labelled}
    seen = sorted({int(label) for mask in masks.values() for label in set(mask.flat) if label != VOID})
    if not seen:
        return _nothing_painted(visit)
    memory = remember([(maps[key].features, masks[key]) for key in labelled], max(seen) + 1)
    carried = {key: carry(memory, found.features) for key, found in maps.items()}
    below = _threshold([c.similarity for c in carried.values()]) if strict else None
    cards, results = [], []
    for key in sorted(carried, key=lambda key: key not in labelled):  # examples first
        one = carried[key]
        photo = photos[key]
        own = None if key in labelled and BACKGROUND in seen else below
        labels = settle(one, (photo.shown.height, photo.shown.width), own).numpy()
        layer = _layer(labels)
        results.append((f"{photo.stem}-{key}-labels.png", partial(_label_file, labels)))
        share = float((labels > 0).mean())
        cards.append(
            card_of(
                photo,
                layer=layer,
                kind="PNG",
                ending="segments",
                badge="your example" if key in labelled else "",
                note=f"{share:.0%} is marked",
            )
        )
    session.results[TAB] = results
    hint = "" if BACKGROUND in seen else "Paint some background too: edges become sharper."
    return grid(cards, blend=0.7, hint=hint)


def strokes_of(value: Any, limits: Limits) -> tuple[Stroke, ...]:
    """The strokes in what the page sent.

    Raises:
        OptionError: It is something else, or too much.
    """
    from amradio.evals.propagate_strokes import Stroke

    if not isinstance(value, list) or len(value) > limits.strokes:
        raise OptionError(f"A photo can have up to {limits.strokes} strokes. Clear it to begin anew.")
    points = sum(len(s["points"]) for s in value if isinstance(s, Mapping) and isinstance(s.get("points"), list))
    if points > limits.points:
        raise OptionError("These strokes have more points than can be used. Clear some of them.")
    try:
        return tuple(
            Stroke(int(s["label"]), float(s["radius"]), tuple((float(x), float(y)) for x, y in s["points"]))
            for s in value
        )
    except (KeyError, TypeError, ValueError, OverflowError):
        raise OptionError("The page sent strokes that cannot be read; reload it.") from None


def mask_of(content: bytes, name: str, photo: Photo, limits: Limits) -> tuple[np.ndarray, int]:
    """Read a mask.

    Args:
        content: Of a PNG file with a palette or in grey: numbers of classes, or black and white.
        name: For messages.
        photo: Whose mask it is; it must have the same shape, at any size.
        limits: Of the app.

    Returns:
        uint8 [H, W], no larger than the photo: classes from 0 (background), and 255 for unknown; and how many classes
        there are.

    Raises:
        OptionError: It is no mask, or not of this photo.
    """
    import numpy as np

    from amradio.images.segmentation.masks import VOID, MaskError, read_ids

    try:
        ids = read_ids(content, name, limits.file_pixels)
    except MaskError as error:
        raise OptionError(f"{name} cannot be used as a mask: it takes a PNG file with a palette or in grey. "
                          f"({error})") from error  # fmt: skip
    shape, wanted = ids.shape[1] / ids.shape[0], photo.picture.width / photo.picture.height
    if abs(shape / wanted - 1) > 0.03:
        raise OptionError(
            f"{name} is {ids.shape[1]} x {ids.shape[0]} pixels, which is not the shape of {photo.name}. Choose the "
            "photo that the mask belongs to."
        )
    ids = _fitted(ids, photo.picture.size)
    values = np.unique(ids)
    if set(values.tolist()) <= {0, VOID}:  # black and white
        return (ids > 0).astype(np.uint8), 2
    classes = [v for v in values.tolist() if v != VOID]
    if len(classes) > _MOST_CLASSES:
        raise OptionError(
            f"{name} has {len(classes)} different values; a mask has up to {_MOST_CLASSES} classes. Is it a photo?"
        )
    numbers = np.full(int(values.max()) + 1, VOID, np.uint8)
    first = 0 if 0 in classes else 1
    numbers[classes] = np.arange(first, first + len(classes))
    return numbers[ids], first + len(classes)


def _fitted(ids: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask at the (width, height) of its photo, if it is larger: the pixels nearest to the middles of the photo's."""
    import numpy as np

    if ids.shape[1] <= size[0]:
        return ids
    rows = ((np.arange(size[1]) + 0.5) * ids.shape[0] / size[1]).astype(int)
    columns = ((np.arange(size[0]) + 0.5) * ids.shape[1] / size[0]).astype(int)
    found: np.ndarray = ids[rows][:, columns]
    return found


def _nothing_painted(visit: Visit) -> str:
    visit.session.results.pop(TAB, None)
    if not visit.session.photos:
        return ""
    return empty("Nothing painted yet", "Pick a colour, and draw over something on the photo.", "✎")


def _mask(visit: Visit, key: int, size: tuple[int, int]) -> np.ndarray:
    """Mask and strokes of a photo together, at the size that the model saw."""
    import numpy as np
    from PIL import Image

    from amradio.evals.propagate_strokes import paint
    from amradio.images.segmentation.masks import VOID

    painted = paint(visit.session.strokes.get(key, ()), size)
    given = visit.session.masks.get(key)
    if given is None:
        return painted
    whole = Image.fromarray(given[0]).resize((size[1], size[0]), Image.Resampling.NEAREST)
    return np.where(painted == VOID, np.array(whole), painted)


def _threshold(similarities: Sequence[Any]) -> float:
    """What parts patches that are like the painted ones from the rest."""
    import torch

    from amradio.viz.foreground import otsu

    return otsu(torch.cat([s.flatten() for s in similarities]))


def _layer(labels: np.ndarray) -> Image:
    """Classes as colours; the background is transparent."""
    import numpy as np
    from PIL import Image

    table = np.zeros((256, 4), np.uint8)
    inks = colours()
    table[1 : len(inks)] = [(*ink, _OPAQUE) for ink in inks[1:]]
    return Image.fromarray(table[labels], "RGBA")


def _label_file(labels: np.ndarray) -> bytes:
    """A PNG file with a palette whose numbers are the classes."""
    from PIL import Image

    picture = Image.fromarray(labels).convert("P")
    picture.putpalette([v for ink in colours() for v in ink])
    return encoded(picture, "PNG")
