"""The tab Features: feature maps in colours."""

from __future__ import annotations

from functools import partial
from typing import Any

from amradio.app.markup import card_of, empty, grid
from amradio.app.photos import encoded
from amradio.app.visit import Visit

TAB = "features"
LAST = "the last one"
SHARED, OWN, SUBJECT = "the same for all photos", "for each photo by itself", "for what stands out"
SMOOTH, EDGES, PATCHES = "smooth", "along edges", "as patches"

_METHODS = {SMOOTH: "bilinear", EDGES: "guided", PATCHES: "nearest"}
_NO_PHOTOS = ("See what the model sees", "Drop photos above, or take the sample photos.")


def layer_choices(depth: int) -> list[str]:
    """Names of the layers that can be chosen."""
    return [LAST, *(f"layer {i + 1} of {depth}" for i in range(depth))]


def layer_of(choice: Any, depth: int) -> int | None:
    """The layer of a choice; None for the output itself. What is no choice is the output too."""
    names = layer_choices(depth)
    return names.index(choice) - 1 if choice in names[1:] else None


def show_features(visit: Visit, resolution: Any, output: Any, layer: Any, colours: Any, drawing: Any) -> str:
    """Colour the feature maps of all photos by their principal components."""
    from PIL import Image

    from amradio.app.model import BACKBONE
    from amradio.viz.foreground import foreground_masks
    from amradio.viz.pca import fit_basis, to_picture
    from amradio.viz.upsample import upsample

    photos = dict(visit.session.photos)
    if not photos:
        return empty(*_NO_PHOTOS, icon="◐")
    model = visit.house.model
    number = layer_of(layer, model.depth)
    if number is not None and output != BACKBONE:
        visit.on_notice("Layers are those of the backbone; they are shown in place of the output.")
        output = BACKBONE
    maps = {key: found.features for key, found in model.maps(visit, photos, output, resolution, number).items()}
    masks = dict(zip(maps, foreground_masks(list(maps.values())), strict=True)) if colours == SUBJECT else {}
    kept = [maps[key][masks[key]] for key in maps if masks[key].any()] if masks else list(maps.values())
    basis = None if colours == OWN else fit_basis(kept or list(maps.values()))
    pictures: dict[int, Image.Image] = {}
    for key, features in maps.items():
        rgb = (basis or fit_basis(features)).rgb(features)  # [h, w, 3]
        if masks:
            rgb = rgb * masks[key][..., None]
        shown = photos[key].shown
        method: Any = _METHODS.get(drawing, "bilinear")
        pictures[key] = to_picture(upsample(rgb, (shown.height, shown.width), method, shown).clamp(0, 1))
    visit.session.results[TAB] = [
        (f"{photos[key].stem}-{key}-features.png", partial(encoded, picture, "PNG"))
        for key, picture in pictures.items()
    ]
    h, w, width = next(iter(maps.values())).shape
    cards = [card_of(photos[key], layer=pictures[key], ending="features") for key in pictures]
    meaning = "Equal colours mean similar features" + (" within one photo." if colours == OWN else ".")
    return grid(cards, blend=1.0, hint=f"{meaning} Maps like {h} x {w} patches of {width} numbers.")
