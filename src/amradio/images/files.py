"""Pictures in files: files, folders and glob patterns become a set with stable names."""

from __future__ import annotations

import glob
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from amradio.errors import OptionError
from amradio.images.dataset import ImageSet
from amradio.images.names import Digests, Names, folded, natural_key, portable, with_digest
from amradio.images.sources import PICTURE_SUFFIXES, ImageFile


class Found(NamedTuple):
    """A file that was named or found.

    Attributes:
        root: The folder that the name counts from.
        name: Path from there, with forward slashes; the id is made of it.
        real_path: What tells two names of one file.
    """

    root: str
    name: str
    real_path: str


class FileRows:
    """Pictures in files (see `amradio.images.dataset.Rows`).

    Args:
        found: The files.
        unique: Take a file that comes twice only once, at its first place.
    """

    def __init__(self, found: Iterable[Found], *, unique: bool = True) -> None:
        roots: dict[str, int] = {}
        names, root_of, files = Names(), array("i"), Digests()
        for f in found:
            root_of.append(roots.setdefault(f.root, len(roots)))
            names.append(f.name)
            files.append(f.real_path)
        self._roots = list(roots)
        self._names = names
        self._root_of = np.frombuffer(root_of, dtype=np.intc)
        if unique and (again := files.repeated()[0]).any():
            kept = np.flatnonzero(~again)
            self._names, self._root_of = Names(names[int(i)] for i in kept), self._root_of[kept]
        ids = Digests()
        for name in self._names:
            ids.append(folded(portable(name)))
        self._id_is_shared = ids.repeated()[1]

    def __len__(self) -> int:
        return len(self._names)

    def source(self, row: int) -> ImageFile:
        """Make the source of one picture."""
        name, path = self._names[row], self._path(row)
        fit = portable(name)
        return ImageFile(Path(path), with_digest(fit, path) if self._id_is_shared[row] else fit)

    def stamps(self, rows: np.ndarray) -> Iterator[bytes]:
        """Names, sizes and times of change of files; a file that is gone counts as such."""
        for row in rows.tolist():
            yield self._names.encoded(row)
            path = self._path(row)
            if self._id_is_shared[row]:
                yield os.fsencode(path)
            yield file_stamp(path)

    def _path(self, row: int) -> str:
        return os.path.join(self._roots[self._root_of[row]], self._names[row])


def expand(paths: Sequence[str | os.PathLike[str]]) -> ImageSet:
    """List the pictures that paths, folders and glob patterns mean, without labels.

    A file that is named, also by a pattern, is always taken. A folder is searched recursively, in natural order (2
    before 10), for files that end in one of `PICTURE_SUFFIXES`; hidden files and folders are left out, and links that
    lead in a circle are followed once. A file that is reached twice is taken once, at its first place.

    The id of a picture is its path relative to the folder (or the fixed part of the pattern) it was found by, made fit
    for a file name: ``sub/a b.jpg`` becomes ``sub__a_b.jpg``. Pictures whose ids would be equal, also on a file system
    that ignores case, all carry a digest of their path.

    Args:
        paths: Files, folders, or patterns with ``*``, ``?``, ``[...]`` and ``**``.

    Returns:
        At least one picture, in the order asked for.

    Raises:
        OptionError: A path does not exist, a pattern matches nothing, or a folder has no pictures or cannot be read.
    """
    if isinstance(paths, (str, os.PathLike)):
        raise OptionError(f"Expected a list of paths, got one path: [{os.fspath(paths)!r}] would be a list.")
    names = [os.fspath(p) for p in paths]
    if not names:
        raise OptionError("No pictures were named. Give files, folders or patterns.")
    missing: list[str] = []
    rows = FileRows(_expand_all(names, missing))
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise OptionError(f"No such file or folder, nor a pattern that matches any: {shown}.")
    return ImageSet(rows, name=", ".join(names))


