"""Tables and units for people."""

from __future__ import annotations

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align columns; columns of numbers to the right.

    Args:
        head: Column titles.
        rows: Cells as text.

    Returns:
        Lines without trailing spaces.
    """
    columns = list(zip(head, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [_is_numeric(column[1:]) for column in columns]
    lines = []
    for row in [head, *rows]:
        cells = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)


def _is_numeric(cells: Sequence[str]) -> bool:
    return all(c in ("", "-") or c.replace(".", "").replace(",", "").rstrip("M").isdigit() for c in cells)


def number(value: float | None) -> str:
    """A number without needless digits; ``-`` for None."""
    return "-" if value is None else f"{value:g}"


def size_of(count_bytes: float) -> str:
    """A byte count in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count_bytes < 1024:
            return f"{count_bytes:.0f} {unit}" if unit == "B" else f"{count_bytes:.1f} {unit}"
        count_bytes /= 1024
    return f"{count_bytes:.1f} TiB"
