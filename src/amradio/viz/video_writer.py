"""Pictures to an MP4 file that every browser plays, and that is the same, byte for byte, each time it is made."""

from __future__ import annotations

import math
import os
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from amradio.errors import MissingDependencyError, OptionError
from amradio.images.video_pixels import EXACT
from amradio.images.video_stream import origin_of
from amradio.weights.files import atomic_file

if TYPE_CHECKING:
    from PIL.Image import Image

    from amradio.images.video import Span, Video

Preset = Literal["ultrafast", "veryfast", "medium", "slow", "veryslow"]
"""How long x264 searches for a smaller file."""

MAX_SIDE = 16384  # of x264
_CLOCK = 90_000  # ticks in a second
_THREADS = 4  # fixed, because x264 decides differently with another number of threads
_BT709 = 1  # AVCOL_SPC_BT709, AVCOL_PRI_BT709, AVCOL_TRC_BT709
_LIMITED_RANGE = 1  # AVCOL_RANGE_MPEG
_SOUND_IN_MP4 = ("aac", "ac3", "alac", "eac3", "flac", "mp3", "mp3float", "opus", "libopus")


@dataclass(frozen=True)
class VideoOptions:
    """How pictures are compressed.

    Attributes:
        crf: x264's constant rate factor: 0 loses nothing but colour resolution, 18 nothing that is seen, 51 nearly all.
        preset: See `Preset`.

    Raises:
        OptionError: There is no such value.
    """

    crf: int = 18
    preset: Preset = "veryfast"

    def __post_init__(self) -> None:
        if not 0 <= self.crf <= 51:
            raise OptionError(f"crf is a number from 0 (best) to 51 (smallest), got {self.crf}.")
        if self.preset not in get_args(Preset):
            raise OptionError(f"Unknown preset {self.preset!r}. Known are: {', '.join(get_args(Preset))}.")


