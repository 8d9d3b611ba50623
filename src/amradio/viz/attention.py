"""Attention of class and register tokens, as maps that can be drawn."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from amradio.errors import OptionError


class TokenAttention(NamedTuple):
    """Where one token looks.

    Attributes:
        values: float32 [h, w]: its attention to each patch.
        share: Of its attention that goes to patches at all; the rest goes to other class and register tokens.
    """

    values: Tensor
    share: float


def token_attention(patches: Tensor, token: int, head: int | None = None) -> TokenAttention:
    """Take the attention of one token.

    Args:
        patches: [heads, P, h, w] attention of P prefix tokens to patches.
        token: Which of them, from 0.
        head: Of one head; None for the mean over all.

    Returns:
        The map.

    Raises:
        OptionError: There is no such token or head.
    """
    heads, count = patches.shape[:2]
    if not 0 <= token < count:
        raise OptionError(f"There is no prefix token {token}; the model has {count}, numbered from 0.")
    if head is not None and not 0 <= head < heads:
        raise OptionError(f"There is no head {head}; the block has {heads}, numbered from 0.")
    values = patches[:, token].mean(0) if head is None else patches[head, token]  # [h, w]
    return TokenAttention(values, float(values.sum()))


def token_name(token: int, num_cls_tokens: int) -> str:
    """What a prefix token is, for people: class tokens come first."""
    return f"class token {token}" if token < num_cls_tokens else f"register {token - num_cls_tokens}"
