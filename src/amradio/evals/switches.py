"""Where a curve over resolutions switches: a fast change between two stretches of slow change.

A backbone that was trained at separate resolutions may carry two behaviours and change from one to the other in
between ("mode switching", RADIOv2.5 report, arXiv 2412.07679). Errors also grow smoothly, towards resolutions that are
too small or were never seen; that is no switch. The definition, which is ours:

- The error E, of each picture, is the median of three neighbouring resolutions, so that a single odd one counts for
  nothing, and is read as a function of the logarithm of the resolution, linear between points.
- Around each gap between points lies a window that spans a factor of 1.25 in resolution (or the gap, if that is wider),
  with a stretch of the same width before and one after it, or what the sweep has of them, but at least half; changes
  over these are scaled to the full width.
- The size of the change is the change of E across the window minus the mean of those before and after: what goes beyond
  the trend.
- It is a switch if the size is at least 0.05, and at least the difference of the changes before and after (a bend of
  the curve has at most half of that), and if half of the pictures have at least half of it.
- At either end of a sweep a stretch to compare with is missing. A change there is named, but not judged, if it is
  larger than any further inside and three times as fast as that over the next gap inwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from amradio.errors import OptionError

FACTOR = 1.25
LEAST_SIZE = 0.05
_LEAST_RATIO = 1.0
_LEAST_AGREEMENT = 0.5
_LEAST_FLANK = 0.5  # of the width of a window
_END_RATIO = 3.0
_LOCAL_SHARE = 0.8  # of the window's change: that is where the switch is

Values = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Change:
    """A change of the error over a window of resolutions.

    Attributes:
        low: Resolution in pixels before it.
        high: Resolution after it: the narrowest points of the sweep between which most of it happens.
        size: Change beyond the trend; positive if the error grows.
        before: Error at `low`.
        after: Error at `high`.
        ratio: Its size over the difference of the changes before and after.
        agreement: Share of pictures whose own size is at least half of the mean one, and has its sign.
    """

    low: int
    high: int
    size: float
    before: float
    after: float
    ratio: float
    agreement: float

    @property
    def is_local(self) -> bool:
        """Whether it stands out from what is before and after it, in enough pictures."""
        return self.ratio >= _LEAST_RATIO and self.agreement >= _LEAST_AGREEMENT


@dataclass(frozen=True)
class EndChange:
    """A change too near to an end of the sweep to tell whether it is a switch.

    Attributes:
        low: Resolution in pixels before it.
        high: Resolution after it.
        before: Error at `low`.
        after: Error at `high`.
    """

    low: int
    high: int
    before: float
    after: float


@dataclass(frozen=True)
class Verdict:
    """Whether a curve switches.

    Attributes:
        switches: Largest first; none is in the window of another, or in the stretches beside it.
        largest: The largest change beyond the trend anywhere, switch or not; None if the sweep is too short to tell.
        searched: First and last resolution between which a switch would be seen; None likewise.
        least_size: From which size on a change counts.
        at_end: The largest change between two neighbouring resolutions outside of `searched`, if it is larger than
            `largest` and counts.
    """

    switches: tuple[Change, ...]
    largest: Change | None
    searched: tuple[int, int] | None
    least_size: float
    at_end: EndChange | None = None

    def __str__(self) -> str:
        if self.largest is None or self.searched is None:
            return "No verdict: too few resolutions, too close to each other. Sweep over a factor of 2 at least."
        if self.switches:
            return " ".join([*map(_sentence, self.switches), *self._open()])
        if self.at_end is not None:
            return f"No switch between {self.searched[0]} and {self.searched[1]} px. {self._open()[0]}"
        return (
            f"No switch between {self.searched[0]} and {self.searched[1]} px: the largest change beyond the trend, "
            f"{self.largest.size:+.2g} between {self.largest.low} and {self.largest.high} px, {self._why_not()}."
        )

    def _open(self) -> list[str]:
        """What the sweep is too short to judge."""
        end = self.at_end
        if end is None:
            return []
        return [
            f"But between {end.low} and {end.high} px, at the end of the sweep, the error goes from {end.before:.3f} "
            f"to {end.after:.3f}: sweep further to see whether that is a switch."
        ]

    def _why_not(self) -> str:
        """Why the largest change is no switch."""
        assert self.largest is not None  # there is one
        if abs(self.largest.size) < self.least_size:
            return f"is below {self.least_size:g}"
        if self.largest.ratio < _LEAST_RATIO:
            return "is a bend of the curve and no step"
        return f"shows in {100 * self.largest.agreement:.0f} % of the pictures only"


def find_switches(
    resolutions: Sequence[int], errors: Values, *, least_size: float = LEAST_SIZE, factor: float = FACTOR
) -> Verdict:
    """Look for switches in a curve.

    Args:
        resolutions: R of them in pixels, ascending.
        errors: [R, N] for each of N pictures; what is not a number counts as missing, and a picture that misses one is
            left out.
        least_size: See the module.
        factor: Width of a window.

    Returns:
        The verdict.

    Raises:
        OptionError: Resolutions do not ascend or do not match the errors, or no picture has all errors.
    """
    values = np.asarray(errors, dtype=np.float64)
    if values.shape[:1] != (len(resolutions),) or values.ndim != 2 or list(resolutions) != sorted(set(resolutions)):
        raise OptionError(
            f"Errors must be [R, N] for R ascending resolutions, got {list(values.shape)} for {list(resolutions)}."
        )
    values = values[:, np.isfinite(values).all(0)]
    if not values.shape[1]:
        raise OptionError("No picture has an error at every resolution.")
    mean = values.mean(1)  # [R]
    if len(values) > 2:  # steps stay where they are
        middle = np.median(np.stack([values[:-2], values[1:-1], values[2:]]), 0)
        values = np.concatenate([values[:1], middle, values[-1:]])
    x = np.log(np.asarray(resolutions, dtype=np.float64))
    about = [_window(x, i, float(np.log(factor))) for i in range(len(x) - 1)]
    windows = [w for w in about if w is not None]
    if not windows:
        return Verdict((), None, None, least_size)
    changes = sorted(
        ((_change(resolutions, x, values, mean, w), w) for w in windows), key=lambda found: -abs(found[0].size)
    )
    switches: list[tuple[Change, Values]] = []
    for change, w in changes:
        apart = all(w[3] <= other[1] or other[2] <= w[0] for _, other in switches)
        if abs(change.size) >= least_size and change.is_local and apart:
            switches.append((change, w))
    searched = round(float(np.exp(windows[0][1]))), round(float(np.exp(windows[-1][2])))
    largest = changes[0][0]
    unsearched = [i for i, w in enumerate(about) if w is None]
    at_end = _at_end(resolutions, x, values.mean(1), unsearched, max(least_size, abs(largest.size)))
    return Verdict(tuple(change for change, _ in switches), largest, searched, least_size, at_end)


def _at_end(
    resolutions: Sequence[int], x: Values, mean: Values, unsearched: Sequence[int], least: float
) -> EndChange | None:
    """The largest change over a gap that no window is about, if it is at least so large and stands out."""
    changes = np.abs(np.diff(mean))  # [R - 1]
    if not unsearched or changes[i := max(unsearched, key=lambda gap: float(changes[gap]))] < least:
        return None
    inwards = i + 1 if i < len(changes) / 2 else i - 1
    speeds = changes / np.diff(x)
    if speeds[i] < _END_RATIO * speeds[inwards]:
        return None
    return EndChange(int(resolutions[i]), int(resolutions[i + 1]), float(mean[i]), float(mean[i + 1]))


def _window(x: Values, i: int, width: float) -> Values | None:
    """Begin of the stretch before, begin and end of the window about gap i, end of the stretch after."""
    width = max(width, float(x[i + 1] - x[i]))
    start = float(x[i] + x[i + 1] - width) / 2
    ends = np.array([max(start - width, x[0]), start, start + width, min(start + 2 * width, x[-1])])
    flanks = ends[1] - ends[0], ends[3] - ends[2]
    return ends if min(flanks) >= _LEAST_FLANK * width * (1 - 1e-9) else None


def _change(resolutions: Sequence[int], x: Values, values: Values, mean: Values, w: Values) -> Change:
    at = np.stack([np.interp(w, x, column) for column in values.T], 1)  # [4, N]
    rates = np.diff(at, axis=0) / np.diff(w)[:, None] * (w[2] - w[1])  # [3, N] before, in, after the window
    sizes = rates[1] - (rates[0] + rates[2]) / 2  # [N]
    size = float(sizes.mean())
    before, _, after = rates.mean(1)
    slope = (float(before) + float(after)) / 2 / (w[2] - w[1])
    low, high = _narrowest(x, mean - slope * x, w)
    return Change(
        low=int(resolutions[low]),
        high=int(resolutions[high]),
        size=size,
        before=float(mean[low]),
        after=float(mean[high]),
        ratio=abs(size) / max(abs(float(after - before)), 1e-12),
        agreement=float((sizes * np.sign(size) >= abs(size) / 2).mean()),
    )


def _narrowest(x: Values, mean: Values, w: Values) -> tuple[int, int]:
    """The nearest two points in or around a window between which most of its change happens, the trend left out."""
    goal = _LOCAL_SHARE * abs(float(np.interp(w[2], x, mean) - np.interp(w[1], x, mean)))
    first = int(np.searchsorted(x, w[1], "right")) - 1
    last = min(int(np.searchsorted(x, w[2], "left")), len(x) - 1)
    pairs = [(i, j) for i in range(max(first, 0), last) for j in range(i + 1, last + 1)]
    enough = [(i, j) for i, j in pairs if abs(mean[j] - mean[i]) >= goal] or [(max(first, 0), last)]
    return min(enough, key=lambda pair: (pair[1] - pair[0], -abs(float(mean[pair[1]] - mean[pair[0]]))))


def _sentence(change: Change) -> str:
    return (
        f"Switch between {change.low} and {change.high} px: the error goes from {change.before:.3f} to "
        f"{change.after:.3f}, {change.size:+.3f} beyond the trend, in {100 * change.agreement:.0f} % of the pictures."
    )
