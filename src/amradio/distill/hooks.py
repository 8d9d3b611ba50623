"""What is done to a student now and then while it is trained: evaluations, pictures.

The trainer knows only this protocol; the hooks themselves are made by whoever starts it, because evaluations are not
below it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from amradio.models.radio import RadioModel


@dataclass(frozen=True, kw_only=True)
class Moment:
    """A student at a point of its training.

    Attributes:
        step: Steps done.
        model: The student as it would be exported, in evaluation mode on the training's device. Moving averages are in
            it, balancing is folded into its heads.
        folder: Where files about this moment may be written.
    """

    step: int
    model: RadioModel
    folder: Path


class Hook(Protocol):
    """Something to do with a student."""

    @property
    def name(self) -> str:
        """For reports."""
        ...

    @property
    def every(self) -> int:
        """Steps between two times."""
        ...

    def __call__(self, moment: Moment) -> Mapping[str, float]:
        """Do it; returns numbers for the log."""
        ...


@dataclass(frozen=True)
class FunctionHook:
    """A function as a hook.

    Attributes:
        name: For reports.
        every: Steps between two times.
        function: What is done.
    """

    name: str
    every: int
    function: Callable[[Moment], Mapping[str, float]]

    def __call__(self, moment: Moment) -> Mapping[str, float]:
        """Call the function."""
        return self.function(moment)


def due(hook: Hook, before: int, now: int, last: bool) -> bool:
    """Whether a hook's time has come after the steps from `before` to `now`; it always has at the end.

    Args:
        hook: Which.
        before: Steps done when hooks were last looked at.
        now: Steps done.
        last: Whether the training ends here.
    """
    return last or now // hook.every > before // hook.every
