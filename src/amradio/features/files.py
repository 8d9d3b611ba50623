"""Files that appear complete or not at all, and tensors that are fit to be stored."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

_TEMPORARY_PREFIX = ".amradio-"


class UnstorableError(ValueError):
    """A tensor cannot be stored as it should be; the text is the reason for an index. Never leaves this room."""


def write_atomically(target: Path, write: Callable[[Path], None], *, durable: bool = False) -> None:
    """Write a file so that its name only ever shows complete content.

    Args:
        target: The file; its folder exists.
        write: Gets the path of a temporary file in the same folder.
        durable: Also after the power fails, at the price of waiting for the disk.

    Raises:
        OSError: The file could not be written; the target is as it was, and the temporary file is gone.
    """
    temporary = target.with_name(f"{_TEMPORARY_PREFIX}{os.getpid()}-{threading.get_ident()}-{target.name}")
    try:
        write(temporary)
        if durable:
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_temporary_files(folder: Path) -> None:
    """Remove what `write_atomically` left in a folder when it was killed."""
    for leftover in folder.glob(f"{_TEMPORARY_PREFIX}*"):
        leftover.unlink(missing_ok=True)


def printable(text: str) -> str:
    """Paths may hold bytes that are not text; parquet takes text only."""
    return os.fsencode(text).decode("utf-8", errors="backslashreplace")


def storable(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Cast a tensor to the number format in which it is stored.

    Args:
        tensor: Of any shape.
        dtype: float32, float16 or bfloat16.
        name: What it is called in the reason.

    Returns:
        The tensor in that dtype, contiguous.

    Raises:
        UnstorableError: It has values that are not finite, or become so.
    """
    stored = tensor.to(dtype).contiguous()
    if bool(stored.isfinite().all()):
        return stored
    if not tensor.isfinite().all():
        count = int((~tensor.isfinite()).sum())
        raise UnstorableError(f"{name} has {count} values that are not finite: the model overflowed.")
    largest, kind = float(tensor.abs().max()), str(dtype).removeprefix("torch.")
    raise UnstorableError(f"{name} has values up to {largest:.4g}, too large for {kind}; use float32.")
