"""Finding the layout of a data set, and the folder in which it lies."""

from __future__ import annotations

from typing import NamedTuple

from amradio.errors import DatasetError, OptionError, nearest_names
from amradio.images.segmentation.coco import CocoInstancesLayout, CocoStuffLayout, CocoThingLayout
from amradio.images.segmentation.layout import Layout, Part
from amradio.images.segmentation.storage import Storage, below
from amradio.images.segmentation.trees import Ade20kLayout, CityscapesLayout, FolderLayout, VocLayout

_DEPTH = 2  # VOCdevkit/VOC2012

_FALLBACK = FolderLayout()
LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        VocLayout(),
        Ade20kLayout(),
        CityscapesLayout(),
        CocoThingLayout(),
        CocoStuffLayout(),
        CocoInstancesLayout(),
        _FALLBACK,
    )
}
"""All layouts by name."""


class Place(NamedTuple):
    """Where a data set lies.

    Attributes:
        store: Seen from its root.
        layout: Its layout.
    """

    store: Storage
    layout: Layout


def locate(store: Storage, name: str | None = None) -> Place:
    """Find a data set in a folder or an archive: at its root, or one or two folders further down.

    Args:
        store: Where to look.
        name: Of the layout; None finds out.

    Raises:
        OptionError: There is no such layout.
        DatasetError: There is no data set, or there are several. The message says what is missing.
    """
    if name is not None and name not in LAYOUTS:
        raise OptionError(f"There is no layout {name!r}. {nearest_names(name, LAYOUTS)}")
    layouts = [layout for n, layout in LAYOUTS.items() if n == (name or n)]
    bases = [""]
    for _ in range(_DEPTH + 1):
        here = [store.at(base) if base else store for base in bases]
        found = [Place(base, layout) for base in here for layout in _layouts_of(base, layouts)]
        if len(found) > 1:
            raise _several(store, found)
        if found:
            return found[0]
        bases = [below(base, folder) for base in bases for folder in store.folders(base)]
    raise _none(store, layouts)


def _layouts_of(store: Storage, layouts: list[Layout]) -> list[Layout]:
    """Layouts that a folder has; the one of any two trees only if it has no other."""
    found = [layout for layout in layouts if not layout.missing(store)]
    return [layout for layout in found if layout is not _FALLBACK] or found


def _several(store: Storage, found: list[Place]) -> DatasetError:
    places = {place.store.location for place in found}
    if len(places) == 1:
        names = ", ".join(place.layout.name for place in found)
        return DatasetError(f"{store.location} can be read in several layouts: {names}. Say which one is meant.")
    listed = ", ".join(f"{place.store.location} ({place.layout.name})" for place in found)
    return DatasetError(f"{store.location} has several data sets: {listed}. Name one of these folders.")


def _none(store: Storage, layouts: list[Layout]) -> DatasetError:
    """Say what is missing, for the layouts of which something is there."""
    folders = store.folders("")
    has = f"It has the folders {', '.join(folders[:8])}." if folders else "It has no folders."
    missing = {layout.name: layout.missing(store) for layout in layouts}
    begun = {layout.name for layout in layouts if len(missing[layout.name]) < len(layout.parts)}
    if len(layouts) > 1 and not begun:
        return DatasetError(
            f"{store.location} is no data set of pictures with masks. {has} Known layouts: {', '.join(LAYOUTS)}."
        )
    needs = [f"{name} lacks {_listed(parts)}" for name, parts in missing.items() if len(layouts) == 1 or name in begun]
    what = "known layout" if len(layouts) > 1 else f"data set in the layout {layouts[0].name}"
    return DatasetError(f"{store.location} has no {what} in it. {has} Of what is needed, {'; '.join(needs)}.")


def _listed(parts: list[Part]) -> str:
    return " and ".join(f"{part.places[0]} ({part.what})" for part in parts)
