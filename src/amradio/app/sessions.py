"""What pages that are open have: photos, what was painted on them, and their last results. In memory only."""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from amradio.app.limits import Limits
from amradio.app.photos import Photo, clean_name
from amradio.errors import OptionError

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from amradio.evals.propagate_strokes import Stroke


class Query(NamedTuple):
    """What pictures are searched for: a photo, a part of it, or words.

    Attributes:
        photo: Key of the photo.
        box: (left, top, right, bottom) of the part, as shares of width and height; None: the whole photo.
        words: In place of a photo.
    """

    photo: int | None = None
    box: tuple[float, float, float, float] | None = None
    words: str = ""


class Session:
    """One page.

    Args:
        name: Which page, as Gradio calls it.
        limits: Of the app.

    Attributes:
        name: See above.
        photos: By key, in the order in which they came.
        strokes: What was painted on which photo.
        masks: uint8 [H, W] classes (255: unknown) given for photos, and how many classes there are.
        epoch: Changes when everything that was painted is wiped out; the same for no two sessions.
        chosen: The photo that each tab shows large.
        spot: The place that was clicked on: key of a photo, x, y.
        labels: What photos are compared with.
        word: What was looked for in the photos.
        query: What was searched for.
        drawn: From what each part of the page was drawn, see `amradio.app.redraw`.
        notes: What the person should read, until it is dismissed or photos are added.
        was_lost: Whether the page talks of an earlier session that is gone, and does not know it yet.
        results: For each tab, what can be downloaded: names and contents, made when they are asked for.
        used: When the page last asked for something, in seconds of a monotonic clock.
    """

    def __init__(self, name: str, limits: Limits) -> None:
        self.name = name
        self.photos: dict[int, Photo] = {}
        self.strokes: dict[int, tuple[Stroke, ...]] = {}
        self.masks: dict[int, tuple[np.ndarray, int]] = {}
        self.chosen: dict[str, int] = {}
        self.spot: tuple[int, float, float] | None = None
        self.labels: tuple[str, ...] = ()
        self.word = ""
        self.query: Query | None = None
        self.results: dict[str, Sequence[tuple[str, Callable[[], bytes]]]] = {}
        self.drawn: dict[str, Any] = {}
        self.notes: list[str] = []
        self.was_lost = False
        self.used = time.monotonic()
        self._limits = limits
        self._next = 1
        self._token = secrets.token_hex(8)
        self._wiped = self._changes = 0

    @property
    def epoch(self) -> str:
        """See above."""
        return f"{self._token}-{self._wiped}"

    @property
    def stamp(self) -> str:
        """Which session this is, and how often it changed; a page keeps it, and is drawn again when it is another."""
        return f"{self._token}:{self._changes}"

    def is_of(self, stamp: str) -> bool:
        """Whether a stamp that a page kept is of this session; one that knows of none yet sends nothing."""
        return stamp.partition(":")[0] in ("", self._token)

    def changed(self) -> None:
        """Something that is shown has to be drawn again."""
        self._changes += 1

    @property
    def room(self) -> int:
        """How many photos more there may be."""
        return self._limits.photos - len(self.photos)

    def add(self, name: str, picture: Image) -> Photo:
        """Take a photo.

        Raises:
            OptionError: There are too many already.
        """
        if self.room < 1:
            raise OptionError(f"There are {self._limits.photos} photos already, and no more fit. Remove some first.")
        photo = Photo(self._next, clean_name(name), picture)
        self._next += 1
        self.photos[photo.key] = photo
        self.changed()
        return photo

    def remove(self, key: Any) -> None:
        """Forget a photo, and everything that came from it."""
        for of_photo in (self.photos, self.strokes, self.masks):
            of_photo.pop(key, None)
        self.chosen = {tab: chosen for tab, chosen in self.chosen.items() if chosen != key}
        self.results.clear()
        if self.spot is not None and self.spot[0] == key:
            self.spot = None
        if self.query is not None and self.query.photo == key:
            self.query = None
        self.changed()

    def clear(self) -> None:
        """Forget all photos."""
        for key in list(self.photos):
            self.remove(key)

    def wipe(self) -> None:
        """Forget everything that was painted, and all masks."""
        self.strokes.clear()
        self.masks.clear()
        self._wiped += 1
        self.changed()

    def photo(self, key: Any) -> Photo:
        """A photo by its key, as a page said it.

        Raises:
            OptionError: There is none.
        """
        photo = self.photos.get(key) if isinstance(key, int) else None
        if photo is None:
            raise OptionError("This photo is no longer there. Add it again.")
        return photo

    def current(self, tab: str) -> Photo | None:
        """The photo that a tab shows large: the chosen one, else the first."""
        return self.photos.get(self.chosen.get(tab, -1)) or next(iter(self.photos.values()), None)


class Sessions:
    """All pages that are open; those that were used longest ago give way.

    Args:
        limits: Of the app.
        on_drop: Called with the name of each session that is forgotten.
    """

    def __init__(self, limits: Limits, on_drop: Callable[[str], object] = lambda name: None) -> None:
        self._limits = limits
        self._on_drop = on_drop
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._sessions)

    def get(self, name: str, stamp: str = "") -> Session:
        """The session of a page; a new one if there is none.

        Args:
            name: Which page, as Gradio calls it.
            stamp: What the page kept of its session. If that is gone, the new one knows that it was lost.
        """
        now = time.monotonic()
        with self._lock:
            session = self._sessions.get(name)
            if session is None:
                session = self._sessions[name] = Session(name, self._limits)
                session.was_lost = not session.is_of(stamp)
            session.used = now
            self._sessions.move_to_end(name)
            old = [n for n, s in self._sessions.items() if now - s.used > self._limits.idle_s]
            old += [n for n in self._sessions if n not in old][: max(len(self._sessions) - self._limits.sessions, 0)]
        for other in old:
            self.drop(other)
        return session

    def drop(self, name: str) -> None:
        """Forget a session: its page was closed."""
        with self._lock:
            session = self._sessions.pop(name, None)
        if session is not None:
            session.clear()
            self._on_drop(name)
