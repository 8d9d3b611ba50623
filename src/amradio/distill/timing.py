"""Where the time of a training run goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch

TrainStage = Literal["data", "teachers", "student", "optimizer", "saving", "hooks", "other"]
STAGES: tuple[TrainStage, ...] = get_args(TrainStage)
_OF_A_STEP = ("teachers", "student", "optimizer")  # work that a GPU does while the CPU goes on


class StepClock:
    """Seconds of each stage since the last reading.

    On a GPU the stages are timed by events on its stream, which are read after the step's own synchronisation, so
    that timing never makes the GPU wait.

    Args:
        device: Where the training runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        self._events: list[tuple[TrainStage, torch.cuda.Event, torch.cuda.Event]] = []
        self._since = time.perf_counter()

    @contextmanager
    def stage(self, name: TrainStage) -> Iterator[None]:
        """Time a stage. The work of a step is timed on the device, everything else on the CPU."""
        if self._cuda and name in _OF_A_STEP:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
            return
        begin = time.perf_counter()
        yield
        self._seconds[name] += time.perf_counter() - begin

    def read(self) -> dict[str, float]:
        """Seconds by stage since the last reading, and begin anew. ``other`` is what no stage accounts for."""
        for name, start, end in self._events:
            end.synchronize()
            self._seconds[name] += start.elapsed_time(end) / 1000
        now = time.perf_counter()
        accounted = sum(self._seconds.values())
        found = {**self._seconds, "other": max(now - self._since - accounted, 0.0)}
        self._seconds = dict.fromkeys(STAGES, 0.0)
        self._events, self._since = [], now
        return found
