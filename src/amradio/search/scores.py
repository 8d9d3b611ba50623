"""Inner products that do not depend on how the work was cut up, and how far a fast product is from them.

A matrix product adds up D products in an order that depends on the shapes of its arguments, the number of threads and
the library, so the same pair of rows gets another last bit in another block. Neighbours would swap with the chunk size
and with the number of processes. The score of a pair is therefore defined here: products in float64 (exact for float32
features and below), added up in a fixed tree of float64 additions, rounded to float32 once. Other orders of addition
are used where they provably round to the same float32, and float32 products only select candidates. How far a product
may be from the truth, in any order of addition, is the classical |error| <= D u / (1 - D u) * |q| |d| (Higham,
"Accuracy and Stability of Numerical Algorithms", 2nd edition, section 3.1).
"""

from __future__ import annotations

import torch
from torch import Tensor

_SINGLE, _DOUBLE = 2.0**-24, 2.0**-53  # unit roundoffs
_SLACK = 1.01  # second-order terms, and the rounding of the norms
# What rounding both factors costs when float32 products may run on shorter formats; see
# torch.set_float32_matmul_precision. "none" is the default: no such permission.
_SHORTENED = {"none": 0.0, "ieee": 0.0, "tf32": 2.0**-10, "bf16": 2.0**-7}
_TENSOR_CORE = 2.0**-21  # tensor cores align and cut addends at about this, relative to the largest


def exact_device(device: torch.device) -> torch.device:
    """Where float64 is available, for work of a device."""
    return torch.device("cpu") if device.type == "mps" else device


def fast_products(queries: Tensor, block: Tensor, out: Tensor) -> None:
    """Write inner products as fast as the device can.

    Args:
        queries: [q, D].
        block: [d, D], same dtype.
        out: float32 [q, d], contiguous.
    """
    if queries.dtype == torch.float32:
        torch.mm(queries, block.T, out=out)
    else:  # halves on CUDA: multiplied exactly, added up in float32
        out.copy_(torch.mm(queries, block.T, out_dtype=torch.float32))


def fast_error(dim: int, dtype: torch.dtype, device: torch.device) -> float:
    """How far `fast_products` may be from the scores of `pair_scores`, over the product of the norms.

    Args:
        dim: D.
        dtype: Of the arguments of the product.
        device: Where it runs.

    Returns:
        The bound. Multiply it by the norms of the query and of the row.
    """
    unit, shortened = _SINGLE, 0.0
    if dtype != torch.float32:
        unit = _TENSOR_CORE
    else:
        backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
        shortened = _SHORTENED.get(backend.matmul.fp32_precision, _SHORTENED["bf16"])
    additions = (dim + 2) * unit
    own_rounding = 2 * _SINGLE  # of the score to float32
    return _SLACK * (additions / (1 - min(additions, 0.5)) + shortened + own_rounding)


def underflow(dim: int) -> float:
    """What products below the smallest normal float32 may add to `fast_error`, absolutely."""
    return 4 * dim * torch.finfo(torch.float32).tiny


def pair_scores(queries: Tensor, rows: Tensor, largest: float) -> Tensor:
    """The scores of pairs: the same bits in whatever company, on every device.

    Args:
        queries: [P, D].
        rows: [P, D], in the same order.
        largest: At least the product of the norms of any pair.

    Returns:
        float32 [P].
    """
    products = rows.double().mul_(queries)  # [P, D]
    low, scores = _rounded(products.sum(1), _wide_error(rows.shape[1]) * largest)  # [P] each
    unsettled = (low != scores).nonzero()[:, 0]
    if len(unsettled):
        scores[unsettled] = _tree_sum(products[unsettled]).float()
    return scores


def block_scores(queries: Tensor, block: Tensor, largest: float, above: Tensor | None = None) -> Tensor:
    """The scores of all pairs of two blocks, for the cases in which fast products cannot decide.

    Args:
        queries: [q, D].
        block: [d, D].
        largest: At least the product of the norms of any pair.
        above: float32 [q]; only scores above it are needed exactly, others may come out too high, yet not above it.

    Returns:
        float32 [q, d].
    """
    queries, block = queries.double(), block.double()
    low, scores = _rounded(queries @ block.T, _wide_error(block.shape[1]) * largest)  # [q, d] each
    unsettled = low != scores
    if above is not None:
        unsettled &= scores > above[:, None]
    i, j = unsettled.nonzero(as_tuple=True)  # [P] each
    step = pairs_at_once(block.shape[1], block.device)
    for start in range(0, len(i), step):
        part = slice(start, start + step)
        scores[i[part], j[part]] = _tree_sum(block[j[part]].mul_(queries[i[part]])).float()
    return scores


def _wide_error(dim: int) -> float:
    """How far a float64 sum of products may be from any other, over the product of the norms."""
    return 4 * (dim + 2) * _DOUBLE


def _rounded(products: Tensor, error: float) -> tuple[Tensor, Tensor]:
    """The ends of what inner products may be, rounded. Where these agree, they are the score; nearly everywhere."""
    return (products - error).float(), (products + error).float()


def _tree_sum(products: Tensor) -> Tensor:
    """Add up the columns of [P, D], which is overwritten, in an order that depends on D alone."""
    width = products.shape[1]
    while width > 1:  # the second half onto the first; an element in the middle waits
        half = width // 2
        products[:, :half].add_(products[:, width - half : width])
        width -= half
    return products[:, 0]


def pairs_at_once(dim: int, device: torch.device) -> int:
    """How many pairs to multiply at a time: what fits into a core's cache, or fills a GPU."""
    return max((2**19 if device.type == "cpu" else 2**26) // (8 * dim), 1)
