"""Where the time of a run goes, and how full its batches are."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

Stage = Literal["decode", "model", "write"]
STAGES: tuple[Stage, ...] = get_args(Stage)


class StageTimer:
    """Seconds per stage, added up from any thread.

    Attributes:
        waited_s: For each stage, how long the run stood still for it. These add up to the run's wall time, but for
            overhead, and their largest is the bottleneck.
        busy_s: For each stage, work done by all threads together, waited for or not.
        batches: Forward passes.
        pictures: That went through the model.
    """

    def __init__(self) -> None:
        self.waited_s: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        self.busy_s: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        self.batches = 0
        self.pictures = 0
        self._start = time.perf_counter()
        self._lock = threading.Lock()

    @contextmanager
    def waiting(self, stage: Stage) -> Iterator[None]:
        """Time what the run waits for."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._add(self.waited_s, stage, time.perf_counter() - start)

    @contextmanager
    def busy(self, stage: Stage) -> Iterator[None]:
        """Time work in a thread."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add_busy(stage, time.perf_counter() - start)

    def add_busy(self, stage: Stage, seconds: float) -> None:
        """Add work that was timed elsewhere, as on a device that works by itself."""
        self._add(self.busy_s, stage, seconds)

    def count_batch(self, pictures: int) -> None:
        """Note a forward pass."""
        with self._lock:
            self.batches += 1
            self.pictures += pictures

    @property
    def bottleneck(self) -> str | None:
        """The stage that the run waited for most, None before anything was timed."""
        stage = max(self.waited_s, key=lambda s: self.waited_s[s])
        return stage if self.waited_s[stage] > 0 else None

    def record(self, batch_size: int) -> dict[str, Any]:
        """What was measured since the timer was made, as JSON can hold it.

        Args:
            batch_size: Most pictures in one forward pass.

        Returns:
            ``wall_s``, ``images_per_s`` (of pictures that went through the model), ``waited_s`` and ``busy_s`` by
            stage, ``bottleneck``, and ``batch_fill``: the mean share of a batch that was used, None without batches.
        """
        wall_s = time.perf_counter() - self._start
        return {
            "wall_s": wall_s,
            "images_per_s": self.pictures / wall_s,
            "waited_s": dict(self.waited_s),
            "busy_s": dict(self.busy_s),
            "bottleneck": self.bottleneck,
            "batch_fill": self.pictures / (self.batches * batch_size) if self.batches else None,
        }

    def _add(self, seconds: dict[str, float], stage: Stage, elapsed: float) -> None:
        with self._lock:
            seconds[stage] += elapsed
