"""Safetensors files and the JSON beside them, with errors that say what is wrong with a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from amradio.errors import CheckpointError
from amradio.weights.files import atomic_file

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # what the safetensors library itself allows


@dataclass(frozen=True)
class Header:
    """What a safetensors file says about itself.

    Attributes:
        metadata: Free strings.
        shapes: Tensor shapes by name.
    """

    metadata: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as a safetensors file does."""
    if not path.is_file():
        return False
    with path.open("rb") as f:
        start = f.read(_LENGTH_BYTES + 1)
    return len(start) == _LENGTH_BYTES + 1 and start.endswith(b"{") and _header_length(start) <= _MAX_HEADER_BYTES


def read_header(path: Path) -> Header:
    """Read the names and shapes in a safetensors file, and check that the file is complete.

    Args:
        path: The file.

    Returns:
        Its header. No tensor is read.

    Raises:
        CheckpointError: The file is truncated, damaged or no safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as f:
        length = _header_length(f.read(_LENGTH_BYTES))
        if not is_safetensors(path):
            raise CheckpointError(f"{path} is no safetensors file ({size:,} bytes): it does not begin like one.")
        raw = f.read(length)
    if len(raw) < length:
        raise _truncated(path, size, _LENGTH_BYTES + length)
    try:
        entries = json.loads(raw)
        metadata = entries.pop("__metadata__", None) or {}
        shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
        raise CheckpointError(
            f"{path} has a damaged safetensors header ({type(e).__name__}: {e}). Delete it and get it again."
        ) from e
    if size < _LENGTH_BYTES + length + end:
        raise _truncated(path, size, _LENGTH_BYTES + length + end)
    return Header(metadata, shapes)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Args:
        path: The file.

    Returns:
        All tensors by name, on the CPU.

    Raises:
        CheckpointError: The file is truncated, damaged or no safetensors file.
    """
    read_header(path)
    try:
        return load_file(path)
    except SafetensorError as e:
        raise CheckpointError(f"{path} cannot be read: {e}. It is damaged; delete it and get it again.") from e


def read_directory(path: Path) -> dict[str, Tensor]:
    """Read the weights of a Hugging Face style directory: one safetensors file, or shards with an index.

    Args:
        path: The directory.

    Returns:
        All tensors by name, on the CPU.

    Raises:
        CheckpointError: There are no such files, or one is missing or damaged.
    """
    if (path / WEIGHTS).is_file():
        return read_tensors(path / WEIGHTS)
    if not (path / INDEX).is_file():
        pickled = sorted(p.name for p in path.glob("*.bin"))
        found = f"only pickled weights {pickled}, which are not read from directories" if pickled else "neither"
        raise CheckpointError(f"{path} needs {WEIGHTS} or {INDEX}, but has {found}.")
    placed = read_json(path / INDEX).get("weight_map")
    if not (isinstance(placed, Mapping) and all(_is_plain_name(v) for v in placed.values())):
        raise CheckpointError(f"{path / INDEX} has no 'weight_map' from tensors to files of the same directory.")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(placed.values())):
        if not (path / shard).is_file():
            raise CheckpointError(f"{path} lacks {shard}, which {INDEX} names. Get the whole directory again.")
        tensors |= read_tensors(path / shard)
    lost = sorted(set(placed) - set(tensors))
    if lost:
        raise CheckpointError(f"{path} lacks tensors that {INDEX} names: {lost[:10]}. Get the whole directory again.")
    return tensors


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file under a temporary name, and move it into place once complete.

    Args:
        tensors: On any device; written in their own dtypes.
        path: The file; parents are made.
        metadata: Free strings.

    Raises:
        CheckpointError: The file cannot be written.
    """
    with atomic_file(path) as part:
        try:
            save_file(_apart(tensors), part, metadata=dict(metadata))
        except SafetensorError as e:
            raise CheckpointError(f"{path} cannot be written: {e}. Nothing is left behind.") from e


def owned(tensor: Tensor) -> Tensor:
    """A CPU tensor that has its storage to itself, since pickling writes whole storages."""
    plain = _packed(tensor)
    return plain if plain.untyped_storage().nbytes() == plain.nbytes else plain.clone()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: The file holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path} is not valid JSON: {e}.") from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, but holds a {type(value).__name__}.")
    return value


def config_of(path: Path) -> dict[str, Any]:
    """The ``config.json`` of a directory, or an empty object where there is none that can be read."""
    try:
        return read_json(path / CONFIG) if (path / CONFIG).is_file() else {}
    except CheckpointError:
        return {}


def to_json_text(value: Mapping[str, Any]) -> str:
    """The text of a ``config.json``."""
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CPU tensors of which no two overlap in memory, which the format insists on: tied weights become copies."""
    packed = {k: _packed(v) for k, v in tensors.items()}
    end = 0
    for name, tensor in sorted(packed.items(), key=lambda item: item[1].data_ptr()):
        start = tensor.data_ptr()
        if start < end:
            packed[name] = tensor.clone()
        end = max(end, start + tensor.nbytes)
    return packed


def _packed(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu").contiguous()


def _header_length(start: bytes) -> int:
    return int.from_bytes(start[:_LENGTH_BYTES], "little")


def _is_plain_name(name: Any) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\:")


def _truncated(path: Path, size: int, wanted: int) -> CheckpointError:
    return CheckpointError(
        f"{path} is truncated: it has {size:,} bytes and its header announces {wanted:,}. Delete it and get it again."
    )
