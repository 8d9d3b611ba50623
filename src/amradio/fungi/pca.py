"""Principal components, fitted exactly: for narrower features at little loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from amradio.errors import OptionError


@dataclass(frozen=True)
class Pca:
    """Directions of largest variance.

    Attributes:
        mean: float32 [C].
        components: float32 [dim, C] orthonormal rows; the entry of largest magnitude of each is positive.
        explained_variance: float32 [dim], with divisor N - 1.
    """

    mean: Tensor
    components: Tensor
    explained_variance: Tensor

    @property
    def dim(self) -> int:
        """Width of the result."""
        return len(self.components)

    def transform(self, features: Tensor) -> Tensor:
        """Project features [..., C] to [..., dim]. The result is not scaled to length 1."""
        centred = features.float() - self.mean.to(features.device)
        return centred @ self.components.to(features.device).T

    @classmethod
    def fit(cls, features: Tensor, dim: int) -> Pca:
        """Fit on rows, in float64, with a full decomposition.

        Args:
            features: [N, C].
            dim: Components to keep.

        Returns:
            The components.

        Raises:
            OptionError: `dim` is not in 1 to min(N, C), or features are not finite.
        """
        if features.ndim != 2 or not 1 <= dim <= min(features.shape):
            raise OptionError(
                f"PCA to {dim} components needs at least {dim} rows of at least {dim} features, got "
                f"{list(features.shape)}."
            )
        x = features.double()
        if not bool(torch.isfinite(x).all()):
            raise OptionError("PCA cannot be fitted: some features are NaN or infinite.")
        mean = x.mean(0)
        x = x - mean
        if len(x) >= x.shape[1]:
            squares, vectors = torch.linalg.eigh(x.T @ x)  # ascending
            squares, components = squares.flip(0)[:dim].clamp(min=0), vectors.T.flip(0)[:dim]
        else:
            _, singular, components = torch.linalg.svd(x, full_matrices=False)
            squares, components = singular[:dim] ** 2, components[:dim]
        largest = components.gather(1, components.abs().argmax(1, keepdim=True))  # [dim, 1]
        components = components * largest.sign()
        return cls(mean.float(), components.float(), (squares / max(len(x) - 1, 1)).float())


def can_reduce(rows: int, width: int, dim: int) -> bool:
    """Whether FUNGI's evaluations apply PCA: only if it makes features narrower than both sides of the train set."""
    return dim < min(rows, width)
