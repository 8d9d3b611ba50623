"""Colours of feature maps in a file, so that another clip is painted in the same ones."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amradio.errors import OptionError
from amradio.viz.pca import PCABasis
from amradio.weights.files import atomic_file

_KIND = "amradio colour bases"


@dataclass(frozen=True)
class NamedBasis:
    """A basis and the space of features that it belongs to.

    Attributes:
        about: What tells the space: model, digest of its weights, adaptor, layer. Plain values.
        basis: The colours.
    """

    about: Mapping[str, Any]
    basis: PCABasis


def save_bases(path: str | os.PathLike[str], bases: Sequence[NamedBasis]) -> Path:
    """Write bases to a safetensors file, which replaces an earlier one.

    Args:
        path: Of the file.
        bases: Any number.

    Returns:
        The path.
    """
    from safetensors.torch import save_file

    tensors = {
        f"{i}.{name}": getattr(one.basis, name).contiguous()
        for i, one in enumerate(bases)
        for name in ("matrix", "minimum", "maximum")
    }
    about = json.dumps([dict(one.about) for one in bases])
    target = Path(path)
    with atomic_file(target) as part:
        save_file(tensors, part, metadata={"kind": _KIND, "about": about})
    return target


def load_bases(path: str | os.PathLike[str]) -> list[NamedBasis]:
    """Read what `save_bases` wrote.

    Raises:
        OptionError: There is no such file, or it holds something else.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise OptionError(f"There is no file {os.fspath(path)} with colours; --save-basis writes one.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("kind") != _KIND:
                raise OptionError(f"{os.fspath(path)} is a safetensors file, but holds no colours of feature maps.")
            return [
                NamedBasis(about, _basis([file.get_tensor(f"{i}.{n}") for n in ("matrix", "minimum", "maximum")]))
                for i, about in enumerate(json.loads(metadata["about"]))
            ]
    except (SafetensorError, KeyError, ValueError) as error:
        if isinstance(error, OptionError):
            raise
        raise OptionError(f"{os.fspath(path)} cannot be read as colours of feature maps: {error}") from error


def basis_of(about: Mapping[str, Any], bases: Sequence[NamedBasis], path: str | os.PathLike[str]) -> PCABasis:
    """Find the basis of a space.

    Args:
        about: See `NamedBasis`.
        bases: Where to look.
        path: Where they are from, for the message.

    Raises:
        OptionError: None of them is of this space.
    """
    for one in bases:
        if dict(one.about) == dict(about):
            return one.basis
    known = "; ".join(_text(one.about) for one in bases) or "nothing"
    raise OptionError(
        f"{os.fspath(path)} has no colours for {_text(about)}. It has those of: {known}. Colours only fit the features "
        "that they were made of."
    )


def _basis(tensors: Sequence[Any]) -> PCABasis:
    matrix, minimum, maximum = tensors
    if matrix.ndim != 2 or tuple(matrix.shape[1:]) != (3,) or minimum.shape != (3,) or maximum.shape != (3,):
        raise ValueError("tensors of other shapes")
    return PCABasis(matrix.double(), minimum.double(), maximum.double())


def _text(about: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {str(value)[:16]}" for key, value in about.items() if value is not None)
