"""Balancing the distributions of teachers' features, so that none of them dominates the loss.

Ranzinger et al. 2024, "PHI-S: Distribution Balancing for Label-Free Multi-Teacher Distillation" (arXiv 2410.01680). All
kinds are invertible affine maps ``y = W (x - mean)``; students learn standardised targets, and the inverse is folded
into the last layer of their heads, so that what is exported speaks the teacher's own language.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from amradio.errors import OptionError, nearest_names
from amradio.statistics.hadamard import equalizing_rotation
from amradio.statistics.moments import Moments
from amradio.statistics.phi_s import phi_s

BalancingKind = Literal["none", "global", "per-channel", "pca", "zca", "hadamard", "phi-s"]
BALANCING: tuple[str, ...] = get_args(BalancingKind)

_MATRIX_KINDS = ("pca", "zca", "hadamard", "phi-s")
_RELATIVE_FLOOR = 1e-8


class Balancing(nn.Module):
    """An invertible standardisation of features.

    With mean μ, covariance Σ = U diag(e) Uᵀ (divisor N - 1), ``φ = sqrt(mean(e))`` and R the rotation of
    `amradio.statistics.hadamard.equalizing_rotation` for the variances e:

    ============  ======================  =================================================
    kind          W                       on the data of the statistics
    ============  ======================  =================================================
    none          I                       nothing is changed
    global        φ⁻¹                     the mean variance is 1
    per-channel   diag(Σ)^-½              every channel has variance 1
    pca           diag(e)^-½ Uᵀ           identity covariance, channels are components
    zca           U diag(e)^-½ Uᵀ         identity covariance, as near to x as can be
    hadamard      R diag(e)^-½ Uᵀ         identity covariance, every channel mixes all
    phi-s         φ⁻¹ R Uᵀ                every channel has variance 1, one scale for all
    ============  ======================  =================================================

    A whitening cannot give variance to directions that have none: eigenvalues are raised to 1e-8 of the largest (our
    choice), and a channel without any variance is only centred. PHI-S needs neither.

    Args:
        kind: See above.
        dim: Width D of the features. The map is the identity until fitted (`fit`) or loaded (`load_state_dict`).

    Attributes:
        kind: See above.
        dim: See above.
        mean: float64 [D].
        weight: W, float64 [D, D], or [D] for the kinds that scale channels.
        inverse_weight: Its inverse, likewise.

    Raises:
        OptionError: There is no such kind.
    """

    mean: Tensor
    weight: Tensor
    inverse_weight: Tensor

    def __init__(self, kind: BalancingKind, dim: int) -> None:
        super().__init__()
        if kind not in BALANCING:
            raise OptionError(f"Unknown balancing {kind!r}. {nearest_names(kind, BALANCING)}")
        self.kind, self.dim = kind, dim
        ones = torch.ones(dim, dtype=torch.float64)
        identity = ones.diag() if kind in _MATRIX_KINDS else ones
        self.register_buffer("mean", torch.zeros_like(ones))
        self.register_buffer("weight", identity)
        self.register_buffer("inverse_weight", identity.clone())

    @classmethod
    def fit(cls, kind: BalancingKind, moments: Moments) -> Balancing:
        """Fit to the statistics of features.

        Args:
            kind: See the class.
            moments: Of at least two rows.

        Returns:
            The standardisation, on the CPU.

        Raises:
            OptionError: There is no such kind, too few rows were seen, or features never varied.
        """
        balancing = cls(kind, moments.dim)
        if kind == "none":
            return balancing
        covariance = moments.covariance
        if not bool(covariance.trace() > 0):
            raise OptionError(
                f"The teacher said the same for all {moments.count} rows, so its features have no scale. Check its "
                "input, or leave its features out."
            )
        balancing.mean.copy_(moments.mean)
        fit = _fit_matrix if kind in _MATRIX_KINDS else _fit_scale
        weight, inverse = fit(kind, covariance)
        balancing.weight.copy_(weight)
        balancing.inverse_weight.copy_(inverse)
        return balancing

    def forward(self, features: Tensor) -> Tensor:
        """Standardise.

        Args:
            features: [..., D], of any floating dtype.

        Returns:
            [..., D] in float32, or in float64 where that was given; never in less, also under autocast.
        """
        x = _at_least_float32(features)
        with torch.autocast(x.device.type, enabled=False):
            return _apply(self.weight.to(x.dtype), x - self.mean.to(x.dtype))

    def inverse(self, targets: Tensor) -> Tensor:
        """Undo `forward`.

        Args:
            targets: [..., D] standardised.

        Returns:
            [..., D] in the teacher's space, dtypes as in `forward`.
        """
        y = _at_least_float32(targets)
        with torch.autocast(y.device.type, enabled=False):
            return _apply(self.inverse_weight.to(y.dtype), y) + self.mean.to(y.dtype)

    def fold(self, linear: nn.Linear) -> None:
        """Put the inverse into the last layer of a head, in place: it then speaks the teacher's own language.

        Args:
            linear: Its outputs are [..., D], or [..., u*u*D] in a head that upsamples by u.

        Raises:
            OptionError: The layer has no bias, another width, or a parametrisation.
        """
        self._replace(linear, self.inverse_weight, torch.zeros_like(self.mean), self.mean)

    def unfold(self, linear: nn.Linear) -> None:
        """Undo `fold`, in place: to train on from an exported head.

        Args:
            linear: See `fold`.

        Raises:
            OptionError: The layer has no bias, another width, or a parametrisation.
        """
        self._replace(linear, self.weight, self.mean, torch.zeros_like(self.mean))

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"{self.kind!r}, dim={self.dim}"

    @torch.no_grad()
    def _replace(self, linear: nn.Linear, matrix: Tensor, before: Tensor, after: Tensor) -> None:
        """Make a layer give ``matrix (y - before) + after`` where it gave y."""
        has_bias = "bias" in dict(linear.named_parameters())
        if not has_bias or linear.out_features % self.dim or parametrize.is_parametrized(linear):
            raise OptionError(
                f"Balancing of width {self.dim} can only be folded into a linear layer with a bias, a multiple of "
                f"{self.dim} outputs and no parametrisation, got {linear}."
            )
        place = linear.weight.device
        rows = linear.weight.double().reshape(-1, self.dim, linear.in_features)  # [u*u, D, C]
        bias = linear.bias.double().reshape(-1, self.dim)  # [u*u, D]
        matrix, before, after = matrix.to(place), before.to(place), after.to(place)
        mixed = matrix @ rows if matrix.ndim == 2 else matrix[:, None] * rows  # [u*u, D, C]
        linear.weight.copy_(mixed.reshape(linear.weight.shape))
        linear.bias.copy_((_apply(matrix, bias - before) + after).reshape(-1))


def _fit_scale(kind: str, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """W and its inverse, both [D], of the kinds that scale channels."""
    variances = covariance.diagonal()
    if kind == "global":
        scale = variances.mean().sqrt().expand_as(variances)
    else:
        scale = torch.where(variances > 0, variances, torch.ones_like(variances)).sqrt()
    return 1 / scale, scale


def _fit_matrix(kind: str, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """W and its inverse, both [D, D], of the kinds that mix channels."""
    if kind == "phi-s":
        return phi_s(covariance)
    variances, components = torch.linalg.eigh(covariance)  # ascending; components in columns
    variances = variances.clamp(min=0)
    scale = variances.clamp(min=variances[-1] * _RELATIVE_FLOOR).sqrt()  # [D]
    rotation = _whitening_rotation(kind, variances, components)
    return rotation @ (components / scale).T, (components * scale) @ rotation.T


def _whitening_rotation(kind: str, variances: Tensor, components: Tensor) -> Tensor:
    """What follows the whitening of components."""
    if kind == "pca":
        return torch.eye(len(variances), dtype=variances.dtype)
    return components if kind == "zca" else equalizing_rotation(variances)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _apply(weight: Tensor, x: Tensor) -> Tensor:
    """``weight @ x`` for each row of x [..., D]."""
    return x @ weight.T if weight.ndim == 2 else x * weight
