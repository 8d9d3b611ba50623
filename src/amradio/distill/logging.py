"""Numbers and pictures over time: JSON lines and files, and TensorBoard or Weights & Biases for those who have them."""

from __future__ import annotations

import importlib
import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from amradio.distill.config import DistillConfig
from amradio.models.configs import to_json

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

LOG = "log.jsonl"
PICTURES = "pictures"


class RunLog:
    """Where a run's numbers and pictures go. Only the main process has one.

    Args:
        folder: Of the run.
        config: Of the run.
        step: Steps done; lines of later ones, which a killed run has left, are removed.
    """

    def __init__(self, folder: Path, config: DistillConfig, step: int) -> None:
        path = folder / LOG
        if path.is_file():
            _cut(path, step)
        self._folder = folder
        self._file = path.open("a", encoding="utf-8")
        self._board = _tensorboard(folder / "tensorboard", step) if config.run.tensorboard else None
        self._wandb = _wandb(folder, config) if config.run.wandb else None

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Add a report.

        Args:
            step: Steps done.
            numbers: By name.
        """
        line = {"step": step, "time": round(time.time(), 3), **numbers}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(numbers), step=step)

    def show(self, step: int, name: str, picture: Image) -> None:
        """Keep a picture.

        Args:
            step: Steps done.
            name: Such as ``maps/cat``; slashes make folders.
            picture: In RGB.
        """
        path = self._folder / PICTURES / f"step-{step:08d}" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
        if self._board is not None:
            self._board.add_image(name, np.asarray(picture), step, dataformats="HWC")
        if self._wandb is not None:
            self._wandb.log({name: importlib.import_module("wandb").Image(picture)}, step=step)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The reports of a run, in order; a line that was cut off is left out."""
    path = folder / LOG
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [entry for entry in map(_parsed, lines) if entry is not None]


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("step"), int) else None


def _cut(path: Path, step: int) -> None:
    """Remove the lines of steps that will be done again."""
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if (entry := _parsed(line)) is not None and entry["step"] <= step]
    path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def _tensorboard(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.info("TensorBoard is not installed (extra: amradio[train]); numbers go to %s only.", LOG)
        return None
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)


def _wandb(folder: Path, config: DistillConfig) -> Any:
    try:
        wandb: Any = importlib.import_module("wandb")
    except ImportError:
        logger.warning("run.wandb is set, but the package wandb is not installed; numbers go to %s only.", LOG)
        return None
    return wandb.init(
        project=config.run.wandb,
        name=config.name,
        dir=str(folder),
        config=to_json(config),
        resume="allow",
        id=folder.name,
    )
