"""Writing videos, read back with PyAV."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from amradio.errors import OptionError
from amradio.images.video import Span, open_video
from amradio.viz.video_writer import VideoOptions, VideoWriter

av = pytest.importorskip("av")

MakeClip = Callable[..., Path]


def pictures(count: int, size: tuple[int, int] = (48, 64)) -> list[Image.Image]:
    """A coloured square that moves over a slope."""
    found = []
    for i in range(count):
        slope = np.linspace(40, 200, size[1]).astype(np.uint8)
        picture = np.repeat(np.broadcast_to(slope, size)[..., None], 3, 2).copy()
        picture[16:32, 4 * i % 48 : 4 * i % 48 + 16] = (200, 30, 60)
        found.append(Image.fromarray(picture))
    return found


def write(path: Path, count: int = 10, times: list[float] | None = None) -> Path:
    with VideoWriter(path, (48, 64), 10) as out:
        for i, picture in enumerate(pictures(count)):
            out.write(picture, Fraction(i, 10) if times is None else times[i])
    return path


def test_frames_and_times_come_back(tmp_path: Path) -> None:
    times = [0, 0.1, 0.25, 1.0, 1.001]
    frames = list(open_video(write(tmp_path / "out.mp4", 5, times)).frames())
    assert [round(float(f.time), 4) for f in frames] == times
    for found, expected in zip(frames, pictures(5), strict=True):
        difference = np.abs(np.asarray(found.image).astype(int) - np.asarray(expected))
        assert difference.mean() < 2.5  # colours have half the resolution
        assert found.image.getpixel((2, 2)) == pytest.approx(expected.getpixel((2, 2)), abs=4)


def test_what_players_need(tmp_path: Path) -> None:
    path = write(tmp_path / "out.mp4")
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        frame = next(file.decode(stream))
        assert (frame.colorspace, frame.color_range, frame.color_primaries, frame.color_trc) == (1, 1, 1, 1)
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")  # plays before all of it is there


def test_the_same_file_each_time(tmp_path: Path) -> None:
    digests = {hashlib.sha256(write(tmp_path / f"{i}.mp4", 20).read_bytes()).hexdigest() for i in range(3)}
    assert len(digests) == 1


def test_quality(tmp_path: Path) -> None:
    sizes = []
    for crf in (10, 40):
        with VideoWriter(tmp_path / "out.mp4", (48, 64), 10, VideoOptions(crf=crf, preset="ultrafast")) as out:
            for i, picture in enumerate(pictures(10)):
                out.write(picture, i / 10)
        sizes.append((tmp_path / "out.mp4").stat().st_size)
    assert sizes[1] < 0.7 * sizes[0]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OptionError, OSError])
@pytest.mark.parametrize("count", [0, 1, 30])
def test_an_interrupted_run_leaves_nothing(tmp_path: Path, error: type[BaseException], count: int) -> None:
    def run() -> None:
        with VideoWriter(tmp_path / "out.mp4", (48, 64), 10) as out:
            for i, picture in enumerate(pictures(count)):
                out.write(picture, i / 10)
            raise error

    with pytest.raises(error):
        run()
    assert list(tmp_path.iterdir()) == []
    before = write(tmp_path / "out.mp4").read_bytes()
    with pytest.raises(error):
        run()
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [before]


def test_nothing_written_is_no_video(tmp_path: Path) -> None:
    with (
        pytest.raises(OptionError, match=r"No frame was written, so there is no .*out\.mp4"),
        VideoWriter(tmp_path / "out.mp4", (48, 64), 10),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_folders_are_made(tmp_path: Path) -> None:
    assert write(tmp_path / "a" / "b: c" / "out.mp4").is_file()


@pytest.mark.parametrize(
    ("size", "message"),
    [((47, 64), "64 x 47 pixels cannot be written: sides are even"), ((48, 20000), "16384 at most"), ((0, 2), "even")],
)
def test_sizes_that_cannot_be(tmp_path: Path, size: tuple[int, int], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        VideoWriter(tmp_path / "out.mp4", size, 10)


def test_other_refusals(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="crf is a number from 0"):
        VideoOptions(crf=52)
    with pytest.raises(OptionError, match="Unknown preset 'fast'"):
        VideoOptions(preset="fast")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="fps must be above 0"):
        VideoWriter(tmp_path / "out.mp4", (48, 64), 0)
    with VideoWriter(tmp_path / "out.mp4", (48, 64), 10) as out:
        out.write(pictures(1)[0], 1)
        with pytest.raises(OptionError, match=r"one at 1\.000000 s cannot follow one at 1\.000000 s"):
            out.write(pictures(1)[0], 1)
        with pytest.raises(OptionError, match="has 64 x 48 pixels, and this picture 32 x 32"):
            out.write(Image.new("RGB", (32, 32)), 2)


# ---- sound ----


def tones(path: Path) -> tuple[float, float, np.ndarray]:
    """Begin and end of the sound in seconds, and its samples."""
    with av.open(str(path)) as file:
        frames = list(file.decode(audio=0))
    samples = np.concatenate([f.to_ndarray()[0] for f in frames])
    begin = float(frames[0].pts * frames[0].time_base)
    return begin, begin + len(samples) / 48000, samples


@pytest.mark.parametrize("span", [Span(), Span(0.5, 1.5), Span(0.5)])
def test_sound_is_copied_and_cut(make_clip: MakeClip, tmp_path: Path, span: Span) -> None:
    source = make_clip(tmp_path / "clip.mp4", [np.asarray(p) for p in pictures(20)], sound="aac")
    clip = open_video(source)
    with VideoWriter(tmp_path / "out.mp4", (48, 64), clip.fps, sound=(clip, span)) as out:
        for frame in clip.frames(span):
            out.write(frame.image, frame.time - span.exact[0])
    begin, end, samples = tones(tmp_path / "out.mp4")
    assert begin == pytest.approx(0, abs=0.05)
    assert end == pytest.approx((span.end or 2.0) - span.start, abs=0.1)
    original = tones(source)[2][round(span.start * 48000) :]
    loud = np.abs(original[4800:9600]).max()
    assert loud > 0.1
    assert np.abs(samples[4800:9600]).max() == pytest.approx(loud, rel=0.1)
    assert open_video(tmp_path / "out.mp4").sound == "aac"


def test_sound_that_is_not_there_or_does_not_fit(make_clip: MakeClip, tmp_path: Path) -> None:
    silent = open_video(make_clip(tmp_path / "silent.mp4", [np.asarray(p) for p in pictures(2)]))
    with pytest.raises(OptionError, match=r"silent\.mp4 has no sound that could be kept"):
        VideoWriter(tmp_path / "out.mp4", (48, 64), 10, sound=(silent, Span()))
    path = make_clip(tmp_path / "clip.mkv", [np.asarray(p) for p in pictures(2)], sound="pcm_s16le")
    other = open_video(path)
    with pytest.raises(OptionError, match=r"a codec that an MP4 file cannot hold as it is \(pcm_s16le\)"):
        VideoWriter(tmp_path / "out.mp4", (48, 64), 10, sound=(other, Span()))
