"""The training loop: builds everything from a configuration, trains, saves, goes on."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from amradio.distill.building import attach_caches, build_machine, identity_of
from amradio.distill.config import DistillConfig
from amradio.distill.config.run import check_unique
from amradio.distill.ema import MovingAverage
from amradio.distill.estimate import estimate
from amradio.distill.export import finished_model, start_from_exported, write_model, write_results
from amradio.distill.hooks import Hook, Moment, Result, due
from amradio.distill.logging import RunLog
from amradio.distill.parallel import check_sizes, no_view_warnings
from amradio.distill.signals import stop_signals
from amradio.distill.state import add_to_note, check_identity, find_states, load_state, read_note, save_state, whole
from amradio.distill.steps import train_step
from amradio.distill.stream import Loader, Planner, open_pictures
from amradio.distill.student import Widths, radio_config
from amradio.distill.teachers import Spec, load_teachers
from amradio.distributed import Group
from amradio.errors import ConfigError, NonFiniteLossError
from amradio.models.configs import to_json
from amradio.models.radio import RadioModel
from amradio.weights.checkpoint import Identity
from amradio.weights.files import atomic_file

logger = logging.getLogger(__name__)

STATES = "states"
NON_FINITE = "nonfinite.json"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is.

    Attributes:
        step: Steps done.
        total: Steps in all.
        images_per_s: Over all processes, since the last report.
        remaining_s: Time left at this pace.
        numbers: Means since the last report.
    """

    step: int
    total: int
    images_per_s: float
    remaining_s: float
    numbers: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a call of `distill` ended.

    Attributes:
        step: Steps done.
        total: Steps in all.
        state: The last saved state.
        model: The exported student; None if the run is not finished.
        reason: ``finished``, ``time`` (the time given is over) or ``signal``.
        seconds: Training time so far, of all calls together.
    """

    step: int
    total: int
    state: Path
    model: Path | None
    reason: str
    seconds: float


def distill(
    config: DistillConfig,
    folder: Path,
    *,
    device: torch.device,
    group: Group | None = None,
    hooks: Sequence[Hook] = (),
    backbones: Mapping[str, Spec] | None = None,
    max_minutes: float | None = None,
    export: Path | None = None,
    export_dtype: torch.dtype = torch.float16,
    on_progress: Callable[[Progress], object] = lambda p: None,
    on_message: Callable[[str], object] = logger.info,
) -> Outcome:
    """Train a student, or go on with one.

    A folder with saved states goes on from the last one, exactly: on a CPU the weights are the same to the bit as
    without the interruption.

    Args:
        config: Of the run.
        folder: Where states, logs and the student go.
        device: Where this process trains.
        group: The processes under ``torchrun``; None for a single one.
        hooks: What is done now and then, by the main process.
        backbones: By teacher, what `amradio.load_backbone` takes (a callable, say), instead of what is configured.
        max_minutes: Stop after this time with a saved state; None: train to the end.
        export: Where the student is written as it is when the call ends, finished or not; None: nowhere.
        export_dtype: What its weights are stored in there. They are single precision again when they are loaded.
        on_progress: Called by the main process each time that numbers are logged.
        on_message: Called by the main process with what is worth knowing.

    Returns:
        How it ended.

    Raises:
        ConfigError: The configuration contradicts itself or a saved state.
        NonFiniteLossError: The loss is no number any more; a state was saved, and `NON_FINITE` says more.
        AmradioError: A teacher, a picture set or a checkpoint cannot be used.
    """
    begun = time.monotonic()
    run = _Run(config, folder, device, group, hooks, backbones, on_progress, on_message)
    limit = None if max_minutes is None else begun + 60 * max_minutes
    outcome = run.train(limit)
    if export is not None:
        run.export(export, export_dtype)
    return outcome


class _Run:
    """Everything that belongs to one call."""

    def __init__(
        self,
        config: DistillConfig,
        folder: Path,
        device: torch.device,
        group: Group | None,
        hooks: Sequence[Hook],
        backbones: Mapping[str, Spec] | None,
        on_progress: Callable[[Progress], object],
        on_message: Callable[[str], object],
    ) -> None:
        self.config, self.folder, self.device, self.group, self.hooks = config, folder, device, group, hooks
        self.is_main = group is None or group.is_main
        self.on_progress = on_progress
        self.say: Callable[[str], object] = on_message if self.is_main else (lambda text: None)
        world_size = 1 if group is None else group.world_size
        check_sizes(config, world_size)
        check_unique("hook", [h.name for h in hooks])
        folder.mkdir(parents=True, exist_ok=True)
        self.pictures = open_pictures(config.data)
        self.teachers = load_teachers(config.teachers, device, backbones)
        self.identity = identity_of(config, self.pictures, self.teachers)
        states = find_states(folder / STATES)
        self.state = states[-1] if states else None
        if self.state is not None:  # before minutes are spent on anything else
            check_identity(read_note(self.state)["identity"], self.identity, self.state)
        attach_caches(config, self.pictures, self.teachers)
        widths = {n: Widths(t.summary_dim, t.feature_dim) for n, t in self.teachers.items()}
        self.description = radio_config(config, widths)
        self.machine, self.from_init = build_machine(config, self.description, widths, self.teachers, device, group)
        self.planner = Planner(
            config, len(self.pictures), self.machine.student.radio.patch_size, group.rank if group else 0, world_size
        )
        self.loader = Loader(self.pictures, self.planner, config.data, self.machine.sizes, pin=device.type == "cuda")
        self.step = 0
        self.seconds = 0.0
        self.results: list[Result] = []
        self.done: list[str] = []  # hooks that have seen the present step

    def train(self, limit: float | None) -> Outcome:
        """Run to the end, or to the limit of time."""
        self._begin()
        total = self.config.schedule.steps
        partitions = range(len(self.config.partitions))
        reason = "finished"
        since = saved = time.monotonic()
        counted = self.step
        sums: dict[str, float] = {}
        with ExitStack() as stack:
            log = stack.enter_context(RunLog(self.folder, self.config, self.step)) if self.is_main else None
            interrupted = stack.enter_context(stop_signals())
            stack.enter_context(no_view_warnings())
            self._run_hooks(log, self._missed_hooks())
            batches = self.loader.batches(self.step, total, partitions)
            stack.callback(batches.close)
            self.machine.clock.read()
            while self.step < total:
                with self.machine.clock.stage("data"):
                    loaded = next(batches)
                for batch in loaded:
                    for location in batch.broken:
                        self.say(f"skipped a picture: {location}")
                started = time.monotonic()
                try:
                    numbers = train_step(self.machine, self.step, loaded)
                except NonFiniteLossError as error:
                    self._stop_for(error)
                    raise
                self.step += 1
                self.done = []
                self.seconds += time.monotonic() - started
                for name, value in numbers.items():
                    sums[name] = sums.get(name, 0.0) + value
                now = time.monotonic()
                wish = self._agreed(self._wish(interrupted(), limit is not None and now > limit, now - saved))
                last = self.step == total
                stop = wish if wish in ("signal", "time") and not last else None
                if self.step % self.config.run.log_steps == 0 or last or stop:
                    self._report(log, {k: v / (self.step - counted) for k, v in sums.items()}, now - since, counted)
                    since, counted, sums = time.monotonic(), self.step, {}
                hooks = [h for h in self.hooks if due(h, self.step - 1, self.step, last)]
                every = self.config.run.checkpoint_steps
                if last or wish or hooks or (every is not None and self.step % every == 0):
                    self._save()  # before hooks, so that nothing is lost if one of them fails
                    saved = time.monotonic()
                begun = time.monotonic()
                self._run_hooks(log, hooks)
                since += time.monotonic() - begun  # evaluations say nothing about the speed of the training
                if stop:
                    reason = stop
                    break
        return self._outcome(reason)

    def export(self, path: Path, dtype: torch.dtype) -> None:
        """Write the student as it is now. All processes call it."""
        model = self._finished()
        if self.is_main:
            write_model(model, path, dtype)

    # ---- beginning and ending ----

    def _begin(self) -> None:
        """Go on from a state, or estimate statistics and start."""
        if self.state is not None:
            note = load_state(self.state, self.machine)
            self.step, self.seconds = int(note["step"]), float(note["seconds"])
            self.results, self.done = [Result(**r) for r in note["results"]], list(note["hooks"])
            if self.step > self.config.schedule.steps:
                raise ConfigError(
                    f"{self.state} is {self.step} steps far, and schedule.steps is {self.config.schedule.steps}. Give "
                    "it at least as many, or delete the later states to go on from an earlier one."
                )
            self.say(f"going on from step {self.step} of {self.config.schedule.steps} ({self.state})")
            return
        count = self.config.run.statistics
        self.say(f"estimating statistics of {len(self.teachers)} teachers from {count} pictures")
        estimate(self.machine, self.loader)
        if self.from_init:
            start_from_exported(self.machine.student, self.machine.objective, self.from_init)
            if self.machine.average is not None:
                self.machine.average = MovingAverage(self.machine.student, self.machine.average.decay)

    def _save(self) -> None:
        for teacher in self.teachers.values():
            if teacher.cache is not None:
                teacher.cache.flush()
        note = {
            "identity": self.identity,
            "seconds": self.seconds,
            **self._measured(),
            "config": to_json(self.config),
            "description": to_json(self.description),
        }
        with self.machine.clock.stage("saving"):
            self.state = save_state(self.folder / STATES, self.machine, self.step, note)

    def _stop_for(self, error: NonFiniteLossError) -> None:
        """Save what is needed to look into a loss that is no number."""
        self._save()
        ids = [error.ids] if self.group is None else self.group.all_gather_objects(error.ids)
        if self.is_main:
            report = {"step": error.step, "losses": {k: str(v) for k, v in error.losses.items()}, "pictures": ids}
            with atomic_file(self.folder / NON_FINITE) as part:
                part.write_text(json.dumps(report, indent=1), encoding="utf-8")
        self.say(f"the state before step {error.step} is in {self.state}, the pictures are in {NON_FINITE}")

    def _outcome(self, reason: str) -> Outcome:
        total = self.config.schedule.steps
        if self.state is None or self.step == total:
            self._save()  # which does nothing where it is saved already
        assert self.state is not None  # it has just been saved
        model = None
        if self.step == total:
            finished = self._finished()
            if self.is_main:
                model = write_results(
                    self.folder, self.config, finished, self.teachers, len(self.pictures), self.results, self.seconds
                )
        return Outcome(step=self.step, total=total, state=self.state, model=model, reason=reason, seconds=self.seconds)

    # ---- now and then ----

    def _report(self, log: RunLog | None, means: Mapping[str, float], elapsed: float, counted: int) -> None:
        steps = self.step - counted
        images = sum(p.batch_size for p in self.config.partitions) * steps
        times = {f"seconds/{name}": value / steps for name, value in self.machine.clock.read().items()}
        rate = images / elapsed if elapsed > 0 else 0.0
        left = (self.config.schedule.steps - self.step) * elapsed / steps
        numbers = {**means, "images_per_s": rate, **times}
        if log is not None:
            log.write(self.step, numbers)
            self.on_progress(
                Progress(
                    step=self.step,
                    total=self.config.schedule.steps,
                    images_per_s=rate,
                    remaining_s=left,
                    numbers=numbers,
                )
            )

    def _missed_hooks(self) -> list[Hook]:
        """Hooks that were due when the state was saved, but did not come to their end, or were not asked for then."""
        if not self.step:
            return []
        last = self.step == self.config.schedule.steps
        return [h for h in self.hooks if due(h, self.step - 1, self.step, last) and h.name not in self.done]

    def _run_hooks(self, log: RunLog | None, wanted: Sequence[Hook]) -> None:
        if not wanted:
            return
        with self.machine.clock.stage("hooks"):
            model = self._finished()
            if log is not None:
                assert self.state is not None  # hooks come after a saved state
                for hook in wanted:
                    self._run_hook(log, hook, model)
                    self.done.append(hook.name)
                    add_to_note(self.state, self._measured())
            if self.group is not None:
                self.group.barrier()

    def _run_hook(self, log: RunLog, hook: Hook, model: RadioModel) -> None:
        step = self.step
        moment = Moment(
            step=step, model=model, folder=self.folder, show=lambda name, picture: log.show(step, name, picture)
        )
        found = {f"{hook.name}/{name}": m for name, m in hook(moment).items()}
        if found:
            log.write(step, {name: m.value for name, m in found.items()})
            self.say(f"step {step}: {', '.join(f'{name} {m.value:.4g} {m.unit}'.strip() for name, m in found.items())}")
        self.results += [Result(name=name, step=step, **asdict(m)) for name, m in found.items()]

    def _measured(self) -> dict[str, Any]:
        """What hooks have found, as a state keeps it."""
        return {"results": [asdict(r) for r in self.results], "hooks": self.done}

    def _finished(self) -> RadioModel:
        """The student as it would be exported, on the training's device. All processes call it."""
        machine, config = self.machine, self.config
        tensors = machine.student.state_dict() if machine.average is None else machine.average.tensors
        model = finished_model(self.description, config.student, whole(tensors), machine.objective).to(self.device)
        model.identity = Identity(source=config.name, layout="memory", license=config.licence)
        return model

    def _wish(self, interrupted: bool, over: bool, unsaved_s: float) -> str | None:
        """What this process would do after a step."""
        if interrupted:
            return "signal"
        if over:
            return "time"
        return "save" if unsaved_s > 60 * self.config.run.checkpoint_minutes else None

    def _agreed(self, wish: str | None) -> str | None:
        """The main process's wish, in all processes: clocks differ, and a signal may reach one of them only."""
        if self.group is None:
            return wish
        wishes = (None, "save", "time", "signal")
        code = torch.tensor([wishes.index(wish) if self.is_main else 0])
        return wishes[int(self.group.all_reduce_sum(code))]
