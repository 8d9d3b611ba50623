"""What of the page has to be drawn again: one function for all tabs, after anything changed.

A click or a word is only remembered (in the session) by the event that brings it; what it changes is drawn here. So
nothing that a person does is lost while the model computes, settings hold for everything that is shown, and the tabs
that nobody looks at wait until somebody does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from amradio.app import features, find, gallery, segment, similarity, words
from amradio.app.sessions import Session
from amradio.app.visit import KEEP, Keep, Visit
from amradio.errors import AmradioError

Shown = str | Keep


class Settings(NamedTuple):
    """What the controls of the page say; none of it is trusted."""

    resolution: Any
    output: Any
    layer: Any
    colours: Any
    drawing: Any
    similarity_output: Any
    segment_output: Any
    gradients: Any
    strict: Any
    scope: Any


class Part(NamedTuple):
    """A part of the page that shows what the model says.

    Attributes:
        name: For the record of what it was drawn from.
        tab: Where it is.
        draw: Makes its HTML from settings.
        settings: Which, in the order of the arguments.
        asked: What a person asked for there.
    """

    name: str
    tab: str
    draw: Callable[..., str]
    settings: tuple[str, ...]
    asked: Callable[[Session], Any] = lambda session: None


PARTS = (
    Part("features", features.TAB, features.show_features, ("resolution", "output", "layer", "colours", "drawing")),
    Part("similarity", similarity.TAB, similarity.show_similarity, ("resolution", "similarity_output"),
         lambda s: s.spot),
    Part("bars", words.TAB, words.show_bars, ("resolution",), lambda s: s.labels),
    Part("where", words.TAB, words.show_where, ("resolution",), lambda s: s.word),
    Part("segments", segment.TAB, segment.carry_over, ("resolution", "segment_output", "gradients", "strict"),
         lambda s: (s.epoch, dict(s.strokes), {key: id(mask) for key, (mask, _) in s.masks.items()})),
    Part("found", find.TAB, find.show_found, ("scope", "resolution"), lambda s: s.query),
)  # fmt: skip


def show_photos(visit: Visit) -> tuple[str, ...]:
    """What shows photos and needs no model, after they changed: the strip, places to click, the two boards."""
    return (gallery.shown(visit), similarity.show_photos(visit), segment.show_board(visit), find.show_source(visit))


def redraw(visit: Visit, tab: Any, *values: Any) -> tuple[Shown, ...]:
    """Draw the parts of a tab again that are not as they should be.

    Args:
        visit: Who asks.
        tab: The one that is seen.
        *values: See `Settings`.

    Returns:
        HTML of the strip and the two boards, then of `PARTS`; `KEEP` for what stays as it is.
    """
    settings, session = Settings(*values), visit.session
    photos: tuple[Shown, ...] = (KEEP,) * 3
    if session.was_lost:  # whatever the page shows is of photos that are gone
        session.was_lost = False
        session.notes = [gallery.FORGOTTEN, *session.notes]
        strip, _, *boards = show_photos(visit)
        photos, tab = (strip, *boards), None
    return (*photos, *(_drawn(visit, part, settings, is_seen=tab in (None, part.tab)) for part in PARTS))


def _drawn(visit: Visit, part: Part, settings: Settings, *, is_seen: bool) -> Shown:
    session = visit.session
    chosen = [getattr(settings, name) for name in part.settings]
    wanted = (tuple(session.photos), part.asked(session), chosen)
    if not is_seen or session.drawn.get(part.name) == wanted:
        return KEEP
    session.drawn.pop(part.name, None)
    try:
        page = part.draw(visit, *chosen)
    except AmradioError as error:  # not raised: the other parts are fine, and what was asked meanwhile has its turn
        visit.on_notice(str(error))
        return KEEP
    session.drawn[part.name] = wanted
    return page
