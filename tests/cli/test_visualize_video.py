"""``amradio visualize video`` as a user runs it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import amradio
from amradio.cli import main
from amradio.evals.report import EvalReport
from amradio.images.video import open_video

pytest.importorskip("av")

MakeClip = Callable[..., Path]
MODEL = str(Path(__file__).resolve().parent.parent / "goldens" / "radio" / "models" / "v25_p16.pth.tar")
QUICK = ["--resolution", "32", "--preset", "ultrafast", "--basis-frames", "4"]
SMALL = [*QUICK, "-m", MODEL]


def scene(count: int, size: tuple[int, int] = (48, 80)) -> list[np.ndarray]:
    """A still background on which a square moves."""
    rng = np.random.default_rng(0)
    background = rng.integers(0, 256, (size[0] // 8, size[1] // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    found = []
    for i in range(count):
        picture = background.copy()
        left = 3 * i % (size[1] - 16)
        picture[8:24, left : left + 16] = (250, 240, 20)
        found.append(picture)
    return found


@pytest.fixture
def clip(make_clip: MakeClip, tmp_path: Path) -> Path:
    return make_clip(tmp_path / "clip.mp4", scene(12), sound="aac")


def run(capsys: pytest.CaptureFixture[str], clip: Path, out: Path, *words: str) -> Any:
    code = main(["visualize", "video", str(clip), "-o", str(out), "--json", *words])
    printed = json.loads(capsys.readouterr().out)
    assert code == (1 if "error" in printed else 0)
    return printed


def test_models_and_resolutions_side_by_side(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.mp4"
    words = [*SMALL, "--resolution", "64", "-m", "amradio-tiny", "--report-out", str(tmp_path / "r")]
    printed = run(capsys, clip, out, *words)
    assert (printed["frames"], printed["written"]) == (12, str(out))
    assert printed["frames_per_s"] > 0
    labels = [(r["model"]["name"], r["config"]["resize"]["size"]) for r in printed["reports"]]
    assert [size for _, size in labels] == [[32], [64]] * 2
    assert len({name for name, _ in labels}) == 2
    for report in printed["reports"]:
        assert 0 < report["metrics"]["change"]["value"] < 2
        assert 0 < report["metrics"]["static"]["value"] < 100
    stored = sorted((tmp_path / "r").glob("*.json"))
    assert len(stored) == 4
    assert EvalReport.load(stored[0]).task == "temporal-stability"
    video = open_video(out)
    frames = list(video.frames())
    assert [round(float(f.time), 3) for f in frames] == [i / 10 for i in range(12)]
    assert video.width >= 3 * 80  # the frame and two resolutions
    assert video.height >= 2 * 48  # two models
    assert video.sound is None


def test_a_table_for_people(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["visualize", "video", str(clip), "-o", str(tmp_path / "out.mp4"), *QUICK]) == 0
    captured = capsys.readouterr()
    assert "amradio-tiny · 32 px" in captured.out
    assert "12 frames in" in captured.out
    assert "frames/s); the video is" in captured.out
    assert "frame/s" in captured.err  # the bar


def test_the_same_file_each_time(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digests = []
    for name in ("a", "b"):
        out = tmp_path / f"{name}.mp4"
        run(capsys, clip, out, *SMALL, "--upsample", "guided", "--audio")
        digests.append(hashlib.sha256(out.read_bytes()).hexdigest())
    assert digests[0] == digests[1]


def test_colours_can_be_kept_for_another_clip(
    clip: Path, make_clip: MakeClip, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    colours, first, again = (tmp_path / name for name in ("colours.safetensors", "first.mp4", "again.mp4"))
    run(capsys, clip, first, *SMALL, "--save-basis", str(colours))
    run(capsys, clip, again, *SMALL, "--basis", str(colours))
    assert first.read_bytes() == again.read_bytes()
    other = make_clip(tmp_path / "other.mp4", [p[::-1] for p in scene(4)])
    run(capsys, other, again, *SMALL, "--basis", str(colours), "--resolution", "64")
    refused = run(capsys, clip, again, *SMALL, "--basis", str(colours), "-a", "clip")
    assert "has no colours for model" in refused["error"]["message"]


def test_parts_of_a_clip(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.mp4"
    printed = run(capsys, clip, out, *SMALL, "--start", "0.2", "--end", "0.9", "--every", "3", "--audio")
    assert printed["frames"] == 3
    video = open_video(out)
    assert [round(float(f.time), 3) for f in video.frames()] == [0.0, 0.3, 0.6]
    assert video.sound == "aac"
    assert printed["reports"][0]["dataset"]["video"]["start_s"] == 0.2
    assert run(capsys, clip, out, *SMALL, "--fps", "2")["frames"] == 3


def test_layers_adaptors_and_looks(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.mp4"
    run(capsys, clip, out, *SMALL, "--layer", "0", "--layer", "-1", "--no-captions", "--height", "40")
    assert open_video(out).height == 40
    printed = run(capsys, clip, out, *SMALL, "-a", "clip", "-a", "backbone", "--columns", "1")
    assert [r["model"]["adaptor"] for r in printed["reports"]] == ["clip", None]
    assert open_video(out).height >= 2 * 48
    run(
        capsys,
        clip,
        out,
        "-m",
        MODEL,
        "--resolution",
        "32",
        "32",
        "--upsample",
        "nearest",
        "--skip",
        "1",
        "--end",
        "0.3",
    )


def test_a_gif(make_clip: MakeClip, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gif = make_clip(tmp_path / "clip.gif", scene(5), codec="gif", pixel_format="rgb8")
    assert run(capsys, gif, tmp_path / "out.mp4", *SMALL)["frames"] == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--start", "9"], "has no frame between 9 s and the end"),
        (["--start", "-1"], "start must be at least 0"),
        (["--every", "0"], "every must be at least 1"),
        (["--crf", "90"], "crf is a number from 0"),
        (["--height", "8"], "from 16 to 4096 pixels high"),
        (["--height", "4000", "--resolution", "64", "--resolution", "96"], "16384 at most"),
        (["--columns", "0"], "--columns must be at least 1"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--basis-frames", "0"], "--basis-frames must be at least 1"),
        (["--static-threshold", "0"], "threshold is a share above 0"),
        (["--basis", "none.safetensors"], "There is no file none.safetensors with colours"),
        (["--basis", "x", "--skip", "1"], "--basis takes colours from a file"),
        (["--layer", "0", "-a", "clip"], "leave --adaptor out, or the layer"),
        (["--resolution", "100000"], "more than 33,554,432 pixels"),
        (["--layer", "99"], "99"),
    ],
)
def test_wrong_options_leave_nothing(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    printed = run(capsys, clip, tmp_path / "out" / "out.mp4", *SMALL, *words)
    assert message in printed["error"]["message"]
    assert not list(tmp_path.glob("out/*"))


def test_outputs_that_cannot_be(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "must be a file that ends in .mp4" in run(capsys, clip, tmp_path / "out.avi")["error"]["message"]
    assert "is the clip itself" in run(capsys, clip, clip)["error"]["message"]
    refused = run(capsys, clip, tmp_path / "out.mp4", "--report-out", str(clip))
    assert "a folder is needed" in refused["error"]["message"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "the file is empty"), (b"GIF89a\0\0\0", "broken or cut short"), (None, "no such file")],
)
def test_broken_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, message: str) -> None:
    path = tmp_path / "broken.mp4"
    if content is not None:
        path.write_bytes(content)
    assert message in run(capsys, path, tmp_path / "out.mp4")["error"]["message"]
    assert not (tmp_path / "out.mp4").exists()


def test_a_clip_that_breaks_off_leaves_no_video(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = clip.read_bytes()
    clip.write_bytes(content[:-50])
    assert "the file is cut short" in run(capsys, clip, tmp_path / "out.mp4", *SMALL)["error"]["message"]
    assert not (tmp_path / "out.mp4").exists()


def test_an_interrupt_leaves_the_earlier_video(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from amradio.viz.video_writer import VideoWriter

    out, write = tmp_path / "out.mp4", VideoWriter.write
    out.write_bytes(b"the earlier one")

    def interrupted(self: VideoWriter, picture: Any, time: Any) -> None:
        if time >= 0.5:
            raise KeyboardInterrupt
        write(self, picture, time)

    monkeypatch.setattr(VideoWriter, "write", interrupted)
    assert main(["visualize", "video", str(clip), "-o", str(out), *SMALL]) == 130
    assert out.read_bytes() == b"the earlier one"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip.mp4", "out.mp4"]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_length(make_clip: MakeClip, tmp_path: Path) -> None:
    """300 frames of 720p: what frame 50 needed is what frame 300 needs."""
    pictures = scene(15, (720, 1280))
    path = make_clip(
        tmp_path / "clip.mp4", pictures * 20, fps=30, pixel_format="yuv420p", options={"preset": "ultrafast"}
    )
    words = ["visualize", "video", str(path), "-o", str(tmp_path / "out.mp4"), *SMALL, "--device", "cpu"]
    program = Path(__file__).with_name("video_memory.py")
    environment = {**os.environ, "PYTHONPATH": str(Path(amradio.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(program), *words], capture_output=True, text=True, timeout=900, env=environment
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["code"], found["frames"]) == (0, 300)
    early, late = found["at"]["50"], found["at"]["300"]
    grown = {name: (late[name] - early[name]) / 2**20 for name in early}
    assert grown["peak"] < 32, grown  # MiB; the frames in between are 660
    assert grown["resident"] < 32, grown
