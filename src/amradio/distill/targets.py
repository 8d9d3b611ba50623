"""Targets kept on disk, where the teachers are slower than the student.

For a fixed set of views each teacher needs to run once. Targets are stored in half precision in files that are mapped
into memory, one file for summaries and one for features of each teacher; a file of flags tells which are there. What
is used is always the stored value, so that it does not matter whether a target was just computed or read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from amradio.distill.config import digest
from amradio.errors import ConfigError
from amradio.weights.files import atomic_file


class Targets(NamedTuple):
    """What a teacher says about some pictures.

    Attributes:
        summary: [B, C] float32, or None.
        features: [B, D, h, w] float32, or None.
    """

    summary: Tensor | None
    features: Tensor | None


class TargetCache:
    """One teacher's targets for a fixed number of views. Several processes may write, each its own views.

    Args:
        folder: Where the files are; made where it is missing.
        slots: Number of views.
        identity: What the targets depend on: teacher, pictures, crops. A folder made for another one is refused.

    Raises:
        ConfigError: The folder has targets of something else.
    """

    def __init__(self, folder: Path, slots: int, identity: dict[str, Any]) -> None:
        self.folder, self.slots = folder, slots
        folder.mkdir(parents=True, exist_ok=True)
        _claim(folder / "identity.json", identity)
        self._filled = _mapped(folder / "filled.u8", np.uint8, (slots,))
        self._arrays: dict[str, np.memmap[Any, Any]] = {}

    def has(self, slots: Sequence[int]) -> bool:
        """Whether the targets of all these views are there."""
        return bool(self._filled[list(slots)].all())

    @property
    def filled(self) -> int:
        """How many views have targets."""
        return int(self._filled.sum())

    def read(self, slots: Sequence[int]) -> Targets:
        """Read targets.

        Args:
            slots: Of the views; all must be there.
        """
        found = []
        for name in ("summary", "features"):
            array = self._open(name)
            found.append(None if array is None else torch.from_numpy(np.asarray(array[list(slots)])).float())
        return Targets(*found)

    def write(self, slots: Sequence[int], targets: Targets) -> Targets:
        """Store targets of views that have none yet; those that are there stay as they are.

        A target may be computed twice, in batches of other pictures, and then differ in the last bit. What was stored
        first is what every run sees, so that one that was stopped goes on as if it had not been.

        Args:
            slots: Of the views.
            targets: What the teacher said of each.

        Returns:
            What `read` gives, on the device of the targets.
        """
        new = [i for i, slot in enumerate(slots) if not self._filled[slot]]
        rows = [slots[i] for i in new]
        for name, values in zip(Targets._fields, targets, strict=True):
            if values is not None:
                array = self._open(name, tuple(values.shape[1:]))
                assert array is not None  # it has just been made
                array[rows] = values[new].half().cpu().numpy()
        self._filled[rows] = 1  # last, so that what is flagged is there
        stored = self.read(slots)
        return Targets(*(None if v is None or s is None else s.to(v) for v, s in zip(targets, stored, strict=True)))

    def flush(self) -> None:
        """Write to disk what is only in memory."""
        for array in (*self._arrays.values(), self._filled):
            array.flush()

    def _open(self, name: str, shape: tuple[int, ...] | None = None) -> np.memmap[Any, Any] | None:
        """The array of one kind of target; made if a shape is given, None if there is none."""
        if name not in self._arrays:
            note = self.folder / f"{name}.json"
            if shape is None:
                if not note.is_file():
                    return None
                shape = tuple(json.loads(note.read_text(encoding="utf-8")))
            else:
                _claim(note, list(shape))
            self._arrays[name] = _mapped(self.folder / f"{name}.f16", np.float16, (self.slots, *shape))
        return self._arrays[name]


def _claim(path: Path, content: Any) -> None:
    """Write a note that says what files are about, or check that it says the same."""
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        if digest(found) == digest(content):
            return
        differ = [k for k in {*found, *content} if found.get(k) != content.get(k)] if isinstance(found, dict) else []
        detail = f" They differ in: {', '.join(sorted(differ))}." if differ else ""
        raise ConfigError(
            f"{path.parent} has cached targets of another teacher, other pictures or other crops.{detail} Delete the "
            "folder, or choose another data.cache_dir."
        )
    with atomic_file(path) as part:
        part.write_text(json.dumps(content, indent=1), encoding="utf-8")


def _mapped(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.memmap[Any, Any]:
    """A file as an array; made of zeros, which take no space on most file systems until they are written."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    with path.open("ab") as file:
        file.truncate(size)
    return np.memmap(path, dtype=dtype, mode="r+", shape=shape)
