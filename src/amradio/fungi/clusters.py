"""Spherical k-means as FUNGI's DeepCluster objective runs it: few iterations over latents that are held in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from amradio.errors import OptionError


def kmeans(rows: Tensor, initial: Tensor, iterations: int = 10) -> Tensor:
    """Lloyd's algorithm by inner product.

    Centroids are plain means, not scaled to length 1. A cluster without rows keeps its centroid.

    Args:
        rows: [N, d] latents.
        initial: int64 [K] rows that are the first centroids.
        iterations: How many.

    Returns:
        [K, d].

    Raises:
        OptionError: There are more clusters than rows.
    """
    if len(initial) > len(rows):
        raise OptionError(f"There cannot be more clusters ({len(initial)}) than pictures ({len(rows)}).")
    centroids = rows[initial].clone()
    for _ in range(iterations):
        assigned = assign(rows, centroids)  # [N]
        counts = torch.bincount(assigned, minlength=len(centroids))  # [K]
        # A product with the one-hot matrix, because scattered sums of floats are not reproducible on a GPU.
        member = torch.nn.functional.one_hot(assigned, len(centroids)).to(rows.dtype)  # [N, K]
        means = member.T @ rows / counts.clamp(min=1)[:, None]
        centroids = torch.where(counts[:, None] > 0, means, centroids)
    return centroids


def assign(rows: Tensor, centroids: Tensor) -> Tensor:
    """The centroid with the highest inner product with each row: int64 [N]."""
    return (rows @ centroids.T).argmax(-1)
