"""Which kind of video file something is, and whether all of it is there: from its first bytes and its own sizes.

FFmpeg plays what is left of a file that was cut, and says nothing. Most containers say how long they are, so a cut can
be seen before anything is decoded.
"""

from __future__ import annotations

from typing import IO, Literal

from amradio.errors import ImageError

VideoFormat = Literal["mov", "matroska", "gif", "avi", "mpegts"]
"""FFmpeg's names of the containers that are read: MP4 and QuickTime, Matroska and WebM, GIF, AVI, MPEG transport
streams. FFmpeg knows many more; among them are play lists, which name other files and addresses to be opened."""

FORMAT_NAMES = "MP4, MOV, WebM, MKV, GIF, AVI, MPEG-TS"

_HEAD = 16
_TS_PACKET = 188
_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"styp")
_EBML, _SEGMENT = 0x1A45DFA3, 0x18538067
_GIF_TRAILER = b";"


def recognise_video(file: IO[bytes]) -> VideoFormat:
    """Tell the container by its first bytes.

    Args:
        file: At any position; is left at its beginning.

    Returns:
        The container.

    Raises:
        ImageError: It is none that is read. The message has no name in it.
    """
    file.seek(0)
    head = file.read(_HEAD)
    file.seek(_TS_PACKET)
    second_packet = file.read(1)
    file.seek(0)
    if not head:
        raise ImageError("the file is empty (0 bytes)")
    if head[4:8] in _BOXES:
        return "mov"
    if head.startswith(_EBML.to_bytes(4, "big")):
        return "matroska"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    if head.startswith(b"RIFF") and head[8:11] == b"AVI":
        return "avi"
    if head.startswith(b"G") and second_packet == b"G":
        return "mpegts"
    raise ImageError(
        f"it is not a video that is read here (it begins with bytes {head[:8].hex(' ')}); formats: {FORMAT_NAMES}"
    )


def is_cut_short(file: IO[bytes], size: int, kind: VideoFormat) -> bool:
    """Say whether a file ends before its container says it does.

    Args:
        file: At any position; is left at its beginning.
        size: Of the file, in bytes.
        kind: The container.

    Returns:
        True if a part is missing. False if not, or if the container does not say, as with transport streams and
        recordings that were written while they went on.
    """
    end = {"mov": _end_of_boxes, "matroska": _end_of_segment, "gif": _end_of_gif, "avi": _end_of_riff}.get(kind)
    cut = end is not None and end(file, size) > size
    file.seek(0)
    return cut


def _end_of_boxes(file: IO[bytes], size: int) -> int:
    """Where the last box of an MP4 file ends."""
    position = 0
    while position < size:
        file.seek(position)
        head = file.read(16)
        length, header = int.from_bytes(head[:4], "big"), 8
        if length == 1:  # the length follows, in 64 bits
            length, header = int.from_bytes(head[8:16], "big"), 16
        if length == 0 or not head[4:8].isalnum():  # to the end of the file; or what follows is no box, but padding
            return size
        if len(head) < header:
            return position + header
        position += max(length, header)
    return position


def _end_of_riff(file: IO[bytes], size: int) -> int:
    """Where the last RIFF chunk of an AVI file ends; a large file has several."""
    position = 0
    while position < size:
        file.seek(position)
        head = file.read(8)
        length = int.from_bytes(head[4:8], "little")
        if not head.startswith(b"RIFF") or length == 0:  # padding, or never finished
            return size
        position += 8 + length
    return position


def _end_of_segment(file: IO[bytes], size: int) -> int:
    """Where the segment of a Matroska file ends."""
    position = 0
    while position < size:
        file.seek(position)
        element, id_bytes = _vint(file.read(8), marker=True)
        file.seek(position + id_bytes)
        length, length_bytes = _vint(file.read(8), marker=False)
        if not id_bytes or not length_bytes:
            return position + 2  # what follows is less than an element
        if length == (1 << (7 * length_bytes)) - 1:  # all ones: unknown
            return size
        position += id_bytes + length_bytes + length
        if element == _SEGMENT:
            return position
    return position + 1  # no segment at all


def _vint(data: bytes, *, marker: bool) -> tuple[int, int]:
    """A number of variable length and its length in bytes, 0 if there are too few; an element's id has its marker."""
    if not data or data[0] == 0:
        return 0, 0
    length = 9 - data[0].bit_length()
    if len(data) < length:
        return 0, 0
    value = int.from_bytes(data[:length], "big")
    return (value if marker else value & ((1 << (7 * length)) - 1)), length


def _end_of_gif(file: IO[bytes], size: int) -> int:
    """Where a GIF ends: here, if its last byte is that of the trailer (zeros may follow)."""
    file.seek(max(size - 512, 0))
    return size if file.read().rstrip(b"\0").endswith(_GIF_TRAILER) else size + 1
