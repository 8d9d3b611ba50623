"""What all commands under ``amradio eval`` share: models times resolutions, one table, a report each."""

from __future__ import annotations

import itertools
import json
import re
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import tyro

from amradio.cli.arguments import Size
from amradio.cli.common import (
    DEFAULT_MODEL,
    PictureOptions,
    check_counts,
    check_share,
    device_of,
    first_on_machine,
    progress_bar,
)
from amradio.cli.text import table
from amradio.errors import AmradioError, OptionError

if TYPE_CHECKING:
    from amradio.backbones.protocol import Backbone
    from amradio.distributed import Group
    from amradio.evals.report import EvalReport
    from amradio.evals.runner import Setup
    from amradio.images.dataset import ImageSet
    from amradio.images.resize import ResizePolicy

_SHOWN_FAILURES = 10
_INCOMPLETE = 3


class _Outcome(NamedTuple):
    """What an evaluation command did.

    Attributes:
        reports: One for each model and resolution.
        unwritten: Why files could not be written.
        is_main: Whether this process is the one that prints.
    """

    reports: list[EvalReport]
    unwritten: list[str]
    is_main: bool


@dataclass(frozen=True, kw_only=True)
class EvalCommand(PictureOptions, ABC):
    """Base class of the evaluations. A subclass opens its data once and evaluates one backbone at one size."""

    model: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(aliases=["-m"])] = ()
    """Backbone: version key, repository, path, timm:NAME, hf:REPO, ...; default the package's amradio-tiny."""
    adaptor: Annotated[str | None, tyro.conf.arg(aliases=["--adaptor-name", "-a"])] = None
    """Evaluate this adaptor's output instead of the backbone's own."""
    resolution: tyro.conf.UseAppendAction[tuple[Size, ...]] = ()
    """One number: shortest side, aspect kept. Two: scaled to cover height and width, centre cut out. Default: the
    model's preferred resolution, as a centre crop."""
    limit: int | None = None
    """Take only so many pictures of each set, chosen at random, some of each class."""
    seed: int = 0
    """Of every random choice."""
    label_column: str | None = None
    """Of tables and Hugging Face datasets; default the one that has labels."""
    image_column: str | None = None
    """Of tables and Hugging Face datasets; default the one that has images."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Folder for a report of each model and resolution, as JSON and as Markdown."""
    csv_out: Path | None = None
    """CSV file to add a line to for each model and resolution."""
    json: bool = False
    """Print one JSON object with all reports instead of a table, and no progress bar."""

    @abstractmethod
    def open(self) -> dict[str, Any]:
        """The sets of pictures, by role; called once."""

    @abstractmethod
    def evaluate(self, backbone: Backbone, images: dict[str, Any], setup: Setup) -> EvalReport | list[EvalReport]:
        """One backbone at one size: a report, or several."""

    def policy(self, backbone: Backbone, resolution: Size | tuple[()]) -> ResizePolicy:
        """To which size pictures are brought, from a value of ``--resolution`` or none."""
        from amradio.evals.runner import policy_for

        return policy_for(backbone, resolution, None if self.mode == "auto" else self.mode, self.resize_multiple)

    def policies(self, backbone: Backbone) -> list[ResizePolicy]:
        """The sizes that are evaluated one by one."""
        return [self.policy(backbone, size) for size in self.resolution or ((),)]

    def amount(self, images: dict[str, Any], backbone: Backbone) -> int:
        """How many pictures go through a backbone at each of these sizes; for the progress bar."""
        return sum(map(len, images.values()))

    def draw(self, report: EvalReport, path: Path) -> None:
        """Write what belongs beside a report.

        Args:
            report: Was written already.
            path: Of its files, without ending.
        """

    def prepared(self, backbone: Backbone, images: dict[str, Any]) -> Backbone:
        """The backbone that is evaluated, of the one that was loaded; called once for each model."""
        return backbone

    def run(self) -> int:
        """Evaluate, print and write; returns the exit code."""
        reports, unwritten, is_main = self._evaluate_all(bars=not self.json)
        if is_main:
            self._print(reports)
        if unwritten:
            raise OptionError(f"The results are above, but could not all be written: {unwritten[0]}")
        return _INCOMPLETE if any(r.failed_fraction > self.max_failed for r in reports) else 0

    def reports(self) -> list[EvalReport]:
        """Evaluate and write, without printing a table."""
        return self._evaluate_all(bars=True).reports

    def open_set(self, spec: str, split: str | None, usual_split: str) -> ImageSet:
        """Open one set of pictures, with the options of this command.

        Args:
            spec: See `amradio.images.open_images`.
            split: The part asked for.
            usual_split: The part that is meant where none is asked for and the set has several.
        """
        from amradio.errors import DatasetError

        images = None
        try:
            images = self._open_images(spec, split)
        except DatasetError:
            if split is None:
                with suppress(DatasetError):
                    images = self._open_images(spec, usual_split)
            if images is None:  # the first message is about what was asked for
                raise
        if self.limit is None:
            return images
        # Of labelled sets some of each class: what is to be found must be in the train set.
        return images.balanced_head(self.limit, self.seed)

    def _open_images(self, spec: str, split: str | None) -> ImageSet:
        from amradio.images import open_images

        return open_images(
            spec,
            split,
            cache_dir=self.cache_dir,
            local_files_only=self.offline,
            label_column=self.label_column,
            image_column=self.image_column,
        )

    def _evaluate_all(self, bars: bool) -> _Outcome:
        """All reports, each written as soon as it is there."""
        from amradio.distributed import init_group

        check_counts(limit=self.limit)
        check_share("max_failed", self.max_failed)
        self._check_outputs()
        with init_group(None if self.device == "auto" else device_of(self.device)) as group, warnings.catch_warnings():
            is_main = group is None or group.is_main
            if not is_main:  # the main process says the same
                warnings.simplefilter("ignore")
            outcome = _Outcome([], [], is_main)
            for report in self._measure(group, bars and is_main):
                outcome.reports.append(report)
                if is_main:
                    try:
                        self._keep(report)
                    except (AmradioError, OSError) as error:  # the result is still printed
                        outcome.unwritten.append(str(error))
            return outcome

    def _measure(self, group: Group | None, bars: bool) -> Iterator[EvalReport]:
        from amradio.evals.runner import Setup

        images = self.open()
        device = device_of(self.device) if group is None else group.device
        step = 1 if group is None else group.world_size  # the other processes are about as far
        for spec in self.model or (DEFAULT_MODEL,):
            backbone = self.prepared(self._load(spec, device, group, bars), images)
            total = self.amount(images, backbone)
            for policy in self.policies(backbone):
                setup = Setup(policy, self.extract_options(device), group)
                with progress_bar(total, f"{spec}, {policy}", enabled=bars) as advance:
                    # A default argument, because `advance` is another function in the next round.
                    on_record = lambda _, advance=advance: advance(step)  # noqa: E731
                    found = self.evaluate(backbone, images, replace(setup, on_record=on_record))
                chosen = {"limit": self.limit, "limit_seed": None if self.limit is None else self.seed}
                for report in found if isinstance(found, list) else [found]:
                    yield replace(report, config={**report.config, **chosen})

    def _load(self, spec: str, device: Any, group: Group | None, bars: bool) -> Backbone:
        """Load a backbone; under a group the first process of each machine downloads, the others find it there."""
        with first_on_machine(group):
            return self.load_backbone(spec, self.adaptor, device, progress=bars)

    def _keep(self, report: EvalReport) -> None:
        """Write a report as soon as it is there, so that a later failure does not lose it."""
        if self.output is not None:
            path = _free_name(self.output, report)
            report.save(path)
            self.draw(report, path)
        if self.csv_out is not None:
            from amradio.evals.report import append_csv

            append_csv(report, self.csv_out)

    def _check_outputs(self) -> None:
        """Refuse what cannot be written to before hours of computing."""
        if self.output is not None and self.output.exists() and not self.output.is_dir():
            raise OptionError(f"--output {self.output} is a file, and a folder is needed for the reports.")
        if self.csv_out is not None and self.csv_out.is_dir():
            raise OptionError(f"--csv-out {self.csv_out} is a folder; name a file.")

    def _print(self, reports: Sequence[EvalReport]) -> None:
        from amradio.evals.report import sweep_table

        if self.json:
            print(json.dumps({"reports": [r.to_dict() for r in reports]}, indent=2))
            return
        for report in reports:
            print_problems(report)
        print(table(*sweep_table(reports)))
        if self.output is not None:
            print(f"\nreports are in {self.output}")


def print_problems(report: EvalReport) -> None:
    """Say on standard error what a reader of the numbers has to know, and which pictures failed."""
    for note in report.notes:
        print(f"note: {report.label}: {note}", file=sys.stderr)
    for role, record in report.dataset.items():
        for failure in record["failures"][:_SHOWN_FAILURES]:
            print(f"failed: {failure['path']}: {failure['reason']}", file=sys.stderr)
        more = record["failed"] - _SHOWN_FAILURES
        if more > 0:
            print(f"failed: {more} more {role} pictures", file=sys.stderr)


def _free_name(folder: Path, report: EvalReport) -> Path:
    """A path without ending for a report; an earlier report is never replaced."""
    name = re.sub(r"[^\w.=-]+", "-", f"{report.task}-{report.model_label}-{report.size_label}").strip("-.")[:150]
    for i in itertools.count(1):
        path = folder / (name if i == 1 else f"{name}-{i}")
        if not Path(f"{path}.json").exists():
            return path
    raise AssertionError("unreachable")
