"""``amradio data``: what is in a data set of pictures with masks; pictures packed for another machine."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from amradio.cli.common import progress_bar
from amradio.cli.data_pack import Pack
from amradio.cli.text import table

if TYPE_CHECKING:
    from amradio.images.segmentation import DataReport, SegmentationSet
    from amradio.images.segmentation.check import SplitReport

_SHOWN = 10
_LAYOUTS = Literal["auto", "voc", "ade20k", "cityscapes", "coco-thing", "coco-stuff", "coco-instances", "folder"]


@dataclass(frozen=True, kw_only=True)
class SegmentationOptions:
    """Which pictures with masks are meant. A base class of commands: each field is an option."""

    path: tyro.conf.Positional[Path]
    """Folder or uncompressed tar archive."""
    layout: _LAYOUTS = "auto"
    """How it lies there; auto finds out."""
    split: str | None = None
    """Its part, such as train, trainaug or val."""
    classes: Path | None = None
    """File that names the classes, one a line, in place of the data set's own."""
    list_file: Path | None = None
    """Take the pictures that this file names, one a line."""
    json: bool = False
    """Print one JSON object, and no progress bar."""

    @property
    def layout_name(self) -> str | None:
        """The layout; None for auto."""
        return None if self.layout == "auto" else self.layout


@dataclass(frozen=True, kw_only=True)
class Check(SegmentationOptions):
    """Say what is in a data set of pictures with masks, what is missing, and what does not fit.

    Names are matched for all pictures. Exit code 0 if all is well, 3 if there are problems, 1 if nothing can be used.
    """

    sample: int = 64
    """Open so many pictures and masks of each split, chosen at random."""
    all: bool = False
    """Open every picture and mask."""

    def run(self) -> int:
        """Check and print; returns the exit code."""
        from amradio.images.segmentation import check_segmentation

        report = check_segmentation(
            self.path,
            self.layout_name,
            split=self.split,
            classes=self.classes,
            list_file=self.list_file,
            sample=None if self.all else self.sample,
            bar=partial(progress_bar, enabled=not self.json and sys.stderr.isatty()),
        )
        print(json.dumps(report.to_dict(), indent=2) if self.json else _as_text(report))
        return report.exit_code


@dataclass(frozen=True, kw_only=True)
class Subset(SegmentationOptions):
    """Draw pictures at random, and print their names, one a line, as --list-file takes them.

    Draws of one seed are nested: the pictures of a smaller size are among those of a larger one.
    """

    size: str
    """How many: a number, or a share such as 1/8, 1/64 or 1/128."""
    seed: int = 0
    """Of the draw."""

    def run(self) -> int:
        """Draw and print; returns the exit code."""
        from amradio.images.segmentation import open_segmentation

        pairs: SegmentationSet = open_segmentation(
            self.path, self.split, layout=self.layout_name, classes=self.classes, list_file=self.list_file
        )
        names = pairs.subset(self.size, self.seed).names
        print(json.dumps({"names": names}, indent=2) if self.json else "\n".join(names))
        return 0


@dataclass(frozen=True, kw_only=True)
class Data:
    """Look into a data set of pictures with masks, or pack pictures for another machine."""

    action: (
        Annotated[Check, tyro.conf.subcommand("check")]
        | Annotated[Subset, tyro.conf.subcommand("subset")]
        | Annotated[Pack, tyro.conf.subcommand("pack")]
    )

    @property
    def json(self) -> bool:
        """Whether errors are printed as JSON."""
        return self.action.json

    def run(self) -> int:
        """Do it; returns the exit code."""
        return self.action.run()


def _as_text(report: DataReport) -> str:
    names = next((split.class_names for split in report.splits if split.class_names), ())
    head = ("split", "pictures", "with mask", "opened", "void %", "problems")
    blocks = [f"layout {report.layout} in {report.root}", table(head, [_row(split) for split in report.splits])]
    if names:
        blocks.append(f"{len(names)} classes: {', '.join(names)}")
    blocks += [_absent(split) for split in report.splits if split.checked and split.absent]
    if report.lacking:
        blocks.append("\n".join(["not here, though the published data set has it:", *_indented(report.lacking)]))
    kinds = Counter(problem.kind for problem in report.problems)
    for kind, count in kinds.items():
        messages = [problem.message for problem in report.problems if problem.kind == kind]
        more = [f"and {count - _SHOWN} more; --json has all"] if count > _SHOWN else []
        blocks.append("\n".join([f"{kind} ({count:,}):", *_indented([*messages[:_SHOWN], *more])]))
    if not kinds:
        opened = all(split.checked == split.masks for split in report.splits)
        blocks.append("no problems" + ("" if opened else " in what was opened; --all opens the rest"))
    return "\n\n".join(blocks)


def _row(split: SplitReport) -> tuple[str, ...]:
    numbers = (split.pictures, split.masks, split.checked)
    return (
        split.split or "(all)",
        *(f"{n:,}" for n in numbers),
        f"{100 * split.void_share:.1f}",
        f"{len(split.problems):,}",
    )


def _absent(split: SplitReport) -> str:
    return f"in no mask opened of {split.split or 'all'}: {', '.join(split.absent)}"


def _indented(lines: tuple[str, ...] | list[str]) -> list[str]:
    return [f"  {line}" for line in lines]
