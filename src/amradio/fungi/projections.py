"""Projections of gradients to short vectors that keep their inner products, without the gradients themselves.

The gradient of a loss with respect to a linear layer's weight and bias is a sum of rank-one matrices ``b a'``: the
loss's gradient b at the layer's output times its input a (with a 1 for the bias), one for each token that went through
it. A vectorised gradient has H (H + 1) numbers, hundreds of thousands; the projections here read the factors only.

| name | cost for one rank-one gradient | what it is |
|---|---|---|
| ``sign`` | 2 E H^2 | the original's product with a matrix of random signs, streamed; equal to it |
| ``rank-one-R`` | 4 E H R | signs too, but each row is a sum of R outer products; rank-one-4 is hardly noisier |
| ``tensor-sketch`` | 2 H + 3 E log E | Pham and Pagh 2013: count sketches of the factors, convolved |
| ``exact-kernel`` | 0 | the unit factors, whose cosines multiplied are the gradients' cosine; no noise |

Legend of shape comments: N gradients, V factor pairs of a gradient, H layer outputs, J layer inputs (with the bias), E
width of the projection.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amradio.errors import CapabilityError, OptionError

PROJECTIONS = ("sign", "rank-one-4", "tensor-sketch", "exact-kernel")
_RANK_ONE = re.compile(r"rank-one(?:-([1-9]\d*))?")
_PRODUCTS_AT_ONCE = 2**22  # floats of the intermediate product held at once: 16 MiB stay in a cache or near it
_DRAWN_AT_ONCE = 2**22


@dataclass(frozen=True)
class GradientShape:
    """Shape of a linear layer's gradient.

    Attributes:
        outputs: H, outputs of the layer.
        inputs: Inputs of the layer.
        bias: Whether it has a bias, whose gradient is the last column.
    """

    outputs: int
    inputs: int
    bias: bool

    @property
    def columns(self) -> int:
        """J, the columns of the gradient."""
        return self.inputs + self.bias

    @property
    def size(self) -> int:
        """Numbers in the gradient."""
        return self.outputs * self.columns

    def augmented(self, inputs: Tensor) -> Tensor:
        """Layer inputs [..., inputs] in float32, with a 1 for the bias: [..., J]."""
        inputs = inputs.float()
        return F.pad(inputs, (0, 1), value=1.0) if self.bias else inputs


@runtime_checkable
class Projection(Protocol):
    """From factors of gradients to vectors."""

    @property
    def dim(self) -> int:
        """Width of the vectors."""
        ...

    def __call__(self, upstream: Tensor, inputs: Tensor) -> Tensor:
        """Project gradients.

        Args:
            upstream: float32 [N, V, H].
            inputs: float32 [N, V, J].

        Returns:
            float32 [N, dim]: the projection of ``sum_v upstream_v inputs_v'``, of any length.
        """
        ...


class SignProjection(nn.Module):
    """The product with a matrix of random signs, over the square root of its number of rows.

    Each row R_e of the matrix, seen as [H, J], contributes ``b' R_e a``, so the rows are multiplied with the inputs in
    chunks and nothing of the size N x H x J is held for gradients of rank one.

    Args:
        signs: int8 [E, H, J] of -1 and 1.
    """

    signs: Tensor

    def __init__(self, signs: Tensor) -> None:
        super().__init__()
        if signs.ndim != 3 or signs.dtype != torch.int8:
            raise OptionError(f"Signs must be int8 [E, H, J], got {signs.dtype} {list(signs.shape)}.")
        self.register_buffer("signs", signs, persistent=False)

    @classmethod
    def random(cls, shape: GradientShape, dim: int, generator: torch.Generator) -> SignProjection:
        """Draw the signs: 1 where a uniform number is above 0.5, else -1.

        Args:
            shape: Of the gradients.
            dim: E.
            generator: On the CPU. The numbers are those of one ``torch.rand(dim, shape.size)``, drawn in parts.

        Returns:
            The projection.
        """
        signs = torch.empty(dim, shape.size, dtype=torch.int8)
        for rows in signs.split(max(_DRAWN_AT_ONCE // shape.size, 1)):
            rows.copy_(torch.rand(rows.shape, generator=generator) > 0.5).mul_(2).sub_(1)
        return cls(signs.view(dim, shape.outputs, shape.columns))

    @property
    def dim(self) -> int:
        """E."""
        return len(self.signs)

    def forward(self, upstream: Tensor, inputs: Tensor) -> Tensor:
        """See `Projection`."""
        result = upstream.new_empty(len(upstream), self.dim)
        if upstream.shape[1] == 1:
            self._of_rank_one(upstream[:, 0], inputs[:, 0], result)
        else:
            self._of_matrices(torch.bmm(upstream.transpose(1, 2), inputs), result)
        return result.div_(math.sqrt(self.dim))

    def _of_rank_one(self, upstream: Tensor, inputs: Tensor, result: Tensor) -> None:
        n, h = upstream.shape
        for rows, signs in self._chunks(_PRODUCTS_AT_ONCE // (max(n, inputs.shape[1]) * h), upstream):
            products = F.linear(inputs, signs.flatten(0, 1)).view(n, -1, h)  # [N, e, H]
            result[:, rows] = torch.bmm(products, upstream[:, :, None])[:, :, 0]  # [N, e]

    def _of_matrices(self, gradients: Tensor, result: Tensor) -> None:
        flat = gradients.flatten(1)  # [N, H * J]
        for rows, signs in self._chunks(_PRODUCTS_AT_ONCE // flat.shape[1], gradients):
            result[:, rows] = flat @ signs.flatten(1).T  # [N, e]

    def _chunks(self, size: int, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Rows of the matrix in float32, some at a time."""
        size = max(size, 1)
        for start in range(0, self.dim, size):
            rows = slice(start, min(start + size, self.dim))
            yield rows, self.signs[rows].to(like.dtype)


