"""Numbered files in one word: ``shard-{0000..0007}.tar``."""

from __future__ import annotations

import re

from amradio.errors import DatasetError

_MAX_WORDS = 1_000_000
_RANGE = re.compile(r"(-?[0-9]+)\.\.(-?[0-9]+)(?:\.\.(-?[0-9]+))?")


def expand_braces(pattern: str) -> list[str]:
    """Write out what stands in braces, as the shell does.

    ``{a,b}`` stands for both words, ``{08..11}`` for the numbers from 08 to 11, as wide as the wider end if one of them
    begins with 0, and ``{0..10..5}`` for every fifth. Braces may be nested. Others, such as ``{}`` and ``{x}``, stay as
    they are.

    Args:
        pattern: A text with any number of braces.

    Returns:
        At least one text; the last brace counts fastest.

    Raises:
        DatasetError: There would be more than a million texts.
    """
    start = pattern.find("{")
    while start >= 0:
        end = _matching(pattern, start)
        words = None if end is None else _words(pattern[start + 1 : end])
        if end is not None and words is not None:
            heads = [head for word in words for head in expand_braces(word)]
            tails = expand_braces(pattern[end + 1 :])
            _check_count(pattern, len(heads) * len(tails))
            return [f"{pattern[:start]}{head}{tail}" for head in heads for tail in tails]
        start = pattern.find("{", start + 1)
    return [pattern]


def _matching(pattern: str, start: int) -> int | None:
    depth = 0
    for i in range(start, len(pattern)):
        depth += {"{": 1, "}": -1}.get(pattern[i], 0)
        if depth == 0:
            return i
    return None


def _words(inner: str) -> list[str] | None:
    """What the content of a pair of braces stands for; None if it is no list and no range."""
    if span := _RANGE.fullmatch(inner):
        return _numbers(span[1], span[2], span[3])
    words, depth = [""], 0
    for c in inner:
        depth += {"{": 1, "}": -1}.get(c, 0)
        if c == "," and depth == 0:
            words.append("")
        else:
            words[-1] += c
    return words if len(words) > 1 else None


def _numbers(first: str, last: str, step: str | None) -> list[str]:
    a, b = int(first), int(last)
    by = abs(int(step or 1)) or 1
    _check_count(f"{{{first}..{last}}}", abs(b - a) // by + 1)
    padded = any(re.match("-?0[0-9]", n) for n in (first, last))
    width = max(len(first), len(last)) if padded else 0
    return [f"{n:0{width}d}" for n in (range(a, b + 1, by) if a <= b else range(a, b - 1, -by))]


def _check_count(pattern: str, count: int) -> None:
    if count > _MAX_WORDS:
        raise DatasetError(f"The braces in {pattern} stand for {count:,} names, more than {_MAX_WORDS:,}.")
