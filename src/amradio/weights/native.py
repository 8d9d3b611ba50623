"""amradio's own layout: one safetensors file with the model's description in its metadata.

Tensor names are those of `RadioModel.state_dict`; tensors that the original stores and no model reads are kept under
``unused.``. Nothing needs to be looked up or guessed to load such a file.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from amradio import __version__
from amradio.errors import CheckpointError, ConfigError, LayoutError
from amradio.models.configs import RadioConfig, from_json, to_json
from amradio.weights.checkpoint import Checkpoint, Identity, with_prefix
from amradio.weights.fidelity import without_heads
from amradio.weights.tensorfiles import is_safetensors, read_header, read_tensors, write_tensors

NAME = "native"
FORMAT = "amradio"
FORMAT_VERSION = 1
UNUSED = "unused."
KEPT_IDENTITY = ("version", "sha256", "revision", "license")


def matches(path: Path) -> bool:
    """Whether a path is a file in this layout, by its header."""
    try:
        return is_safetensors(path) and read_header(path).metadata.get("format") == FORMAT
    except CheckpointError:
        return False


def read(path: Path) -> Checkpoint:
    """Read a file of ours.

    Args:
        path: A ``.safetensors`` file.

    Returns:
        The checkpoint. Its identity names this file, and what is known of the weights' origin.

    Raises:
        LayoutError: The file was not written by amradio, or by a newer one.
        CheckpointError: The file is truncated or damaged.
        ConfigError: Its description is inconsistent.
    """
    metadata = read_header(path).metadata
    if metadata.get("format") != FORMAT:
        raise LayoutError(
            f"{path} was not written by amradio: its metadata has no format={FORMAT!r}, but {dict(metadata)}."
        )
    writer = metadata.get("amradio_version", "an unknown version")
    version = metadata.get("format_version", "")
    if version.isdigit() and int(version) > FORMAT_VERSION:
        raise LayoutError(
            f"{path} was written by amradio {writer} in version {version} of the format; amradio {__version__} reads "
            f"up to version {FORMAT_VERSION}. Upgrade amradio."
        )
    try:
        config = from_json(RadioConfig, _json(metadata, "config", path), "config")
    except ConfigError as e:
        raise ConfigError(f"{path} (written by amradio {writer}, read by {__version__}): {e}") from e
    identity = _json(metadata, "identity", path)
    state = read_tensors(path)
    return Checkpoint(
        config,
        {k: v for k, v in state.items() if not k.startswith(UNUSED)},
        Identity(source=str(path), layout=NAME, **{k: identity.get(k) for k in KEPT_IDENTITY}),
        with_prefix(state, UNUSED),
    )


def write(checkpoint: Checkpoint, path: Path, *, backbone_only: bool = False) -> Path:
    """Write a file of ours; it holds everything.

    Args:
        checkpoint: What to write.
        path: The file; parents are made, an existing file is replaced once the new one is complete.
        backbone_only: Leave out adaptors and normalizers.

    Returns:
        The path.

    Raises:
        LayoutError: `path` is a directory.
        CheckpointError: The file cannot be written.
    """
    if path.is_dir():
        raise LayoutError(f"{path} is a directory, but the {NAME} layout is one file. Name a file in it.")
    if backbone_only:
        checkpoint = without_heads(checkpoint)
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "amradio_version": __version__,
        "config": json.dumps(to_json(checkpoint.config)),
        "identity": json.dumps(dataclasses.asdict(checkpoint.identity)),
    }
    unused = {f"{UNUSED}{k}": v for k, v in checkpoint.unused.items()}
    write_tensors(checkpoint.tensors | unused, path, metadata)
    return path


def _json(metadata: Any, name: str, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(metadata[name])
    except (KeyError, ValueError, RecursionError) as e:
        raise LayoutError(
            f"{path} has no usable {name!r} in its metadata ({type(e).__name__}: {e}); metadata was lost or edited "
            f"after amradio wrote the file. Convert the original checkpoint again."
        ) from e
    if not isinstance(value, dict):
        raise LayoutError(f"{path} has a {name!r} in its metadata that is no JSON object.")
    return value
