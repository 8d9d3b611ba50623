"""The tab Features: feature maps in colours."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from amradio.app.markup import card_of, empty, grid
from amradio.app.photos import encoded
from amradio.app.visit import Visit

if TYPE_CHECKING:
    from amradio.viz.upsample import Upsampling

TAB = "features"
LAST = "the last one"
SHARED, OWN, SUBJECT = "the same for all photos", "for each photo by itself", "for what stands out"
SMOOTH, EDGES, PATCHES = "smooth", "along edges", "as patches"

_METHODS: dict[Any, Upsampling] = {SMOOTH: "bilinear", EDGES: "guided", PATCHES: "nearest"}
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
    from amradio.app.model import BACKBONE
    from amradio.viz.paint import PCAStyle, pca_pictures

    photos = dict(visit.session.photos)
    if not photos:
        return empty(*_NO_PHOTOS, icon="◐")
    model = visit.house.model
    number = layer_of(layer, model.depth)
    if number is not None and output != BACKBONE:
        visit.on_notice("Layers are those of the backbone; they are shown in place of the output.")
        output = BACKBONE
    maps = {key: found.features for key, found in model.maps(visit, photos, output, resolution, number).items()}
    style = PCAStyle(
        joint=colours != OWN, foreground=colours == SUBJECT, upsample=_METHODS.get(drawing, _METHODS[SMOOTH])
    )
    drawn = pca_pictures(list(maps.values()), [photos[key].shown for key in maps], style)
    pictures = dict(zip(maps, drawn, strict=True))
    visit.session.results[TAB] = [
        (f"{photos[key].stem}-{key}-features.png", partial(encoded, picture, "PNG"))
        for key, picture in pictures.items()
    ]
    h, w, width = next(iter(maps.values())).shape
    cards = [card_of(photos[key], layer=pictures[key], ending="features") for key in pictures]
    meaning = "Equal colours mean similar features" + (" within one photo." if colours == OWN else ".")
    return grid(cards, blend=1.0, hint=f"{meaning} Maps like {h} x {w} patches of {width} numbers.")
