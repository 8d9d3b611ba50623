"""One request of a page, and what the whole app shares."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeVar

from amradio.app.limits import Limits
from amradio.app.sessions import Session, Sessions
from amradio.app.uploads import Uploads
from amradio.errors import OptionError

if TYPE_CHECKING:
    from amradio.app.collection import Collection
    from amradio.app.model import AppModel

_T = TypeVar("_T")


class Keep(Enum):
    """What a function returns in place of HTML for a part of the page that stays as it is."""

    KEEP = "keep"


KEEP = Keep.KEEP


@dataclass(frozen=True)
class House:
    """What all pages share.

    Attributes:
        model: What looks at the photos.
        sessions: Of the pages.
        limits: What they may ask for.
        collection: The pictures that the app was started with, if any.
        uploads: Files that were uploaded and not yet read.
    """

    model: AppModel
    sessions: Sessions
    limits: Limits
    collection: Collection | None = None
    uploads: Uploads = field(default_factory=Uploads)


@dataclass(frozen=True)
class Visit:
    """One request.

    Attributes:
        house: What all share.
        session: Who asks.
        event: What was clicked, as the page said it: nothing in it is trusted.
        on_progress: Called with the done share from 0 to 1 and what is being done.
        on_notice: Called with sentences for people that are no errors.
    """

    house: House
    session: Session
    event: Mapping[str, Any] = field(default_factory=dict)
    on_progress: Callable[[float, str], object] = lambda share, what: None
    on_notice: Callable[[str], object] = lambda text: None

    def steps(self, items: Iterable[_T], total: int, what: str) -> Iterator[_T]:
        """Go through items, saying how far it got."""
        self.on_progress(0.0, what)
        for done, item in enumerate(items, 1):
            yield item
            self.on_progress(done / max(total, 1), what)

    def number(self, name: str, low: float = 0.0, high: float = 1.0) -> float:
        """A number of the event.

        Raises:
            OptionError: It is missing, no number, or outside.
        """
        value = self.event.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise OptionError("The page sent something that does not fit; reload it.")
        return float(value)
