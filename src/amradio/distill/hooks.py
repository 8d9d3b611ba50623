"""What is done to a student now and then while it is trained: evaluations, pictures.

The trainer knows only this protocol; the hooks themselves are made by whoever starts it, because evaluations are not
below it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from amradio.errors import OptionError
from amradio.models.radio import RadioModel

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A number.

    Attributes:
        value: The number.
        unit: ``%``, ``px``, ...; empty for a pure number.
        data: What it was measured on and how, in words, for the model card.
    """

    value: float
    unit: str = ""
    data: str = ""


@dataclass(frozen=True, kw_only=True)
class Result(Measurement):
    """A number at a point of a training.

    Attributes:
        name: ``HOOK/WHAT``.
        step: Steps done.
    """

    name: str
    step: int


@dataclass(frozen=True, kw_only=True)
class Moment:
    """A student at a point of its training.

    Attributes:
        step: Steps done.
        model: The student as it would be exported, in evaluation mode on the training's device. Moving averages are in
            it, balancing is folded into its heads.
        folder: Of the run, where files about this moment may be written.
        show: Keeps a picture under a name such as ``maps/cat``: in the folder, and where numbers are logged too.
    """

    step: int
    model: RadioModel
    folder: Path
    show: Callable[[str, Image], object]


class Hook(Protocol):
    """Something to do with a student."""

    @property
    def name(self) -> str:
        """For reports; no two hooks of a run have the same."""
        ...

    @property
    def every(self) -> int:
        """Steps between two times."""
        ...

    def __call__(self, moment: Moment) -> Mapping[str, Measurement]:
        """Do it; returns numbers by name."""
        ...


@dataclass(frozen=True)
class FunctionHook:
    """A function as a hook.

    Attributes:
        name: For reports.
        every: Steps between two times, at least 1.
        function: What is done.

    Raises:
        OptionError: `every` is below 1.
    """

    name: str
    every: int
    function: Callable[[Moment], Mapping[str, Measurement]]

    def __post_init__(self) -> None:
        if self.every < 1:
            raise OptionError(f"The hook {self.name!r} must come every 1 or more steps, got {self.every}.")

    def __call__(self, moment: Moment) -> Mapping[str, Measurement]:
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
