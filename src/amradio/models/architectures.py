"""The published network names and what they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from amradio.errors import ConfigError, nearest_names
from amradio.models.configs import ViTConfig


def _vit(patch: int, dim: int, depth: int, heads: int, **extra: Any) -> dict[str, Any]:
    return {"patch_size": patch, "embed_dim": dim, "depth": depth, "num_heads": heads, **extra}


_V2: dict[str, Any] = {"init_values": 1e-5, "reg_tokens": 4, "img_size": 592}

VIT_ARCHITECTURES: Mapping[str, Mapping[str, Any]] = {
    "vit_tiny_patch14_224": _vit(14, 192, 12, 3),
    "vit_tiny_patch16_224": _vit(16, 192, 12, 3),
    "vit_small_patch14_224": _vit(14, 384, 12, 6),
    "vit_small_patch16_224": _vit(16, 384, 12, 6),
    "vit_base_patch14_224": _vit(14, 768, 12, 12),
    "vit_base_patch16_224": _vit(16, 768, 12, 12),
    "vit_base_patch16_v2_224": _vit(16, 768, 12, 12, **_V2),
    "vit_large_patch14_224": _vit(14, 1024, 24, 16),
    "vit_large_patch16_224": _vit(16, 1024, 24, 16),
    "vit_large_patch16_v2_224": _vit(16, 1024, 24, 16, **_V2),
    "vit_large_dyt_patch16_224": _vit(16, 1024, 24, 16, norm="dyt"),
    "vit_so400m_patch16_224": _vit(16, 1152, 27, 16, mlp_ratio=4304 / 1152),
    "vit_so400m_v2_patch16_224": _vit(16, 1152, 27, 16, mlp_ratio=4320 / 1152),
    "vit_huge_patch14_224": _vit(14, 1280, 32, 16),
    "vit_huge_patch16_224": _vit(16, 1280, 32, 16),
    "vit_huge_patch16_224_mlpnorm": _vit(16, 1280, 32, 16, mlp_norm=True),
    "vit_giant_patch16_224": _vit(16, 1536, 40, 24),
    "vit_bigG_patch14_224": _vit(14, 1664, 48, 16, init_values=1e-6),
}
"""Constructor arguments of the vision transformers, in timm's terms; a checkpoint's ``model_kwargs`` override them."""

DINO_STUDENTS: Mapping[str, Mapping[str, Any]] = {
    "dino_v2_l_student": _vit(14, 1024, 24, 16, mlp="gelu"),
    "dino_v2_g_student": _vit(14, 1536, 40, 24, mlp="swiglu"),
}
"""DINOv2 with registers: final norm always on, layer scale, patch bias, one class token and four registers."""

RESEARCH_ONLY = ("radio1d_", "hybrid_", "paligemma_")
"""Prefixes of names that official research code registers; no weights were ever released for them."""


def vit_arguments(name: str, model_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments of a named vision transformer, with a checkpoint's overrides applied.

    Args:
        name: The official ``args.model``.
        model_kwargs: The official ``args.model_kwargs``.

    Returns:
        Arguments in timm's terms: ``embed_dim``, ``depth``, ``num_heads``, ``patch_size``, ``mlp_ratio``, ``img_size``
        and so on.

    Raises:
        ConfigError: The name is unknown, or an override is not understood.
    """
    table = {**VIT_ARCHITECTURES, **DINO_STUDENTS}
    if name not in table:
        if name.startswith(RESEARCH_ONLY):
            raise ConfigError(
                f"The architecture {name!r} is research code without released weights; it is not supported."
            )
        raise ConfigError(f"Unknown architecture {name!r}. {nearest_names(name, table)}")
    known: dict[str, Any] = {
        "img_size": 224,
        "mlp_ratio": 4.0,
        "init_values": None,
        "reg_tokens": 0,
        "class_token": True,
    }
    known |= {
        "no_embed_class": False,
        "global_pool": "token",
        "scaled_ln": False,
        "qkv_bias": True,
        "norm": "layernorm",
    }
    known |= {"mlp_norm": False, "mlp": "gelu"}
    arguments = {**known, **table[name]}
    overrides = {k: v for k, v in model_kwargs.items() if k not in ("weight_init", "num_classes")}
    unknown = sorted(set(overrides) - set(arguments))
    if unknown:
        raise ConfigError(
            f"The checkpoint's model_kwargs for {name!r} have entries that amradio does not understand: {unknown}. "
            f"Understood are {sorted(arguments)}."
        )
    return arguments | overrides


def dino_swiglu_hidden(embed_dim: int) -> int:
    """Hidden width of DINOv2's SwiGLU: two thirds of four times the width, rounded up to a multiple of 8."""
    return (int(int(embed_dim * 4) * 2 / 3) + 7) // 8 * 8


def build_vit_config(arguments: Mapping[str, Any], **overrides: Any) -> ViTConfig:
    """Turn timm-style constructor arguments into a `ViTConfig` without prefix and position rules.

    Args:
        arguments: What `vit_arguments` gave.
        **overrides: Fields of `ViTConfig` that take precedence.

    Returns:
        The config.
    """
    c = arguments["embed_dim"]
    swiglu = arguments["mlp"] == "swiglu"
    fields: dict[str, Any] = {
        "embed_dim": c,
        "depth": arguments["depth"],
        "num_heads": arguments["num_heads"],
        "mlp_hidden_dim": dino_swiglu_hidden(c) if swiglu else int(c * arguments["mlp_ratio"]),
        "patch_size": arguments["patch_size"],
        "mlp": arguments["mlp"],
        "mlp_norm": arguments["mlp_norm"],
        "qkv_bias": arguments["qkv_bias"],
        "norm": arguments["norm"],
        "scaled_norm": bool(arguments["scaled_ln"]),
        "layer_scale": arguments["init_values"],
    }
    return ViTConfig(**(fields | overrides))
