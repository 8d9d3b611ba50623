"""Reading pickled checkpoints without running code in them."""

from __future__ import annotations

import argparse
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from amradio.errors import CheckpointError, UnsafeCheckpointError

SAFE_GLOBALS = (argparse.Namespace,)
"""What a checkpoint may contain besides tensors and plain data."""

_MIN_TORCH = (2, 10)


def load_pickle(path: Path) -> Any:
    """Load a ``torch.save`` file through the restricted unpickler only. There is no fallback.

    Args:
        path: The file.

    Returns:
        What was saved, with tensors memory-mapped where the format allows.

    Raises:
        UnsafeCheckpointError: The pickle refers to something that is not on the allow-list.
        CheckpointError: The file is damaged, or torch is too old to read pickles safely.
    """
    _require_safe_torch()
    try:
        with torch.serialization.safe_globals(list(SAFE_GLOBALS)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as e:
        raise _refusal(path, e) from None
    except (FileNotFoundError, MemoryError):
        raise
    except Exception as e:  # a damaged pickle can trip the unpickler anywhere
        raise CheckpointError(
            f"{path} cannot be read: {type(e).__name__}: {_first_line(e)}. It is truncated, damaged or no torch "
            f"checkpoint ({path.stat().st_size:,} bytes). Delete it and download it again."
        ) from e


def _refusal(path: Path, error: Exception) -> CheckpointError:
    try:
        with torch.serialization.safe_globals(list(SAFE_GLOBALS)):
            found = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # the listing is best effort: the file is hostile or damaged, and already refused
        found = []
    if not found and "GLOBAL" not in str(error) and "global" not in str(error):
        return CheckpointError(
            f"{path} cannot be read: {_first_line(error)}. It is truncated, damaged or no torch checkpoint "
            f"({path.stat().st_size:,} bytes). Delete it and download it again."
        )
    allowed = ", ".join(f"{c.__module__}.{c.__qualname__}" for c in SAFE_GLOBALS)
    evidence = ", ".join(found) if found else _first_line(error)
    return UnsafeCheckpointError(
        f"{path} is refused: its pickle refers to code that is not on the allow-list: {evidence}. Allowed are "
        f"tensors, plain containers and {allowed}. Nothing was executed, and there is no unsafe fallback. If you "
        f"trust the file, convert it to safetensors in a separate, isolated environment; otherwise get the weights "
        f"from their publisher."
    )


def _require_safe_torch() -> None:
    release = tuple(int(p) for p in torch.__version__.split("+")[0].split(".")[:2])
    if release < _MIN_TORCH:
        raise CheckpointError(
            f"Reading pickled checkpoints needs torch >= {_MIN_TORCH[0]}.{_MIN_TORCH[1]}, this is "
            f"{torch.__version__}: older "
            f"versions can be made to execute code even by weights_only loading (CVE-2025-32434, CVE-2026-24747). "
            f"Upgrade "
            f"torch, or load a safetensors file."
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
