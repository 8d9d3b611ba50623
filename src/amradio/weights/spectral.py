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
        """Read the official ``args.spectral_reparam``: a flag, or a dict with ``eps`` and ``n_power_iterations``."""
        if isinstance(value, Mapping):
            return cls(float(value.get("eps", 1e-12)), int(value.get("n_power_iterations", 1)))
        return cls()


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
            rows = weight.chunk(len(parts))
            weight = torch.cat([_effective(w, parts[i], settings) for i, w in enumerate(rows)])
        folded[f"{layer}.weight"] = weight
    for layer, parts in units.items():  # vectors without a weight: left for the key accounting to report
        folded |= {
            f"{layer}.parametrizations.weight.0.{i}.{n}": t for i, part in parts.items() for n, t in part.items()
        }
    return folded


def _effective(weight: Tensor, unit: Mapping[str, Tensor], settings: SpectralSettings) -> Tensor:
    """One unit's weight [rows, columns], rescaled to its learned spectral norm."""
    eps = settings.eps
    scale = unit["scale"].float()
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
