"""What all commands of ``amradio visualize`` that draw photos have in common: models, sizes, sheets."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from amradio.cli.arguments import Size
from amradio.cli.common import DEFAULT_MODEL, BackboneOptions, device_of, exit_code, print_failures, progress_bar
from amradio.errors import ImageError, OptionError, ResolutionError

if TYPE_CHECKING:
    from PIL.Image import Image

    from amradio.backbones.protocol import Backbone
    from amradio.images import ResizePolicy
    from amradio.viz import Cell, Legend, Sheet

_MOST_PHOTOS = 256
_DEFAULT_RESOLUTION = (448,)
_WIDEST = 2.5  # of a picture on a sheet, in heights

UpsamplingName = Literal["nearest", "bilinear", "bicubic", "guided"]


@dataclass(frozen=True)
class Photo:
    """A photo that was read.

    Attributes:
        name: For captions and file names.
        location: For messages.
        picture: Upright, in RGB, at its own size.
        is_first: Whether it is the first of those that were named.
    """

    name: str
    location: str
    picture: Image
    is_first: bool


@dataclass
class Column:
    """One model at one size, and what it makes of each photo.

    Attributes:
        head: What it is, for people.
        group: Model, adaptor and layer: what features of one space have in common.
        results: A `FeatureMap` or `AttentionMap` for each photo; None where it failed.
        extra: What else the command needs of the model; see `DrawCommand.extra`.
    """

    head: str
    group: tuple[Any, ...]
    results: list[Any] = field(default_factory=list)
    extra: Any = None


@dataclass(frozen=True)
class Drawing:
    """What a command drew.

    Attributes:
        heads: Above the columns.
        rows: One for each photo that `DrawCommand.draw` was given, unless `together`.
        note: What the pictures are.
        legend: What colours mean, if anything.
        together: Rows are of all photos, and stay on one sheet.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str
    legend: Legend | None = None
    together: bool = False


