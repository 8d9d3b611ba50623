"""``amradio compare``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import tyro

from amradio.cli.text import table


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Put evaluation reports side by side: metrics, and what else differs."""

    reports: tyro.conf.Positional[tuple[Path, ...]]
    """JSON files that amradio eval wrote; the first one is what the others are compared with."""
    markdown: bool = False
    """Print tables in Markdown."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> int:
        """Compare and print; returns the exit code."""
        from amradio.evals.report import EvalReport, compare, markdown_table

        found = compare([EvalReport.load(path) for path in self.reports])
        if self.json:
            print(json.dumps(found.to_dict(), indent=2))
            return 0
        show = markdown_table if self.markdown else table
        print(show(*found.metric_table()))
        if found.differing:
            print(f"\nwhat differs\n\n{show(*found.difference_table())}")
        if found.protocol_differs:
            print(f"\nnote: measured under different protocols or data ({', '.join(found.protocol_differs)})")
        return 0
