"""Weights under training: a bounded spectral norm, and multiplicative noise.

Spectral reparametrisation (Zhai et al., arXiv 2303.06296) divides a weight by its largest singular value, tracked by
power iteration, and multiplies it by a learned norm; it keeps attention from collapsing to few keys. DAMP (Trinh et
al., arXiv 2402.17863) multiplies weights by noise around 1 in training, which makes features robust to corruptions.
Both vanish from an exported model: the effective weight is stored.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

_NORM_FLOOR = 0.05  # the offset of the learned norm, as in the published checkpoints
_EPS = 1e-6
_FIRST_ITERATIONS = 15
_SMALLEST = 1e-4  # of what a norm is above its floor at the start


class SpectralNorm(nn.Module):
    """A weight whose parts each have a learned spectral norm ``softplus(scale) + 0.05``.

    The power iteration moves once for each call of `advance`, not with each forward pass, so that activations which are
    computed again for the backward pass see the same weight.

    Args:
        weight: [rows, columns]; at the start it is reproduced as it is.
        parts: Equal parts of rows with a norm each (3 for q, k and v).
    """

    _u: Tensor
    _v: Tensor

    def __init__(self, weight: Tensor, parts: int = 1) -> None:
        super().__init__()
        rows = weight.detach().unflatten(0, (parts, -1))  # [parts, rows / parts, columns]
        generator = torch.Generator().manual_seed(0)
        v = torch.randn(parts, weight.shape[1], generator=generator).to(weight)  # [parts, columns]
        u = rows.new_zeros(rows.shape[:2])  # [parts, rows / parts]
        for _ in range(_FIRST_ITERATIONS):
            u, v = _iterate(rows, v)
        self.register_buffer("_u", u)
        self.register_buffer("_v", v)
        norm = self._norm_of(rows)  # [parts]
        above = (norm - _NORM_FLOOR).clamp(min=_SMALLEST)
        self.scale = nn.Parameter(above + torch.log(-torch.expm1(-above)))  # the inverse of softplus
        self._due = False

    def advance(self) -> None:
        """Let the next forward pass in training move the power iteration."""
        self._due = True

    def forward(self, weight: Tensor) -> Tensor:
        """The effective weight [rows, columns]."""
        rows: Tensor = weight.unflatten(0, (self._u.shape[0], -1))  # [parts, rows / parts, columns]
        if self.training and self._due:
            self._due = False
            with torch.no_grad():
                u, v = _iterate(rows, self._v)
                self._u.copy_(u)
                self._v.copy_(v)
        factor = (F.softplus(self.scale) + _NORM_FLOOR) / self._norm_of(rows)  # [parts]
        return (rows * factor[:, None, None]).flatten(0, 1)  # [rows, columns]

    def _norm_of(self, rows: Tensor) -> Tensor:
        # Copies, because the vectors move in place before the backward pass of an accumulated batch reads them.
        u, v = self._u.clone(), self._v.clone()
        norm: Tensor = torch.einsum("pr,prc,pc->p", u, rows, v) + _EPS
        return norm


class WeightNoise(nn.Module):
    """A weight times ``1 + std * noise`` in training.

    Args:
        std: Standard deviation of the noise.
    """

    def __init__(self, std: float) -> None:
        super().__init__()
        self.std = std

    def forward(self, weight: Tensor) -> Tensor:
        """The noisy weight in training, the weight itself otherwise."""
        if not self.training:
            return weight
        return weight * (1 + self.std * torch.randn_like(weight))


def add_parametrizations(blocks: nn.Module, spectral: bool, damp: float | None) -> None:
    """Reparametrise every linear layer of the blocks.

    Args:
        blocks: Transformer blocks.
        spectral: Whether weights get a learned spectral norm; the norms of q, k and v are separate.
        damp: Standard deviation of the weight noise, None for none.
    """
    for name, module in list(blocks.named_modules()):
        if not isinstance(module, nn.Linear):
            continue
        if spectral:
            parts = 3 if name.endswith("qkv") else 1
            parametrize.register_parametrization(module, "weight", SpectralNorm(module.weight, parts))
        if damp:
            parametrize.register_parametrization(module, "weight", WeightNoise(damp))


def fold_parametrizations(model: nn.Module) -> None:
    """Replace every reparametrised weight by its effective value, in place; `model` is in evaluation mode."""
    for module in model.modules():
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)


def _iterate(rows: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    u = F.normalize(torch.einsum("prc,pc->pr", rows, v), dim=-1, eps=_EPS)  # [parts, rows / parts]
    return u, F.normalize(torch.einsum("prc,pr->pc", rows, u), dim=-1, eps=_EPS)  # [parts, columns]
