"""The photos at the top of the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from amradio.app.markup import strip
from amradio.app.photos import clean_name, read_photo, sample_photos
from amradio.app.visit import Visit
from amradio.errors import ImageError

FORGOTTEN = (
    "This page was idle or out of reach for a while, or was opened again: its photos were forgotten. Add them again."
)

_NOTES = 5


class Upload(NamedTuple):
    """A file that was just uploaded.

    Attributes:
        path: Where the server put it; the page has no say in it (see `amradio.app.gate`).
        name: What the person calls it.
    """

    path: str
    name: str


def add_uploads(visit: Visit, uploads: Sequence[Upload] | None) -> str:
    """Take uploaded photos; the files are removed from the disk as soon as they are read.

    What cannot be used is noted, and stops nothing.

    Returns:
        The strip of photos.
    """
    uploads = uploads or []
    refused: list[str] = []
    limits, room = visit.house.limits, visit.session.room
    for i, upload in enumerate(visit.steps(uploads, len(uploads), "Reading the photos")):
        content = visit.house.uploads.take(upload.path, limits.file_bytes if i < room else 0)
        if i >= room:
            continue
        try:
            name = clean_name(upload.name)
            visit.session.add(name, read_photo(content, name, limits))
        except ImageError as error:
            refused.append(f"Left out: {error}")
    if len(refused) > _NOTES:
        refused[_NOTES:] = [f"{len(refused) - _NOTES} more files could not be used."]
    if len(uploads) > room:
        refused.append(f"{len(uploads) - room} photos were left out: a page holds {limits.photos}. Remove some first.")
    visit.session.notes = refused
    return shown(visit)


def add_samples(visit: Visit) -> str:
    """Take the sample photos, those that are not there already."""
    present = {photo.name for photo in visit.session.photos.values()}
    for name, picture in sample_photos():
        if name not in present and visit.session.room:
            visit.session.add(name, picture)
    visit.session.notes = []
    return shown(visit)


def remove_photo(visit: Visit) -> str:
    """Remove the photo of the event."""
    visit.session.remove(visit.session.photo(visit.event.get("photo")).key)
    return shown(visit)


def remove_all(visit: Visit) -> str:
    """Remove all photos."""
    visit.session.clear()
    visit.session.notes = []
    return shown(visit)


def dismiss(visit: Visit) -> str:
    """Take the notes away, which were read."""
    visit.session.notes = []
    return shown(visit)


def forgotten(visit: Visit) -> str:
    """Tell a page whose session is gone, because it was loaded again, that its photos are."""
    if not visit.session.photos:
        visit.session.notes = [FORGOTTEN]
    return shown(visit)


def shown(visit: Visit) -> str:
    """The strip of photos, and what there is to say about them."""
    return strip(list(visit.session.photos.values()), visit.house.limits.photos, visit.session.notes)
