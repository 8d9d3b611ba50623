"""The tab Words: photos compared with what a person types."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from functools import partial
from typing import Any

from amradio.app.limits import Limits
from amradio.app.markup import bars, card_of, empty, grid, scale
from amradio.app.photos import encoded
from amradio.app.visit import Visit
from amradio.errors import CapabilityError, OptionError

TAB = "words"
TEMPLATES = ("a photo of a {}.",)
FIRST_WORDS = "cat, dog, person, cup of coffee, rocket, motorcycle, car, flower, tree, house, food, mountain"

_OTHERS = ("person", "dog", "car", "tree", "house", "food", "flower", "mountain", "chair", "boat")
_SHOWN = 5


def labels_of(text: Any, limits: Limits) -> list[str]:
    """The labels in a text: separated by commas or lines.

    Raises:
        OptionError: There is none, there are too many, or one is too long.
    """
    found = text if isinstance(text, str) else ""
    if len(found) > 4 * limits.words * limits.word_length:
        raise OptionError("This is more text than there can be labels.")
    words = list(dict.fromkeys(w for part in found.splitlines() for w in (p.strip() for p in part.split(",")) if w))
    if not words:
        raise OptionError("Type what could be on the photos, such as: cat, dog, person.")
    if len(words) > limits.words:
        raise OptionError(f"These are {len(words)} labels; up to {limits.words} fit.")
    long = next((w for w in words if len(w) > limits.word_length), None)
    if long is not None:
        raise OptionError(f"A label has up to {limits.word_length} characters, and {long[:20]!r}… is longer.")
    return words


def show_bars(visit: Visit, text: Any, resolution: Any) -> str:
    """Compare all photos with all labels."""
    import torch

    from amradio.evals.texts import calibration_of
    from amradio.evals.zero_shot import build_classifier, similarities

    model, photos = visit.house.model, dict(visit.session.photos)
    name = _needs_words(visit, model.text_output)
    if not photos:
        return empty("Say what you see", "Drop photos above, or take the sample photos; then type words.", "Aa")
    words = labels_of(text, visit.house.limits)
    maps = model.maps(visit, photos, name, resolution)
    output = model.output(name)
    classifier = build_classifier(output, words, TEMPLATES, device=model.device)  # [K, C]
    cosines = similarities(torch.stack([m.summary for m in maps.values()]), classifier)  # [B, K]
    calibration = calibration_of(output)
    known = calibration.logit_scale is not None
    values = calibration.probabilities(cosines) if known else cosines
    top = 1.0 if known else max(float(values.max()), 1e-6)
    articles = []
    for key, row in zip(maps, values, strict=True):
        best = row.topk(min(_SHOWN, len(words)))
        shown = [
            (words[i], v / top, f"{v:.0%}" if known else f"{v:.2f}")
            for v, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        articles.append(bars(photos[key], shown))
    table = _table([photos[key].name for key in maps], words, values.tolist())
    visit.session.results[TAB] = [("words.csv", table.encode)]
    what = "the probability among these words" if known else "the cosine similarity of photo and word"
    return f'<div class="toolbar"><p class="hint">The best {min(_SHOWN, len(words))} of {len(words)}, with {what}. ' \
           f'Click on a word to see where it is.</p></div><div class="wordgrid">{"".join(articles)}</div>'  # fmt: skip


def show_where(visit: Visit, text: Any, resolution: Any) -> str:
    """Show where in all photos something is that a person names, in the box or by a click on a bar."""
    from amradio.evals.zero_shot import build_classifier
    from amradio.viz.heat import colour_bar, heat_picture, limits_of
    from amradio.viz.similarity import similarity_map

    model, photos = visit.house.model, dict(visit.session.photos)
    name = _needs_words(visit, model.text_map_output)
    asked = visit.event.get("word", text)
    if not photos:
        return ""
    if not isinstance(asked, str) or not asked.strip():
        raise OptionError("Type a word or two to look for.")
    word = labels_of(asked.replace(",", " ").replace("\n", " "), visit.house.limits)[0]
    maps = model.maps(visit, photos, name, resolution)
    others = [other for other in _OTHERS if other != word]
    queries = build_classifier(model.output(name), [word, *others], TEMPLATES, device=model.device)  # [1 + n, C]
    # Less what any word has in common with the patch: the cosines with texts all lie close together.
    found = {
        key: similarity_map(m.features, queries[0]) - similarity_map(m.features, queries[1:], "mean")
        for key, m in maps.items()
    }
    limits = limits_of(found.values())
    cards, results = [], []
    for key in sorted(found, key=lambda k: -float(found[k].max())):
        photo = photos[key]
        heat = heat_picture(found[key], (photo.shown.height, photo.shown.width), limits=limits)
        results.append((f"{photo.stem}-{key}-{_file_part(word)}.png", partial(encoded, heat, "PNG")))
        cards.append(card_of(photo, layer=heat, ending=_file_part(word)))
    visit.session.results["where"] = results
    hint = f"Where is “{word}”? The photo in which it is found best comes first."
    return grid(cards, blend=0.65, legend=scale("less", "more", colour_bar()), hint=hint)


def show_where_of_bar(visit: Visit, text: Any, resolution: Any) -> tuple[str, str]:
    """The same for a bar that was clicked on; also returns its word, for the box."""
    page = show_where(visit, text, resolution)
    return str(visit.event.get("word", text)), page


def _needs_words(visit: Visit, name: str | None) -> str:
    if name is None:
        raise CapabilityError(
            f"{visit.house.model.name} cannot be compared with words: it has no text side. Start the app with a model "
            "that has one, such as amradio-tiny."
        )
    return name


def _table(names: Sequence[str], words: Sequence[str], values: Sequence[Sequence[float]]) -> str:
    """As CSV; a name that a spreadsheet would take for a formula is quoted by an apostrophe."""
    data = io.StringIO()
    writer = csv.writer(data)
    writer.writerow(["photo", *map(_harmless, words)])
    writer.writerows([_harmless(n), *(f"{v:.4f}" for v in row)] for n, row in zip(names, values, strict=True))
    return data.getvalue()


def _harmless(text: str) -> str:
    return f"'{text}" if text[:1] in "=+-@\t" else text


def _file_part(word: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in word)[:40]
