"""Largest singular values of a network's weights: large ones are what low precision and deployment suffer from."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

_POSITIONS = re.compile(r"pos(ition)?(al)?_?(emb|bias|grid|table)|rel(ative)?_pos", re.IGNORECASE)
_JOINT = re.compile(r"(^|[._])(qkv|in_proj)([._]|$)", re.IGNORECASE)


def spectral_norms(module: nn.Module) -> dict[str, float]:
    """The largest singular value of every weight.

    Args:
        module: Any network. Parameters with fewer than two axes larger than 1 do not count, nor do position embeddings;
            joint weights of queries, keys and values are taken apart; convolutions are [out, everything else].

    Returns:
        By the name of the parameter, with ``.q``, ``.k`` and ``.v`` behind it for parts.
    """
    found: dict[str, float] = {}
    for name, parameter in module.named_parameters():
        weight = parameter.detach().squeeze()
        if weight.ndim < 2 or _POSITIONS.search(name) or not weight.is_floating_point():
            continue
        matrix = weight.flatten(1)  # [out, in]
        if _JOINT.search(name) and len(matrix) % 3 == 0:
            for part, rows in zip("qkv", matrix.chunk(3), strict=True):
                found[f"{name}.{part}"] = spectral_norm(rows)
        else:
            found[name] = spectral_norm(matrix)
    return found


def spectral_norm(matrix: Tensor) -> float:
    """The largest singular value of a matrix [R, C].

    From the eigenvalues of the smaller Gram matrix in float64: many times faster than singular values, and the largest
    one loses no digits.
    """
    m = matrix.detach().cpu().double()
    gram = m @ m.T if m.shape[0] <= m.shape[1] else m.T @ m
    return float(torch.linalg.eigvalsh(gram)[-1].clamp(min=0).sqrt())
