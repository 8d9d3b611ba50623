"""``amradio distill``."""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from amradio.cli.common import device_of

if TYPE_CHECKING:
    from amradio.distill.config import DistillConfig
    from amradio.distill.loop import Outcome, Progress
    from amradio.distributed import Group


_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps{postfix}"


@dataclass(frozen=True, kw_only=True)
class Distill:
    """Train one student from several teachers, on one process or under torchrun.

    A folder with saved states goes on from the last one, exactly. SIGTERM and Ctrl-C stop after the step with a saved
    state.
    """

    config: tyro.conf.Positional[str]
    """Configuration: a name that the package carries (tiny-cpu, ...) or a .yaml file."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o", "--out"])] = None
    """Folder for states, logs and the student; default the configuration's name in the current folder."""
    data: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Pictures to train on instead of the configuration's. Repeat the option for several sources."""
    settings: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(name="set")] = ()
    """A setting to change: KEY=VALUE, such as schedule.steps=100 or teachers.0.weight=2. Repeat for several."""
    max_minutes: float | None = None
    """Stop after this time with a saved state; the same command goes on from there."""
    export: Path | None = None
    """Write the student as it is when this call ends, finished or not, to this .safetensors file."""
    export_dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    """Of the weights in that file; they are loaded as single precision."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto takes a GPU if there is one."""
    threads: int | None = None
    """Threads of the CPU for computing; default as torch chooses. The same number gives the same bits."""
    cost: bool = False
    """Say what the training will cost, and do nothing."""
    json: bool = False
    """Print one JSON object instead of text, and no progress bar."""

    def run(self) -> int:
        """Train and say how it ended; returns the exit code."""
        from amradio.distill.config import load_config
        from amradio.distributed import init_group

        config = load_config(self.config, self._overrides())
        if self.cost:
            return self._print_cost(config)
        if self.threads is not None:
            import torch

            torch.set_num_threads(self.threads)
        with init_group(None if self.device == "auto" else device_of(self.device)) as group, warnings.catch_warnings():
            is_main = group is None or group.is_main
            if not is_main:  # the main process says the same
                warnings.simplefilter("ignore")
            outcome = self._train(config, group)
        if is_main:
            self._print(outcome)
        return 0

    def _overrides(self) -> list[str]:
        sources = [{"path": path} for path in self.data]
        return [*([f"data.sources={json.dumps(sources)}"] if sources else []), *self.settings]

    def _train(self, config: DistillConfig, group: Group | None) -> Outcome:
        from tqdm import tqdm

        from amradio.cli.distill_hooks import make_hooks
        from amradio.distill.loop import distill
        from amradio.weights.checkpoint import torch_dtype

        is_main = group is None or group.is_main
        device = device_of(self.device) if group is None else group.device
        folder = self.output or Path(config.name)
        quiet = self.json or not is_main
        with tqdm(
            total=config.schedule.steps, desc=config.name, bar_format=_BAR, disable=quiet, file=sys.stderr
        ) as bar:

            def show(progress: Progress) -> None:
                bar.n = progress.step
                bar.set_postfix_str(
                    f"loss {progress.numbers['loss']:.4f}, {progress.images_per_s:.1f} images/s, "
                    f"{_duration(progress.remaining_s)} left"
                )

            return distill(
                config,
                folder,
                device=device,
                group=group,
                hooks=make_hooks(config),
                max_minutes=self.max_minutes,
                export=self.export,
                export_dtype=torch_dtype(self.export_dtype),
                on_progress=show,
                on_message=lambda text: None if self.json else tqdm.write(text, file=sys.stderr),
            )

    def _print(self, outcome: Outcome) -> None:
        if self.json:
            record: dict[str, Any] = {
                "step": outcome.step,
                "total": outcome.total,
                "reason": outcome.reason,
                "state": str(outcome.state),
                "model": None if outcome.model is None else str(outcome.model),
                "export": None if self.export is None else str(self.export),
                "seconds": outcome.seconds,
            }
            print(json.dumps(record))
        elif outcome.model is not None:
            print(f"trained {outcome.total} steps in {_duration(outcome.seconds)}; the student is {outcome.model}")
        else:
            print(
                f"stopped after step {outcome.step} of {outcome.total} ({outcome.reason}); the same command goes on "
                f"from {outcome.state}"
            )

    def _print_cost(self, config: DistillConfig) -> int:
        from amradio.distill.budget import run_cost

        cost = run_cost(config)
        print(json.dumps(cost.record, indent=2) if self.json else cost.text)
        return 0


def _duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}"
