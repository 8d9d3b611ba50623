"""The published DINO and DINOv2 backbones: a table of frozen records.

Names, addresses and sizes are those of the ``hubconf.py`` of facebookresearch/dino and facebookresearch/dinov2. The
publishers announce no digests; the first download records them.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass

from amradio.models.configs import Resolution
from amradio.weights.catalog import License

_PUBLISHED = "https://dl.fbaipublicfiles.com"
_REPORTED_AT = Resolution(224, 224)

DINO_LICENSE = License(
    name="Apache License 2.0",
    short_name="Apache-2.0",
    url="https://github.com/facebookresearch/dino/blob/main/LICENSE",
    commercial=True,
)
DINO_V2_LICENSE = License(
    name="Apache License 2.0",
    short_name="Apache-2.0",
    url="https://github.com/facebookresearch/dinov2/blob/main/LICENSE",
    commercial=True,
)


@dataclass(frozen=True, kw_only=True)
class DinoEntry:
    """One published backbone.

    Attributes:
        name: As in the official hubconf.py.
        url: Its state dict.
        license: Terms of the weights.
        embed_dim: Width C.
        depth: Number of blocks.
        num_heads: Attention heads.
        patch_size: P, in pixels.
        grid: Rows and columns of the stored position grid.
        registers: Number of register tokens.
        layer_scale: Whether residual branches have a learned factor (DINOv2).
        swiglu: Whether the MLPs are SwiGLU.
        preferred_resolution: (height, width) in pixels at which the publishers report k-NN.
    """

    name: str
    url: str
    license: License
    embed_dim: int
    depth: int
    num_heads: int
    patch_size: int
    grid: int
    registers: int = 0
    layer_scale: bool = False
    swiglu: bool = False
    preferred_resolution: Resolution = _REPORTED_AT


_SIZES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "g": (1536, 40, 24)}


def _dino(size: str, patch: int, folder: str) -> DinoEntry:
    width, depth, heads = _SIZES[size]
    return DinoEntry(
        name=f"dino_vit{size}{patch}",
        url=f"{_PUBLISHED}/dino/{folder}/{folder}.pth",
        license=DINO_LICENSE,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        patch_size=patch,
        grid=224 // patch,
    )


def _dino_v2(size: str, registers: int) -> DinoEntry:
    width, depth, heads = _SIZES[size]
    base = f"dinov2_vit{size}14"
    return DinoEntry(
        name=f"{base}_reg" if registers else base,
        url=f"{_PUBLISHED}/dinov2/{base}/{base}{f'_reg{registers}' if registers else ''}_pretrain.pth",
        license=DINO_V2_LICENSE,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        patch_size=14,
        grid=518 // 14,
        registers=registers,
        layer_scale=True,
        swiglu=size == "g",
    )


_ENTRIES = (
    _dino("s", 16, "dino_deitsmall16_pretrain"),
    _dino("s", 8, "dino_deitsmall8_pretrain"),
    _dino("b", 16, "dino_vitbase16_pretrain"),
    _dino("b", 8, "dino_vitbase8_pretrain"),
    *(_dino_v2(size, registers) for registers in (0, 4) for size in _SIZES),
)

DINO_MODELS: Mapping[str, DinoEntry] = types.MappingProxyType({entry.name: entry for entry in _ENTRIES})
"""Every published DINO and DINOv2 backbone by its name."""