@dataclass(frozen=True, kw_only=True)
class DrawCommand(BackboneOptions):
    """Base class of commands that draw what models make of photos. Each field is an option."""

    photos: tyro.conf.Positional[tuple[str, ...]]
    """Files, folders (searched recursively) and glob patterns."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """A file for one sheet with all photos, ending in .png, .jpg, .svg or .pdf; or a folder, for one sheet a photo."""
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
    """How a resolution is meant; nearest is the photo's own size."""
    upsample: UpsamplingName = "bilinear"
    """How maps become as large as photos; nearest shows the true grid, guided follows the edges of the photo."""
    height: int = 320
    """Of the pictures on the sheet, in pixels."""
    title: str = ""
    """Stands above the sheet."""
    format: Literal["png", "jpg", "svg", "pdf"] = "png"
    """Of the files in a folder."""
    json: bool = False
    """Print one JSON object instead of text, and no progress bar."""

    def compute(self, backbone: Backbone, photo: Image, policy: ResizePolicy, layer: int | None) -> Any:
        """What a model makes of a photo; a `FeatureMap` unless a command wants something else."""
        from amradio.features import feature_map

        return feature_map(backbone, photo, policy, layer=layer)

    def extra(self, backbone: Backbone) -> Any:
        """What else is needed of a model; it is asked before the photos go through."""
        return None

    def check(self) -> None:
        """Refuse what cannot work, before anything is loaded."""

    def draw(self, photos: Sequence[Photo], columns: Sequence[Column]) -> Drawing:
        """Draw the photos."""
        raise NotImplementedError

    def run(self) -> int:
        """Draw and write; returns the exit code."""
        as_file = self._check()
        photos, failures = self._read()
        total = len(photos) + len(failures)
        columns = self._columns(photos, failures) if photos else []
        photos = [p for i, p in enumerate(photos) if all(column.results[i] is not None for column in columns)]
        for column in columns:
            column.results = [result for result in column.results if result is not None]
        written = self._write(photos, columns, as_file) if photos else []
        if self.json:
            print(json.dumps({"written": [str(path) for path in written], "photos": total, "failures": failures}))
        else:
            print_failures(failures, len(failures))
            if written:
                print(f"{len(photos)} of {total} photos are in {written[0] if as_file else self.output}")
            else:
                print("error: none of the photos could be drawn", file=sys.stderr)
        return exit_code(total, len(failures), 0.0)

    # ---- what columns there are ----

    def _check(self) -> bool:
        """Refuse wrong options; returns whether one file is written."""
        from amradio.viz.grid import SHEET_SUFFIXES

        as_file = self.output.suffix.lower() in SHEET_SUFFIXES and not self.output.is_dir()
        if not as_file and (self.output.suffix or self.output.is_file()) and not self.output.is_dir():
            raise OptionError(
                f"--output {self.output} is neither a folder nor does it end in one of {', '.join(SHEET_SUFFIXES)}."
            )
        if not 16 <= self.height <= 4096:
            raise OptionError(f"--height must be from 16 to 4096 pixels, got {self.height}.")
        if self.layer and any(name != "backbone" for name in self.adaptor):
            raise OptionError("--layer chooses a block of the backbone; leave --adaptor out, or the layer.")
        self.check()
        return as_file

    def _policies(self, step: int) -> list[tuple[str, ResizePolicy]]:
        from amradio.images import ResizePolicy

        mode = None if self.mode == "auto" else self.mode
        sizes = self.resolution or ((),) if mode == "nearest" else self.resolution or (_DEFAULT_RESOLUTION,)
        return [("x".join(map(str, size)), ResizePolicy.parse(size, mode, step)) for size in sizes]

    def _columns(self, photos: Sequence[Photo], failures: list[dict[str, str]]) -> list[Column]:
        """Run all models over all photos; a photo that fails for one of them fails for all."""
        models = self.model or (DEFAULT_MODEL,)
        spaces = list(product(models, self.adaptor or (None,), self.layer or (None,)))
        sizes = len(self.resolution) or 1
        device = device_of(self.device)
        failed: dict[int, str] = {}
        columns: list[Column] = []
        with progress_bar(len(photos) * len(spaces) * sizes, "features", enabled=not self.json) as advance:
            for model, adaptor, layer in spaces:
                chosen = None if adaptor == "backbone" else adaptor
                backbone = self.load_backbone(model, chosen, device, progress=not self.json)
                extra = self.extra(backbone)
                for size, policy in self._policies(backbone.min_resolution_step):
                    column = Column(self._head(model, adaptor, layer, size), (model, adaptor, layer), extra=extra)
                    columns.append(column)
                    for i, photo in enumerate(photos):
                        column.results.append(None)
                        if i not in failed:
                            try:
                                column.results[i] = self.compute(backbone, photo.picture, policy, layer)
                            except ResolutionError as error:
                                failed[i] = str(error)
                        advance(1)
        for i, reason in failed.items():
            failures.append({"path": photos[i].location, "reason": reason})
            for column in columns:
                column.results[i] = None
        return columns

    def _head(self, model: str, adaptor: str | None, layer: int | None, size: str) -> str:
        parts = [re.split(r"[\\/]", model.rstrip("\\/"))[-1]]
        parts += [] if adaptor is None else [adaptor]
        parts += [] if layer is None else [f"layer {layer}"]
        parts += [f"{size} px"] if len(self.resolution) > 1 else []
        return " · ".join(parts)

    # ---- photos in, sheets out ----

    def _read(self) -> tuple[list[Photo], list[dict[str, str]]]:
        """The photos, and which could not be read."""
        from amradio.images import MAX_PIXELS, WHITE, expand

        sources = expand(self.photos)
        if len(sources) > _MOST_PHOTOS:
            raise OptionError(
                f"A sheet of {len(sources)} photos would show nothing; give at most {_MOST_PHOTOS}. "
                "`amradio features --pca` draws any number, each by itself."
            )
        photos, failures = [], []
        for i, source in enumerate(sources):
            try:
                picture = source.decode(max_pixels=MAX_PIXELS, background=WHITE)
                photos.append(Photo(source.id, source.location, picture, i == 0))
            except ImageError as error:
                failures.append({"path": source.location, "reason": str(error)})
        return photos, failures

    def _write(self, photos: Sequence[Photo], columns: Sequence[Column], as_file: bool) -> list[Path]:
        from amradio.viz.grid import save_sheet

        drawing = self.draw(photos, columns)
        if as_file:
            return [save_sheet(self._sheet(drawing, drawing.rows), self.output)]
        if drawing.together:
            name = "--".join(photo.name for photo in photos)
            return [save_sheet(self._sheet(drawing, drawing.rows), self.output / f"{name}.{self.format}")]
        return [
            save_sheet(self._sheet(drawing, [row]), self.output / f"{photo.name}.{self.format}")
            for photo, row in zip(photos, drawing.rows, strict=True)
        ]

    def _sheet(self, drawing: Drawing, rows: Sequence[Sequence[Cell]]) -> Sheet:
        from amradio.viz.grid import Sheet

        return Sheet(rows, drawing.heads, self.title, drawing.note, drawing.legend)

    def shown(self, photo: Image) -> Image:
        """A photo at its size on the sheet."""
        from PIL.Image import Resampling

        scale = min(self.height / photo.height, _WIDEST * self.height / photo.width)
        size = max(round(photo.width * scale), 1), max(round(photo.height * scale), 1)
        return photo.resize(size, Resampling.LANCZOS)


def grid_text(grid: Sequence[int]) -> str:
    """The size of a feature map, for people."""
    return f"{grid[0]} x {grid[1]}"
