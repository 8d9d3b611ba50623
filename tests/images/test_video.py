"""Reading videos, made here with PyAV."""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from amradio.errors import ImageError, MissingDependencyError, OptionError
from amradio.images.video import Span, Video, open_video

pytest.importorskip("av")

MakeClip = Callable[..., Path]


def grey(count: int, size: tuple[int, int] = (32, 48)) -> list[np.ndarray]:
    """Frames whose brightness is their number times five."""
    return [np.full((*size, 3), 5 * i, np.uint8) for i in range(count)]


def numbers(clip: Video, span: Span | None = None) -> list[int]:
    """Which of `grey` the frames are."""
    return [round(float(np.asarray(f.image).mean()) / 5) for f in clip.frames(span or Span())]


def quadrants(size: tuple[int, int] = (32, 48)) -> np.ndarray:
    """Red, green / blue, white."""
    picture = np.zeros((*size, 3), np.uint8)
    h, w = size[0] // 2, size[1] // 2
    picture[:h, :w], picture[:h, w:], picture[h:, :w], picture[h:, w:] = (
        (220, 20, 20), (20, 200, 20), (20, 20, 220), (230, 230, 230),
    )  # fmt: skip
    return picture


@pytest.mark.parametrize(
    ("name", "codec", "pixel_format"),
    [
        ("clip.mp4", "libx264", "yuv444p"),
        ("clip.mov", "libx264", "yuv420p"),
        ("clip.webm", "libvpx-vp9", "yuv420p"),
        ("clip.mkv", "mpeg4", "yuv420p"),
        ("clip.avi", "mpeg4", "yuv420p"),
        ("clip.ts", "libx264", "yuv420p"),
        ("clip.gif", "gif", "rgb8"),
    ],
)
def test_containers(make_clip: MakeClip, tmp_path: Path, name: str, codec: str, pixel_format: str) -> None:
    options = {"crf": "0", "bf": "2"} if codec == "libx264" else {"lossless": "1"} if "vp9" in codec else {}
    path = make_clip(tmp_path / name, [quadrants()] * 7, codec=codec, pixel_format=pixel_format, options=options)
    clip = open_video(path)
    frames = list(clip.frames())
    assert (clip.height, clip.width, clip.fps, clip.sound) == (32, 48, 10, None)
    assert [f.index for f in frames] == list(range(7))
    assert [round(float(f.time), 3) for f in frames] == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert all(f.image.mode == "RGB" for f in frames)
    middles = np.asarray(frames[3].image)[8::16, 12::24].astype(int)  # [2, 2, 3]
    tolerance = {"gif": 70, "mpeg4": 40}.get(codec, 4)  # GIF: 8 levels of red and green, 4 of blue
    assert np.abs(middles - quadrants()[8::16, 12::24]).max() <= tolerance


def test_the_content_decides(make_clip: MakeClip, tmp_path: Path) -> None:
    path = make_clip(tmp_path / "clip.mp4", grey(3)).rename(tmp_path / "clip.txt")
    assert len(list(open_video(path).frames())) == 3


@pytest.mark.parametrize("matrix", ["bt601", "bt709"])
@pytest.mark.parametrize("full_range", [False, True])
def test_colours_follow_what_the_file_says(make_clip: MakeClip, tmp_path: Path, matrix: str, full_range: bool) -> None:
    """The YUV values are computed here, from the standards."""
    import av

    kr, kb = (0.299, 0.114) if matrix == "bt601" else (0.2126, 0.0722)
    rgb = np.array([200.0, 60.0, 90.0])
    y = kr * rgb[0] + (1 - kr - kb) * rgb[1] + kb * rgb[2]
    cb, cr = (rgb[2] - y) / (2 * (1 - kb)), (rgb[0] - y) / (2 * (1 - kr))
    scales = (1.0, 1.0) if full_range else (219 / 255, 224 / 255)
    planes = [round(y * scales[0] + (0 if full_range else 16)), *(round(128 + c * scales[1]) for c in (cb, cr))]
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=10, options={"crf": "0"})
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv444p"
        stream.codec_context.colorspace = 6 if matrix == "bt601" else 1
        stream.codec_context.color_range = 2 if full_range else 1
        pixels = np.stack([np.full((32, 48), value, np.uint8) for value in planes])  # [3, H, W]
        frame = av.VideoFrame.from_ndarray(pixels, format="yuv444p")
        frame.colorspace, frame.color_range = stream.codec_context.colorspace, stream.codec_context.color_range
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    found = np.asarray(next(open_video(path).frames()).image)[16, 24]
    np.testing.assert_allclose(found, rgb, atol=2)


