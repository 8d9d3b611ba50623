"""The layout that ``amradio.hf.AmradioModel.save_pretrained`` writes.

A directory of ``config.json`` and safetensors, one file or shards with an index. The description is `RadioConfig` under
``radio``; tensors have the names of `RadioModel.state_dict` under ``radio.``, and those that no model reads are kept
under ``unused.``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from amradio.errors import ConfigError, LayoutError
from amradio.models.configs import RadioConfig, from_json, to_json
from amradio.weights.checkpoint import Checkpoint, Identity, torch_dtype, with_prefix
from amradio.weights.fidelity import without_heads
from amradio.weights.files import atomic_directory
from amradio.weights.native import KEPT_IDENTITY, UNUSED
from amradio.weights.tensorfiles import (
    CONFIG,
    WEIGHTS,
    config_of,
    read_directory,
    read_json,
    to_json_text,
    write_tensors,
)

NAME = "pretrained"
MODEL_TYPE = "amradio"
ROOT = "radio."

_SUMMARY_IDXS = "summary_idxs"


def matches(path: Path) -> bool:
    """Whether a path is a directory whose ``config.json`` is that of an `AmradioModel`."""
    return path.is_dir() and config_of(path).get("model_type") == MODEL_TYPE


def read(path: Path) -> Checkpoint:
    """Read a directory that ``save_pretrained`` wrote.

    Args:
        path: A directory of ``config.json`` and ``model.safetensors``, or shards with an index.

    Returns:
        The checkpoint, with the adaptors whose weights are there.

    Raises:
        LayoutError: The directory is of another layout, or its weights are quantised.
        CheckpointError: A file is missing or damaged.
        ConfigError: The description is inconsistent.
    """
    config = read_json(path / CONFIG) if (path / CONFIG).is_file() else {}
    if config.get("model_type") != MODEL_TYPE:
        raise LayoutError(f"{path} is no directory of an AmradioModel: no {CONFIG} with model_type {MODEL_TYPE!r}.")
    if config.get("quantization_config"):
        raise LayoutError(
            f"The weights in {path} are quantised, as its {CONFIG} says, and only transformers can read them: use "
            f"amradio.hf.AmradioModel.from_pretrained."
        )
    described = describe(config, f"{path / CONFIG}")
    state = read_directory(path)
    tensors = {k.removeprefix(ROOT): v for k, v in state.items() if not k.startswith(UNUSED)}
    tensors.pop(_SUMMARY_IDXS, None)  # config.json says the same
    return Checkpoint(described, tensors, identity_of(config, str(path)), with_prefix(state, UNUSED))


def describe(config: Mapping[str, Any], where: str) -> RadioConfig:
    """What the model of a ``config.json`` is, in the dtype that it was saved in, with the adaptors that it has.

    Args:
        config: The JSON object.
        where: Its name in error messages.

    Returns:
        The description.

    Raises:
        ConfigError: It is incomplete or inconsistent.
    """
    if not isinstance(config.get("radio"), Mapping):
        raise ConfigError(f"{where} has no description of a model under 'radio'.")
    radio = from_json(RadioConfig, config["radio"], f"{where}: radio")
    names = config.get("adaptor_names")
    kept = radio.adaptors if names is None else {k: v for k, v in radio.adaptors.items() if k in names}
    dtype = str(config.get("dtype") or radio.dtype).removeprefix("torch.")
    torch_dtype(dtype)
    return dataclasses.replace(radio, adaptors=kept, dtype=dtype)


def identity_of(config: Mapping[str, Any], source: str) -> Identity:
    """Where the weights of a ``config.json`` came from.

    Args:
        config: The JSON object.
        source: Where it is now.

    Returns:
        The identity.
    """
    stored = config.get("identity") or {}
    return Identity(source=source, layout=NAME, **{k: stored.get(k) for k in KEPT_IDENTITY})


def write(checkpoint: Checkpoint, path: Path, *, backbone_only: bool = False) -> Path:
    """Write a directory that ``AmradioModel.from_pretrained`` reads; it holds everything.

    Args:
        checkpoint: What to write.
        path: The directory; files in it are replaced once all new ones are complete.
        backbone_only: Leave out adaptors and normalizers.

    Returns:
        The path.

    Raises:
        LayoutError: `path` is a file.
    """
    if path.is_file():
        raise LayoutError(f"{path} is a file, but the {NAME} layout is a directory.")
    if backbone_only:
        checkpoint = without_heads(checkpoint)
    state = {f"{ROOT}{k}": v for k, v in checkpoint.tensors.items()}
    state[f"{ROOT}{_SUMMARY_IDXS}"] = torch.tensor(checkpoint.config.summary_idxs, dtype=torch.int64)
    state |= {f"{UNUSED}{k}": v for k, v in checkpoint.unused.items()}
    with atomic_directory(path) as part:
        write_tensors(state, part / WEIGHTS, {"format": "pt"})
        (part / CONFIG).write_text(to_json_text(config_json(checkpoint)), encoding="utf-8")
    return path


def config_json(checkpoint: Checkpoint) -> dict[str, Any]:
    """The ``config.json`` of a checkpoint.

    Args:
        checkpoint: Any checkpoint.

    Returns:
        A JSON object.
    """
    return {
        "architectures": ["AmradioModel"],
        "model_type": MODEL_TYPE,
        "radio": to_json(checkpoint.config),
        "adaptor_names": list(checkpoint.config.adaptors),
        "identity": {k: getattr(checkpoint.identity, k) for k in ("source", *KEPT_IDENTITY)},
        "dtype": checkpoint.config.dtype,
    }
