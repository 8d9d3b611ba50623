"""Saved states of a run, from which it goes on exactly.

A state holds the student, the optimiser, the moving average, and the statistics and running magnitudes of the losses,
by `torch.distributed.checkpoint`: sharded, and readable by any number of processes. The position in the data and all
random numbers follow from the seed and the step, so the step is all that is needed of them. A state appears under its
name once it is complete.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from amradio.distill.steps import Machine
from amradio.errors import CheckpointError, ConfigError
from amradio.weights.files import atomic_file

if TYPE_CHECKING:
    from torch.distributed.checkpoint.planner import SavePlanner


NOTE = "state.json"
_NAME = re.compile(r"step-(\d+)")
_FILES = 4  # of each process, written at once
_MIB = 2**20


def state_folder(root: Path, step: int) -> Path:
    """Where the state after `step` steps is."""
    return root / f"step-{step:08d}"


def find_states(root: Path) -> list[Path]:
    """Complete states, the oldest first."""
    if not root.is_dir():
        return []
    found = [p for p in root.iterdir() if _NAME.fullmatch(p.name) and (p / NOTE).is_file()]
    return sorted(found, key=lambda p: int(p.name.partition("-")[2]))


def save_state(root: Path, machine: Machine, step: int, note: Mapping[str, Any]) -> Path:
    """Save the state after some steps. All processes call it.

    Args:
        root: Folder of all states of the run.
        machine: What is saved.
        step: Steps done.
        note: What else is kept, as JSON can hold it.

    Returns:
        The state's folder.

    Raises:
        CheckpointError: It cannot be written.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    target = state_folder(root, step)
    if (target / NOTE).is_file():  # a run that stops right after a regular save
        return target
    part = root / f".{target.name}.part"
    is_main = machine.group is None or machine.group.is_main
    if is_main:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(target, ignore_errors=True)
        part.mkdir(parents=True)
    _wait(machine)
    state = _state_of(machine)
    try:
        files, planner = _plan(state, machine.config.run.state_file_mib)
        writer = FileSystemWriter(part, thread_count=files)
        with _alone_is_fine():
            save(state, storage_writer=writer, planner=planner, no_dist=machine.group is None)
    except OSError as e:
        raise CheckpointError(f"The state after step {step} cannot be written to {part}: {e}.") from e
    if is_main:
        steps = {} if machine.average is None else {"average_steps": machine.average.steps}
        (part / NOTE).write_text(json.dumps({**note, "step": step, **steps}, indent=1), encoding="utf-8")
        os.replace(part, target)
        _drop_old(root, machine.config.run.keep)
    _wait(machine)
    return target


def read_note(folder: Path) -> dict[str, Any]:
    """What is known of a state without reading its tensors.

    Raises:
        CheckpointError: It is damaged.
    """
    try:
        note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
        return dict(note)
    except (OSError, ValueError, TypeError) as e:
        raise CheckpointError(f"{folder} is no usable state: {e}. Delete it to go on from the one before.") from e


def add_to_note(folder: Path, more: Mapping[str, Any]) -> None:
    """Note something about a state after it was saved.

    Args:
        folder: Of the state.
        more: What, as JSON can hold it.
    """
    note = read_note(folder) | dict(more)
    with atomic_file(folder / NOTE) as part:
        part.write_text(json.dumps(note, indent=1), encoding="utf-8")


def check_identity(found: Mapping[str, str], wanted: Mapping[str, str], folder: Path) -> None:
    """Refuse to go on with another run than the one that was saved.

    Args:
        found: Digests by part, of the state.
        wanted: Of the present run.
        folder: Of the state.

    Raises:
        ConfigError: Some differ; the message names them.
    """
    changed = sorted(part for part in {*found, *wanted} if found.get(part) != wanted.get(part))
    if changed:
        raise ConfigError(
            f"{folder} was saved by another run: {', '.join(changed)} changed since. Going on would mix the two. Undo "
            "the change, or train into another folder (a student can start from an exported one with student.init)."
        )


