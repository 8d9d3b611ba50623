"""Features of intermediate blocks: which, aggregated how, standardised how (RADIOv2.5, arXiv 2412.07679)."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, SupportsIndex

import torch
from torch import Tensor

from amradio.errors import OptionError
from amradio.models.normalizers import InterFeatureNormalizer
from amradio.models.output import check_feature_fmt
from amradio.models.vit import Tokens, VisionTransformer

AGGREGATIONS = ("sparse", "dense")
ALPHA_SCHEMES = ("none", "pre-alpha", "post-alpha")


class IntermediatesOptionError(OptionError, AssertionError):
    """A bad option of `forward_intermediates`; timm and the official code raise `AssertionError` there."""


@dataclass(frozen=True)
class IntermediatesOptions:
    """The options of `RadioModel.forward_intermediates`, see there.

    Attributes:
        official: Reproduce the official code: indices become a sorted set, and the final output is normed only if
            `norm`.
    """

    indices: int | Sequence[int] | None
    prefix_tokens: bool
    norm: bool
    stop_early: bool
    output_fmt: str
    aggregation: str
    norm_alpha_scheme: str
    official: bool

    def check(self) -> None:
        """Refuse unknown values.

        Raises:
            IntermediatesOptionError: A value is unknown.
        """
        try:
            check_feature_fmt(self.output_fmt, "output_fmt", ("NCHW", "NLC"))
            check_feature_fmt(self.aggregation, "aggregation", AGGREGATIONS)
            check_feature_fmt(self.norm_alpha_scheme, "norm_alpha_scheme", ALPHA_SCHEMES)
        except OptionError as e:
            raise IntermediatesOptionError(str(e)) from None

    def resolve_indices(self, depth: int) -> list[int]:
        """Turn `indices` into absolute block indices.

        Args:
            depth: Number of blocks.

        Returns:
            Indices in the caller's order (as a sorted set if `official`).

        Raises:
            OptionError: An index is out of range.
        """
        indices = take_indices(self.indices, depth)
        return sorted(set(indices)) if self.official else indices


def take_indices(indices: int | Sequence[int] | None, depth: int) -> list[int]:
    """Turn a choice of blocks into absolute indices.

    Args:
        indices: n for the last n, a sequence in which negatives count from the end, or None for all.
        depth: Number of blocks.

    Returns:
        Absolute indices in the order given.

    Raises:
        OptionError: An index, or n, is out of range.
    """
    if indices is None:
        return list(range(depth))
    if isinstance(indices, SupportsIndex):
        indices = operator.index(indices)
        if not 1 <= indices <= depth:
            raise OptionError(f"The last {indices} blocks were asked for, but n must be in 1 to {depth}.")
        return list(range(depth - indices, depth))
    indices = [operator.index(i) for i in indices]
    wrong = [i for i in indices if not -depth <= i < depth]
    if wrong:
        raise OptionError(f"Block index {wrong[0]} is out of range (0 to {depth - 1}, or -{depth} to -1 from the end).")
    return [i % depth for i in indices]


class Intermediates(NamedTuple):
    """What `collect_intermediates` found.

    Attributes:
        final: The last run block's tokens, with the final norm.
        tokens: One entry an index, in the order asked for.
    """

    final: Tokens
    tokens: list[Tokens]


def collect_intermediates(
    trunk: VisionTransformer,
    normalizer: InterFeatureNormalizer | None,
    images: Tensor,
    options: IntermediatesOptions,
) -> Intermediates:
    """Run the trunk and collect (aggregated, standardised) tokens of intermediate blocks.

    Args:
        trunk: The network.
        normalizer: Statistics of its blocks, if stored.
        images: Conditioned images [B, 3, H, W].
        options: What to collect.

    Returns:
        Final and intermediate tokens.

    Raises:
        OptionError: An index is out of range.
    """
    depth = len(trunk.blocks)
    order = options.resolve_indices(depth)
    taken = sorted(set(order))
    group_end = _group_ends(taken, depth) if options.aggregation == "dense" else {i: i for i in taken}
    used = None if options.norm_alpha_scheme == "none" else normalizer
    found: dict[int, Tokens] = {}
    group: list[_Scaled] = []
    final: Tokens | None = None
    stop = taken[-1] if options.stop_early and taken else None
    for i, tokens in trunk.run(images, tuple(group_end), stop):
        final = tokens
        if i not in group_end:
            continue
        group.append(_standardise(tokens, used, i, group_end[i]))
        if i == group_end[i]:
            mean = _mean(group, options.norm_alpha_scheme)
            found[i] = trunk.finish(mean) if options.norm else mean
            group = []
    assert final is not None  # the trunk always yields its last block
    if options.norm or not options.official:
        final = trunk.finish(final)
    return Intermediates(final, [found[i] for i in order])


class _Scaled(NamedTuple):
    tokens: Tokens
    alpha: Tensor | None  # scale of the patch tokens; prefix tokens are never scaled


def _group_ends(taken: list[int], depth: int) -> dict[int, int]:
    """For each block up to the last index taken, the index that closes its group."""
    ends: dict[int, int] = {}
    for i in range(depth):
        end = next((t for t in taken if t >= i), None)
        if end is not None:
            ends[i] = end
    return ends


def _standardise(tokens: Tokens, normalizer: InterFeatureNormalizer | None, index: int, rotation: int) -> _Scaled:
    if normalizer is None:
        return _Scaled(tokens, None)
    patches, alpha = normalizer(tokens.patches, index, rotation)
    return _Scaled(Tokens(tokens.prefix, patches), alpha)


def _mean(group: list[_Scaled], scheme: str) -> Tokens:
    """The mean over a group, scaled after (``post-alpha``) or before (``pre-alpha``) the sum."""
    prefix = _average([g.tokens.prefix for g in group])
    alphas = [g.alpha for g in group if g.alpha is not None]
    if not alphas:
        return Tokens(prefix, _average([g.tokens.patches for g in group]))
    if scheme == "pre-alpha":
        return Tokens(prefix, _average([a * g.tokens.patches for a, g in zip(alphas, group, strict=True)]))
    return Tokens(prefix, _average(alphas) * _average([g.tokens.patches for g in group]))


def _average(tensors: list[Tensor]) -> Tensor:
    if len(tensors) == 1:
        return tensors[0]
    total = tensors[0] + tensors[1]
    for t in tensors[2:]:
        total = total + t
    return torch.div(total, len(tensors))
