"""Attention that goes through transformers' table of implementations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from amradio.models.vit import Attention, attend

SDPA = "sdpa"
_FLASH = "flash"  # part of the names of all its versions and kernels


class AttentionCore(nn.Module):
    """From queries, keys and values to their mean, by the implementation that a config names.

    It has no parameters. As a module of its own, whose output has the weights in it, it is what transformers records
    attention weights from.

    Args:
        config: The model's config; its present ``attn_implementation`` counts.
    """

    is_causal = False

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        """Attend with [B, H, N, C/H] each: [B, N, H, C/H], and the weights [B, H, N, N] if they are computed at all.

        Flash attention has no float32, in which heads of adaptors are by default: these attend by sdpa.
        """
        name = self.config._attn_implementation
        if name in (SDPA, None) or (_FLASH in name and q.dtype == torch.float32):
            return attend(q, k, v), None  # what the model does without transformers
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        compute = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention)
        y, weights = compute(self, q, k, v, None, dropout=0.0, scaling=q.shape[-1] ** -0.5, is_causal=False)
        return y, weights


def eager_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float, **_: Any
) -> tuple[Tensor, Tensor]:
    """Attention step by step, in the signature of transformers' implementations.

    Args:
        module: Not used.
        query: [B, H, N, C/H].
        key: [B, H, N, C/H].
        value: [B, H, N, C/H].
        attention_mask: Not used; images have no padding.
        scaling: Factor of the logits.
        _: Not used.

    Returns:
        The mean of the values [B, N, H, C/H], and the weights [B, H, N, N].
    """
    weights = (query @ key.transpose(-2, -1) * scaling).softmax(-1)  # [B, H, N, N]
    return (weights @ value).transpose(1, 2), weights  # [B, N, H, C/H]


class DispatchedAttention(Attention):
    """The attention of a block, with the same parameters under the same names.

    Args:
        of: The attention to replace; its layers are taken over.
        config: The model's config.
    """

    def __init__(self, of: Attention, config: Any) -> None:
        nn.Module.__init__(self)
        self.num_heads, self.qkv, self.proj = of.num_heads, of.qkv, of.proj
        self.core = AttentionCore(config)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As in the base class, by the implementation that the config names."""
        y: Tensor = self.core(q, k, v)[0]
        return y


def dispatch_attention(model: nn.Module, config: Any) -> None:
    """Let every transformer block of a model attend by the implementation that a config names.

    Args:
        model: Changed in place; names and values of its parameters stay.
        config: The model's config.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is Attention:
                setattr(module, name, DispatchedAttention(child, config))
