"""Memories as safetensors files that say what they are."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from amradio.errors import OptionError
from amradio.evals.differences import differences
from amradio.evals.in_context.memory import MemoryBank
from amradio.weights.files import atomic_file

FORMAT = "amradio in-context memory 2"
_KEY = "amradio"
_TENSORS = tuple(f.name for f in dataclasses.fields(MemoryBank) if f.name != "about")
_ROWS = ("features", "counts", "item", "patch", "rank")


def save_memory(bank: MemoryBank, path: str | os.PathLike[str]) -> Path:
    """Write a memory to a safetensors file, with its protocol.

    Args:
        bank: Of any size.
        path: Folders are made; an existing file is replaced.

    Returns:
        The path.
    """
    from safetensors.torch import save_file

    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: getattr(bank, name).contiguous() for name in _TENSORS}
    with atomic_file(target) as part:
        save_file(tensors, part, metadata={"format": FORMAT, _KEY: json.dumps(bank.about)})
    return target


def load_memory(path: str | os.PathLike[str]) -> MemoryBank:
    """Read a memory that `save_memory` wrote.

    Raises:
        OptionError: There is no such file, or it is none.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise OptionError(f"There is no memory {path}: give the .safetensors file that an earlier run wrote.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise OptionError(
                    f"{path} is not a memory of this version: its format is {metadata.get('format')!r}, not {FORMAT!r}."
                )
            tensors = {name: file.get_tensor(name) for name in _TENSORS}
        about = json.loads(metadata[_KEY])
    except (SafetensorError, KeyError, ValueError) as error:
        if isinstance(error, OptionError):
            raise
        raise OptionError(f"{path} cannot be read as a memory: {error}") from error
    _check(path, tensors)
    return MemoryBank(**tensors, about=about)


def check_same(bank: MemoryBank, wanted: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Refuse a memory that was made otherwise than is asked for now.

    Args:
        bank: As it was read.
        wanted: What `MemoryBank.about` would be if it were made now.
        path: Its file, for the message.

    Raises:
        OptionError: The message lists what differs.
    """
    plain = json.loads(json.dumps(wanted))
    different = [words for name, value in plain.items() for words in differences(name, bank.about.get(name), value)]
    if different:
        raise OptionError(
            f"The memory {os.fspath(path)} was made in another way: {'; '.join(different)}. Make a new one, or use the "
            "options that it was made with."
        )


def _check(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    rows = {name: len(tensors[name]) for name in _ROWS}
    pictures = len(tensors["pictures"])
    item = tensors["item"]
    wrong = len(set(rows.values())) > 1 or tensors["pictures"].shape[1:] != (8,)
    wrong |= tensors["jitter"].shape != (pictures, 4) or tensors["features"].ndim != 2 or tensors["counts"].ndim != 2
    wrong |= not tensors["features"].is_floating_point() or tensors["counts"].is_floating_point()
    wrong |= len(item) > 0 and not -1 <= int(item.min()) <= int(item.max()) < pictures
    if wrong:
        shapes = ", ".join(f"{name} {tensor.dtype} {list(tensor.shape)}" for name, tensor in tensors.items())
        raise OptionError(f"The tensors of {path} do not fit together, so it is no memory: {shapes}.")
