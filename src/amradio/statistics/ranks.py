"""Effective ranks: how many directions features really use.

RankMe: Garrido et al. 2023 (arXiv 2210.02885). LiDAR: Thilak et al. 2024 (arXiv 2312.04000). Both are the exponential
of the entropy of a normalised spectrum, a count of directions that is not a whole number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from amradio.errors import OptionError
from amradio.statistics.moments import Moments

_SUM_FLOOR = 1e-7
_WITHIN_RIDGE = 1e-8


def smooth_rank(spectrum: Tensor) -> float:
    """The exponential of the entropy of a spectrum.

    Args:
        spectrum: [D] singular values, or eigenvalues; those that are not positive do not count.

    Returns:
        From 1 to the number of positive values; 0 where there is none.
    """
    values = spectrum.double()
    values = values[values > 0]
    if not len(values):
        return 0.0
    shares = values / (values.sum() + _SUM_FLOOR)
    return float((-(shares * shares.log()).sum()).exp())


def rankme(embeddings: Tensor) -> float:
    """RankMe: the smooth rank of the singular values of embeddings, which are not centred.

    Args:
        embeddings: [N, K].

    Returns:
        At most min(N, K).
    """
    _check_rows(embeddings, 2)
    return smooth_rank(torch.linalg.svdvals(embeddings.double()))


def rankme_of_moments(moments: Moments) -> float:
    """`rankme` of rows that have streamed by.

    The squares of the singular values are eigenvalues of the rows' Gram matrix. Singular values below 1e-8 of the
    largest are lost in that square; they carry none of the entropy.

    Args:
        moments: Of the rows.
    """
    gram = moments.covariance * (moments.count - 1) + moments.count * torch.outer(moments.mean, moments.mean)
    squares = torch.linalg.eigvalsh(gram)
    noise = squares[-1] * len(squares) * torch.finfo(torch.float64).eps
    return smooth_rank(squares.where(squares > noise, 0).sqrt())


def lidar(embeddings: Tensor) -> float:
    """LiDAR: the smooth rank of what tells pictures apart, measured against what differs between views of one.

    Args:
        embeddings: [N, V, K]: N pictures in V views each.

    Returns:
        At most min(N - 1, K), but for rounding.
    """
    _check_rows(embeddings, 3)
    streamed = Lidar(embeddings.shape[-1])
    for views in embeddings:
        streamed.update(views)
    return streamed.value()


class Lidar:
    """`lidar` of pictures that come one by one: only their means are kept.

    With Σ_b the covariance of the pictures' means (divisor N - 1) and Σ_w that of the deviations from them (divisor
    N V - 1, plus 1e-8 on the diagonal), the value is the smooth rank of the eigenvalues of
    ``Σ_w^-½ Σ_b Σ_w^-½ + 1e-8 I``.

    Args:
        dim: K.
    """

    def __init__(self, dim: int) -> None:
        self._means: list[Tensor] = []  # [K] each
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64)
        self._rows = 0

    @property
    def count(self) -> int:
        """Pictures seen."""
        return len(self._means)

    def update(self, views: Tensor) -> None:
        """Add a picture.

        Args:
            views: [V, K]; V may differ between pictures.
        """
        x = views.double()
        mean = x.mean(0)
        deviations = x - mean
        self._means.append(mean)
        self._scatter += deviations.T @ deviations
        self._rows += len(x)

    def value(self) -> float:
        """LiDAR of the pictures so far.

        Raises:
            OptionError: There were fewer than two pictures, or only one view of each.
        """
        if self.count < 2 or self._rows <= self.count:
            raise OptionError(
                f"LiDAR compares several views of several pictures, got {self._rows} views of {self.count} pictures."
            )
        ridge = _WITHIN_RIDGE * torch.eye(len(self._scatter), dtype=torch.float64)
        between = torch.cov(torch.stack(self._means).T).reshape(ridge.shape)  # [K, K]
        variances, components = torch.linalg.eigh(self._scatter / (self._rows - 1) + ridge)
        whitening = (components * variances.clamp(min=_WITHIN_RIDGE).rsqrt()) @ components.T
        return smooth_rank(torch.linalg.eigvalsh(whitening @ between @ whitening + ridge))


def _check_rows(embeddings: Tensor, axes: int) -> None:
    if embeddings.ndim != axes or not embeddings.numel():
        raise OptionError(f"Embeddings must have {axes} axes and values, got the shape {list(embeddings.shape)}.")
    if not bool(embeddings.isfinite().all()):
        raise OptionError("A rank cannot be computed: some embeddings are NaN or infinite.")
