"""The training loop: builds everything from a configuration, trains, saves, goes on."""

from __future__ import annotations

import json
import logging
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from amradio.distill.config import DistillConfig, digest
from amradio.distill.ema import MovingAverage
from amradio.distill.estimate import estimate
from amradio.distill.export import finished_model, start_from_exported, write_results
from amradio.distill.hooks import Hook, Moment, due
from amradio.distill.logging import RunLog
from amradio.distill.objective import Objective
from amradio.distill.optim import Lamb, parameter_groups
from amradio.distill.parallel import check_sizes, distributed
from amradio.distill.state import (
    add_to_note,
    check_identity,
    find_states,
    load_state,
    read_note,
    save_state,
    whole,
)
from amradio.distill.steps import Machine, NonFiniteLossError, train_step
from amradio.distill.stream import Loader, Pictures, Planner, open_pictures
from amradio.distill.student import Widths, build_student, radio_config
from amradio.distill.targets import TargetCache
from amradio.distill.teachers import Spec, Teacher, load_teachers
from amradio.distill.timing import StepClock
from amradio.distributed import Group
from amradio.models.configs import RadioConfig, to_json
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
    return run.train(limit)


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
        folder.mkdir(parents=True, exist_ok=True)
        self.pictures = open_pictures(config.data)
        self.teachers = load_teachers(config.teachers, device, backbones)
        self.identity = _identity(config, self.pictures, self.teachers)
        states = find_states(folder / STATES)
        self.state = states[-1] if states else None
        if self.state is not None:  # before minutes are spent on anything else
            check_identity(read_note(self.state)["identity"], self.identity, self.state)
        _attach_caches(config, self.pictures, self.teachers)
        widths = {n: Widths(t.summary_dim, t.feature_dim) for n, t in self.teachers.items()}
        self.description = radio_config(config, widths)
        self.machine, self.from_init = _build(config, self.description, widths, self.teachers, device, group)
        self.planner = Planner(
            config, len(self.pictures), self.machine.student.radio.patch_size, group.rank if group else 0, world_size
        )
        self.loader = Loader(self.pictures, self.planner, config.data, self.machine.sizes, pin=device.type == "cuda")
        self.step = 0
        self.seconds = 0.0
        self.results: dict[str, float] = {}

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
            interrupted = stack.enter_context(_signals())
            stack.enter_context(_no_view_warnings())
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
                if hooks:
                    self._run_hooks(log, hooks)
                if stop:
                    reason = stop
                    break
        return self._outcome(reason)

    # ---- beginning and ending ----

    def _begin(self) -> None:
        """Go on from a state, or estimate statistics and start."""
        if self.state is not None:
            note = load_state(self.state, self.machine)
            self.step, self.seconds, self.results = int(note["step"]), float(note["seconds"]), dict(note["results"])
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
            "results": self.results,
            "config": to_json(self.config),
            "description": to_json(self.description),
        }
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

    def _run_hooks(self, log: RunLog | None, wanted: Sequence[Hook]) -> None:
        model = self._finished()
        if log is not None:
            for hook in wanted:
                moment = Moment(step=self.step, model=model, folder=self.folder)
                found = {f"{hook.name}/{k}": v for k, v in hook(moment).items()}
                self.results |= found
                log.write(self.step, found)
                if found:
                    self.say(f"step {self.step}: {', '.join(f'{k} {v:.4g}' for k, v in found.items())}")
            assert self.state is not None  # hooks come after a saved state
            add_to_note(self.state, {"results": self.results})
        if self.group is not None:
            self.group.barrier()

    def _finished(self) -> Any:
        """The student as it would be exported, on the training's device. All processes call it."""
        machine = self.machine
        tensors = machine.student.state_dict() if machine.average is None else machine.average.tensors
        return finished_model(self.description, self.config.student, whole(tensors), machine.objective).to(self.device)

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


def _identity(config: DistillConfig, pictures: Pictures, teachers: Mapping[str, Teacher]) -> dict[str, str]:
    weights = {name: {k: v for k, v in t.facts.items() if k != "source"} for name, t in teachers.items()}
    return config.identity | {"pictures": pictures.identity, "teachers' weights": digest(weights)}


def _attach_caches(config: DistillConfig, pictures: Pictures, teachers: Mapping[str, Teacher]) -> None:
    """Give teachers their caches of targets, which depend on the teacher, the pictures and the crops."""
    if config.data.cache_dir is None or config.data.fixed_views is None:
        return
    for name, teacher in teachers.items():
        t = teacher.config
        identity = {
            "teacher": {k: v for k, v in teacher.facts.items() if k != "source"},
            "adaptor": t.adaptor,
            "options": dict(t.options),
            "resolution": t.resolution,
            "dtype": t.dtype,
            "targets": [t.summary is not None, t.features is not None],
            "pictures": pictures.identity,
            "views": config.data.fixed_views,
            "crops": to_json(config.data.crops),
            "decode": config.data.decode,
            "seed": config.seed,
        }
        folder = Path(config.data.cache_dir).expanduser() / name
        teacher.cache = TargetCache(folder, config.data.fixed_views * len(pictures), identity)


def _build(
    config: DistillConfig,
    description: RadioConfig,
    widths: Mapping[str, Widths],
    teachers: Mapping[str, Teacher],
    device: torch.device,
    group: Group | None,
) -> tuple[Machine, frozenset[str]]:
    """The machine at the start, and the adaptors whose weights came from a checkpoint."""
    student, from_init = build_student(config, description)
    student.to(device)
    model = distributed(student, config, group)
    o = config.optimizer
    groups = parameter_groups(student.named_parameters(), o.weight_decay, o.layer_decay)
    optimizer: torch.optim.Optimizer
    if o.kind == "lamb":
        optimizer = Lamb(groups, lr=o.lr, betas=o.betas, eps=o.eps)
    else:
        optimizer = torch.optim.AdamW(groups, lr=o.lr, betas=o.betas, eps=o.eps, fused=device.type in ("cpu", "cuda"))
    machine = Machine(
        config=config,
        student=student,
        model=model,
        teachers=teachers,
        objective=Objective(config, widths).to(device),
        optimizer=optimizer,
        average=None if config.student.ema is None else MovingAverage(student, config.student.ema),
        device=device,
        group=group,
        clock=StepClock(device),
    )
    return machine, from_init


@contextmanager
def _no_view_warnings() -> Iterator[None]:
    """Keep FSDP2 from warning of views, which nothing here changes in place."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
        yield


@contextmanager
def _signals() -> Iterator[Callable[[], bool]]:
    """Take SIGTERM and SIGINT as a wish to stop after the step; a second one stops at once."""
    seen: list[int] = []

    def note(number: int, frame: Any) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    if threading.current_thread() is not threading.main_thread():  # where signals cannot be handled
        yield lambda: False
        return
    before = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