def test_transparent_parts_are_white(tmp_path: Path) -> None:
    frames = []
    for i in range(3):
        frame = Image.new("RGBA", (48, 32), (0, 0, 0, 0))
        frame.paste((200, 0, 0, 255), (8 * i, 0, 8 * i + 8, 32))
        frames.append(frame)
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:], duration=100, disposal=2)
    found = [np.asarray(f.image) for f in open_video(tmp_path / "clip.gif").frames()]
    assert found[2][16, 40].tolist() == [255, 255, 255]
    assert found[2][16, 20].tolist() == [200, 0, 0]


# ---- rotation and the shape of pixels ----


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        ((0, 1, -1, 0), Image.Transpose.ROTATE_270),  # a phone held upright: a quarter clockwise
        ((-1, 0, 0, -1), Image.Transpose.ROTATE_180),
        ((0, -1, 1, 0), Image.Transpose.ROTATE_90),
        ((-1, 0, 0, 1), Image.Transpose.FLIP_LEFT_RIGHT),
        ((1, 0, 0, -1), Image.Transpose.FLIP_TOP_BOTTOM),
        ((0, 1, 1, 0), Image.Transpose.TRANSPOSE),
        ((0, -1, -1, 0), Image.Transpose.TRANSVERSE),
        ((1, 0, 0, 1), None),
    ],
)
def test_rotation(
    make_clip: MakeClip, tmp_path: Path, matrix: tuple[int, ...], expected: Image.Transpose | None
) -> None:
    path = make_clip(tmp_path / "clip.mp4", [quadrants()] * 2)
    content = bytearray(path.read_bytes())
    place = content.index(b"tkhd") + 44  # of the matrix in the track header, version 0
    assert struct.unpack(">9i", content[place : place + 36])[0] == 1 << 16
    a, b, c, d = (value << 16 for value in matrix)
    content[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    clip = open_video(path)
    upright = Image.fromarray(quadrants())
    upright = upright if expected is None else upright.transpose(expected)
    assert (clip.width, clip.height) == upright.size
    difference = np.asarray(next(clip.frames()).image).astype(int) - np.asarray(upright)
    assert np.abs(difference).max() <= 4


def test_pixels_are_made_square(make_clip: MakeClip, tmp_path: Path) -> None:
    path = make_clip(tmp_path / "clip.mp4", grey(2), sample_aspect_ratio=Fraction(4, 3))
    clip = open_video(path)
    assert (clip.height, clip.width) == (32, 64)
    assert next(clip.frames()).image.size == (64, 32)


# ---- spans ----


@pytest.mark.parametrize(
    ("span", "expected"),
    [
        (Span(0.3), [3, 4, 5, 6, 7, 8, 9]),
        (Span(0.25, 0.5), [3, 4]),
        (Span(end=0.2), [0, 1]),
        (Span(every=4), [0, 4, 8]),
        (Span(0.15, every=3), [2, 5, 8]),
        (Span(fps=5), [0, 2, 4, 6, 8]),
        (Span(fps=4), [0, 3, 5, 8]),
        (Span(fps=1000), list(range(10))),
        (Span(0.85, 100), [9]),
    ],
)
def test_spans(make_clip: MakeClip, tmp_path: Path, span: Span, expected: list[int]) -> None:
    path = make_clip(tmp_path / "clip.mp4", grey(10), options={"crf": "0", "g": "4", "bf": "2"})
    clip = open_video(path)
    assert numbers(clip, span) == expected
    assert [round(float(f.time) * 10) for f in clip.frames(span)] == expected
    assert clip.expected_frames(span) == pytest.approx(len(expected), abs=1)


@pytest.mark.parametrize(
    ("name", "codec", "pixel_format"),
    [("a.webm", "libvpx-vp9", "yuv420p"), ("a.ts", "libx264", "yuv420p"), ("a.gif", "gif", "rgb8")],
)
def test_a_start_leads_to_the_same_frames(
    make_clip: MakeClip, tmp_path: Path, name: str, codec: str, pixel_format: str
) -> None:
    pictures = [np.roll(quadrants(), 4 * i, 1) for i in range(12)]
    path = make_clip(tmp_path / name, pictures, codec=codec, pixel_format=pixel_format, options={"g": "5"})
    clip = open_video(path)
    whole = {f.time: f.image.tobytes() for f in clip.frames()}
    for start in (0.05, 0.5, 1.05):
        part = {f.time: f.image.tobytes() for f in clip.frames(Span(start))}
        assert part == {time: data for time, data in whole.items() if time >= start}, start


def test_a_variable_frame_rate(make_clip: MakeClip, tmp_path: Path) -> None:
    times = [0, 40, 500, 520, 1400]
    clip = open_video(make_clip(tmp_path / "clip.mp4", grey(5), times_ms=times))
    assert [round(float(f.time) * 1000) for f in clip.frames()] == times
    assert numbers(clip, Span(0.5)) == [2, 3, 4]
    assert numbers(clip, Span(fps=2)) == [0, 2, 4]


@pytest.mark.parametrize(("count", "expected"), [(1, [0]), (2, [0, 9]), (4, [0, 3, 6, 9]), (50, list(range(10)))])
def test_evenly_spaced_frames(make_clip: MakeClip, tmp_path: Path, count: int, expected: list[int]) -> None:
    clip = open_video(make_clip(tmp_path / "clip.mp4", grey(10), options={"crf": "0", "bf": "2"}))
    found = [round(float(np.asarray(f.image).mean()) / 5) for f in clip.evenly(count)]
    assert found == expected
    part = [round(float(np.asarray(f.image).mean()) / 5) for f in clip.evenly(2, Span(0.2, 0.7, every=5))]
    assert part == [2, 6]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": -1}, "start must be at least 0"),
        ({"start": float("nan")}, "start must be a finite number, got nan"),
        ({"start": 2, "end": 2}, "The end at 2 s is not after the start at 2 s"),
        ({"every": 0}, "every must be at least 1"),
        ({"fps": 0}, "fps must be above 0"),
        ({"fps": 5, "every": 2}, "by every or by fps, not by both"),
    ],
)
def test_spans_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Span(**options)


