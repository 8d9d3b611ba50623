"""Videos to pictures: one frame after the other, safely, in memory that does not grow with the length.

A frame is what `amradio.images.decode.decode` would make of it: upright, in RGB, whole. What is decided here:

* The content decides the container, never the file name; only those of `VideoFormat` and the codecs of `CODECS` are
  tried, and FFmpeg is given an open file, so that nothing in it can make it open another one or an address.
* The size in the header is checked against the budget before any pixel memory is allocated, and again by the decoder.
* Rotation and mirroring that phones write into the file are applied, and pixels are made square.
* Each frame has the time at which it is shown, exactly: a variable frame rate needs nothing special.
* A file that is cut short or damaged is refused, with the time up to which it can be read.
* Transparency is composed over white. Colours are converted by the matrix that the file names, or, where it names
  none, by what players assume: BT.709 from 720 lines on, BT.601 below. There is no tone mapping: HDR looks flat.

Needs the package ``av`` (``pip install 'amradio[video]'``).
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amradio.errors import ImageError, OptionError
from amradio.images.decode import open_regular_file
from amradio.images.resize import MAX_RESIZED_PIXELS
from amradio.images.video_containers import is_cut_short, recognise_video
from amradio.images.video_pixels import turn_of, upright_picture, upright_size
from amradio.images.video_stream import CODECS, DamageError, VideoFile, codec_name, picture_stream

if TYPE_CHECKING:
    from PIL.Image import Image, Transpose

MAX_FRAME_PIXELS = MAX_RESIZED_PIXELS
"""Default pixel budget of a frame: 8192 x 4096."""

_USUAL_FPS = Fraction(25)


@dataclass(frozen=True)
class Span:
    """Which frames of a video are taken. Speed never changes: each frame keeps its time.

    Attributes:
        start: Seconds; the frames before are left out.
        end: Seconds; the frames from here on are left out, and not read. None = to the end.
        every: Only each so-many-th frame is taken.
        fps: At most so many frames a second are taken; None = all.

    Raises:
        OptionError: Numbers that cannot be.
    """

    start: float = 0.0
    end: float | None = None
    every: int = 1
    fps: float | None = None

    def __post_init__(self) -> None:
        for name, number in (("start", self.start), ("end", self.end), ("fps", self.fps)):
            if number is not None and not math.isfinite(number):
                raise OptionError(f"{name} must be a finite number, got {number}.")
        if self.start < 0:
            raise OptionError(f"start must be at least 0 seconds, got {self.start:g}.")
        if self.end is not None and self.end <= self.start:
            raise OptionError(f"The end at {self.end:g} s is not after the start at {self.start:g} s.")
        if self.every < 1:
            raise OptionError(f"every must be at least 1, got {self.every}.")
        if self.fps is not None and self.fps <= 0:
            raise OptionError(f"fps must be above 0, got {self.fps:g}.")
        if self.fps is not None and self.every > 1:
            raise OptionError("Frames are chosen by every or by fps, not by both.")

    @property
    def exact(self) -> tuple[Fraction, Fraction | None]:
        """Start and end as they were meant: 0.2 is a fifth, where the frame at a fifth of a second begins."""
        return Fraction(repr(self.start)), None if self.end is None else Fraction(repr(self.end))


WHOLE = Span()


@dataclass(frozen=True)
class Frame:
    """A picture of a video.

    Attributes:
        index: Among the frames that are taken, from 0.
        time: Seconds from the video's first frame.
        image: Upright, in RGB.
    """

    index: int
    time: Fraction
    image: Image


@dataclass(frozen=True)
class Video:
    """A video; see `open_video`.

    Attributes:
        file: Where it is, and what.
        codec: FFmpeg's name of the decoder of its pictures.
        sound: FFmpeg's name of the decoder of its sound; None without sound.
        height: Of its frames in pixels, upright.
        width: Of its frames in pixels, upright, pixels made square.
        fps: Frames a second, on average.
        duration_s: As its header says; None if it does not.
        turn: How frames are turned or mirrored to be upright; None for not at all.
    """

    file: VideoFile
    codec: str
    sound: str | None
    height: int
    width: int
    fps: Fraction
    duration_s: float | None
    turn: Transpose | None = None

    @property
    def path(self) -> Path:
        """Where it is."""
        return self.file.path

    def frames(self, span: Span = WHOLE) -> Iterator[Frame]:
        """Read frames in the order in which they are shown.

        Args:
            span: Which.

        Returns:
            An iterator; one frame is held at a time. Times increase strictly.

        Raises:
            ImageError: The file is damaged or cut short (the message says until when it can be read), has no frame in
                the span, or can no longer be opened.
        """
        for i, (time, picture) in enumerate(self._chosen(span)):
            yield Frame(i, time, upright_picture(picture, (self.height, self.width), self.turn))

    def evenly(self, count: int, span: Span = WHOLE) -> Iterator[Frame]:
        """Read some frames, at equal distances from the first of a span to its last.

        Two passes: the first finds where the span begins and ends, and decodes nothing.

        Args:
            count: How many; all where there are fewer.
            span: Of which frames; what it says of `every` and `fps` is not regarded.

        Returns:
            As `frames`.

        Raises:
            ImageError: See `frames`.
            OptionError: The count is below 1.
        """
        if count < 1:
            raise OptionError(f"The number of frames must be at least 1, got {count}.")
        first, last = self._extent(span)
        step = (last - first) / max(count - 1, 1)
        taken, tolerance = 0, 1 / (4 * self.fps)  # the decoder may know times better than the packets
        for time, picture in self._chosen(Span(span.start, span.end)):
            if taken < count and time >= first + taken * step - tolerance:
                yield Frame(taken, time, upright_picture(picture, (self.height, self.width), self.turn))
                taken += 1

    def expected_frames(self, span: Span = WHOLE) -> int | None:
        """How many frames a span has according to the header; None if it says nothing. For progress bars."""
        if self.duration_s is None:
            return None
        end = self.duration_s if span.end is None else min(span.end, self.duration_s)
        rate = float(self.fps) / span.every if span.fps is None else min(span.fps, float(self.fps))
        return max(math.ceil((end - span.start) * rate - 0.01), 1)  # durations are rounded

    def _extent(self, span: Span) -> tuple[Fraction, Fraction]:
        """Times of the first and of the last frame of a span."""
        start, end = span.exact
        first, last = None, start
        for time in self.file.times():
            if time >= start and (end is None or time < end):
                first, last = time if first is None else min(first, time), max(last, time)
        return (start if first is None else first), last

    def _chosen(self, span: Span) -> Iterator[tuple[Fraction, Any]]:
        """The frames of a span with their times, not yet converted."""
        if self.file.cut_short and span.end is None:
            raise ImageError(
                f"Cannot read {self.path}: the file is cut short, as after an interrupted download. Get it again, or "
                "take what there is of it by saying where to end (--end SECONDS)."
            )
        start, end = span.exact
        last: Fraction | None = None
        passed, tick, taken = 0, -1, 0
        try:
            for time, picture in self._from(start):
                if end is not None and time >= end:
                    break
                last = time
                if time < start:
                    continue
                if picture.width * picture.height > self.file.max_pixels:  # frames may become larger on the way
                    raise DamageError(f"a frame has {picture.width} x {picture.height} pixels, more than the budget")
                if span.fps is None:
                    wanted = passed % span.every == 0
                else:
                    now = math.floor((time - start) * Fraction(repr(span.fps)))
                    wanted, tick = now > tick, now
                passed += 1
                if wanted:
                    taken += 1
                    yield time, picture
        except DamageError as damage:
            reached = max(damage.time or Fraction(0), Fraction(0) if last is None else last + 1 / self.fps)
            if end is None or reached < end:
                raise self._refusal(damage, last) from damage.__cause__
        if taken == 0:
            until = "the end" if span.end is None else f"{span.end:g} s"
            shown = "" if last is None else f"; its last frame is at {float(last):.3f} s"
            raise ImageError(f"{self.path} has no frame between {span.start:g} s and {until}{shown}.")

    def _from(self, start: Fraction) -> Iterator[tuple[Fraction, Any]]:
        """All frames from some point before a start on."""
        if start > 0 and self.file.kind != "gif":  # which has no index
            with closing(self.file.frames(self.fps, start)) as frames:
                try:
                    first = next(frames, None)
                except DamageError:
                    first = None
                if first is not None and first[0] <= start:
                    yield first
                    yield from frames
                    return
        yield from self.file.frames(self.fps)  # the index of the file led behind the start, or nowhere

    def _refusal(self, damage: DamageError, last: Fraction | None) -> ImageError:
        if last is None:
            return ImageError(f"Cannot read {self.path}: {damage}, and no frame comes before that.")
        # Half a frame behind the last one: nothing that is damaged needs to be decoded until there.
        until = math.ceil((last + 1 / (2 * self.fps)) * 1000) / 1000
        return ImageError(
            f"Cannot read {self.path} beyond {float(last):.3f} s: {damage}. Get the file again, or take what comes "
            f"before by ending there (--end {until:.3f})."
        )


def open_video(path: str | os.PathLike[str], *, max_pixels: int = MAX_FRAME_PIXELS) -> Video:
    """Look at a video file: what it is, how large, how long. Its first frame is decoded.

    Args:
        path: MP4, MOV, WebM, MKV, GIF, AVI or MPEG-TS.
        max_pixels: Budget of a frame; a header that promises more is refused before any frame is decoded.

    Returns:
        The video, whose `Video.frames` can be read any number of times.

    Raises:
        ImageError: The file is missing, empty, no video, of a kind that is not read, without a picture, or its frames
            are too large.
        MissingDependencyError: The package av is not installed.
    """
    path = Path(path)
    try:
        with open_regular_file(path) as stream:
            kind = recognise_video(stream)
            cut_short = is_cut_short(stream, os.fstat(stream.fileno()).st_size, kind)
    except ImageError as error:
        raise ImageError(f"Cannot read {path}: {error}.") from error.__cause__
    file = VideoFile(path, kind, max_pixels, cut_short)
    described = _described(file)
    with closing(file.frames(described.fps)) as frames:
        try:
            first = next(frames, None)
        except DamageError as damage:
            raise described._refusal(damage, None) from damage.__cause__
        if first is None:
            raise ImageError(f"{path} says that it has pictures, but no frame comes out of it.")
    # How the frame is turned is only known from the frame.
    with file.opened() as container:
        turn = turn_of(first[1])
        height, width = upright_size(first[1], picture_stream(container), turn)
    _check_budget(height, width, file)
    return dataclasses.replace(described, height=height, width=width, turn=turn)


def _described(file: VideoFile) -> Video:
    """What the header says."""
    with file.opened() as container:
        stream = picture_stream(container)
        if stream is None:
            others = sorted({s.type for s in container.streams})
            what = f"only {' and '.join(others)}" if others else "nothing that can be read"
            raise ImageError(f"{file.path} has no pictures, {what}.{' It is cut short.' if file.cut_short else ''}")
        codec = codec_name(stream)
        if codec not in CODECS:
            raise ImageError(
                f"The pictures of {file.path} are in a codec that is not read here ({codec}). Convert it to H.264, for "
                f"example. Codecs: {', '.join(CODECS)}."
            )
        height, width = stream.codec_context.height, stream.codec_context.width
        _check_budget(height, width, file)
        sound = next(map(codec_name, container.streams.audio), None)
        fps = Fraction(stream.average_rate or stream.guessed_rate or _USUAL_FPS)
        duration = None if container.duration is None else container.duration / 1e6
        if stream.duration is not None:
            duration = float(stream.duration * stream.time_base)
        return Video(file, codec, sound, height, width, fps, duration)


def _check_budget(height: int, width: int, file: VideoFile) -> None:
    if height * width > file.max_pixels:
        raise ImageError(
            f"Cannot read {file.path}: its frames have {width} x {height} = {width * height:,} pixels, more than the "
            f"budget of {file.max_pixels:,} (raise max_pixels if the file is trusted)."
        )
