"""What an evaluation returns: numbers together with everything that they depend on.

A report is saved twice, as JSON for programs and as Markdown for people. `compare` puts reports side by side and names
what else differs between them; `sweep_table` makes one table of many.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from amradio.errors import ConfigError, OptionError
from amradio.weights.files import atomic_file

SCHEMA = 1
"""Version of the layout of the saved file."""

_MARKDOWN_CLASSES = 50  # a table of more classes is in the JSON file only


@dataclass(frozen=True)
class Metric:
    """A measured number.

    Attributes:
        value: The number; the mean if it was measured several times.
        unit: ``%``, ``px``, ...; empty for a pure number.
        std: Standard deviation over repetitions (n - 1 in the denominator), None for one measurement.
    """

    value: float
    unit: str = ""
    std: float | None = None

    def __str__(self) -> str:
        spread = "" if self.std is None else f" ± {self.std:.3f}"
        return f"{self.value:.3f}{spread}{' ' if self.unit else ''}{self.unit}"


@dataclass(frozen=True, kw_only=True)
class EvalReport:
    """Result of one evaluation of one backbone at one resolution.

    Attributes:
        task: ``knn``, ``linear``, ``zero-shot``, ...
        protocol: What exactly was done, in words; differs where numbers may not be compared.
        metrics: By name, the most important first: ``top1``, ``top5``, ...
        config: All options, resolved, with ``resize`` (``mode``, ``size``, ``multiple``).
        model: Identity: ``name``, ``adaptor``, ``source``, ``sha256``, ``license``, ...
        dataset: For each role (``train``, ``eval``): name, split, count, how many failed and why, fingerprint.
        environment: Versions of the packages, device, dtype, number of processes.
        wall_s: Seconds of the whole evaluation.
        images_per_s: Pictures that went through the backbone each second, all processes together.
        timing: Seconds and throughput of each stage.
        per_class: A value for each class that occurs, in the unit of the first metric; None if there are no classes.
        notes: What a reader of the numbers has to know.
        details: Further results of the protocol, such as the confusion matrix.
    """

    task: str
    protocol: str
    metrics: dict[str, Metric]
    config: dict[str, Any]
    model: dict[str, Any]
    dataset: dict[str, Any]
    environment: dict[str, Any]
    wall_s: float
    images_per_s: float
    timing: dict[str, Any] = field(default_factory=dict)
    per_class: dict[str, float] | None = None
    notes: tuple[str, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Model, adaptor and size, for the head of a column."""
        return f"{self.model_label}, {self.size_label}"

    @property
    def model_label(self) -> str:
        """Model and adaptor."""
        adaptor = self.model.get("adaptor")
        return f"{self.model['name']}/{adaptor}" if adaptor else str(self.model["name"])

    @property
    def size_label(self) -> str:
        """To which size pictures were brought: ``378x378`` (centre crop), ``shortest 378``, ..."""
        resize = self.config["resize"]
        size = "x".join(map(str, resize["size"]))
        return size if resize["mode"] == "crop" else f"{resize['mode']} {size}".strip()

    @property
    def failed(self) -> int:
        """Pictures that could not be used, of all roles."""
        failed: int = sum(d["failed"] for d in self.dataset.values())
        return failed

    @property
    def failed_fraction(self) -> float:
        """Share of pictures that could not be used."""
        count: int = sum(d["count"] for d in self.dataset.values())
        return self.failed / max(count, 1)

    def to_dict(self) -> dict[str, Any]:
        """Return a record that JSON can hold."""
        record = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        record["metrics"] = {name: dataclasses.asdict(m) for name, m in self.metrics.items()}
        return {"schema": SCHEMA, **record, "notes": list(self.notes)}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> EvalReport:
        """Make a report from what `to_dict` returned.

        Raises:
            ConfigError: The record is no report, or of another version.
        """
        fields = dict(record)
        schema = fields.pop("schema", None)
        if schema != SCHEMA:
            found = "no schema version" if schema is None else f"schema version {schema!r}"
            raise ConfigError(
                f"The record has {found}; this amradio reads reports of version {SCHEMA}, which `amradio eval` writes."
            )
        try:
            fields["metrics"] = {name: Metric(**m) for name, m in fields["metrics"].items()}
            fields["notes"] = tuple(fields["notes"])
            return cls(**fields)
        except (AttributeError, KeyError, TypeError) as error:
            raise ConfigError(f"The record is not an evaluation report: {error}.") from error

    def to_markdown(self) -> str:
        """Write the report for people."""
        title = f"# {self.task}: {self.label}\n\n{self.protocol}\n"
        metrics = markdown_table(["metric", "value"], [[name, str(m)] for name, m in self.metrics.items()])
        speed = f"{self.images_per_s:.1f} images/s, {self.wall_s:.1f} s in all\n"
        parts = [title, metrics, speed]
        if self.notes:
            parts.append("\n".join(f"- {note}" for note in self.notes) + "\n")
        sections = {
            "Data": self.dataset,
            "Model": self.model,
            "Config": self.config,
            "Environment": self.environment,
            "Timing": self.timing,
        }
        for heading, content in sections.items():
            rows = [[key, _text(value)] for key, value in flatten(content).items() if not key.endswith(".failures")]
            parts.append(f"## {heading}\n\n{markdown_table(['what', 'value'], rows)}")
        failures = [(role, f) for role, d in self.dataset.items() for f in d["failures"]]
        if failures:
            rows = [[role, f["path"], f["reason"]] for role, f in failures]
            parts.append(f"## Pictures that failed\n\n{markdown_table(['role', 'path', 'reason'], rows)}")
        if self.per_class:
            parts.append(f"## Classes\n\n{self._classes()}")
        return "\n".join(parts)

    def _classes(self) -> str:
        assert self.per_class is not None
        if len(self.per_class) > _MARKDOWN_CLASSES:
            return f"{len(self.per_class)} values are in the JSON file.\n"
        unit = next(iter(self.metrics.values())).unit
        head = ["class", f"{next(iter(self.metrics))} {unit}".strip()]
        return markdown_table(head, [[name, f"{value:.3f}"] for name, value in self.per_class.items()])

    def save(self, path: str | os.PathLike[str]) -> tuple[Path, Path]:
        """Write the report as JSON and as Markdown.

        Args:
            path: Without ending, or ending in ``.json`` or ``.md``; folders are made.

        Returns:
            The paths of the two files.
        """
        stem = os.fspath(path).removesuffix(".json").removesuffix(".md")
        json_path, markdown_path = Path(f"{stem}.json"), Path(f"{stem}.md")
        for target, text in ((json_path, _dump(self.to_dict())), (markdown_path, self.to_markdown())):
            with atomic_file(target) as part:
                # A file name need not be valid Unicode; that is no reason to lose a report.
                part.write_text(text, encoding="utf-8", errors="backslashreplace")
        return json_path, markdown_path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EvalReport:
        """Read the JSON file of a report.

        Raises:
            OptionError: There is no such file.
            ConfigError: It is no report.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (FileNotFoundError, IsADirectoryError):
            raise OptionError(f"There is no report {os.fspath(path)}: give the .json file of a report.") from None
        try:
            record = json.loads(text)
            if not isinstance(record, dict):
                raise ConfigError(f"The file holds a {type(record).__name__}, not a JSON object.")
            return cls.from_dict(record)
        except (ConfigError, ValueError) as error:
            raise ConfigError(f"{os.fspath(path)} cannot be read as a report: {error}") from error


class Table(NamedTuple):
    """Cells as text.

    Attributes:
        head: Column titles.
        rows: As many cells each.
    """

    head: list[str]
    rows: list[list[str]]


def sweep_table(reports: Sequence[EvalReport], digits: int | None = 3) -> Table:
    """Make one table of many reports: a row each.

    Args:
        reports: Any; a metric that a report lacks is left empty.
        digits: After the point; None gives all of them.

    Returns:
        Model, size, the metrics with their units, failed pictures, throughput.
    """
    units = {name: m.unit for r in reports for name, m in r.metrics.items()}
    spread = {name for r in reports for name, m in r.metrics.items() if m.std is not None}

    def number(value: float | None) -> str:
        return "" if value is None else repr(value) if digits is None else f"{value:.{digits}f}"

    head = ["task", "model", "size"]
    for name, unit in units.items():
        head += [f"{name} {unit}".strip(), *([f"{name} std"] if name in spread else [])]
    rows = []
    for r in reports:
        row = [r.task, r.model_label, r.size_label]
        for name in units:
            metric = r.metrics.get(name)
            row.append(number(metric.value if metric else None))
            if name in spread:
                row.append(number(metric.std if metric else None))
        rows.append([*row, str(r.failed), f"{r.images_per_s:.1f}"])
    return Table([*head, "failed", "images/s"], rows)


def append_csv(report: EvalReport, path: str | os.PathLike[str]) -> None:
    """Add a line to a CSV file; a new file gets a head.

    Args:
        report: Its row of `sweep_table`, with all digits.
        path: Folders are made.

    Raises:
        OptionError: The file has other columns.
    """
    head, rows = sweep_table([report], digits=None)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("a+", newline="", encoding="utf-8") as file:
        file.seek(0)
        found = next(csv.reader(file), None)
        if found is not None and found != head:
            raise OptionError(
                f"{target} has the columns {', '.join(found)}, and this report has {', '.join(head)}. Choose another "
                "CSV file."
            )
        csv.writer(file).writerows([*([head] if found is None else []), *rows])


@dataclass(frozen=True)
class MetricComparison:
    """One metric in several reports.

    Attributes:
        name: Of the metric.
        unit: Its unit.
        values: One a report; None where the report does not have it.
    """

    name: str
    unit: str
    values: tuple[float | None, ...]

    @property
    def differences(self) -> tuple[float | None, ...]:
        """Each value minus the first report's."""
        first = self.values[0]
        return tuple(None if v is None or first is None else v - first for v in self.values)