def test_a_span_without_frames(make_clip: MakeClip, tmp_path: Path) -> None:
    clip = open_video(make_clip(tmp_path / "clip.mp4", grey(3)))
    with pytest.raises(ImageError, match=r"has no frame between 7 s and the end; its last frame is at 0\.200 s"):
        list(clip.frames(Span(7)))


# ---- what is refused ----


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"the file is empty \(0 bytes\)"),
        (b"hello, this is a text", "it is not a video that is read here .* formats: MP4, MOV, WebM"),
        (b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n", "not a video"),
        (b"ffconcat version 1.0\nfile '/etc/passwd'\n", "not a video"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + bytes(200), "it is broken or cut short"),
        (b"\x1a\x45\xdf\xa3" + b"\xff" * 300, "it is broken or cut short"),
        (b"GIF89a" + bytes(3), "it is broken or cut short"),
    ],
)
def test_what_is_no_video(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=f"Cannot read .*clip.mp4: .*{message}"):
        open_video(path)


def test_missing_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no such file"):
        open_video(tmp_path / "none.mp4")
    with pytest.raises(ImageError, match="it is a folder"):
        open_video(tmp_path)


def test_sound_alone(tmp_path: Path) -> None:
    import av

    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", rate=48000)
        sample = av.AudioFrame.from_ndarray(np.zeros((1, 4800), np.float32), format="fltp", layout="mono")
        sample.rate = 48000
        file.mux(stream.encode(sample))
        file.mux(stream.encode(None))
    with pytest.raises(ImageError, match=r"sound.mp4 has no pictures, only audio\."):
        open_video(path)


