"""Lengths of features: far too long ones in the background are artefacts, where a network keeps notes of its own.

Vision Transformers Need Registers (Darcet et al., arXiv 2309.16588) shows what they look like.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from amradio.errors import OptionError

FAR = 6.0
"""A length is an outlier when its distance from the median is more than this many median distances. Of lengths that
are spread as a normal distribution, this happens to one in 20,000."""


class Norms(NamedTuple):
    """Lengths of the features of one map.

    Attributes:
        norms: float32 [h, w].
        outliers: bool [h, w].
    """

    norms: Tensor
    outliers: Tensor

    @property
    def share(self) -> float:
        """Of positions that are outliers."""
        return float(self.outliers.float().mean())


def norm_map(features: Tensor) -> Norms:
    """Measure the lengths of features.

    Args:
        features: [h, w, D].

    Returns:
        Lengths, and which are outliers: only those that are too long, see `FAR`.

    Raises:
        OptionError: The map is empty, or values are not finite.
    """
    norms = features.float().norm(dim=-1)  # [h, w]
    if norms.numel() == 0 or not norms.isfinite().all():
        raise OptionError("Lengths are measured of finite features, and at least one.")
    median = norms.median()
    typical = (norms - median).abs().median()
    return Norms(norms, (norms - median > FAR * typical) & (typical > 0))
