"""How much two feature spaces have in common: canonical correlations, maps from one to the other, linear CKA.

Everything follows from the joint second moments of both spaces, so pictures may stream by in any number. CCA as RADIO's
examples have it: both spaces are standardised by PHI-S first, so that errors of the maps are in units of variance. CKA:
Kornblith et al. 2019 (arXiv 1905.00414).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from amradio.errors import OptionError
from amradio.statistics.moments import Moments
from amradio.statistics.phi_s import phi_s
from amradio.statistics.ranks import smooth_rank

_LEAST_ERROR = 1e-12  # of a channel: a space that is mapped to itself has no error but rounding


@dataclass(frozen=True)
class SecondMoments:
    """Covariances of two spaces.

    Attributes:
        aa: float64 [Da, Da].
        ab: float64 [Da, Db].
        bb: float64 [Db, Db].
    """

    aa: Tensor
    ab: Tensor
    bb: Tensor

    @classmethod
    def of(cls, joint: Moments, width: int) -> SecondMoments:
        """Take the moments of rows [a, b] apart.

        Args:
            joint: Of at least two rows.
            width: Da.

        Returns:
            Covariances about the mean, with divisor N - 1.
        """
        whole = joint.covariance
        return cls(whole[:width, :width], whole[:width, width:], whole[width:, width:])

    def standardised(self) -> SecondMoments:
        """After PHI-S of each space: the diagonals of `aa` and `bb` are ones.

        Raises:
            OptionError: A space does not vary.
        """
        for name, covariance in (("first", self.aa), ("second", self.bb)):
            if not bool(covariance.trace() > 0):
                raise OptionError(f"The {name} backbone says the same everywhere, so nothing can be compared with it.")
        a, b = phi_s(self.aa)[0], phi_s(self.bb)[0]
        return SecondMoments(a @ self.aa @ a.T, a @ self.ab @ b.T, b @ self.bb @ b.T)


@dataclass(frozen=True)
class Cca:
    """Canonical correlation analysis of two spaces.

    Attributes:
        correlations: float64 [k] singular values of ``T = Σ_aa^-½ Σ_ab Σ_bb^-½``, descending; k = min(Da, Db).
        projection_a: float64 [Da, k]: ``Σ_aa^-½ U``.
        projection_b: float64 [Db, k]: ``Σ_bb^-½ V``.
    """

    correlations: Tensor
    projection_a: Tensor
    projection_b: Tensor

    @property
    def rank(self) -> float:
        """How many directions the spaces share: the sum of the correlations."""
        return float(self.correlations.sum())


@dataclass(frozen=True)
class Comparison:
    """Two spaces side by side.

    Attributes:
        correlations: See `Cca`.
        rank_a: Smooth rank of the singular values of the first space, about its mean.
        rank_b: Of the second.
        fidelity_a_to_b: Mean over channels of 1 / MSE, when the first space is mapped to the second through the
            canonical directions and both are standardised by PHI-S. That map is not the best one: where correlations
            are low it is worse than a constant, whose fidelity is 1.
        fidelity_b_to_a: The other way.
        explained_a_to_b: Share of the second space's variance that the best linear map from the first explains.
        explained_b_to_a: The other way.
        cka: Linear CKA, from 0 to 1.
    """

    correlations: Tensor
    rank_a: float
    rank_b: float
    fidelity_a_to_b: float
    fidelity_b_to_a: float
    explained_a_to_b: float
    explained_b_to_a: float
    cka: float


def cca(moments: SecondMoments) -> Cca:
    """Find the directions in which two spaces say the same.

    Args:
        moments: Of both spaces. Directions without variance are left out.
    """
    a, b = _inverse_root(moments.aa), _inverse_root(moments.bb)
    left, values, right = torch.linalg.svd(a @ moments.ab @ b, full_matrices=False)
    return Cca(values, a @ left, b @ right.T)


def channel_errors(moments: SecondMoments, projection_a: Tensor, projection_b: Tensor) -> Tensor:
    """Mean squared errors of ``a (P_a P_b⁺)`` against b, for each channel of b.

    Args:
        moments: Means of a aᵀ, a bᵀ and b bᵀ over rows; about the mean, or about zero.
        projection_a: [Da, k].
        projection_b: [Db, k].

    Returns:
        float64 [Db].
    """
    mapped = projection_a @ torch.linalg.pinv(projection_b)  # [Da, Db]
    explained = (mapped * (moments.aa @ mapped)).sum(0) - 2 * (mapped * moments.ab).sum(0)  # [Db]
    errors: Tensor = moments.bb.diagonal() + explained
    return errors.clamp(min=0)


def fidelity(errors: Tensor) -> float:
    """Mean over channels of 1 / MSE; errors below 1e-12, which are rounding, count as that."""
    return float((1 / errors.clamp(min=_LEAST_ERROR)).mean())


def explained_variance(moments: SecondMoments) -> float:
    """Share of the second space's variance that least squares from the first one explains, from 0 to 1."""
    explained = (_inverse_root(moments.aa) @ moments.ab).square().sum()  # trace of Σ_ba Σ_aa⁺ Σ_ab
    return float(explained / moments.bb.trace())


def linear_cka(moments: SecondMoments) -> float:
    """Linear CKA, about the mean: ``|Σ_ab|² / (|Σ_aa| |Σ_bb|)`` in Frobenius norms."""
    return float(moments.ab.norm() ** 2 / (moments.aa.norm() * moments.bb.norm()))


def compare_spaces(joint: Moments, width: int) -> Comparison:
    """Compare two spaces by the moments of their rows side by side.

    Args:
        joint: Of rows [a, b].
        width: Da.

    Returns:
        The comparison.

    Raises:
        OptionError: A space does not vary.
    """
    moments = SecondMoments.of(joint, width)
    standard = moments.standardised()
    found = cca(standard)
    # The mean over N rows of what the covariances, with divisor N - 1, are about.
    share = (joint.count - 1) / joint.count
    forward = share * channel_errors(standard, found.projection_a, found.projection_b)  # [Db]
    swapped = SecondMoments(standard.bb, standard.ab.T, standard.aa)
    backward = share * channel_errors(swapped, found.projection_b, found.projection_a)  # [Da]
    return Comparison(
        correlations=found.correlations,
        rank_a=smooth_rank(_singular_values(moments.aa)),
        rank_b=smooth_rank(_singular_values(moments.bb)),
        fidelity_a_to_b=fidelity(forward),
        fidelity_b_to_a=fidelity(backward),
        explained_a_to_b=explained_variance(standard),
        explained_b_to_a=explained_variance(swapped),
        cka=linear_cka(moments),
    )


def _inverse_root(covariance: Tensor) -> Tensor:
    """Σ^-½, zero in directions whose variance is not above rounding."""
    variances, components = _spectrum(covariance)
    return (components * torch.where(variances > 0, variances, torch.inf).rsqrt()) @ components.T


def _singular_values(covariance: Tensor) -> Tensor:
    """Of the centred rows, but for a common factor."""
    return _spectrum(covariance)[0].sqrt()


def _spectrum(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, zero where they are rounding, and eigenvectors."""
    variances, components = torch.linalg.eigh(covariance)
    noise = variances[-1].clamp(min=0) * len(variances) * torch.finfo(torch.float64).eps
    return variances.where(variances > noise, 0), components