@dataclass(frozen=True)
class Comparison:
    """Reports side by side.

    Attributes:
        labels: One a report.
        metrics: All metrics that any of them has.
        differing: Fields that are not equal in all reports, by dotted name, with each report's value (None if
            missing): ``protocol``, ``config.k``, ``model.sha256``, ``dataset.eval.count``, ``environment.torch``, ...
    """

    labels: tuple[str, ...]
    metrics: tuple[MetricComparison, ...]
    differing: dict[str, tuple[Any, ...]]

    @property
    def protocol_differs(self) -> list[str]:
        """Differing fields of task, protocol, config (but for the resolution) and data: reasons not to compare."""
        own = ("task", "protocol", "config.", "dataset.")
        return [name for name in self.differing if name.startswith(own) and not name.startswith("config.resize.")]

    def to_dict(self) -> dict[str, Any]:
        """Return a record that JSON can hold."""
        return {
            "reports": list(self.labels),
            "metrics": [{**dataclasses.asdict(m), "differences": list(m.differences)} for m in self.metrics],
            "differing": {name: list(values) for name, values in self.differing.items()},
            "protocol_differs": self.protocol_differs,
        }

    def metric_table(self) -> Table:
        """Metrics down, reports across; behind each value the difference to the first report."""
        rows = []
        for metric in self.metrics:
            cells = []
            for i, (value, change) in enumerate(zip(metric.values, metric.differences, strict=True)):
                gap = "" if i == 0 or change is None else f" ({change:+.3f})"
                cells.append("-" if value is None else f"{value:.3f}{gap}")
            rows.append([f"{metric.name} {metric.unit}".strip(), *cells])
        return Table(["metric", *self.labels], rows)

    def difference_table(self) -> Table:
        """Differing fields down, reports across."""
        rows = [[name, *map(_text, values)] for name, values in self.differing.items()]
        return Table(["field", *self.labels], rows)


