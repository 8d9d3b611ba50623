"""What differs between the settings that a file was made with, and those of now."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_MOST_SHOWN = 80  # letters of a value in a message


def differences(name: str, found: Any, wanted: Any) -> Iterator[str]:
    """Compare settings, nested ones by dotted name.

    Args:
        name: Of the settings; empty for a record whose keys speak for themselves.
        found: In the file, as JSON gives them.
        wanted: Now, likewise.

    Yields:
        A sentence for each difference.
    """
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        for key in {**found, **wanted}:
            yield from differences(f"{name}.{key}" if name else str(key), found.get(key), wanted.get(key))
    elif found != wanted:
        yield f"{name} is {_short(found)} in the file and {_short(wanted)} now"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."
