"""One way to look into a folder and into a tar archive: what lies where, and the content of files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from copy import copy
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from amradio.errors import DatasetError, ImageError, OptionError
from amradio.images.files import file_stamp, is_picture, list_folder, walk
from amradio.images.names import natural_key
from amradio.images.sources import EncodedImage, ImageFile, ImageSource
from amradio.images.tarfiles import OpenFiles, members, read_member


class Storage(Protocol):
    """Files in folders, by names with forward slashes that count from a root; the root itself is the empty name.

    Hidden files and folders are left out.
    """

    @property
    def location(self) -> str:
        """Of the root, for people: a path, or an archive and a folder in it."""
        ...

    def folders(self, folder: str) -> list[str]:
        """Names of the sub-folders of a folder, in natural order; none if there is no such folder."""
        ...

    def files(self, folder: str) -> list[str]:
        """Names of the files directly in a folder, in natural order; none if there is no such folder."""
        ...

    def is_file(self, name: str) -> bool:
        """Whether there is a file of this name."""
        ...

    def is_folder(self, name: str) -> bool:
        """Whether there is a folder of this name."""
        ...

    def pictures(self, folder: str) -> Iterator[str]:
        """Names, from a folder, of the files at any depth under it that end as pictures do."""
        ...

    def read(self, name: str) -> bytes:
        """The content of a file.

        Raises:
            ImageError: It cannot be read.
        """
        ...

    def image(self, name: str, image_id: str) -> ImageSource:
        """The source of a picture, under an id."""
        ...

    def stamp(self, name: str) -> bytes:
        """What tells that a file has changed, without reading it."""
        ...

    def at(self, folder: str) -> Storage:
        """The same files, seen from a folder."""
        ...


def open_storage(path: str | os.PathLike[str]) -> Storage:
    """Look into a folder or a tar archive.

    Raises:
        DatasetError: There is none, or the archive is compressed or damaged.
    """
    place = os.path.expanduser(os.fspath(path))
    if os.path.isdir(place):
        return FolderStorage(place)
    if not os.path.lexists(place):
        raise DatasetError(f"There is no folder or tar archive {path}.")
    return TarStorage(place)


def below(folder: str, name: str) -> str:
    """The name of what is called `name` in a folder."""
    return f"{folder}/{name}" if folder else name


class FolderStorage:
    """A folder on disk (see `Storage`)."""

    def __init__(self, root: str) -> None:
        self._root = root

    @property
    def location(self) -> str:
        """The path."""
        return self._root

    def folders(self, folder: str) -> list[str]:
        """See `Storage`."""
        return self._list(folder)[1]

    def files(self, folder: str) -> list[str]:
        """See `Storage`."""
        return self._list(folder)[0]

    def is_file(self, name: str) -> bool:
        """See `Storage`."""
        return os.path.isfile(self._path(name))

    def is_folder(self, name: str) -> bool:
        """See `Storage`."""
        return os.path.isdir(self._path(name))

    def pictures(self, folder: str) -> Iterator[str]:
        """See `Storage`."""
        path = self._path(folder)
        try:
            yield from (found.name for found in walk(path, path))
        except OptionError as error:
            raise DatasetError(str(error)) from error

    def read(self, name: str) -> bytes:
        """See `Storage`."""
        path = self._path(name)
        try:
            return Path(path).read_bytes()
        except OSError as error:
            raise ImageError(f"Cannot read {path}: {error.strerror or error}.") from error

    def image(self, name: str, image_id: str) -> ImageFile:
        """See `Storage`."""
        return ImageFile(Path(self._path(name)), image_id)

    def stamp(self, name: str) -> bytes:
        """Size and time of change."""
        return file_stamp(self._path(name))

    def at(self, folder: str) -> FolderStorage:
        """See `Storage`."""
        return FolderStorage(self._path(folder))

    def _path(self, name: str) -> str:
        return os.path.join(self._root, *name.split("/")) if name else self._root

    def _list(self, folder: str) -> tuple[list[str], list[str]]:
        path = self._path(folder)
        if not os.path.isdir(path):
            return [], []
        try:
            listing = list_folder(path)
        except OptionError as error:
            raise DatasetError(str(error)) from error
        return listing.files, listing.folders


class TarStorage:
    """A tar archive (see `Storage`); its headers are read once.

    Raises:
        DatasetError: The archive cannot be read.
    """

    def __init__(self, path: str) -> None:
        self._path, self._prefix, self._open = path, "", OpenFiles()
        self._members: dict[str, tuple[int, int]] = {}
        self._folders: dict[str, dict[str, None]] = {"": {}}
        self._files: dict[str, list[str]] = {}
        for member in members(path):
            if any(part.startswith(".") for part in member.name.split("/")):
                continue
            folder, _, file = member.name.rpartition("/")
            if member.name not in self._members:  # of two members of one name the last counts, as when unpacked
                self._files.setdefault(folder, []).append(file)
            self._members[member.name] = (member.offset, member.size)
            self._add_folder(folder)
        for names in self._files.values():
            names.sort(key=natural_key)

    @property
    def location(self) -> str:
        """The path of the archive, and the folder in it."""
        return below(self._path, self._prefix) if self._prefix else self._path

    def folders(self, folder: str) -> list[str]:
        """See `Storage`."""
        return sorted(self._folders.get(self._name(folder), ()), key=natural_key)

    def files(self, folder: str) -> list[str]:
        """See `Storage`."""
        return list(self._files.get(self._name(folder), ()))

    def is_file(self, name: str) -> bool:
        """See `Storage`."""
        return self._name(name) in self._members

    def is_folder(self, name: str) -> bool:
        """See `Storage`."""
        return self._name(name) in self._folders

    def pictures(self, folder: str) -> Iterator[str]:
        """See `Storage`."""
        yield from filter(is_picture, self.files(folder))
        for name in self.folders(folder):
            yield from (f"{name}/{picture}" for picture in self.pictures(below(folder, name)))

    def read(self, name: str) -> bytes:
        """See `Storage`."""
        if (member := self._members.get(self._name(name))) is None:
            raise ImageError(f"Cannot read {name} in {self.location}: there is no such member.")
        return read_member(self._open, self._path, self._name(name), *member)

    def image(self, name: str, image_id: str) -> EncodedImage:
        """See `Storage`."""
        return EncodedImage(partial(self.read, name), image_id, f"{self._path}/{self._name(name)}")

    def stamp(self, name: str) -> bytes:
        """Size and time of change of the archive, place and size of the member."""
        place = self._members.get(self._name(name), (-1, -1))
        return file_stamp(self._path) + np.array(place, dtype="<i8").tobytes()

    def at(self, folder: str) -> TarStorage:
        """See `Storage`."""
        view = copy(self)
        view._prefix = self._name(folder)
        return view

    def _name(self, name: str) -> str:
        return below(self._prefix, name) if name else self._prefix

    def _add_folder(self, folder: str) -> None:
        if folder in self._folders:
            return
        self._folders[folder] = {}
        parent, _, own = folder.rpartition("/")
        self._add_folder(parent)
        self._folders[parent][own] = None