class RankOneProjection(nn.Module):
    """Rows that are sums of R outer products of random signs.

    Args:
        shape: Of the gradients.
        dim: E.
        generator: On the CPU.
        rank: R; the noise falls towards that of `SignProjection` as it grows.
    """

    left: Tensor
    right: Tensor

    def __init__(self, shape: GradientShape, dim: int, generator: torch.Generator, rank: int = 4) -> None:
        super().__init__()
        self.dim = dim
        self.rank = rank
        left, right = (_signs(rank * dim, width, generator) for width in (shape.outputs, shape.columns))
        self.register_buffer("left", left.unflatten(0, (rank, dim)), persistent=False)  # [R, E, H]
        self.register_buffer("right", right.unflatten(0, (rank, dim)), persistent=False)  # [R, E, J]

    def forward(self, upstream: Tensor, inputs: Tensor) -> Tensor:
        """See `Projection`."""
        total = upstream.new_zeros(*upstream.shape[:2], self.dim)  # [N, V, E]
        for left, right in zip(self.left, self.right, strict=True):
            total.addcmul_(F.linear(upstream, left), F.linear(inputs, right))
        return total.sum(1).div_(math.sqrt(self.dim * self.rank))  # [N, E]


class TensorSketch(nn.Module):
    """Count sketches of both factors, convolved by FFT (Pham and Pagh 2013).

    Args:
        shape: Of the gradients.
        dim: E.
        generator: On the CPU.
    """

    def __init__(self, shape: GradientShape, dim: int, generator: torch.Generator) -> None:
        super().__init__()
        self.dim = dim
        # As matrices: few products beside everything else, and no scattered sums, which GPUs add up in any order.
        self.register_buffer("_left", _sketch(shape.outputs, dim, generator), persistent=False)
        self.register_buffer("_right", _sketch(shape.columns, dim, generator), persistent=False)

    def forward(self, upstream: Tensor, inputs: Tensor) -> Tensor:
        """See `Projection`."""
        left, right = self._sketched(upstream, self._left), self._sketched(inputs, self._right)  # [N, V, E]
        spectrum = (torch.fft.rfft(left) * torch.fft.rfft(right)).sum(1)  # [N, E/2 + 1]
        result: Tensor = torch.fft.irfft(spectrum, n=self.dim)  # [N, E]
        return result

    def _sketched(self, x: Tensor, signed: object) -> Tensor:
        """Sums of the entries that share a bucket, with their signs: [..., E]."""
        assert isinstance(signed, Tensor)
        return x @ signed


