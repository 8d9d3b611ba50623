"""Folding training-time weight parametrisations into plain weights.

Spectral reparametrisation (Zhai et al., arXiv 2303.06296) stores a weight together with a learned norm and power
iteration vectors; DAMP (arXiv 2402.17863) stores it under another name and adds noise in training only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from amradio.errors import CheckpointError

_ORIGINAL = ".parametrizations.weight.original"
_UNIT = re.compile(
    r"^(?P<layer>.+)\.parametrizations\.weight\.\d+\.(?:parts\.(?P<part>\d+)\.)?(?P<name>scale|_u|_v|_sn_version)$"
)
_SOFTPLUS_OFFSET = 0.05


@dataclass(frozen=True)
class SpectralSettings:
    """Numerical settings of the power iteration.

    Attributes:
        eps: Added to the spectral norm and used when normalising vectors.
        iterations: Power iterations before folding. The official loader folds in training mode, which runs them.
    """

    eps: float = 1e-6
    iterations: int = 1

    @classmethod
    def of(cls, value: Any) -> SpectralSettings:
        """Read the official ``args.spectral_reparam``: a flag, or a dict with ``eps`` and ``n_power_iterations``.

        Raises:
            CheckpointError: One of the two is no number.
        """
        if not isinstance(value, Mapping):
            return cls()
        try:
            return cls(float(value.get("eps", 1e-12)), int(value.get("n_power_iterations", 1)))
        except (TypeError, ValueError) as e:
            raise CheckpointError(f"The checkpoint's training arguments have spectral_reparam={value}: {e}.") from e


def fold_parametrizations(tensors: Mapping[str, Tensor], settings: SpectralSettings) -> dict[str, Tensor]:
    """Replace every parametrised weight by its effective value.

    Layers are recognised by their own keys, so files in which only some layers are parametrised work, as do version 1
    files without version numbers. Folding starts from the stored vectors each time, so it gives the same result
    whenever it is done.

    Args:
        tensors: A state dict. Parametrised layers have ``X.parametrizations.weight.original`` and, unless the
            parametrisation is DAMP alone, ``scale``, ``_u`` and ``_v`` for the weight or for each part of its rows.
        settings: Numerical settings.

    Returns:
        The state dict with ``X.weight`` instead, in float32.

    Raises:
        CheckpointError: A parametrisation lacks tensors, or their shapes do not fit the weight.
    """
    units: dict[str, dict[int, dict[str, Tensor]]] = {}
    folded: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        unit = _UNIT.match(key)
        if unit:
            units.setdefault(unit["layer"], {}).setdefault(int(unit["part"] or 0), {})[unit["name"]] = tensor
        elif not key.endswith(_ORIGINAL):
            folded[key] = tensor
    for key in (k for k in tensors if k.endswith(_ORIGINAL)):
        layer = key.removesuffix(_ORIGINAL)
        weight = tensors[key].float()
        parts = units.pop(layer, {})
        if parts:
            weight = _rescaled(layer, weight, parts, settings)
        folded[f"{layer}.weight"] = weight
    for layer, parts in units.items():  # vectors without a weight: left for the key accounting to report
        folded |= {
            f"{layer}.parametrizations.weight.0.{i}.{n}": t for i, part in parts.items() for n, t in part.items()
        }
    return folded


def _rescaled(
    layer: str, weight: Tensor, parts: Mapping[int, Mapping[str, Tensor]], settings: SpectralSettings
) -> Tensor:
    """A weight [rows, columns] made of equal parts of rows, each rescaled by itself."""
    missing = [f"part {i}" for i in range(len(parts)) if i not in parts]
    needed = ("scale",) if weight.ndim == 1 else ("scale", "_u", "_v")
    missing += [f"{name} of part {i}" for i, part in sorted(parts.items()) for name in needed if name not in part]
    if missing:
        raise CheckpointError(f"The spectral parametrisation of {layer} is incomplete: it lacks {', '.join(missing)}.")
    if weight.ndim not in (1, 2) or weight.shape[0] % len(parts):
        raise CheckpointError(
            f"The spectral parametrisation of {layer} has {len(parts)} equal parts of rows, which its weight "
            f"{list(weight.shape)} cannot be cut into."
        )
    rows = weight.chunk(len(parts))
    for i, w in enumerate(rows):
        shapes = [list(parts[i][name].shape) for name in needed[1:]]
        if parts[i]["scale"].numel() != 1 or shapes != [[n] for n in w.shape[: len(shapes)]]:
            raise CheckpointError(
                f"The spectral parametrisation of {layer} has a scale of shape {list(parts[i]['scale'].shape)} and "
                f"vectors of shapes {shapes} in part {i}, which do not fit its weight {list(w.shape)}."
            )
    return torch.cat([_effective(w, parts[i], settings) for i, w in enumerate(rows)])


def _effective(weight: Tensor, unit: Mapping[str, Tensor], settings: SpectralSettings) -> Tensor:
    """One unit's weight [rows, columns], rescaled to its learned spectral norm."""
    eps = settings.eps
    scale = unit["scale"].float().reshape(())
    if weight.ndim == 1:
        sigma = weight.norm() + eps
    else:
        u, v = unit["_u"].float(), unit["_v"].float()
        for _ in range(settings.iterations):
            u = F.normalize(weight @ v, dim=0, eps=eps)
            v = F.normalize(weight.T @ u, dim=0, eps=eps)
        sigma = u @ (weight @ v) + eps
    # Version 1 units have no version number and store the norm itself.
    norm = F.softplus(scale) + _SOFTPLUS_OFFSET if "_sn_version" in unit else scale
    effective: Tensor = weight * (norm / sigma)
    return effective