def load_state(folder: Path, machine: Machine) -> dict[str, Any]:
    """Bring a machine to a saved state. All processes call it.

    Args:
        folder: Of the state.
        machine: Built by the same configuration; changed in place.

    Returns:
        The state's note.

    Raises:
        CheckpointError: The state is damaged, or it is whole and has other tensors than this run.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load

    note = read_note(folder)
    state = _state_of(machine)
    _check_tensors(folder, state)
    try:
        with _alone_is_fine():
            load(state, checkpoint_id=folder, no_dist=machine.group is None)
    except (Exception, CheckpointException) as e:  # whatever a damaged file makes torch stumble over
        reason = str(e).strip().splitlines()[-1:] or [type(e).__name__]
        raise CheckpointError(f"{folder} cannot be read: {reason[0]}. Delete it to go on from the one before.") from e
    machine.student.load_state_dict(state["student"])
    set_optimizer_state_dict(machine.student, machine.optimizer, state["optimizer"])
    machine.objective.load_state_dict(state["objective"])
    if machine.average is not None:
        machine.average.load(state["average"], int(note["average_steps"]))
    return note


def _check_tensors(folder: Path, state: Mapping[str, Any]) -> None:
    """Refuse a state of other names or shapes: its files are good, and deleting it would lose a training.

    Raises:
        CheckpointError: The list of tensors cannot be read, or is another one.
    """
    from torch.distributed.checkpoint._nested_dict import flatten_state_dict
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    try:
        saved = FileSystemReader(folder).read_metadata().state_dict_metadata
    except Exception as e:  # whatever a damaged file makes torch stumble over
        raise CheckpointError(f"{folder} cannot be read: {e}. Delete it to go on from the one before.") from e
    wanted, _ = flatten_state_dict(dict(state))
    for name, value in wanted.items():
        shape = getattr(saved.get(name), "size", None)
        missing, other = name not in saved, isinstance(value, Tensor) and shape is not None and shape != value.shape
        if missing or other:
            found = "is not in it" if missing else f"has the shape {list(shape or ())} in it, not {list(value.shape)}"
            raise CheckpointError(
                f"{folder} was saved by another configuration or version: {name} {found}. Its files are not damaged: "
                "keep it, and go on with the configuration and version that it was saved by, or train into another "
                "folder."
            )


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that may be sharded, whole and on the CPU. All processes call it."""
    from torch.distributed.tensor import DTensor

    return {k: (v.full_tensor() if isinstance(v, DTensor) else v).detach().cpu() for k, v in tensors.items()}


def _state_of(machine: Machine) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    state: dict[str, Any] = {
        "student": machine.student.state_dict(),
        "optimizer": get_optimizer_state_dict(machine.student, machine.optimizer),
        "objective": machine.objective.state_dict(),
    }
    if machine.average is not None:
        state["average"] = dict(machine.average.tensors)
    return state


@contextmanager
def _alone_is_fine() -> Iterator[None]:
    """Keep torch from warning that there is only one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _plan(state: Mapping[str, Any], file_mib: float | None) -> tuple[int, SavePlanner]:
    """How many files this process writes, and what is in them."""
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.utils._pytree import tree_leaves

    from amradio.distill.pieces import PiecePlanner, bounded_files

    if file_mib is None:
        return _FILES, DefaultSavePlanner()
    own = [_own(t) for t in tree_leaves(state) if isinstance(t, Tensor)]
    files, piece = bounded_files(own, round(file_mib * _MIB))
    return files, PiecePlanner(piece)


def _own(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that may be sharded."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _drop_old(root: Path, keep: int) -> None:
    for folder in find_states(root)[:-keep]:
        shutil.rmtree(folder, ignore_errors=True)


def _wait(machine: Machine) -> None:
    if machine.group is not None:
        machine.group.barrier()
