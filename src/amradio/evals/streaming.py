"""Features of many pictures that are used as they come, and never kept together."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from amradio.errors import OptionError
from amradio.evals.runner import Measurement, model_record
from amradio.features.collect import Failure
from amradio.features.extract import FeatureRecord, extract
from amradio.features.partition import check_same_set
from amradio.features.timing import StageTimer

if TYPE_CHECKING:
    from amradio.distributed import Group
    from amradio.images.dataset import ImageSet


def own_part(count: int, group: Group | None) -> np.ndarray:
    """The positions, out of `count`, that this process takes: one run, so that archives are read in order."""
    if group is None:
        return np.arange(count)
    return np.arange(count * group.rank // group.world_size, count * (group.rank + 1) // group.world_size)


class FeaturePass:
    """One run of the backbone over this process's part of a set; iterated once, then finished.

    Args:
        measurement: Whose backbone and setup are used.
        images: The set.
        positions: int64 [N_r] the pictures of this process, in the order in which they are wanted.
        keep: ``summary``, or ``all`` for feature maps too.
        shows_progress: Whether the setup's `on_record` is called.
    """

    def __init__(
        self,
        measurement: Measurement,
        images: ImageSet,
        positions: np.ndarray,
        keep: Literal["summary", "all"],
        *,
        shows_progress: bool = True,
    ) -> None:
        self._measurement = measurement
        self._images = images
        self._positions = positions
        self._keep = keep
        self._on_record = measurement.setup.on_record if shows_progress else None
        self._failures: list[Failure] = []
        self._not_finite = 0
        self._timer = StageTimer()
        self._seconds = 0.0

    def __iter__(self) -> Iterator[FeatureRecord]:
        """Yield the pictures that worked, in order; `position` counts in the whole set."""
        setup = self._measurement.setup
        check_same_set(self._images, setup.group)
        options = dataclasses.replace(setup.options, keep=self._keep)
        sources = (self._images[int(i)] for i in self._positions)
        start = time.perf_counter()
        with closing(extract(sources, self._measurement.backbone, setup.policy, options, self._timer)) as records:
            for found in records:
                record = dataclasses.replace(found, position=int(self._positions[found.position]))
                if self._on_record is not None:
                    self._on_record(record)
                if record.reason is not None:
                    failure = Failure(record.position, record.source.id, record.source.location, record.reason)
                    self._failures.append(failure)
                elif self._is_finite(record):
                    yield record
                else:
                    self._not_finite += 1
        self._seconds = time.perf_counter() - start

    def batches(self, size: int) -> Iterator[list[FeatureRecord]]:
        """Yield lists of `size` records; the last one may be shorter."""
        batch: list[FeatureRecord] = []
        for record in self:
            batch.append(record)
            if len(batch) == size:
                yield batch
                batch = []
        if batch:
            yield batch

    def finish(self, role: str) -> None:
        """Note in the measurement what happened in all processes.

        Args:
            role: What the set is for.

        Raises:
            DatasetError: No picture worked.
            OptionError: Features are not finite.
        """
        group = self._measurement.setup.group
        parts = [(self._failures, self._not_finite)]
        if group is not None:
            parts = group.all_gather_objects(parts[0])
        failures = sorted((f for part, _ in parts for f in part), key=lambda f: f.position)
        timing: dict[str, Any] = {
            "wall_s": self._seconds,
            "waited_s": dict(self._timer.waited_s),
            "busy_s": dict(self._timer.busy_s),
            "bottleneck": self._timer.bottleneck,
        }
        self._measurement.record(role, self._images, failures, timing, self._seconds)
        not_finite = sum(count for _, count in parts)
        if not_finite:
            raise OptionError(
                f"The features of {not_finite} of {len(self._images)} pictures of {self._images.name} are not finite "
                f"numbers, so {model_record(self._measurement.backbone)['name']} does not work in this precision. "
                "Choose float32, or bfloat16 instead of float16."
            )

    def _is_finite(self, record: FeatureRecord) -> bool:
        output = record.outputs["backbone"]
        return bool(torch.isfinite(output.summary if self._keep == "summary" else output.features).all())
