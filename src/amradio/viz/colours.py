"""Colours that can be told apart."""

from __future__ import annotations

import colorsys
import functools

import numpy as np

MOST = 64
"""Colours that there are; the last of them are already similar to others."""

_FIRST = (66, 133, 196)
_HUES, _SATURATIONS, _VALUES = 36, (0.25, 0.5, 0.75), (0.45, 0.7, 0.95)


def distinct_colours(count: int) -> list[tuple[int, int, int]]:
    """Colours for things without an order; the first ones of a longer list are those of a shorter one.

    Args:
        count: How many. Beyond `MOST`, they begin anew.

    Returns:
        RGB, 0..255 each.
    """
    colours = _colours()
    return [colours[i % MOST] for i in range(count)]


@functools.cache
def _colours() -> tuple[tuple[int, int, int], ...]:
    """Out of many colours, always the one that is furthest from all that were taken."""
    candidates = np.array(
        [
            colorsys.hsv_to_rgb(hue / _HUES, saturation, value)
            for saturation in _SATURATIONS
            for value in _VALUES
            for hue in range(_HUES)
        ]
    )
    candidates = (candidates * 255).round().astype(int)  # [N, 3]
    taken = [np.array(_FIRST)]
    distances = np.full(len(candidates), np.iinfo(int).max)  # squared, to the nearest that was taken
    for _ in range(MOST - 1):
        distances = np.minimum(distances, ((candidates - taken[-1]) ** 2).sum(1))
        taken.append(candidates[distances.argmax()])
    return tuple((int(r), int(g), int(b)) for r, g, b in taken)
