"""Where the time of a run goes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

Stage = Literal["decode", "model", "write"]
STAGES: tuple[Stage, ...] = get_args(Stage)


class StageTimer:
    """Seconds per stage, added up from any thread.

    Attributes:
        waited_s: For each stage, how long the run stood still for it. These add up to the run's wall time, but for
            overhead, and their largest is the bottleneck.
        busy_s: For each stage, work done by all threads together, waited for or not.
    """

    def __init__(self) -> None:
        self.waited_s: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        self.busy_s: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        self._lock = threading.Lock()

    @contextmanager
    def waiting(self, stage: Stage) -> Iterator[None]:
        """Time what the run waits for."""
        with self._adding(self.waited_s, stage):
            yield

    @contextmanager
    def busy(self, stage: Stage) -> Iterator[None]:
        """Time work in a thread."""
        with self._adding(self.busy_s, stage):
            yield

    @property
    def bottleneck(self) -> str | None:
        """The stage that the run waited for most, None before anything was timed."""
        stage = max(self.waited_s, key=lambda s: self.waited_s[s])
        return stage if self.waited_s[stage] > 0 else None

    @contextmanager
    def _adding(self, seconds: dict[str, float], stage: Stage) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            with self._lock:
                seconds[stage] += elapsed