def compare(reports: Sequence[EvalReport], labels: Sequence[str] | None = None) -> Comparison:
    """Put reports side by side.

    Args:
        reports: At least two.
        labels: How to call them; default model and size, numbered where two are equal.

    Returns:
        Their metrics, and which fields differ. Times and lists of failed pictures are not compared.

    Raises:
        OptionError: There are fewer than two reports, or not as many labels.
    """
    if len(reports) < 2:
        raise OptionError(f"A comparison needs at least two reports, got {len(reports)}.")
    names = [r.label for r in reports] if labels is None else list(labels)
    if len(names) != len(reports):
        raise OptionError(f"There are {len(reports)} reports and {len(names)} labels.")
    names = [f"{n} [{i + 1}]" if names.count(n) > 1 else n for i, n in enumerate(names)]
    units = {name: m.unit for r in reports for name, m in r.metrics.items()}
    metrics = [
        MetricComparison(name, unit, tuple(r.metrics[name].value if name in r.metrics else None for r in reports))
        for name, unit in units.items()
    ]
    fields = [_comparable(r) for r in reports]
    keys = dict.fromkeys(key for f in fields for key in f)
    rows = {key: tuple(f.get(key) for f in fields) for key in keys}
    differing = {key: row for key, row in rows.items() if any(v != row[0] for v in row[1:])}
    return Comparison(tuple(names), tuple(metrics), differing)


def flatten(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted names."""
    flat: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, with a line break at its end."""
    cells = [[c.replace("|", "\\|").replace("\n", " ") for c in row] for row in [head, *rows]]
    lines = [cells[0], ["---"] * len(head), *cells[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _comparable(report: EvalReport) -> dict[str, Any]:
    record = report.to_dict()
    # Through JSON, so that a report in memory equals the same report from a file: tuples are lists there.
    plain = json.loads(json.dumps({key: record[key] for key in ("config", "model", "dataset", "environment")}))
    flat = {"task": report.task, "protocol": report.protocol, **flatten(plain)}
    return {key: value for key, value in flat.items() if not key.endswith(".failures")}


def _dump(record: Mapping[str, Any]) -> str:
    """JSON with one field a line; long lists of numbers are not spread over lines."""
    fields = []
    for key, value in record.items():
        indent = None if key == "details" else 2
        text = json.dumps(value, indent=indent, allow_nan=False)
        fields.append(f"  {json.dumps(key)}: {text.replace(chr(10), chr(10) + '  ')}")
    return "{\n" + ",\n".join(fields) + "\n}\n"


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    return ", ".join(map(_text, value)) if isinstance(value, (list, tuple)) else str(value)
