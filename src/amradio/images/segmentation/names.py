"""Lists of the names of pictures: reading them, and finding what they mean."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from amradio.errors import DatasetError
from amradio.images.files import is_picture


class NameList(NamedTuple):
    """Names of pictures that a file lists.

    Attributes:
        names: As they stand there.
        location: Of the file.
    """

    names: tuple[str, ...]
    location: str


class Resolved(NamedTuple):
    """What listed names mean.

    Attributes:
        keys: Of pictures that exist, in the order of the list.
        missing: Names that mean none.
    """

    keys: list[str]
    missing: list[str]


def read_list_file(path: str | os.PathLike[str]) -> NameList:
    """Read a list of names from a file on disk.

    Raises:
        DatasetError: It cannot be read, or is empty.
    """
    try:
        return read_names(Path(path).expanduser().read_bytes(), os.fspath(path))
    except OSError as error:
        raise DatasetError(f"The list {path} cannot be read: {error.strerror or error}.") from error


def read_names(content: bytes, location: str) -> NameList:
    """Read a list of names: one a line, without or with the ending of the picture or a folder before it.

    What follows behind white space does not count, as in lists that name the mask too; nor do empty lines and lines
    that begin with ``#``.

    Raises:
        DatasetError: It is no text, or is empty.
    """
    try:
        lines = [line.strip() for line in content.decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise DatasetError(f"The list {location} is no text in UTF-8: {error}.") from error
    names = tuple(line for line in lines if line and not line.startswith("#"))
    if not names:
        raise DatasetError(f"The list {location} is empty. It must name pictures, one a line.")
    return NameList(names, location)


def resolve(listed: NameList, keys: Collection[str]) -> Resolved:
    """Find the pictures that a list means.

    Args:
        listed: The names.
        keys: Of all pictures: paths without ending. A name without its folders is enough where it is unique.

    Raises:
        DatasetError: A picture is listed twice.
    """
    by_file_name: dict[str, str | None] = {}
    for key in keys:
        last = key.rpartition("/")[2]
        by_file_name[last] = None if last in by_file_name else key
    known = set(keys)
    found: dict[str, None] = {}
    missing = []
    for name in listed.names:
        meant = (c if c in known else by_file_name.get(c) for c in _candidates(name))
        found_key = next(filter(None, meant), None)
        if found_key is None:
            missing.append(name)
        elif found_key in found:
            raise DatasetError(f"The list {listed.location} names {name} twice.")
        else:
            found[found_key] = None
    return Resolved(list(found), missing)


def _candidates(name: str) -> Iterable[str]:
    """What a line of a list may mean, the most literal first."""
    for text in (name, name.split()[0]):  # names may have spaces
        path = text.replace("\\", "/").removeprefix("./").lstrip("/")
        yield path  # a name without ending may have a dot in it
        stem = path.rpartition(".")[0] if is_picture(path) else path
        yield stem
        yield stem.rpartition("/")[2]
