"""Statistics of the teachers' targets, estimated before training."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import nn

from amradio.distill.balancing import Balancing
from amradio.distill.losses import Dispersion
from amradio.distill.objective import TeacherObjective
from amradio.distill.steps import Machine
from amradio.distill.stream import Loader
from amradio.statistics.moments import Moments


def estimate(machine: Machine, loader: Loader, on_progress: Callable[[int], object] = lambda n: None) -> None:
    """Fit how targets are standardised, and how summaries are dispersed, to the first pictures of the run.

    Every process sees a share of the pictures; the statistics are merged. The pictures are those that training begins
    with, so their targets are in the cache afterwards, where there is one.

    Args:
        machine: Whose objective is changed.
        loader: Of the pictures.
        on_progress: Called with numbers of pictures.
    """
    config = machine.config
    for index, partition in enumerate(config.partitions):
        first = {t.name for p in config.partitions[:index] for t in config.teachers_of(p)}
        new = [t for t in config.teachers_of(partition) if t.name not in first]
        if not new:
            continue
        objectives: dict[str, TeacherObjective] = {t.name: machine.objective.teachers[t.name] for t in new}  # type: ignore[misc]
        moments = {t.name: Moments(machine.teachers[t.name].feature_dim) for t in new if t.features is not None}
        dispersions = {t.name: Dispersion() for t in new if t.summary is not None}
        steps = math.ceil(config.run.statistics / partition.batch_size)
        for (batch,) in loader.batches(0, steps, [index]):
            targets = machine.targets(batch)
            for name, moment in moments.items():
                features = targets[name].features
                assert features is not None  # the teacher has a feature loss
                moment.update(features.movedim(1, -1))
            for name, dispersion in dispersions.items():
                summary = targets[name].summary
                assert summary is not None  # the teacher has a summary loss
                dispersion.update(summary)
            on_progress(len(batch.plan.samples))
        for name, moment in moments.items():
            if machine.group is not None:
                moment.all_reduce(machine.group)
            config_of = next(t for t in new if t.name == name).features
            assert config_of is not None  # as above
            fitted: nn.Module = Balancing.fit(config_of.balancing, moment)
            objectives[name].balancing.load_state_dict(fitted.state_dict())
        for name, dispersion in dispersions.items():
            if machine.group is not None:
                dispersion.all_reduce(machine.group)
            objectives[name].dispersion.copy_(dispersion.value())
