"""``amradio eval linear-seg``."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from amradio.cli.arguments import Size
from amradio.cli.segmentation import SegmentationOptions
from amradio.errors import OptionError

if TYPE_CHECKING:
    from amradio.backbones.protocol import Backbone
    from amradio.evals.linear_seg import LinearSegConfig
    from amradio.evals.report import EvalReport
    from amradio.evals.runner import Setup
    from amradio.images.resize import ResizePolicy

_STEPS_SHOWN = 500


@dataclass(frozen=True, kw_only=True)
class LinearSeg(SegmentationOptions):
    """Linear segmentation probe: batch norm and a linear layer on frozen patch features, or least squares.

    Data are as for `amradio eval in-context`.
    """

    protocol: Literal["clean", "ridge", "radio", "e-radio", "dinov2"] = "clean"
    """clean: trained on features that are computed once. ridge: least squares, in one pass. Others: the published
    schedules, with random scales and crops, which take a GPU."""
    resolution: tyro.conf.UseAppendAction[tuple[Size, ...]] = ()
    """Shortest side; two numbers: height and width to stretch to (clean and ridge). Default: the model's preferred
    resolution."""
    iterations: int | None = None
    """Training steps, instead of the protocol's."""
    train_batch: int | None = None
    """Pictures in a training step, instead of the protocol's 16."""
    lr: float | None = None
    """Highest learning rate, instead of the protocol's."""
    inference: Literal["whole", "slide"] | None = None
    """Segment whole pictures, or windows that slide over them; default the protocol's."""
    scale: tyro.conf.UseAppendAction[tuple[float, ...]] = ()
    """Segment each picture at this factor of the resolution; default 1. Repeat the option for several, whose
    probabilities are averaged."""
    flip: bool = False
    """Segment each picture mirrored too."""
    score_at: Literal["evaluated", "original"] = "original"
    """Score at the size of the mask files, or at the size that the model sees."""
    layer: tyro.conf.UseAppendAction[tuple[int, ...]] = ()
    """Take the features of this block, from 0, or from -1 backwards. Repeat the option to put several side by side."""
    layer_norm: bool = True
    """Apply the model's last norm to the features of --layer."""
    head_out: Path | None = None
    """Write the fitted head to this .safetensors file."""
    head_in: Path | None = None
    """Use a head that --head-out wrote, and fit none."""
    cache: Path | None = None
    """Folder that keeps the features of the training pictures for the next run (clean)."""
    checkpoint: Path | None = None
    """File that keeps the state of the training; if it is there, the training goes on from it (not ridge)."""

    def policy(self, backbone: Backbone, resolution: Size | tuple[()]) -> ResizePolicy:
        """Nothing of a picture is left out, as all of it is scored."""
        from amradio.evals.linear_seg import linear_seg_policy

        mode = None if self.mode == "auto" else self.mode
        return linear_seg_policy(backbone, resolution, mode, self.resize_multiple)

    def evaluate(self, backbone: Backbone, images: dict[str, Any], setup: Setup) -> EvalReport:
        """One backbone at one size."""
        from amradio.evals.linear_seg import run_linear_seg

        config = self._config()
        return run_linear_seg(
            backbone,
            images["train"],
            images["eval"],
            config,
            setup,
            head_in=self.head_in,
            head_out=self.head_out,
            cache=self.cache,
            checkpoint=self.checkpoint,
            on_step=None if self.json or not setup.is_main else _Steps(config.resolved().iterations),
        )

    def check(self) -> None:
        """Refuse options that do not fit together before anything is read."""
        config = self._config()
        several = len(self.model) > 1 or len(self.resolution) > 1
        if several and any(file is not None for file in (self.head_in, self.head_out, self.checkpoint)):
            raise OptionError(
                "A head belongs to one model at one resolution: --head-out, --head-in and --checkpoint take one "
                "--model and one --resolution."
            )
        fitting = ("iterations", "lr", "train_batch", "head_out", "cache", "checkpoint")
        if self.head_in is not None and (given := [name for name in fitting if getattr(self, name) is not None]):
            raise OptionError(
                f"--head-in takes a head that is fitted already, so --{given[0].replace('_', '-')} has nothing to do."
            )
        for name, is_folder in (("head_out", False), ("checkpoint", False), ("cache", True)):
            path = getattr(self, name)
            if path is not None and path.exists() and path.is_dir() != is_folder:
                what = "a file, and a folder is needed" if is_folder else "a folder; name a file"
                raise OptionError(f"--{name.replace('_', '-')} {path} is {what}.")
        if self.checkpoint is not None and config.protocol.solver == "ridge":
            raise OptionError("--checkpoint keeps the state of a training; ridge is solved in one pass.")
        if self.cache is not None and (config.protocol.augmentation is not None or config.protocol.solver == "ridge"):
            raise OptionError(f"--cache is for the protocol clean; {self.protocol} reads no features a second time.")

    def _config(self) -> LinearSegConfig:
        from amradio.evals.linear_seg import LinearSegConfig, get_protocol

        return LinearSegConfig(
            protocol=get_protocol(self.protocol),
            iterations=self.iterations,
            batch_size=self.train_batch,
            lr=self.lr,
            inference=self.inference,
            scales=self.scale or (1.0,),
            flip=self.flip,
            score_at=self.score_at,
            layers=self.layer,
            layer_norm=self.layer_norm,
            seed=self.seed,
        )

    def _print(self, reports: Sequence[EvalReport]) -> None:
        if not self.json:
            for words in dict.fromkeys(report.protocol for report in reports):
                print(words)
            print()
        super()._print(reports)


class _Steps:
    """Says now and then how far a training is; a callable for each step.

    Args:
        total: Steps of the training.
    """

    def __init__(self, total: int) -> None:
        self._total, self._start, self._first = total, time.monotonic(), -1

    def __call__(self, step: int, loss: float) -> None:
        if self._first < 0:
            self._first, self._start = step, time.monotonic()
        done = step + 1
        if done % _STEPS_SHOWN or done == self._total:
            return
        from tqdm import tqdm

        left = (time.monotonic() - self._start) / max(step - self._first, 1) * (self._total - done)
        tqdm.write(f"step {done} of {self._total}, loss {loss:.4f}, {left / 60:.0f} min left", file=sys.stderr)
