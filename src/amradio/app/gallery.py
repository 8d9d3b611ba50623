"""The photos at the top of the page."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import NamedTuple

from amradio.app.markup import strip
from amradio.app.photos import clean_name, read_photo, sample_photos
from amradio.app.visit import Visit
from amradio.errors import ImageError


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

    What cannot be used is said, and stops nothing.

    Returns:
        The strip of photos.
    """
    uploads = uploads or []
    refused: list[str] = []
    room = visit.session.room
    for i, upload in enumerate(visit.steps(uploads, len(uploads), "Reading the photos")):
        content = taken(upload, visit.house.limits.file_bytes if i < room else 0)
        if i >= room:
            continue
        try:
            name = clean_name(upload.name)
            visit.session.add(name, read_photo(content, name, visit.house.limits))
        except ImageError as error:
            refused.append(str(error))
    for reason in refused[:5]:
        visit.on_notice(f"Left out: {reason}")
    if len(refused) > 5:
        visit.on_notice(f"{len(refused) - 5} more files could not be used.")
    if len(uploads) > room:
        visit.on_notice(
            f"{len(uploads) - room} photos were left out: a page holds {visit.house.limits.photos}. Remove some first."
        )
    return shown(visit)


def add_samples(visit: Visit) -> str:
    """Take the sample photos, those that are not there already."""
    present = {photo.name for photo in visit.session.photos.values()}
    for name, picture in sample_photos():
        if name not in present and visit.session.room:
            visit.session.add(name, picture)
    return shown(visit)


def remove_photo(visit: Visit) -> str:
    """Remove the photo of the event."""
    visit.session.remove(visit.session.photo(visit.event.get("photo")).key)
    return shown(visit)


def remove_all(visit: Visit) -> str:
    """Remove all photos."""
    visit.session.clear()
    return shown(visit)


def shown(visit: Visit) -> str:
    """The strip of photos."""
    return strip(visit.session.photos.values(), visit.house.limits.photos)


def taken(upload: Upload, most: int) -> bytes:
    """The content of an uploaded file, which is removed; at most one byte more than `most`."""
    try:
        with open(upload.path, "rb") as file:
            content = file.read(most + 1)
    except OSError:
        content = b""
    for remove, path in ((os.unlink, upload.path), (os.rmdir, os.path.dirname(upload.path))):
        with contextlib.suppress(OSError):  # another upload of the same content uses the folder too
            remove(path)
    return content
