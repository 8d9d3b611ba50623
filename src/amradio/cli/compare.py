"""``amradio compare``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from amradio.cli.text import table
from amradio.errors import OptionError

_WIDEST = 40


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Put evaluation reports side by side: metrics, and what else differs."""

    reports: tyro.conf.Positional[tuple[Path, ...]]
    """Reports that amradio eval wrote, or folders of them; the first one is what the others are compared with."""
    markdown: bool = False
    """Print tables in Markdown."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> int:
        """Compare and print; returns the exit code."""
        from amradio.evals.report import EvalReport, compare, markdown_table

        found = compare([EvalReport.load(path) for path in _files(self.reports)])
        if self.json:
            print(json.dumps(found.to_dict(), indent=2))
            return 0
        show = markdown_table if self.markdown else table
        print(show(*found.metric_table()))
        if found.differing:
            rows = found.difference_table()
            # Long values side by side would be wider than any terminal; one below the other can be read.
            short = self.markdown or all(len(cell) <= _WIDEST for row in rows.rows for cell in row)
            print(f"\nwhat differs\n\n{show(*rows) if short else _listed(*rows)}")
        if found.protocol_differs:
            print(f"\nnote: measured under different protocols or data ({', '.join(found.protocol_differs)})")
        return 0


def _files(paths: Sequence[Path]) -> list[Path]:
    """Reports by name; of a folder all that are in it, of a Markdown file the JSON beside it."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(path.glob("*.json"))
            if not inside:
                raise OptionError(f"The folder {path} has no reports (*.json).")
            found += inside
        else:
            found.append(path.with_suffix(".json") if path.suffix == ".md" else path)
    return found


def _listed(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Each field, and below it each report's value."""
    width = max(map(len, head[1:]))
    blocks = [
        "\n".join([row[0], *(f"  {name.ljust(width)}  {value}" for name, value in zip(head[1:], row[1:], strict=True))])
        for row in rows
    ]
    return "\n".join(blocks)