class ExactKernel(nn.Module):
    """No projection: both unit factors of a gradient of rank one, side by side.

    The cosine of two gradients is the product of the cosines of their factors, so these vectors are compared by
    `kernel_similarity`, not by an inner product.

    Args:
        shape: Of the gradients.
    """

    def __init__(self, shape: GradientShape) -> None:
        super().__init__()
        self.shape = shape
        self.dim = shape.outputs + shape.columns

    def forward(self, upstream: Tensor, inputs: Tensor) -> Tensor:
        """See `Projection`; the result is [N, H + J].

        Raises:
            CapabilityError: Gradients are sums of several rank-one matrices.
        """
        if upstream.shape[1] != 1:
            raise CapabilityError(
                f"exact-kernel keeps the factors of gradients of rank one, and these are sums of {upstream.shape[1]}. "
                f"Use 'sign' or 'rank-one-4'."
            )
        return torch.cat([unit(upstream[:, 0]), unit(inputs[:, 0])], dim=-1)


@dataclass(frozen=True)
class KernelSimilarity:
    """How rows ``[token | upstream | input]`` of unit vectors are compared: (cos token + cos upstream cos input) / 2.

    A function for `amradio.search.top_k`. It is no inner product, so approximate indices cannot use it.

    Attributes:
        token: Width of the token.
        upstream: Width of the gradient at the layer's output.
    """

    token: int
    upstream: int

    def __call__(self, queries: Tensor, rows: Tensor) -> Tensor:
        """Compare [q, D] with [d, D]: [q, d]."""
        first, second = self.token, self.token + self.upstream
        gradients = (queries[:, first:second] @ rows[:, first:second].T) * (queries[:, second:] @ rows[:, second:].T)
        return gradients.add_(queries[:, :first] @ rows[:, :first].T).mul_(0.5)


def unit(gradients: Tensor) -> Tensor:
    """Scale rows [..., C] to length 1, however short they are (those of the KL objective are); zeros stay zeros."""
    largest = gradients.abs().amax(-1, keepdim=True)
    return F.normalize(gradients / largest.where(largest > 0, 1.0), dim=-1)


def check_projection(name: str) -> None:
    """Refuse an unknown projection.

    Raises:
        OptionError: The message lists the known ones.
    """
    if name not in PROJECTIONS and not _RANK_ONE.fullmatch(name):
        raise OptionError(f"Unknown projection {name!r}. Known: {', '.join(PROJECTIONS)} (any rank-one-R).")


def make_projection(name: str, shape: GradientShape, dim: int, seed: int) -> Projection:
    """Make a projection by its name.

    Args:
        name: One of `PROJECTIONS`, or ``rank-one-R`` for any R.
        shape: Of the gradients.
        dim: Width of the result; exact-kernel has its own.
        seed: Equal seeds give equal projections on every machine.

    Returns:
        The projection, a module on the CPU.

    Raises:
        OptionError: The name is unknown, or `dim` is below 1.
    """
    check_projection(name)
    if dim < 1:
        raise OptionError(f"projection_dim must be at least 1, got {dim}.")
    generator = torch.Generator().manual_seed(seed)
    if name == "sign":
        return SignProjection.random(shape, dim, generator)
    if name == "tensor-sketch":
        return TensorSketch(shape, dim, generator)
    if name == "exact-kernel":
        return ExactKernel(shape)
    match = _RANK_ONE.fullmatch(name)
    assert match is not None
    return RankOneProjection(shape, dim, generator, int(match[1] or 1))


def _signs(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return (torch.rand(rows, columns, generator=generator) > 0.5).float() * 2 - 1


def _sketch(width: int, dim: int, generator: torch.Generator) -> Tensor:
    """A count sketch as a matrix [width, E] with one sign in each row."""
    buckets = torch.randint(dim, (width,), generator=generator)
    matrix = torch.zeros(width, dim)
    matrix[torch.arange(width), buckets] = _signs(1, width, generator)[0]
    return matrix
