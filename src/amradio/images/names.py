"""Many names in little memory, and names that are fit for files on every system."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from array import array
from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np

_MAX_ID_BYTES = 180  # leaves room for endings and temporary names within the 255 bytes of every file system
_WINDOWS_DEVICES = {"con", "prn", "aux", "nul", *(f"{d}{i}" for d in ("com", "lpt") for i in range(10))}
_DIGEST_BYTES = 16
_DIGITS = re.compile("[0-9]+")
_PLAIN = re.compile(r"[A-Za-z0-9._+=@-]+")


class Names(Sequence[str]):
    """A list of texts that takes 8 bytes for each beside the text itself, where a list of `str` takes about 60.

    Grows at its end only. Names that are not valid Unicode, as file systems allow, are kept too.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._text = bytearray()
        self._ends = array("q", [0])
        for name in names:
            self.append(name)

    def append(self, name: str) -> None:
        """Add one name at the end."""
        self._text += name.encode("utf-8", "surrogatepass")
        self._ends.append(len(self._text))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def encoded(self, index: int) -> bytes:
        """One name in UTF-8; `index` counts from 0."""
        return bytes(self._text[self._ends[index] : self._ends[index + 1]])

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.encoded(index % len(self)).decode("utf-8", "surrogatepass")


class Digests:
    """Finds texts that occur more than once among millions, from 16 bytes for each."""

    def __init__(self) -> None:
        self._digests = bytearray()

    def append(self, text: str) -> None:
        """Add one text."""
        encoded = text.encode("utf-8", "surrogatepass")
        self._digests += hashlib.blake2b(encoded, digest_size=_DIGEST_BYTES).digest()

    def repeated(self) -> tuple[np.ndarray, np.ndarray]:
        """Compare all texts.

        Returns:
            Two bool arrays [N]: whether the same text was added before, and whether it was added more than once.
        """
        words = np.frombuffer(self._digests, dtype=np.uint64).reshape(-1, 2)  # [N, 2]
        order = np.lexsort((words[:, 1], words[:, 0]))  # stable: the first of equal ones stays first
        same = (words[order[1:]] == words[order[:-1]]).all(axis=1)
        before, several = np.zeros(len(words), dtype=bool), np.zeros(len(words), dtype=bool)
        before[order[1:][same]] = True
        several[order[1:][same]] = several[order[:-1][same]] = True
        return before, several


def natural_key(text: str) -> str:
    """Sort key under which ``a2`` comes before ``a10``, without regard to case.

    A text, and not a tuple, because a folder may have a million names: a run of digits is led by how many digits it
    has, so that texts compare as their numbers do.
    """
    return f"{_DIGITS.sub(_counted, text.casefold())}\0{text}"


def _counted(digits: re.Match[str]) -> str:
    number = digits[0].lstrip("0")
    return f"0{chr(1 + min(len(number), 0xD000))}{number}"


def folded(name: str) -> str:
    """Equal for names that some file system takes for the same file."""
    return name.lower() if name.isascii() else unicodedata.normalize("NFC", name.casefold())


def portable(name: str) -> str:
    """Make a relative path a file name that every system accepts, readable and at most 180 bytes long."""
    fit = name.replace("/", "__")
    if not _PLAIN.fullmatch(fit):  # which nearly all names are; this is slow
        fit = "".join(c if c.isalnum() or c in "._-+=@" else "_" for c in unicodedata.normalize("NFC", fit))
    if fit.startswith((".", "-")) or fit.split(".")[0].casefold() in _WINDOWS_DEVICES:
        fit = f"_{fit}"
    return with_digest(fit, name) if len(fit.encode()) > _MAX_ID_BYTES else fit


def with_digest(name: str, distinguished_by: str) -> str:
    """Tell a name from an equal one by a digest of something else."""
    digest = hashlib.sha256(os.fsencode(distinguished_by)).hexdigest()[:12]
    return f"{name.encode()[: _MAX_ID_BYTES - 13].decode(errors='ignore')}-{digest}"


def unique_stems(paths: Sequence[str]) -> list[str]:
    """Names of files without ending, and without folders unless two files would be called the same."""
    stems = [os.path.splitext(os.path.basename(p))[0] for p in paths]
    if len({folded(s) for s in stems}) == len(stems):
        return stems
    full = [os.path.abspath(p) for p in paths]
    root = os.path.commonpath([os.path.dirname(p) for p in full])
    return [os.path.splitext(os.path.relpath(p, root))[0].replace(os.sep, "/") for p in full]
