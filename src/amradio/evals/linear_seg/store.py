"""Heads as safetensors files that say what they belong to."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from amradio.errors import OptionError
from amradio.evals.differences import differences
from amradio.evals.linear_seg.head import LinearMap
from amradio.weights.files import atomic_file

FORMAT = "amradio segmentation head 1"
_KEY = "amradio"
_MUST_AGREE = ("model", "layers", "layer_norm", "classes")


def save_head(head: LinearMap, about: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Write a head.

    Args:
        head: Fitted.
        about: What it depends on.
        path: Folders are made; an existing file is replaced.
    """
    from safetensors.torch import save_file

    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"weight": head.weight.cpu().contiguous(), "bias": head.bias.cpu().contiguous()}
    with atomic_file(target) as part:
        save_file(tensors, part, metadata={"format": FORMAT, _KEY: json.dumps(about)})
    return target


def load_head(path: str | os.PathLike[str], about: Mapping[str, Any]) -> tuple[LinearMap, dict[str, Any]]:
    """Read a head that `save_head` wrote.

    Args:
        path: The file.
        about: What it is to be used with.

    Returns:
        The head, and what it was fitted on: protocol, model, sizes and so on.

    Raises:
        OptionError: There is no such file, it is no head, or it belongs to another model, layer or set of classes.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise OptionError(f"There is no head {path}: give the .safetensors file that an earlier run wrote.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise OptionError(f"{path} is no head of this version: its format is {metadata.get('format')!r}.")
            head = LinearMap(file.get_tensor("weight"), file.get_tensor("bias"))
        stored = json.loads(metadata[_KEY])
    except (SafetensorError, KeyError, ValueError) as error:
        if isinstance(error, OptionError):
            raise
        raise OptionError(f"{path} cannot be read as a head: {error}") from error
    now = json.loads(json.dumps(dict(about)))
    different = [words for name in _MUST_AGREE for words in differences(name, stored.get(name), now.get(name))]
    if different:
        raise OptionError(f"The head {path} belongs to something else: {'; '.join(different)}.")
    return head, stored
