"""The tab Search: pictures that are like a picture, like a part of one, or like words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from amradio.app.collection import Hit
from amradio.app.markup import Card, board, card_of, empty, grid
from amradio.app.model import BACKBONE
from amradio.app.photos import data_url
from amradio.app.visit import Visit
from amradio.app.words import TEMPLATES, labels_of
from amradio.errors import CapabilityError, OptionError

if TYPE_CHECKING:
    from torch import Tensor

TAB = "search"
OWN, COLLECTION = "my photos", "the collection"

_Query = tuple[str, Any]


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
    visit.session.query = ("picture", key)
    return show_source(visit)


def find_part(visit: Visit, where: Any, resolution: Any) -> str:
    """Look for what is in the box that was drawn; for the whole photo if it was only clicked."""
    key = visit.session.photo(visit.event.get("photo")).key
    box = tuple(visit.number(side) for side in ("left", "top", "right", "bottom"))
    is_click = box[2] - box[0] < 0.01 or box[3] - box[1] < 0.01
    visit.session.query = ("picture", key) if is_click else ("region", (key, box))
    return find_again(visit, where, resolution)


def find_words(visit: Visit, text: Any, where: Any, resolution: Any) -> str:
    """Look for words."""
    if visit.house.model.text_output is None:
        raise CapabilityError(f"{visit.house.model.name} cannot be compared with words: it has no text side.")
    if not isinstance(text, str) or not text.strip():
        raise OptionError("Type what you look for.")
    word = labels_of(text.replace(",", " ").replace("\n", " "), visit.house.limits)[0]
    visit.session.query = ("words", word)
    return find_again(visit, where, resolution)


def find_again(visit: Visit, where: Any, resolution: Any) -> str:
    """Look for the same as before, perhaps elsewhere."""
    query = visit.session.query
    in_collection = where == COLLECTION and visit.house.collection is not None
    if query is None or not (visit.session.photos or in_collection):
        return nothing_yet(visit)
    if in_collection:
        hits, cards = _in_collection(visit, query, resolution)
    else:
        hits, cards = _in_photos(visit, query, resolution)
    lines = ["rank,picture,similarity", *(f'{i},"{h.name}",{h.score:.4f}' for i, h in enumerate(hits, 1))]
    table = "\n".join(lines) + "\n"
    visit.session.results[TAB] = [("search.csv", table.encode)]
    return grid(cards, hint=f"Most similar first: {_words_of(visit, query)}.")


def nothing_yet(visit: Visit) -> str:
    """What is shown before anything was looked for."""
    text = "Click on a photo, draw a box around a part of it, or type words."
    return empty("Nothing looked for yet", text, "⌕")


def _in_photos(visit: Visit, query: _Query, resolution: Any) -> tuple[list[Hit], list[Card]]:
    import torch
    import torch.nn.functional as F

    from amradio.search import top_k
    from amradio.search.regions import best_positions

    kind, what = query
    output, photos = _output(visit, kind), dict(visit.session.photos)
    maps = visit.house.model.maps(visit, photos, output, resolution)
    vector = _vector(visit, query, resolution)
    keys = list(maps)
    count = min(len(keys), visit.house.limits.results)
    if kind == "region":
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
    own = what if kind == "picture" else what[0] if kind == "region" else None
    cards = [
        card_of(
            photos[hit.row],
            mark=hit.place,
            note=f"{hit.score:.2f}",
            badge="this one" if hit.row == own else "",
        )
        for hit in hits
    ]
    return hits, cards


def _in_collection(visit: Visit, query: _Query, resolution: Any) -> tuple[list[Hit], list[Card]]:
    from amradio.search.regions import best_positions

    collection = visit.house.collection
    assert collection is not None
    output, count = _output(visit, query[0]), visit.house.limits.results
    vector = _vector(visit, query, resolution)
    if query[0] == "region":
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


def _output(visit: Visit, kind: str) -> str:
    text = visit.house.model.text_output
    return text if kind == "words" and text is not None else BACKBONE


def _vector(visit: Visit, query: _Query, resolution: Any) -> Tensor:
    """What is looked for, as one vector in the space of the output."""
    from amradio.evals.zero_shot import build_classifier
    from amradio.search.regions import region_query

    model = visit.house.model
    kind, what = query
    output = _output(visit, kind)
    if kind == "words":
        return build_classifier(model.output(output), [what], TEMPLATES, device=model.device)[0]
    key, box = what if kind == "region" else (what, None)
    found = model.maps(visit, {key: visit.session.photo(key)}, output, resolution)[key]
    return found.summary if box is None else region_query(found.features, box)


def _words_of(visit: Visit, query: _Query) -> str:
    kind, what = query
    if kind == "words":
        return f"“{what}”"
    name = visit.session.photo(what if kind == "picture" else what[0]).name
    return name if kind == "picture" else f"a part of {name}; rings show where"


def _place(position: int, shape: Any) -> tuple[float, float]:
    h, w = shape
    return (position % w + 0.5) / w, (position // w + 0.5) / h