class VideoWriter:
    """An MP4 file (H.264, BT.709) that grows frame by frame, and appears under its name once it is complete.

    ```python
    with VideoWriter("out.mp4", (480, 640), fps=25) as out:
        out.write(picture, time)
    ```

    Leaving the block by an error, or by an interrupt, removes what was written.

    Args:
        path: Of the file; an earlier one is replaced at the end.
        size: (height, width) of the pictures, even numbers.
        fps: Frames a second, about; decides nothing but how x264 spreads bits, and how long the last frame is shown.
        options: How pictures are compressed.
        sound: A video, and which part of it, whose sound is copied as it is.

    Raises:
        OptionError: The size cannot be, or the sound cannot be copied.
        MissingDependencyError: The package av is not installed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        size: tuple[int, int],
        fps: Fraction | float,
        options: VideoOptions | None = None,
        sound: tuple[Video, Span] | None = None,
    ) -> None:
        height, width = size
        if height % 2 or width % 2 or not (2 <= height <= MAX_SIDE and 2 <= width <= MAX_SIDE):
            raise OptionError(
                f"A video of {width} x {height} pixels cannot be written: sides are even, and {MAX_SIDE} at most."
            )
        if fps <= 0:
            raise OptionError(f"fps must be above 0, got {fps}.")
        if sound is not None:
            _check_sound(sound[0])
        self._path, self._size, self._sound = Path(path), size, sound
        self._fps = Fraction(fps).limit_denominator(1001)
        self._options = options or VideoOptions()
        self._stack = ExitStack()
        self._last = -1  # tick of the last frame

    def __enter__(self) -> VideoWriter:
        try:
            import av
        except ImportError as error:
            raise MissingDependencyError(
                "Videos need the package av, which is not installed. Install it with `pip install 'amradio[video]'`."
            ) from error
        with ExitStack() as stack:
            part = stack.enter_context(atomic_file(self._path.resolve()))
            # Neither the time nor FFmpeg's version goes into the file; the index stands at its beginning.
            muxer = {"movflags": "faststart", "fflags": "bitexact"}
            self._file: Any = stack.enter_context(av.open(str(part), "w", format="mp4", container_options=muxer))
            self._stream = self._new_stream()
            self._copy: _SoundCopy | None = None
            if self._sound is not None:
                self._copy = _SoundCopy(*self._sound, self._file, stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._stack:  # in this order: encode the rest, close the file, give it its name
            if kind is None:
                self._finish()
                return
            self._stack.__exit__(kind, error, traceback)

    def write(self, picture: Image, time: Fraction | float) -> None:
        """Add a frame.

        Args:
            picture: In RGB, of the video's size.
            time: Seconds from the beginning at which it is shown.

        Raises:
            OptionError: The picture is of another size, or its time is not after that of the one before.
        """
        import av

        if (picture.height, picture.width) != self._size:
            height, width = self._size
            raise OptionError(
                f"The video has {width} x {height} pixels, and this picture {picture.width} x {picture.height}."
            )
        tick = round(Fraction(time) * _CLOCK)
        if tick <= self._last:
            raise OptionError(
                f"Frames come in the order in which they are shown: one at {float(time):.6f} s cannot follow one at "
                f"{self._last / _CLOCK:.6f} s."
            )
        if self._last < 0:
            self._write_sound(Fraction(0))
        frame = av.VideoFrame.from_ndarray(np.asarray(picture), format="rgb24").reformat(
            format="yuv420p",
            dst_colorspace="ITU709",
            dst_color_range=_LIMITED_RANGE,
            interpolation=EXACT,
            threads=1,
        )
        frame.pts, frame.time_base = tick, Fraction(1, _CLOCK)
        self._last = tick
        self._mux(frame)

    def _new_stream(self) -> Any:
        options = {
            "crf": str(self._options.crf),
            "preset": self._options.preset,
            "threads": str(_THREADS),
            # x264's macroblock tree, with AVX-512, gives another file about once in a hundred runs.
            "mbtree": "0",
        }
        stream = self._file.add_stream("libx264", rate=self._fps, options=options)
        stream.height, stream.width = self._size
        stream.pix_fmt = "yuv420p"
        stream.time_base = Fraction(1, _CLOCK)
        context = stream.codec_context
        context.time_base = Fraction(1, _CLOCK)
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = _LIMITED_RANGE
        return stream

    def _mux(self, frame: Any) -> None:
        for packet in self._stream.encode(frame):
            self._file.mux(packet)
            self._write_sound(packet.pts * packet.time_base)

    def _write_sound(self, time: Fraction) -> None:
        if self._copy is not None:
            self._copy.write_until(time)

    def _finish(self) -> None:
        if self._last < 0:
            raise OptionError(f"No frame was written, so there is no {self._path}.")
        self._mux(None)
        self._write_sound(Fraction(self._last, _CLOCK) + 1 / self._fps)


class _SoundCopy:
    """Copies the packets of a video's sound, in step with the pictures, so that few are ever held."""

    def __init__(self, source: Video, span: Span, target: Any, stack: ExitStack) -> None:
        container = stack.enter_context(source.file.opened())
        stream = container.streams.audio[0]
        self._packets = container.demux(stream)
        start, end = span.exact
        self._shift = origin_of(container) + start
        self._end = math.inf if end is None else end - start
        self._target, self._stream = target, target.add_stream_from_template(stream)
        self._next = self._following()

    def write_until(self, time: Fraction) -> None:
        """Copy what begins before a time of the new video."""
        while self._next is not None and self._next[0] < min(time, self._end):
            packet = self._next[1]
            shift = round(self._shift / packet.time_base)
            packet.pts -= shift
            packet.dts = packet.pts
            packet.stream = self._stream
            self._target.mux(packet)
            self._next = self._following()

    def _following(self) -> tuple[Fraction, Any] | None:
        """The next packet that begins in the new video, and when; None behind the last."""
        for packet in self._packets:
            if packet.pts is None:
                continue
            time = packet.pts * packet.time_base - self._shift
            if time >= 0:
                return time, packet
        return None


def _check_sound(video: Video) -> None:
    if video.sound is None:
        raise OptionError(f"{video.path} has no sound that could be kept.")
    if video.sound not in _SOUND_IN_MP4:
        raise OptionError(
            f"The sound of {video.path} is in a codec that an MP4 file cannot hold as it is ({video.sound}). Leave it "
            f"out, or convert it to AAC first. Copied are: {', '.join(_SOUND_IN_MP4)}."
        )
