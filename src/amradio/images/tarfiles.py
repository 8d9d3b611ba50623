"""Tar archives as random access files: where each member's content is, and reading it.

Headers are walked here and not by `tarfile`, which keeps 2 KB for each member and takes ten times as long: a training
set has millions. Understood are ustar, GNU and pax archives with names and sizes of any length.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

from amradio.errors import DatasetError, ImageError

_BLOCK = 512
_FILE_TYPES = b"0\x007"  # regular, regular in very old archives, contiguous
_LINK_TYPES = {b"1": "a hard link", b"2": "a symbolic link", b"S": "a sparse file"}
_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_MAX_META_BYTES = 1 << 20


class Member(NamedTuple):
    """A file in an archive.

    Attributes:
        name: With slashes, as stored.
        offset: Where its content begins, in bytes.
        size: Of its content, in bytes.
        small: The content itself if it has at most 512 bytes, so that labels need no further reading; else empty.
    """

    name: str
    offset: int
    size: int
    small: bytes


def members(path: str) -> Iterator[Member]:
    """Walk the files in an archive, in their order, reading nothing but headers.

    Yields:
        Files; folders and devices are left out.

    Raises:
        DatasetError: The file cannot be read, is compressed or no tar archive, is cut short, or has links in place of
            files. An archive without its end mark counts as cut short, as pictures may be missing.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            yield from _walk(path, file.fileno(), os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise DatasetError(f"The archive {path} cannot be read: {error.strerror or error}.") from error


class OpenFiles:
    """Reads parts of many files from many threads, with few of them open.

    Copies in forked processes and pickled copies work on their own.

    Args:
        limit: How many files are kept open.
    """

    def __init__(self, limit: int = 32) -> None:
        self._limit = limit
        self._start()

    def _start(self) -> None:
        self._lock, self._process = threading.Lock(), os.getpid()
        self._descriptors: OrderedDict[str, int] = OrderedDict()

    def read(self, path: str, offset: int, size: int) -> bytes:
        """Read `size` bytes, or fewer at the end of the file.

        Raises:
            OSError: The file cannot be read.
        """
        if sys.platform == "win32":
            with open(path, "rb") as file:
                file.seek(offset)
                return file.read(size)
        else:
            if self._process != os.getpid():  # forked, perhaps while another thread held the lock
                self.close()
                self._start()
            with self._lock:
                # A copy of the descriptor stays good when another thread has the file closed to make room.
                descriptor = os.dup(self._descriptor(path))
            try:
                return _read_fully(descriptor, offset, size)
            finally:
                os.close(descriptor)

    def close(self) -> None:
        """Close all files; they are opened again when needed."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, int]:
        return {"_limit": self._limit}

    def __setstate__(self, state: dict[str, int]) -> None:
        self.__init__(state["_limit"])  # type: ignore[misc]  # a pickled copy begins with no open files

    def _descriptor(self, path: str) -> int:
        descriptor = self._descriptors.pop(path, None)
        if descriptor is None:
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            if len(self._descriptors) >= self._limit:
                os.close(self._descriptors.popitem(last=False)[1])
        self._descriptors[path] = descriptor
        return descriptor


def read_member(files: OpenFiles, path: str, name: str, offset: int, size: int) -> bytes:
    """Read the content of a member.

    Raises:
        ImageError: The archive cannot be read, or has become shorter since it was listed.
    """
    try:
        content = files.read(path, offset, size)
    except OSError as error:
        raise ImageError(f"Cannot read {name} in {path}: {error.strerror or error}.") from error
    if len(content) < size:
        raise ImageError(f"Cannot read {name} in {path}: the archive ends {size - len(content)} bytes too early.")
    return content


def _walk(path: str, descriptor: int, end: int) -> Iterator[Member]:
    position, count = 0, 0
    long_name: str | None = None
    pax_size: int | None = None
    while True:
        blocks = _read_fully(descriptor, position, 2 * _BLOCK)  # a header, and the content of a small file
        header = blocks[:_BLOCK]
        if len(header) < _BLOCK:
            raise _cut(path, position, end, count)
        if not any(header):
            return
        _check_header(path, header, position)
        kind, size = header[156:157], _number(header[124:136])
        if kind in (b"x", b"g", b"L", b"K"):
            meta = _read_fully(descriptor, position + _BLOCK, min(size, _MAX_META_BYTES))
            if kind == b"L":
                long_name = _text(meta.rstrip(b"\0"))
            elif kind == b"x":
                records = _pax_records(meta)
                long_name = _text(records[b"path"]) if b"path" in records else long_name
                pax_size = int(records[b"size"]) if b"size" in records else None
        else:
            size = size if pax_size is None else pax_size
            name = long_name or _name(header)
            if kind in _LINK_TYPES:
                raise DatasetError(
                    f"{name} in {path} is {_LINK_TYPES[kind]}, not a file. Pack the archive again with the files "
                    "themselves (GNU tar: --dereference --hard-dereference, without --sparse)."
                )
            if position + _BLOCK + size > end:
                raise _cut(path, position, end, count)
            if kind in _FILE_TYPES and not name.endswith("/"):
                yield Member(name, position + _BLOCK, size, blocks[_BLOCK : _BLOCK + size] if size <= _BLOCK else b"")
                count += 1
            long_name = pax_size = None
        position += _BLOCK + (size + _BLOCK - 1) // _BLOCK * _BLOCK


def _cut(path: str, position: int, end: int, count: int) -> DatasetError:
    return DatasetError(
        f"The archive {path} is cut short: it has {end:,} bytes, {count:,} whole files, and no end mark; what comes at "
        f"byte {position:,} is missing or incomplete. Fetch the file again."
    )


def _check_header(path: str, header: bytes, position: int) -> None:
    try:
        stated = _number(header[148:156])
    except ValueError:
        stated = -1
    if stated == sum(header) - sum(header[148:156]) + 8 * ord(" "):
        return
    if position == 0:
        for magic, what in _COMPRESSIONS.items():
            if header.startswith(magic):
                raise DatasetError(
                    f"The archive {path} is compressed ({what}), so that its pictures cannot be read in any order. "
                    "Unpack it to a plain tar file; pictures are compressed already."
                )
    what = "is no tar archive" if position == 0 else f"is damaged: there is no member header at byte {position:,}"
    raise DatasetError(f"The file {path} {what}.")


def _number(field: bytes) -> int:
    if field[0] & 0x80:  # GNU's form for what octal digits cannot hold
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    return int(field.split(b"\0")[0].strip() or b"0", 8)


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0")[0]
    if header[257:263] == b"ustar\0" and (prefix := header[345:500].split(b"\0")[0]):
        name = prefix + b"/" + name
    return _text(name)


def _pax_records(meta: bytes) -> dict[bytes, bytes]:
    records = {}
    while meta and (length := int(meta.split(b" ", 1)[0] or b"0")):
        key, _, value = meta[:length].split(b" ", 1)[1].partition(b"=")
        records[key] = value[:-1]  # without the newline
        meta = meta[length:]
    return records


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape").removeprefix("./")


def _read_fully(descriptor: int, offset: int, size: int) -> bytes:
    """Read until the end is reached: one call may give less, on network drives and above 2 GB."""
    content = os.pread(descriptor, size, offset)
    while len(content) < size and (more := os.pread(descriptor, size - len(content), offset + len(content))):
        content += more
    return content
