"""PHI-S: one scale for all directions, and then every channel with variance 1.

Ranzinger et al. 2024, "PHI-S: Distribution Balancing for Label-Free Multi-Teacher Distillation" (arXiv 2410.01680).
"""

from __future__ import annotations

import torch
from torch import Tensor

from amradio.statistics.hadamard import equalizing_rotation


def phi_s(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Fit PHI-S to a covariance Σ = U diag(e) Uᵀ.

    Args:
        covariance: float64 [D, D], with a positive trace.

    Returns:
        ``W = φ⁻¹ R Uᵀ`` and its inverse, [D, D] each, where ``φ = sqrt(mean(e))`` and R is the rotation of
        `amradio.statistics.hadamard.equalizing_rotation`: the covariance of W x has a diagonal of ones.
    """
    variances, components = torch.linalg.eigh(covariance)  # ascending; components in columns
    variances = variances.clamp(min=0)
    scale = variances.mean().sqrt()
    rotation = equalizing_rotation(variances) @ components.T
    return rotation / scale, rotation.T * scale
