"""Which pictures are meant: files, folders and glob patterns become a list of sources with stable names."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from amradio.errors import OptionError

if TYPE_CHECKING:
    from PIL.Image import Image

PICTURE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".dib"}
    | {".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".avif"}
)
"""File name endings, in lower case, that count as pictures inside a folder."""

_MAX_ID_BYTES = 180  # leaves room for endings and temporary names within the 255 bytes of every file system
_WINDOWS_DEVICES = {"con", "prn", "aux", "nul", *(f"{d}{i}" for d in ("com", "lpt") for i in range(10))}


class ImageSource(Protocol):
    """Where one picture comes from. Members of archives and rows of data sets can be sources beside files."""

    @property
    def id(self) -> str:
        """Unique in its list, stable between runs, and a file name on every system."""
        ...

    @property
    def location(self) -> str:
        """For people: a path, or an archive and a member."""
        ...

    def decode(self, *, max_pixels: int, background: tuple[int, int, int]) -> Image:
        """Decode the picture as `amradio.images.decode` does.

        Raises:
            ImageError: It cannot be decoded.
        """
        ...


@dataclass(frozen=True)
class ImageFile:
    """A picture in a file.

    Attributes:
        path: Of the file, as it was named or found.
        id: See `ImageSource`.
    """

    path: Path
    id: str

    @property
    def location(self) -> str:
        """The path."""
        return str(self.path)

    def decode(self, *, max_pixels: int, background: tuple[int, int, int]) -> Image:
        """Decode the file.

        Raises:
            ImageError: It cannot be decoded.
        """
        from amradio.images.decode import decode

        return decode(self.path, max_pixels=max_pixels, background=background)


@dataclass(frozen=True)
class _Found:
    path: str
    real_path: str  # what tells two names of one file
    name: str  # relative to what was asked for, with forward slashes


def expand(paths: Sequence[str | os.PathLike[str]]) -> list[ImageFile]:
    """List the pictures that paths, folders and glob patterns mean.

    A file that is named, also by a pattern, is always taken. A folder is searched recursively, in natural order (2
    before 10), for files that end in one of `PICTURE_SUFFIXES`; hidden files and folders are left out, and links that
    lead in a circle are followed once. A file that is reached twice is taken once, at its first place.

    The id of a picture is its path relative to the folder (or the fixed part of the pattern) it was found by, made fit
    for a file name: ``sub/a b.jpg`` becomes ``sub__a_b.jpg``. Pictures whose ids would be equal, also on a file system
    that ignores case, all carry a digest of their path.

    Args:
        paths: Files, folders, or patterns with ``*``, ``?``, ``[...]`` and ``**``.

    Returns:
        At least one source, in the order asked for.

    Raises:
        OptionError: A path does not exist, a pattern matches nothing, or a folder has no pictures or cannot be read.
    """
    if isinstance(paths, (str, os.PathLike)):
        raise OptionError(f"Expected a list of paths, got one path: [{os.fspath(paths)!r}] would be a list.")
    found: list[_Found] = []
    missing: list[str] = []
    for path in [os.fspath(p) for p in paths]:
        part = list(_expand_one(path))
        if part:
            found += part
        elif os.path.isdir(path):
            raise OptionError(
                f"The folder {path} has no pictures in it, nor in its sub-folders. Looked for files that end in "
                f"{' '.join(sorted(PICTURE_SUFFIXES))}; a file with another ending can be named itself."
            )
        else:
            missing.append(path)
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise OptionError(f"No such file or folder, nor a pattern that matches any: {shown}.")
    if not found:
        raise OptionError("No pictures were named. Give files, folders or patterns.")
    unique: dict[str, _Found] = {}
    for f in found:
        unique.setdefault(f.real_path, f)
    return [ImageFile(Path(f.path), name) for f, name in zip(unique.values(), _ids(list(unique.values())), strict=True)]


def natural_key(text: str) -> list[tuple[int, int, str]]:
    """Sort key under which ``a2`` comes before ``a10``."""
    parts = re.split(r"([0-9]+)", text)
    return [(0, int(p), p) if i % 2 else (1, 0, p.casefold()) for i, p in enumerate(parts)] + [(2, 0, text)]


def _expand_one(path: str) -> Iterator[_Found]:
    if os.path.isdir(path):
        yield from _walk(path, "", set())
    elif os.path.lexists(path):
        yield _Found(path, os.path.realpath(path), os.path.basename(path))
    elif glob.has_magic(path):
        yield from _matches(path)


def _matches(pattern: str) -> Iterator[_Found]:
    parts = Path(pattern).parts
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    base, wild = Path(*parts[:fixed]), list(parts[fixed:])
    if wild[-1] == "**":
        wild.append("*")
    try:
        # Not glob.glob, which follows links under ** and so walks links that lead in a circle forty times.
        found = [m for m in base.glob("/".join(wild)) if not _is_hidden(m.relative_to(base))]
    except ValueError as error:
        raise OptionError(f"The pattern {pattern} is not valid: {error}.") from error
    for match in sorted(found, key=lambda m: natural_key(str(m))):
        name = match.relative_to(base).as_posix()
        if not match.is_dir():
            yield _Found(str(match), os.path.realpath(match), name)
        elif "**" not in wild:  # which lists what is inside by itself
            yield from _walk(str(match), f"{name}/", set())


def _is_hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _walk(folder: str, prefix: str, seen: set[str]) -> Iterator[_Found]:
    """Pictures of a folder, its own files before its sub-folders."""
    real = os.path.realpath(folder)
    if real in seen:
        return
    seen.add(real)
    try:
        with os.scandir(folder) as scan:
            entries = sorted((e for e in scan if not e.name.startswith(".")), key=lambda e: natural_key(e.name))
    except OSError as error:
        raise OptionError(f"The folder {folder} cannot be read: {error.strerror}.") from error
    folders = []
    for entry in entries:
        if entry.is_dir():
            folders.append(entry)
        elif os.path.splitext(entry.name)[1].lower() in PICTURE_SUFFIXES:
            # One realpath for a folder, not one for each file: a million files on a network drive are slow otherwise.
            target = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(real, entry.name)
            yield _Found(entry.path, target, prefix + entry.name)
    for entry in folders:
        yield from _walk(entry.path, f"{prefix}{entry.name}/", seen)


def _ids(found: Sequence[_Found]) -> list[str]:
    ids = [_portable(f.name) for f in found]
    counts = Counter(map(_folded, ids))
    return [_with_digest(i, f.path) if counts[_folded(i)] > 1 else i for i, f in zip(ids, found, strict=True)]


def _folded(name: str) -> str:
    """Equal for names that some file system takes for the same file."""
    return unicodedata.normalize("NFC", name.casefold())


def _portable(name: str) -> str:
    """Make a relative path a file name that every system accepts, readable and at most `_MAX_ID_BYTES` long."""
    parts = unicodedata.normalize("NFC", name).replace("/", "__")
    portable = "".join(c if c.isalnum() or c in "._-+=@" else "_" for c in parts)
    if portable.startswith((".", "-")) or portable.split(".")[0].casefold() in _WINDOWS_DEVICES:
        portable = f"_{portable}"
    if len(portable.encode()) > _MAX_ID_BYTES:
        return _with_digest(portable, name)
    return portable


def _with_digest(name: str, distinguished_by: str) -> str:
    digest = hashlib.sha256(os.fsencode(distinguished_by)).hexdigest()[:12]
    return f"{name.encode()[: _MAX_ID_BYTES - 13].decode(errors='ignore')}-{digest}"
