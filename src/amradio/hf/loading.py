"""Weights of every layout and every published name, for transformers' own loading code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amradio.backbones import locate as locating
from amradio.backbones.load import read_located, say_licence
from amradio.errors import CheckpointKeyError, OptionError, UnknownModelError
from amradio.hub import HubOptions
from amradio.weights.catalog import is_catalog_name
from amradio.weights.checkpoint import Checkpoint, lay_out
from amradio.weights.pretrained import MODEL_TYPE, ROOT, config_json, matches

_REFUSED = ("subfolder", "variant", "force_download", "proxies", "gguf_file", "use_safetensors")
_OURS = ("token", "revision", "cache_dir", "local_files_only")
_INTERNAL = ("_from_auto", "_from_pipeline", "trust_remote_code")
_MAIN = "main"


class UnknownPretrainedError(UnknownModelError, OSError):
    """No published model, file or directory has this name; transformers raises `OSError` there."""


def is_pretrained(name: str, kwargs: dict[str, Any]) -> bool:
    """Whether a name is that of an `AmradioModel` as ``save_pretrained`` or ``push_to_hub`` leave it.

    Args:
        name: Path or name of a repository.
        kwargs: Arguments of ``from_pretrained``, for the hub.

    Returns:
        False for names of published models, files, URLs and directories of other layouts.
    """
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        return matches(path / kwargs.get("subfolder", ""))
    if path.is_file():
        return path.suffix == ".json"  # a config by itself
    is_repository = name.count("/") == 1 and not name.startswith((".", "~", os.sep))
    if not is_repository or is_catalog_name(name):
        return False
    from transformers import PreTrainedConfig

    config, _ = PreTrainedConfig.get_config_dict(name, **kwargs)
    return bool(config.get("model_type") == MODEL_TYPE)


def read_foreign(name: str, kwargs: dict[str, Any]) -> tuple[dict[str, Any], Checkpoint, dict[str, Any]]:
    """Read a checkpoint as `amradio.load` does.

    Args:
        name: Whatever `amradio.load` takes.
        kwargs: Arguments of ``from_pretrained``.

    Returns:
        The ``config.json`` that ``save_pretrained`` would write, with no adaptor but those in ``adaptor_names``; the
        checkpoint; and the arguments that were not used.

    Raises:
        OptionError: An argument makes sense only for files of transformers.
        AmradioError: As for `amradio.load`.
    """
    given = [k for k in _REFUSED if kwargs.get(k)]
    if given:
        raise OptionError(
            f"{name} is not in the layout of AmradioModel.save_pretrained, so {', '.join(given)} cannot be used with "
            f"it."
        )
    unused = {k: v for k, v in kwargs.items() if k not in (*_REFUSED, *_OURS, *_INTERNAL)}
    adaptors = unused.pop("adaptor_names", None) or []
    hub = HubOptions(
        token=kwargs.get("token"),
        revision=None if kwargs.get("revision") == _MAIN else kwargs.get("revision"),  # the default of transformers
        cache_dir=kwargs.get("cache_dir"),
        local_files_only=bool(kwargs.get("local_files_only")),
    )
    try:
        located = locating.locate(name, with_adaptors=bool(adaptors), hub=hub)
    except UnknownModelError as e:
        raise UnknownPretrainedError(str(e)) from e
    if located.entry is not None:
        say_licence(located.entry)
    checkpoint = read_located(located)
    return config_json(checkpoint) | {"adaptor_names": list(adaptors)}, checkpoint, unused


def state_of(checkpoint: Checkpoint, adaptors: list[str]) -> dict[str, Tensor]:
    """The weights of a checkpoint by the names of `AmradioModel`, all accounted for.

    Args:
        checkpoint: Any checkpoint.
        adaptors: Which adaptors are wanted.

    Returns:
        Exactly the tensors that the model needs.

    Raises:
        CheckpointKeyError: A tensor is missing, or nothing reads it.
        CheckpointShapeError: A tensor's shape contradicts the description.
        UnknownAdaptorError: The checkpoint has no such adaptor.
    """
    model, report = lay_out(checkpoint, adaptors)
    if report:
        raise CheckpointKeyError(report.describe(checkpoint.identity.source))
    wanted = [k for k in model.state_dict() if k != "summary_idxs"]
    state = {f"{ROOT}{k}": checkpoint.tensors[k] for k in wanted}
    state[f"{ROOT}summary_idxs"] = torch.tensor(checkpoint.config.summary_idxs, dtype=torch.int64)
    return state
