"""The tab Words: photos compared with what a person types."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from amradio.app.limits import Limits
from amradio.app.markup import bars, card_of, empty, grid, scale
from amradio.app.photos import encoded
from amradio.app.tables import csv_of
from amradio.app.visit import Visit
from amradio.errors import CapabilityError, OptionError

if TYPE_CHECKING:
    from torch import Tensor

    from amradio.app.model import AppModel

TAB, WHERE = "words", "where"
TEMPLATES = ("a photo of a {}.",)
FIRST_WORDS = "cat, dog, person, cup of coffee, rocket, motorcycle, car, flower, tree, house, food, mountain"

_OTHERS = (
    *("person", "dog", "cat", "bird", "horse", "car", "bicycle", "boat", "airplane", "tree", "flower", "grass", "sky"),
    *("water", "mountain", "road", "house", "wall", "window", "door", "table", "chair", "bed", "sofa", "food"),
    *("fruit", "bread", "cup", "bottle", "book", "computer", "phone", "clock", "lamp", "shirt", "shoe", "hat"),
    *("bag", "toy", "ball"),
)
"""Words that a word is compared with, to tell how much more like it a patch is than like anything else."""

# Measured with amradio-tiny at 448 px on 30 photos of pets and 50 of ImageNet and scikit-image: how far the word of
# what is on a photo stands out (at the 98 % quantile of the patches), against twelve words of what is not. At 2
# deviations, 84 % (pets: 100 %) of the former are above, and 89 % of the latter below. What is there often has 3.
_THERE = 2.0
_SHARE = 0.98
_DARKEST, _BRIGHTEST = 1.0, 4.0
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


def compare(visit: Visit, text: Any) -> None:
    """Remember labels, which photos are to be compared with."""
    _needs_words(visit, visit.house.model.text_output)
    visit.session.labels = tuple(labels_of(text, visit.house.limits))
    visit.session.changed()


def look(visit: Visit, text: Any) -> str:
    """Remember what to look for in the photos: what was typed, or the word of the bar that was clicked on.

    Returns:
        The word, for the box.
    """
    _needs_words(visit, visit.house.model.text_map_output)
    asked = visit.event.get("word", text)
    if not isinstance(asked, str) or not asked.strip():
        raise OptionError("Type a word or two to look for.")
    visit.session.word = labels_of(asked.replace(",", " ").replace("\n", " "), visit.house.limits)[0]
    visit.session.changed()
    return visit.session.word


def show_bars(visit: Visit, resolution: Any) -> str:
    """Compare all photos with all labels."""
    import torch

    from amradio.evals.texts import calibration_of
    from amradio.evals.zero_shot import build_classifier, similarities

    model, photos = visit.house.model, dict(visit.session.photos)
    if not photos or model.text_output is None:
        return nothing_to_compare(visit)
    name = model.text_output
    words = visit.session.labels or labels_of(FIRST_WORDS, visit.house.limits)
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
    rows = [[photos[key].name, *row] for key, row in zip(maps, values.tolist(), strict=True)]
    visit.session.results[TAB] = [("words.csv", partial(csv_of, [["photo", *words], *rows]))]
    what = "the probability among these words" if known else "the cosine similarity of photo and word"
    return f'<div class="toolbar"><p class="hint">The best {min(_SHOWN, len(words))} of {len(words)}, with {what}. ' \
           f'Click on a word to see where it is.</p></div><div class="wordgrid">{"".join(articles)}</div>'  # fmt: skip


def nothing_to_compare(visit: Visit) -> str:
    """What is shown in place of bars where there are no photos, or the model knows no words."""
    model = visit.house.model
    text = "Drop photos above, or take the sample photos; then type words."
    if model.text_output is None:
        text = f"{model.name} has no text side, so its features cannot be compared with words."
    return empty("Say what you see", text, "Aa")


def show_where(visit: Visit, resolution: Any) -> str:
    """Show where in all photos something is that a person named.

    A patch is like a word when their cosine is far above those with other words, in units of how far these lie apart.
    The colours mean the same for each word, so that one that is on no photo lights up nowhere.
    """
    import torch

    from amradio.viz.heat import colour_bar, heat_picture

    model, photos, word = visit.house.model, dict(visit.session.photos), visit.session.word
    name = model.text_map_output
    if not photos or not word or name is None:
        visit.session.results.pop(WHERE, None)
        return ""
    maps = model.maps(visit, photos, name, resolution)
    compared = (word, *(other for other in _OTHERS if other != word))
    queries = torch.stack([_direction(model, name, text) for text in compared])  # [1 + n, C]
    found = {key: above_others(m.features, queries) for key, m in maps.items()}
    best = {key: float(values.quantile(_SHARE)) for key, values in found.items()}
    top = max(_BRIGHTEST, *best.values())
    cards, results = [], []
    for key in sorted(found, key=lambda k: -best[k]):
        photo = photos[key]
        heat = heat_picture(found[key], (photo.shown.height, photo.shown.width), limits=(_DARKEST, top))
        results.append((f"{photo.stem}-{key}-{_file_part(word)}.png", partial(encoded, heat, "PNG")))
        note = f"{best[key]:.1f}" if best[key] >= _THERE else f"{best[key]:.1f}, probably not here"
        cards.append(card_of(photo, layer=heat, ending=_file_part(word), note=note))
    visit.session.results[WHERE] = results
    hint = f"Where is “{word}”? The photo in which it is found best comes first."
    if max(best.values()) < _THERE:
        hint = f"“{word}” is probably on none of these photos: no place is much more like it than like other words."
    legend = scale(f"{_DARKEST:.0f}", f"{top:.0f} deviations above other words", colour_bar())
    return grid(cards, blend=0.65, legend=legend, hint=hint)


def above_others(features: Tensor, queries: Tensor) -> Tensor:
    """How far the cosines with the first query are above those with the others, in standard deviations of these.

    Args:
        features: [h, w, C].
        queries: [1 + n, C], n > 1.

    Returns:
        [h, w].
    """
    import torch.nn.functional as F

    cosines = F.normalize(features.float(), dim=-1) @ F.normalize(queries.float(), dim=-1).T  # [h, w, 1 + n]
    others = cosines[..., 1:]
    return (cosines[..., 0] - others.mean(-1)) / others.std(-1).clamp_min(1e-6)


def _direction(model: AppModel, name: str, word: str) -> Tensor:
    """What a word is in the space of an output, [C]."""
    from amradio.evals.zero_shot import build_classifier

    return model.remembered((name, word), lambda: build_classifier(model.output(name), [word], TEMPLATES,
                                                                   device=model.device)[0])  # fmt: skip


def _needs_words(visit: Visit, name: str | None) -> str:
    if name is None:
        raise CapabilityError(
            f"{visit.house.model.name} cannot be compared with words: it has no text side. Start the app with a model "
            "that has one, such as amradio-tiny."
        )
    return name


def _file_part(word: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in word)[:40]
