"""The tab Similarity: a patch of one photo lights up in all."""

from __future__ import annotations

from functools import partial
from typing import Any

from amradio.app.markup import card_of, empty, grid, scale
from amradio.app.photos import encoded
from amradio.app.visit import Visit

TAB = "similarity"

_BRIGHTEST = 0.995  # of all patches are darker than the brightest colour: the patch itself would outshine all others


def show_photos(visit: Visit) -> str:
    """The photos, to click on."""
    photos = list(visit.session.photos.values())
    if not photos:
        return empty("What looks alike?", "Drop photos above, or take the sample photos; then click on something.", "◎")
    return grid([card_of(p, can_click=True) for p in photos], hint="Click on something in any of the photos.")


def ask(visit: Visit) -> None:
    """Remember the place of the event, which was clicked on."""
    key = visit.session.photo(visit.event.get("photo")).key
    visit.session.spot = (key, visit.number("x"), visit.number("y"))
    visit.session.changed()


def show_similarity(visit: Visit, resolution: Any, output: Any) -> str:
    """Compare the patch that was clicked on with all patches of all photos; before a click, show the photos."""
    import torch

    from amradio.viz.heat import colour_bar, heat_picture
    from amradio.viz.similarity import centre_of, patch_of, similarity_map

    photos, spot = dict(visit.session.photos), visit.session.spot
    if spot is None or spot[0] not in photos:
        visit.session.results.pop(TAB, None)
        return show_photos(visit)
    asked, (_, x, y) = photos[spot[0]], spot
    maps = visit.house.model.maps(visit, photos, output, resolution)
    features = maps[asked.key].features
    grid_size = (features.shape[0], features.shape[1])
    patch = patch_of((min(x, 0.99999), min(y, 0.99999)), (1, 1), grid_size)
    middle = centre_of(patch, grid_size, (1, 1))
    found = {key: similarity_map(m.features, features[patch]) for key, m in maps.items()}
    values = torch.cat([v.flatten() for v in found.values()])
    limits = (max(float(values.min()), 0.0), float(values.quantile(_BRIGHTEST)))
    cards = []
    results = []
    for key, values in found.items():
        photo = photos[key]
        heat = heat_picture(values, (photo.shown.height, photo.shown.width), limits=limits)
        results.append((f"{photo.stem}-{key}-similarity.png", partial(encoded, heat, "PNG")))
        cards.append(
            card_of(
                photo,
                layer=heat,
                ending="similarity",
                can_click=True,
                mark=middle if photo is asked else None,
                badge="clicked here" if photo is asked else "",
                note="" if photo is asked else f"best match {float(values.max()):.2f}",
            )
        )
    visit.session.results[TAB] = results
    legend = scale(f"unlike {limits[0]:.2f}", f"{limits[1]:.2f} alike", colour_bar())
    return grid(cards, blend=0.65, legend=legend, hint="Bright is alike. Click anywhere to ask again.")
