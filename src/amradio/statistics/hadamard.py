"""Rotations that spread variance evenly over channels: Hadamard matrices, and Givens rotations where there is none.

A Hadamard matrix has entries ±1 and orthogonal rows, so ``R = H / sqrt(n)`` turns any diagonal covariance into one with
a constant diagonal; PHI-S (Ranzinger et al. 2024, arXiv 2410.01680) rests on that. For widths without a known matrix,
Bendel and Mickey's construction (1978, "Population correlation matrices for sampling experiments") reaches the same
constant diagonal exactly by n - 1 Givens rotations, where the official code takes a random matrix.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from amradio.errors import OptionError

Matrix = NDArray[np.float64]


def hadamard(n: int) -> Tensor | None:
    """Construct a Hadamard matrix.

    Sylvester's construction, Paley's two (for fields of a prime number of elements), and Kronecker products of them,
    with as large a Sylvester part as possible.

    Args:
        n: Order.

    Returns:
        float64 [n, n] of ±1 with ``H @ H.T == n * I``; None where these constructions give no matrix of that order.
    """
    found = _hadamard(n)
    return None if found is None else torch.from_numpy(found)


def equalizing_rotation(variances: Tensor) -> Tensor:
    """Make an orthogonal matrix that gives every channel the same variance.

    A Hadamard matrix over sqrt(D) where there is one. Otherwise the Kronecker product of the largest Hadamard matrix
    whose order divides D and a cosine basis, which mixes all channels nearly evenly, followed by D - 1 Givens rotations
    that make the variances equal (the starting point is our choice; Bendel and Mickey start from any matrix).

    Args:
        variances: [D], of uncorrelated channels (eigenvalues of a covariance); not negative.

    Returns:
        R, float64 [D, D]: all entries of ``diag(R @ diag(variances) @ R.T)`` are their mean.

    Raises:
        OptionError: Variances are negative or not finite.
    """
    spread = variances.detach().cpu().double().numpy()
    if spread.ndim != 1 or not len(spread) or not np.isfinite(spread).all() or spread.min() < 0:
        raise OptionError(f"Variances must be a vector of finite numbers of at least 0, got {variances!r:.200}.")
    exact = _hadamard(len(spread))
    if exact is not None:
        return torch.from_numpy(exact / math.sqrt(len(spread)))
    start = _mixing(len(spread))
    return torch.from_numpy(_equalize((start * spread) @ start.T, start))


def _hadamard(n: int) -> Matrix | None:
    if n < 1:
        return None
    twos = (n & -n).bit_length() - 1  # n = 2**twos * odd
    if n == 1 << twos:
        return _sylvester(twos)
    for power in range(twos - 1, -1, -1):
        core = _paley(n >> power)
        if core is not None:
            return _kron(_sylvester(power), core)
    return None


def _sylvester(power: int) -> Matrix:
    """Of order 2**power."""
    matrix = np.ones((1, 1))
    for _ in range(power):
        matrix = _kron(np.array([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix


def _paley(n: int) -> Matrix | None:
    """Of order q + 1 (first construction) or 2 (q + 1) (second), for a prime q that suits it."""
    if _is_prime(n - 1) and (n - 1) % 4 == 3:
        bordered = _bordered_characters(n - 1)
        bordered[1:, 0] = -1  # skew-symmetric, as q is 3 modulo 4
        return bordered + np.eye(n)
    half = n // 2
    if n % 2 == 0 and _is_prime(half - 1) and (half - 1) % 4 == 1:
        at_zero, at_one = np.array([[1.0, -1.0], [-1.0, -1.0]]), np.array([[1.0, 1.0], [1.0, -1.0]])
        return _kron(np.eye(half), at_zero) + _kron(_bordered_characters(half - 1), at_one)
    return None


def _bordered_characters(q: int) -> Matrix:
    """The quadratic character of i - j modulo q, behind a border of ones: [q + 1, q + 1] with a diagonal of zeros."""
    character = np.full(q, -1.0)
    character[[i * i % q for i in range(1, q)]] = 1
    character[0] = 0
    i = np.arange(q)
    bordered = np.ones((q + 1, q + 1))
    bordered[0, 0] = 0
    bordered[1:, 1:] = character[(i[:, None] - i[None, :]) % q]
    return bordered


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % i for i in range(2, math.isqrt(n) + 1))


def _mixing(n: int) -> Matrix:
    """An orthogonal matrix whose entries are of similar magnitude."""
    divisors = (d for d in range(n, 0, -1) if n % d == 0)
    signs = next(m for d in divisors if (m := _hadamard(d)) is not None)  # of order 1 at least
    rest = n // len(signs)
    k, j = np.arange(rest)[:, None], np.arange(rest)[None, :]
    cosines = np.cos(math.pi * (2 * j + 1) * k / (2 * rest)) * math.sqrt(2 / rest)  # DCT-II
    cosines[0] = 1 / math.sqrt(rest)
    return _kron(signs / math.sqrt(len(signs)), cosines)


def _kron(a: Matrix, b: Matrix) -> Matrix:
    return np.asarray(np.kron(a, b), dtype=np.float64)


def _equalize(covariance: Matrix, rotation: Matrix) -> Matrix:
    """Rotate pairs of channels until all variances are the mean.

    Each step takes the channels of largest and smallest variance, one above the mean and one below, and turns them in
    their plane until the first has the mean exactly; it is then left alone.

    Args:
        covariance: [D, D], changed.
        rotation: [D, D], changed: its rows are turned with the channels.

    Returns:
        `rotation`.
    """
    mean = covariance.trace() / len(covariance)
    open_ = np.ones(len(covariance), dtype=bool)
    for _ in range(len(covariance) - 1):
        variances = covariance.diagonal()
        high = int(np.where(open_, variances, -np.inf).argmax())
        low = int(np.where(open_, variances, np.inf).argmin())
        above, below = variances[high] - mean, variances[low] - mean
        if not above > 0 > below:
            break  # the rest are equal, as exactly as floating point can say
        # The tangent t of the angle solves below * t**2 + 2 * cross * t + above = 0; the smaller root disturbs least.
        cross = covariance[high, low]
        tangent = -above / (cross + math.copysign(math.sqrt(cross * cross - above * below), cross))
        cosine = 1 / math.hypot(1, tangent)
        turn = cosine * np.array([[1.0, tangent], [-tangent, 1.0]])
        pair = [high, low]
        covariance[pair] = turn @ covariance[pair]
        covariance[:, pair] = covariance[:, pair] @ turn.T
        rotation[pair] = turn @ rotation[pair]
        covariance[high, high] = mean
        open_[high] = False
    return rotation
