"""Uploads on their way: how much room they may take, and when their files can be removed.

Gradio names a file by its content and its name, so two uploads of one photo are one file. It is removed when both have
been read, and while no other upload is on its way, which could be about to write the same one.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import Counter
from collections.abc import Iterable
from pathlib import Path


class Uploads:
    """What was uploaded to an app, and what is being uploaded."""

    def __init__(self) -> None:
        self._claims: Counter[str] = Counter()  # how often a file is still to be read
        self._done: set[str] = set()  # files that nobody has to read any more
        self._coming = 0
        self._reserved = 0
        self._lock = threading.Lock()

    def begin(self, length: int, folder: Path, most: int) -> bool:
        """Make room for an upload that begins.

        Args:
            length: In bytes, as it was declared.
            folder: Where uploads are written.
            most: Bytes of everything there.

        Returns:
            Whether there is room; only then must `end` be called.
        """
        with self._lock:
            if _bytes_in(folder) + self._reserved + length > most:
                return False
            self._reserved += length
            self._coming += 1
            return True

    def arrived(self, length: int) -> None:
        """So many bytes of an upload are on the disk, where they are counted from now on."""
        with self._lock:
            self._reserved -= length

    def end(self, missing: int, paths: Iterable[str] = ()) -> None:
        """An upload is over.

        Args:
            missing: Bytes that were declared and never came.
            paths: Its files.
        """
        with self._lock:
            self._coming -= 1
            self._reserved -= missing
            self._claims.update(paths)
            self._done.difference_update(paths)
            self._remove()

    def take(self, path: str, most: int) -> bytes:
        """The content of a file, at most one byte more than `most`; the file is removed as soon as possible."""
        try:
            with open(path, "rb") as file:
                content = file.read(most + 1)
        except OSError:
            content = b""
        with self._lock:
            self._claims[path] -= 1
            if self._claims[path] <= 0:
                del self._claims[path]
                self._done.add(path)
            self._remove()
        return content

    def _remove(self) -> None:
        if self._coming:
            return
        for path in self._done:
            for remove, place in ((os.unlink, path), (os.rmdir, os.path.dirname(path))):
                with contextlib.suppress(OSError):  # files of another name may have the same content, and this folder
                    remove(place)
        self._done.clear()


def _bytes_in(folder: Path) -> int:
    found = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                found += os.lstat(os.path.join(place, name)).st_size
            except FileNotFoundError:  # removed in between
                continue
    return found
