"""``amradio visualize video``."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import tyro

from amradio.cli.arguments import Size
from amradio.cli.common import DEFAULT_MODEL, BackboneOptions, check_counts, device_of
from amradio.cli.text import table
from amradio.errors import OptionError

if TYPE_CHECKING:
    from amradio.evals.report import EvalReport
    from amradio.features.frames import View
    from amradio.images.video import Span
    from amradio.images.video import Video as Clip
    from amradio.viz import PCABasis

_DEFAULT_RESOLUTION = (448,)


class _Panel(NamedTuple):
    """One model at one size.

    Attributes:
        head: What it is, for people.
        about: In which space its features live: what a basis belongs to.
        view: What looks at the frames.
    """

    head: str
    about: dict[str, Any]
    view: View


@dataclass(frozen=True, kw_only=True)
class Video(BackboneOptions):
    """A video beside what models see in it, as an MP4 file; and how steady their features are.

    One basis of colours for the whole clip: equal colours mean similar features in all frames, and at all resolutions
    of a model. Steadiness is measured at static pixels, relative to the spread of the features. Any length, in constant
    memory.
    """

    clip: tyro.conf.Positional[Path]
    """MP4, MOV, WebM, MKV, GIF, AVI or MPEG-TS."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """MP4 file to write; an earlier one is replaced when the new one is complete."""
    model: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(aliases=["-m"])] = ()
    """Backbone: version key, repository, path, timm:NAME, ...; default amradio-tiny, which comes with the package.
    Repeat the option for several, side by side."""
    adaptor: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(aliases=["-a"])] = ()
    """Whose features: backbone (the default) or an adaptor of a RADIO model. Repeat the option for several."""
    layer: tyro.conf.UseAppendAction[tuple[int, ...]] = ()
    """Features of this block, from 0, or from -1 backwards; default the last, finished ones. Repeat for several."""
    resolution: tyro.conf.UseAppendAction[tuple[Size, ...]] = ()
    """One number: shortest side, aspect kept. Two: centre crop. Default 448. Repeat the option for several."""
    mode: Literal["auto", "shortest", "longest", "crop", "exact", "nearest"] = "auto"
    """How a resolution is meant; nearest is the frame's own size."""
    batch_size: int = 8
    """Most frames in one forward pass; halved by itself when memory runs out."""

    start: float = 0.0
    """Seconds into the clip at which to begin."""
    end: float | None = None
    """Seconds into the clip at which to stop; nothing behind is read."""
    every: int = 1
    """Take only each so-many-th frame. The speed stays."""
    fps: float | None = None
    """Take at most so many frames a second. The speed stays."""

    upsample: Literal["nearest", "bilinear", "bicubic", "guided"] = "bilinear"
    """How maps become as large as frames; nearest shows the true grid, guided follows the edges of the frame."""
    height: int | None = None
    """Of each picture in the video, in pixels; default that of the frames, but at most 480."""
    columns: int | None = None
    """Maps in a row, behind the frame; default the resolutions of a model if there are several, else all maps."""
    no_captions: bool = False
    """Do not write above the pictures what they are."""
    crf: int = 18
    """Quality, from 0 (best) to 51 (smallest)."""
    preset: Literal["ultrafast", "veryfast", "medium", "slow", "veryslow"] = "veryfast"
    """How long to search for a smaller file."""
    audio: bool = False
    """Keep the sound of the clip."""

    skip: int = 0
    """Leading principal components to leave out; the first often only tells the object from the background."""
    basis_frames: int = 30
    """Frames, evenly spaced, that the colours are fitted on, in a first pass over the clip."""
    basis: Path | None = None
    """Take the colours from this file instead, as --save-basis wrote it; the clip is then read once."""
    save_basis: Path | None = None
    """Write the colours to this file, for other clips."""

    static_threshold: float = 0.01
    """Mean change of a patch's pixels between two frames, of 1 for black to white, below which it counts as static."""
    report_out: Path | None = None
    """Folder for a report of each model and resolution, as JSON and as Markdown, that `amradio compare` reads."""
    json: bool = False
    """Print one JSON object with all reports instead of a table, and no progress bar."""

    def run(self) -> int:
        """Paint, measure and write; returns the exit code."""
        from amradio.images.video import Span, open_video
        from amradio.viz.video_writer import VideoOptions, VideoWriter

        self._check()
        span = Span(self.start, self.end, self.every, self.fps)
        compression = VideoOptions(self.crf, self.preset)
        clip = open_video(self.clip)
        rate = min(self.fps or clip.fps, clip.fps / self.every)
        begin = time.perf_counter()
        panels = self._panels()
        stored = None if self.basis is None else self._stored(panels, self.basis)
        # Before the first pass, so that a size or a sound that cannot be written is refused early.
        size = self._painter(clip, panels, [_no_basis()] * len(panels)).size
        sound = (clip, span) if self.audio else None
        writer = VideoWriter(self.output, size, rate, compression, sound)
        bases = self._fitted(clip, span, panels) if stored is None else stored
        if self.save_basis is not None:
            self._save(panels, bases, self.save_basis)
        reports = self._paint(clip, span, panels, bases, writer)
        self._tell(clip, panels, reports, time.perf_counter() - begin)
        return 0

    def _check(self) -> None:
        """Refuse wrong options before anything is loaded."""
        from amradio.evals.temporal_stability import StabilityConfig

        if self.output.suffix.lower() != ".mp4" or self.output.is_dir():
            raise OptionError(f"--output {self.output} must be a file that ends in .mp4.")
        if self.output.exists() and self.clip.exists() and self.output.samefile(self.clip):
            raise OptionError(f"--output {self.output} is the clip itself; choose another file.")
        if self.report_out is not None and self.report_out.exists() and not self.report_out.is_dir():
            raise OptionError(f"--report-out {self.report_out} is a file, and a folder is needed for the reports.")
        check_counts(batch_size=self.batch_size, basis_frames=self.basis_frames, columns=self.columns)
        if self.layer and any(name != "backbone" for name in self.adaptor):
            raise OptionError("--layer chooses a block of the backbone; leave --adaptor out, or the layer.")
        if self.basis is not None and (self.skip or self.save_basis is not None):
            raise OptionError(
                "--basis takes colours from a file; --skip and --save-basis are for colours that are fitted."
            )
        StabilityConfig(self.static_threshold)

    def _panels(self) -> list[_Panel]:
        """Load the models."""
        from amradio.evals.runner import model_record
        from amradio.features.frames import View
        from amradio.images import ResizePolicy

        mode = None if self.mode == "auto" else self.mode
        sizes = self.resolution or ((),) if mode == "nearest" else self.resolution or (_DEFAULT_RESOLUTION,)
        device = device_of(self.device)
        panels = []
        for model, adaptor, layer in product(
            self.model or (DEFAULT_MODEL,), self.adaptor or (None,), self.layer or (None,)
        ):
            chosen = None if adaptor == "backbone" else adaptor
            backbone = self.load_backbone(model, chosen, device, progress=not self.json)
            record = model_record(backbone)
            digest = record.get("sha256") or record.get("sha256_of_weights") or record.get("revision")
            about = {"model": record["name"], "weights": digest, "adaptor": chosen, "layer": layer}
            names = [re.split(r"[\\/]", model.rstrip("\\/"))[-1], adaptor, None if layer is None else f"layer {layer}"]
            for size in sizes:
                policy = ResizePolicy.parse(size, mode, backbone.min_resolution_step)
                head = [*names, f"{'x'.join(map(str, size)) or 'own'} px"]
                panels.append(_Panel(" · ".join(filter(None, head)), about, View(backbone, policy, layer)))
        return panels

    def _painter(self, clip: Clip, panels: Sequence[_Panel], bases: Sequence[PCABasis]) -> Any:
        from amradio.viz.video import ClipPainter

        return ClipPainter(
            (clip.height, clip.width),
            [panel.head for panel in panels],
            bases,
            [panel.view.policy for panel in panels],
            columns=self.columns or (len(self.resolution) if len(self.resolution) > 1 else None),
            height=self.height,
            upsampling=self.upsample,
            captions=not self.no_captions,
        )

    # ---- colours ----

    def _stored(self, panels: Sequence[_Panel], path: Path) -> list[PCABasis]:
        from amradio.viz.basis_file import basis_of, load_bases

        bases = load_bases(path)
        return [basis_of(panel.about, bases, path) for panel in panels]

    def _fitted(self, clip: Clip, span: Span, panels: Sequence[_Panel]) -> list[PCABasis]:
        """The first pass over the clip."""
        from amradio.features.frames import frame_maps
        from amradio.viz.video import fit_clip_bases

        spaces = [tuple(panel.about.items()) for panel in panels]
        frames = clip.evenly(self.basis_frames, span)
        with self._bar("colours", self.basis_frames) as advance:

            def features() -> Iterator[list[Any]]:
                for _, maps in frame_maps([p.view for p in panels], frames, batch_size=self.batch_size):
                    advance(1)
                    yield [m.features for m in maps]

            return fit_clip_bases(features(), spaces, count=self.basis_frames, skip=self.skip)

    def _save(self, panels: Sequence[_Panel], bases: Sequence[PCABasis], path: Path) -> None:
        from amradio.viz.basis_file import NamedBasis, save_bases

        unique = {tuple(p.about.items()): NamedBasis(p.about, b) for p, b in zip(panels, bases, strict=True)}
        save_bases(path, list(unique.values()))

    # ---- frames ----

    def _paint(
        self, clip: Clip, span: Span, panels: Sequence[_Panel], bases: Sequence[PCABasis], writer: Any
    ) -> list[EvalReport]:
        """The pass over all frames."""
        from amradio.evals.temporal_stability import StabilityConfig, TemporalStability, stability_report
        from amradio.features import ExtractOptions
        from amradio.features.frames import frame_maps
        from amradio.images import to_uint8_tensor

        painter = self._painter(clip, panels, bases)
        measured = [TemporalStability(StabilityConfig(self.static_threshold)) for _ in panels]
        begin, first = time.perf_counter(), None
        with self._bar("video", clip.expected_frames(span)) as advance, writer as out:
            rows = frame_maps([p.view for p in panels], clip.frames(span), batch_size=self.batch_size)
            for frame, maps in rows:
                first = frame.time if first is None else first
                for one, found in zip(measured, maps, strict=True):
                    one.update(to_uint8_tensor(found.photo), found.features, float(frame.time))
                out.write(painter.paint(frame.image, maps), frame.time - first)
                advance(1)
        wall_s = time.perf_counter() - begin
        taken = {"start_s": span.start, "end_s": span.end, "every": span.every, "fps": span.fps}
        about = {"name": str(self.clip), "height": clip.height, "width": clip.width, "codec": clip.codec, **taken}
        options = ExtractOptions(batch_size=self.batch_size, device=device_of(self.device))
        return [
            stability_report(one, panel.view, about, options, wall_s)
            for one, panel in zip(measured, panels, strict=True)
        ]

    def _tell(self, clip: Clip, panels: Sequence[_Panel], reports: Sequence[EvalReport], wall_s: float) -> None:
        """Print and write the numbers."""
        if self.report_out is not None:
            for panel, report in zip(panels, reports, strict=True):
                report.save(self.report_out / re.sub(r"[^\w.=-]+", "-", f"{self.output.stem}-{panel.head}"))
        count, speed = reports[0].dataset["video"]["count"], reports[0].images_per_s
        if self.json:
            found = {"written": str(self.output), "frames": count, "frames_per_s": speed, "wall_s": wall_s}
            print(json.dumps({**found, "reports": [report.to_dict() for report in reports]}, indent=2))
            return
        for panel, report in zip(panels, reports, strict=True):
            for note in report.notes:
                print(f"note: {panel.head}: {note}", file=sys.stderr)
        print(table(*_stability_table(panels, reports)))
        print(
            "\nchange: of features at static patches, from one frame to the next; 0 = none, 1 = as far as two random "
            "patches of the clip are apart"
        )
        print(f"{count} frames in {wall_s:.1f} s ({speed:.1f} frames/s); the video is {self.output}")
        if self.report_out is not None:
            print(f"reports are in {self.report_out}")

    @contextmanager
    def _bar(self, what: str, total: int | None) -> Iterator[Callable[[int], object]]:
        from tqdm import tqdm

        with tqdm(total=total, unit="frame", desc=what, disable=self.json, file=sys.stderr) as bar:
            yield bar.update


def _no_basis() -> PCABasis:
    """Stands for a basis where only sizes are asked for."""
    import torch

    from amradio.viz import PCABasis

    return PCABasis(torch.zeros(1, 3), torch.zeros(3), torch.zeros(3))


def _stability_table(panels: Sequence[_Panel], reports: Sequence[EvalReport]) -> tuple[list[str], list[list[str]]]:
    names = ("change", "change_of_moving", "cosine", "static")
    rows = []
    for panel, report in zip(panels, reports, strict=True):
        cells = [report.metrics.get(name) for name in names]
        rows.append([panel.head, *("-" if m is None else f"{m.value:.3f}" for m in cells)])
    return ["features", "change", "of moving", "cosine", "static %"], rows