def test_a_codec_that_is_not_read(make_clip: MakeClip, tmp_path: Path) -> None:
    path = make_clip(tmp_path / "clip.avi", grey(2), codec="flv", pixel_format="yuv420p")
    with pytest.raises(ImageError, match=r"in a codec that is not read here \(.*\)\. Convert it to H\.264"):
        open_video(path)


def test_frames_beyond_the_budget(make_clip: MakeClip, tmp_path: Path) -> None:
    path = make_clip(tmp_path / "clip.mp4", grey(2))
    assert open_video(path, max_pixels=32 * 48)
    with pytest.raises(ImageError, match=r"48 x 32 = 1,536 pixels, more than the budget of 1,000"):
        open_video(path, max_pixels=1000)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.webm", "clip.gif", "clip.avi"])
def test_no_cut_goes_unnoticed(make_clip: MakeClip, tmp_path: Path, name: str) -> None:
    codec, kind = {
        "clip.webm": ("libvpx-vp9", "yuv420p"), "clip.gif": ("gif", "rgb8"), "clip.avi": ("mpeg4", "yuv420p"),
    }.get(name, ("libx264", "yuv420p"))  # fmt: skip
    pictures = [np.roll(quadrants(), 5 * i, 1) for i in range(8)]
    options = {"movflags": "faststart"} if name == "clip.mp4" else None
    path = make_clip(tmp_path / name, pictures, codec=codec, pixel_format=kind, options=options)
    content = path.read_bytes()
    assert not open_video(path).file.cut_short
    for size in np.linspace(1, len(content) - 1, 12).astype(int):
        path.write_bytes(content[:size])
        with pytest.raises(ImageError):
            list(open_video(path).frames())


def index_first(path: Path) -> bytes:
    """An MP4 file with its index before its data, as browsers like it."""
    import av

    target = path.with_name("index-first.mp4")
    with av.open(str(path)) as source, av.open(str(target), "w", container_options={"movflags": "faststart"}) as copy:
        stream = copy.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                copy.mux(packet)
    return target.read_bytes()


def test_what_comes_before_the_damage_can_be_read(make_clip: MakeClip, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (32, 48, 3), dtype=np.uint8) for _ in range(20)]
    content = index_first(make_clip(tmp_path / "clip.mp4", pictures, options={"crf": "10", "g": "5"}))
    path = tmp_path / "cut.mp4"
    path.write_bytes(content[: len(content) // 2])
    clip = open_video(path)
    with pytest.raises(ImageError, match=r"the file is cut short, .* \(--end SECONDS\)"):
        list(clip.frames())
    with pytest.raises(ImageError, match=r"beyond \d\.\d+ s: .*\(--end (\d\.\d+)\)") as caught:
        list(clip.frames(Span(end=1.9)))
    end = float(str(caught.value).rsplit("--end ", 1)[1].rstrip(")."))
    found = list(clip.frames(Span(end=end)))
    assert len(found) == math.ceil(end * 10) >= 3
    np.testing.assert_allclose(np.asarray(found[-1].image).mean(), pictures[len(found) - 1].mean(), atol=6)


def test_the_package_is_needed(make_clip: MakeClip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_clip(tmp_path / "clip.mp4", grey(2))
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'amradio\[video\]'"):
        open_video(path)


@given(
    data=st.binary(max_size=400),
    head=st.sampled_from([b"", b"\0\0\0\x10ftyp", b"GIF89a", b"\x1a\x45\xdf\xa3", b"RIFF"]),
)
def test_any_bytes_are_refused_in_words(tmp_path_factory: pytest.TempPathFactory, data: bytes, head: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.mp4"
    path.write_bytes(head + data)
    with pytest.raises(ImageError, match=r"any\.mp4"):
        list(open_video(path).frames())
