"""The tab Search: pictures that are like a picture, like a part of one, or like words."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from amradio.app.collection import Hit
from amradio.app.markup import Card, board, card_of, empty, grid
from amradio.app.model import BACKBONE
from amradio.app.photos import data_url
from amradio.app.sessions import Query
from amradio.app.tables import csv_of
from amradio.app.visit import Visit
from amradio.app.words import TEMPLATES, labels_of
from amradio.errors import CapabilityError, OptionError

if TYPE_CHECKING:
    from torch import Tensor

TAB = "search"
OWN, COLLECTION = "my photos", "the collection"
SMALLEST = 0.01
"""Side of a box as a share of the photo; what is smaller was a click. `page.js` knows it too."""


def show_source(visit: Visit) -> str:
    """The photo to look for."""
    photo = visit.session.current(TAB)
    if photo is None:
        return empty("Search by picture", "Drop photos above, or take the sample photos.", "⌕")
    return board(
        photo, list(visit.session.photos.values()), hint="Click on the photo, or draw a box around a part of it."
    )


def choose(visit: Visit) -> str:
    """Take another photo to look for, all of it."""
    key = visit.session.photo(visit.event.get("photo")).key
    visit.session.chosen[TAB] = key
    _ask(visit, Query(photo=key))
    return show_source(visit)


def ask_part(visit: Visit) -> None:
    """Look for what is in the box that was drawn; for the whole photo if it was only clicked."""
    key = visit.session.photo(visit.event.get("photo")).key
    left, top, right, bottom = (visit.number(side) for side in ("left", "top", "right", "bottom"))
    is_click = right - left < SMALLEST or bottom - top < SMALLEST
    _ask(visit, Query(photo=key, box=None if is_click else (left, top, right, bottom)))


def ask_words(visit: Visit, text: Any) -> None:
    """Look for words."""
    if visit.house.model.text_output is None:
        raise CapabilityError(f"{visit.house.model.name} cannot be compared with words: it has no text side.")
    if not isinstance(text, str) or not text.strip():
        raise OptionError("Type what you look for.")
    _ask(visit, Query(words=labels_of(text.replace(",", " ").replace("\n", " "), visit.house.limits)[0]))


def show_found(visit: Visit, where: Any, resolution: Any) -> str:
    """Look for what was asked for."""
    query = visit.session.query
    in_collection = where == COLLECTION and visit.house.collection is not None
    if query is None or not (visit.session.photos or in_collection):
        visit.session.results.pop(TAB, None)
        return nothing_yet(visit)
    if in_collection:
        hits, cards = _in_collection(visit, query, resolution)
    else:
        hits, cards = _in_photos(visit, query, resolution)
    rows = [(i, hit.name, hit.score) for i, hit in enumerate(hits, 1)]
    visit.session.results[TAB] = [("search.csv", partial(csv_of, [("rank", "picture", "similarity"), *rows]))]
    return grid(cards, hint=f"Most similar first: {_words_of(visit, query)}.")


def nothing_yet(visit: Visit) -> str:
    """What is shown before anything was looked for."""
    text = "Click on a photo, draw a box around a part of it, or type words."
    return empty("Nothing looked for yet", text, "⌕")


def _ask(visit: Visit, query: Query) -> None:
    visit.session.query = query
    visit.session.changed()


def _in_photos(visit: Visit, query: Query, resolution: Any) -> tuple[list[Hit], list[Card]]:
    import torch
    import torch.nn.functional as F

    from amradio.search import top_k
    from amradio.search.regions import best_positions

    output, photos = _output(visit, query), dict(visit.session.photos)
    maps = visit.house.model.maps(visit, photos, output, resolution)
    vector = _vector(visit, query, resolution)
    keys = list(maps)
    count = min(len(keys), visit.house.limits.results)
    if query.box is not None:
        tokens = torch.cat([m.features.flatten(0, 1) for m in maps.values()])
        ends = torch.tensor([0, *(m.features.shape[0] * m.features.shape[1] for m in maps.values())]).cumsum(0)
        found = best_positions(tokens, ends, vector)
        order = found.scores.sort(descending=True, stable=True).indices[:count].tolist()
        hits = [
            Hit(keys[i], photos[keys[i]].name, float(found.scores[i]),
                _place(int(found.indices[i]), maps[keys[i]].features.shape[:2]))
            for i in order
        ]  # fmt: skip
    else:
        rows = F.normalize(torch.stack([m.summary for m in maps.values()]), dim=1)
        nearest = top_k(F.normalize(vector, dim=0)[None], rows, count)
        pairs = zip(nearest.scores[0].tolist(), nearest.indices[0].tolist(), strict=True)
        hits = [Hit(keys[i], photos[keys[i]].name, score) for score, i in pairs]
    cards = [
        card_of(
            photos[hit.row],
            mark=hit.place,
            note=f"{hit.score:.2f}",
            badge="this one" if hit.row == query.photo else "",
        )
        for hit in hits
    ]
    return hits, cards


def _in_collection(visit: Visit, query: Query, resolution: Any) -> tuple[list[Hit], list[Card]]:
    from amradio.search.regions import best_positions

    collection = visit.house.collection
    assert collection is not None
    output, count = _output(visit, query), visit.house.limits.results
    vector = _vector(visit, query, resolution)
    if query.box is not None:
        hits = collection.by_region(vector, output, count, best_positions)
    else:
        hits = collection.by_summary(vector, output, count)
    cards, shown = [], []
    for hit in visit.steps(hits, len(hits), "Fetching pictures"):
        picture = collection.picture(hit.row)
        if picture is None:  # moved or changed since it was embedded
            continue
        shown.append(hit)
        cards.append(
            Card(photo=data_url(picture), size=picture.size, title=hit.name, note=f"{hit.score:.2f}", mark=hit.place)
        )
    return shown, cards


def _output(visit: Visit, query: Query) -> str:
    text = visit.house.model.text_output
    return text if query.words and text is not None else BACKBONE


def _vector(visit: Visit, query: Query, resolution: Any) -> Tensor:
    """What is looked for, as one vector in the space of the output."""
    from amradio.evals.zero_shot import build_classifier
    from amradio.search.regions import region_query

    model = visit.house.model
    output = _output(visit, query)
    if query.words:
        return build_classifier(model.output(output), [query.words], TEMPLATES, device=model.device)[0]
    photo = visit.session.photo(query.photo)
    found = model.maps(visit, {photo.key: photo}, output, resolution)[photo.key]
    return found.summary if query.box is None else region_query(found.features, query.box)


def _words_of(visit: Visit, query: Query) -> str:
    if query.words:
        return f"“{query.words}”"
    name = visit.session.photo(query.photo).name
    return name if query.box is None else f"a part of {name}; rings show where"


def _place(position: int, shape: Any) -> tuple[float, float]:
    h, w = shape
    return (position % w + 0.5) / w, (position // w + 0.5) / h