def walk(folder: str, root: str, prefix: str = "", listing: Listing | None = None) -> Iterator[Found]:
    """Find the pictures of a folder, its own files before those of its sub-folders.

    Args:
        folder: Where to look.
        root: What names count from.
        prefix: Path from the root to the folder, empty or with a slash at its end.
        listing: Of the folder, if it is known already.

    Yields:
        Files in natural order; hidden ones are left out, and a folder that is reached twice is searched once.

    Raises:
        OptionError: A folder cannot be read.
    """
    return _walk(folder, root, prefix, set(), listing)


class Listing(NamedTuple):
    """Names in a folder, in natural order, without hidden ones.

    Attributes:
        files: Also links to files, and links that lead nowhere.
        folders: Also links to folders.
        links: The files that are links.
    """

    files: list[str]
    folders: list[str]
    links: set[str]


def list_folder(folder: str) -> Listing:
    """List a folder, not its sub-folders.

    Raises:
        OptionError: It cannot be read.
    """
    files, folders, links = [], [], set()
    try:
        with os.scandir(folder) as scan:
            for entry in scan:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    folders.append(entry.name)
                    continue
                files.append(entry.name)
                if entry.is_symlink():
                    links.add(entry.name)
    except OSError as error:
        raise OptionError(f"The folder {folder} cannot be read: {error.strerror}.") from error
    files.sort(key=natural_key)
    folders.sort(key=natural_key)
    return Listing(files, folders, links)


def file_stamp(path: str) -> bytes:
    """Size and time of change of a file, or a mark that it cannot be read."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return b"cannot be read"
    return np.array([status.st_size, status.st_mtime_ns], dtype="<i8").tobytes()


def no_pictures(folder: str) -> OptionError:
    """The error for a folder without pictures."""
    return OptionError(
        f"The folder {folder} has no pictures in it, nor in its sub-folders. Looked for files that end in "
        f"{' '.join(sorted(PICTURE_SUFFIXES))}; a file with another ending can be named itself."
    )


def is_picture(name: str) -> bool:
    """Whether a file name ends as pictures do."""
    return os.path.splitext(name)[1].lower() in PICTURE_SUFFIXES


def _expand_all(paths: list[str], missing: list[str]) -> Iterator[Found]:
    for path in paths:
        empty = True
        for found in _expand_one(path):
            empty = False
            yield found
        if empty and os.path.isdir(path):
            raise no_pictures(path)
        if empty:
            missing.append(path)


def _expand_one(path: str) -> Iterator[Found]:
    if os.path.isdir(path):
        yield from walk(path, path)
    elif os.path.lexists(path):
        yield Found(os.path.dirname(path), os.path.basename(path), os.path.realpath(path))
    elif glob.has_magic(path):
        yield from _matches(path)


def _matches(pattern: str) -> Iterator[Found]:
    parts = Path(pattern).parts
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    base, wild = Path(*parts[:fixed]), list(parts[fixed:])
    if wild[-1] == "**":
        wild.append("*")
    try:
        # Not glob.glob, which follows links under ** and so walks links that lead in a circle forty times.
        found = [m.relative_to(base).as_posix() for m in base.glob("/".join(wild))]
    except ValueError as error:
        raise OptionError(f"The pattern {pattern} is not valid: {error}.") from error
    for name in sorted((n for n in found if not _is_hidden(n)), key=natural_key):
        match = base / name
        if not match.is_dir():
            yield Found(str(base), name, os.path.realpath(match))
        elif "**" not in wild:  # which lists what is inside by itself
            yield from walk(str(match), str(base), f"{name}/")


def _is_hidden(relative: str) -> bool:
    return any(part.startswith(".") for part in relative.split("/"))


def _walk(folder: str, root: str, prefix: str, seen: set[str], listing: Listing | None = None) -> Iterator[Found]:
    real = os.path.realpath(folder)
    if real in seen:
        return
    seen.add(real)
    listing = listing or list_folder(folder)
    for name in filter(is_picture, listing.files):
        # One realpath for a folder, not one for each file: a million files on a network drive are slow otherwise.
        target = os.path.join(real, name)
        yield Found(root, prefix + name, os.path.realpath(target) if name in listing.links else target)
    for name in listing.folders:
        yield from _walk(os.path.join(folder, name), root, f"{prefix}{name}/", seen)
