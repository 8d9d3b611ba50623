"""Results as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence


def csv_of(rows: Iterable[Sequence[str | int | float]]) -> bytes:
    """Rows as a CSV file in UTF-8; numbers that are no integers get four digits.

    A text that a spreadsheet would take for a formula gets an apostrophe in front.
    """
    data = io.StringIO()
    csv.writer(data).writerows([_cell(value) for value in row] for row in rows)
    return data.getvalue().encode()


def _cell(value: str | int | float) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else str(value)
