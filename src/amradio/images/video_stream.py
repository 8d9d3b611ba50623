"""What FFmpeg makes of a video file: its packets, its frames with their times, and where it cannot go on."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from amradio.errors import ImageError, MissingDependencyError
from amradio.images.decode import open_regular_file
from amradio.images.video_containers import VideoFormat

CODECS = (
    *("h264", "hevc", "av1", "libdav1d", "libaom-av1", "vp8", "vp9", "libvpx", "libvpx-vp9"),
    *("mpeg4", "mpeg2video", "mpeg1video", "mjpeg", "prores", "gif", "png", "rawvideo"),
)
"""FFmpeg's names of the decoders of pictures that are used."""

_SOUND_CODECS = ("aac", "ac3", "alac", "eac3", "flac", "mp3", "mp3float", "opus", "libopus", "vorbis", "pcm_s16le")
_LEAST_STEP = Fraction(1, 1000)  # between two frames whose times are given as the same, in seconds


class DamageError(Exception):
    """Frames end here, and not because the video does; the text is the reason. Never leaves this room.

    Attributes:
        time: Of the frame that cannot be read, in seconds; None if it is not known.
    """

    def __init__(self, reason: str, time: Fraction | None = None) -> None:
        super().__init__(reason)
        self.time = time


@dataclass(frozen=True)
class VideoFile:
    """A file, and how it is opened.

    Attributes:
        path: Where it is.
        kind: Its container: no other is tried.
        max_pixels: Budget of a frame, which the decoder keeps to as well.
        cut_short: Whether it ends before its container says.
    """

    path: Path
    kind: VideoFormat
    max_pixels: int
    cut_short: bool

    @contextmanager
    def opened(self) -> Iterator[Any]:
        """Open it.

        Yields:
            An `av.container.InputContainer`. It reads from an open file: nothing in it can lead to another one.

        Raises:
            ImageError: It cannot be opened.
            MissingDependencyError: The package av is not installed.
        """
        try:
            import av
        except ImportError as error:
            raise MissingDependencyError(
                "Videos need the package av, which is not installed. Install it with `pip install 'amradio[video]'`."
            ) from error
        options = {
            "format_whitelist": self.kind,
            "codec_whitelist": ",".join((*CODECS, *_SOUND_CODECS)),
            "max_pixels": str(self.max_pixels),
        }
        try:
            file = open_regular_file(self.path)
        except ImageError as error:
            raise ImageError(f"Cannot read {self.path}: {error}.") from error.__cause__
        with file:
            try:
                container = av.open(file, "r", options=options)
            except (av.error.FFmpegError, ValueError) as error:
                detail = getattr(error, "strerror", None) or str(error)
                raise ImageError(f"Cannot read {self.path}: it is broken or cut short ({detail}).") from error
            with container:
                yield container

    def frames(self, fps: Fraction, seek_to: Fraction | None = None) -> Generator[tuple[Fraction, Any], None, None]:
        """Decode frames in the order in which they are shown.

        Args:
            fps: How far frames are apart whose times the file does not say.
            seek_to: Begin at the last key frame before this time, in seconds; None for the beginning.

        Returns:
            An iterator over seconds from the first frame of the file, and `av.VideoFrame`. Times increase strictly.

        Raises:
            DamageError: Something is broken or missing. All frames before were given.
        """
        import av

        with self.opened() as container:
            stream, origin = picture_stream(container), origin_of(container)
            if seek_to is not None:
                try:
                    container.seek(math.floor((seek_to + origin) / stream.time_base), stream=stream)
                except av.error.FFmpegError:
                    return
            time: Fraction | None = None
            for picture in self._decoded(container, stream, origin):
                if picture.pts is not None:
                    shown = picture.pts * stream.time_base - origin
                else:
                    shown = Fraction(0) if time is None else time + 1 / fps
                time = shown if time is None else max(shown, time + _LEAST_STEP)
                # Before the time that was sought, a frame may lack those that it was made from.
                if picture.is_corrupt and (seek_to is None or time >= seek_to):
                    raise DamageError("its data is broken", time)
                yield time, picture

    def _decoded(self, container: Any, stream: Any, origin: Fraction) -> Iterator[Any]:
        import av

        packets = container.demux(stream)
        packet = None
        while True:
            damage: DamageError | None = None
            frames: list[Any] = []
            try:
                packet = next(packets, None)
                if packet is None:
                    break
                if packet.is_corrupt:
                    damage = DamageError("a part of it is missing", time_of(packet, origin))
                else:
                    frames = packet.decode()
            except av.error.FFmpegError as error:
                damage = DamageError(f"its data is broken ({error.strerror})", packet and time_of(packet, origin))
                damage.__cause__ = error
            # The decoder may still hold whole frames, which are shown before the broken one.
            yield from frames if damage is None else _held(stream)
            if damage is not None:
                raise damage
        if self.cut_short:
            raise DamageError("the file is cut short")

    def times(self) -> Iterator[Fraction]:
        """When frames are shown, in the order in which they are stored, as far as can be told without decoding.

        Returns:
            An iterator over seconds from the first frame of the file.
        """
        import av

        with self.opened() as container:
            origin = origin_of(container)
            packets = container.demux(picture_stream(container))
            while True:
                try:
                    time = time_of(next(packets), origin)
                except (StopIteration, av.error.FFmpegError):  # what is broken is said when it is decoded
                    return
                if time is not None:
                    yield time


def picture_stream(container: Any) -> Any:
    """The first stream of pictures that is no cover of an album; None if there is none."""
    from av.stream import Disposition

    return next((s for s in container.streams.video if not s.disposition & Disposition.attached_pic), None)


def origin_of(container: Any) -> Fraction:
    """The time of the first frame on the clock of the file, in seconds."""
    stream = picture_stream(container)
    return Fraction(0) if stream.start_time is None else Fraction(stream.start_time * stream.time_base)


def time_of(packet: Any, origin: Fraction) -> Fraction | None:
    """When what a packet holds begins, in seconds from an origin; None if the file does not say."""
    return None if packet.pts is None else Fraction(packet.pts * packet.time_base - origin)


def codec_name(stream: Any) -> str:
    """FFmpeg's name of the decoder of a stream."""
    return "unknown" if stream.codec_context is None else str(stream.codec_context.name)


def _held(stream: Any) -> list[Any]:
    """What the decoder still has, without an error of its own."""
    import av

    try:
        return list(stream.codec_context.decode(None))
    except av.error.FFmpegError:
        return []
