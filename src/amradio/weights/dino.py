"""State dicts of the official DINO and DINOv2 code, as checkpoints of this package's own trunk.

The class token's row of the position embedding is added to the class token, which is what the official forward pass
does at every size. Everything else keeps its value.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amradio.errors import CheckpointError
from amradio.models.architectures import dino_swiglu_hidden
from amradio.models.configs import RadioConfig, Resolution, ViTConfig
from amradio.weights.checkpoint import Checkpoint, Identity
from amradio.weights.dino_catalog import DinoEntry
from amradio.weights.pickles import load_pickle
from amradio.weights.tensorfiles import is_safetensors, read_tensors

LAYOUT = "dino"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HEAD_WIDTH = 64
"""Channels of an attention head, in every published DINO and DINOv2 model; state dicts do not say."""

_OFFSET = 0.1
_TEACHER = "teacher"
_WRAPPERS = re.compile(r"^(?:module\.)?(?:backbone\.)?")
_CHUNK = re.compile(r"^blocks\.\d+\.(?=\d+\.)")  # official training code keeps blocks in chunks, with whole indices
_BLOCK = re.compile(r"^blocks\.(\d+)\.")
_UNUSED = ("mask_token",)  # needed for training only
_HEADS = ("head.", "dino_head.", "ibot_head.")  # projections that the training losses are computed on


def read_dino(path: Path) -> dict[str, Tensor]:
    """Read a state dict in the names of the official code.

    Args:
        path: A ``.pth`` file of the publishers, or safetensors with the same names. Of a training checkpoint the
            teacher is taken.

    Returns:
        The backbone's tensors by their official names.

    Raises:
        CheckpointError: The file is unsafe, damaged, or holds another kind of model.
    """
    payload: Any = read_tensors(path) if is_safetensors(path) else load_pickle(path)
    if isinstance(payload, Mapping) and isinstance(payload.get(_TEACHER), Mapping):
        payload = payload[_TEACHER]
    if not isinstance(payload, Mapping) or not all(isinstance(v, Tensor) for v in payload.values()):
        found = sorted(map(str, payload))[:8] if isinstance(payload, Mapping) else type(payload).__name__
        raise CheckpointError(f"{path} is no state dict of DINO or DINOv2: it holds {found}.")
    tensors = {_CHUNK.sub("blocks.", _WRAPPERS.sub("", k)): v for k, v in payload.items()}
    tensors = {k: v for k, v in tensors.items() if k not in _UNUSED and not k.startswith(_HEADS)}
    wanted = ("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "blocks.0.attn.qkv.weight")
    lost = [name for name in wanted if name not in tensors]
    if lost:
        raise CheckpointError(
            f"{path} is no state dict of DINO or DINOv2: it lacks {', '.join(lost)}. It has {sorted(tensors)[:8]}."
        )
    return tensors


def describe_entry(entry: DinoEntry) -> ViTConfig:
    """The trunk of a published model."""
    return _trunk(
        embed_dim=entry.embed_dim,
        depth=entry.depth,
        num_heads=entry.num_heads,
        patch_size=entry.patch_size,
        grid=(entry.grid, entry.grid),
        registers=entry.registers,
        layer_scale=entry.layer_scale,
        swiglu_dim=dino_swiglu_hidden(entry.embed_dim) if entry.swiglu else None,
    )


def describe_tensors(tensors: Mapping[str, Tensor], source: str) -> ViTConfig:
    """The trunk that a state dict of any size belongs to.

    Registers, layer scale and the kind of MLP are told by the names of the tensors. Heads have `HEAD_WIDTH` channels.

    Args:
        tensors: By their official names.
        source: Where they come from, for the message.

    Returns:
        The trunk's description.

    Raises:
        CheckpointError: The sizes contradict one another.
    """
    embedding, positions = tensors["patch_embed.proj.weight"], tensors["pos_embed"]
    if embedding.ndim != 4 or positions.ndim != 3:
        raise CheckpointError(
            f"{source} is damaged: patch_embed.proj.weight is {list(embedding.shape)} and pos_embed is "
            f"{list(positions.shape)}, where 4 and 3 dimensions are expected."
        )
    width, patch, rows = embedding.shape[0], embedding.shape[2], positions.shape[1] - 1
    side = math.isqrt(max(rows, 0))
    if side * side != rows or width % HEAD_WIDTH:
        raise CheckpointError(
            f"{source} has {rows} patch positions and a width of {width}: DINO and DINOv2 have a square position grid "
            f"and heads of {HEAD_WIDTH} channels."
        )
    registers = tensors["register_tokens"].shape[1] if "register_tokens" in tensors else 0
    gate = tensors.get("blocks.0.mlp.w12.weight")
    return _trunk(
        embed_dim=width,
        depth=1 + max(int(match[1]) for match in map(_BLOCK.match, tensors) if match),
        num_heads=width // HEAD_WIDTH,
        patch_size=patch,
        grid=(side, side),
        registers=registers,
        layer_scale="blocks.0.ls1.gamma" in tensors,
        swiglu_dim=None if gate is None else gate.shape[0] // 2,
    )


def _trunk(
    *,
    embed_dim: int,
    depth: int,
    num_heads: int,
    patch_size: int,
    grid: tuple[int, int],
    registers: int,
    layer_scale: bool,
    swiglu_dim: int | None,
) -> ViTConfig:
    return ViTConfig(
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        mlp_hidden_dim=swiglu_dim or 4 * embed_dim,
        patch_size=patch_size,
        mlp="gelu" if swiglu_dim is None else "swiglu",
        layer_scale=1.0 if layer_scale else None,
        final_norm=True,
        position="resize",
        position_grid=grid,
        position_offset=0.0 if registers else _OFFSET,
        position_antialias=registers > 0,
        num_registers=registers,
        patch_bias=True,
    )


def to_checkpoint(
    tensors: Mapping[str, Tensor],
    trunk: ViTConfig,
    identity: Identity,
    *,
    preferred_resolution: Resolution | None = None,
) -> Checkpoint:
    """A state dict in official names as a checkpoint of this package's own trunk.

    Args:
        tensors: By their official names.
        trunk: The trunk's description.
        identity: Where they come from.
        preferred_resolution: (height, width) in pixels.

    Returns:
        The checkpoint. Images are standardised with the statistics of ImageNet.
    """
    rest = dict(tensors)
    positions = rest.pop("pos_embed")  # [1, 1 + L, C]
    prefix = rest.pop("cls_token")[0] + positions[0, :1]  # [1, C]
    if "register_tokens" in rest:
        prefix = torch.cat([prefix, rest.pop("register_tokens")[0]])  # [1 + registers, C]
    native = {
        "input_conditioner.norm_mean": torch.tensor(IMAGENET_MEAN).view(3, 1, 1),
        "input_conditioner.norm_std": torch.tensor(IMAGENET_STD).view(3, 1, 1),
        "model.patch_generator.cls_token.token": prefix,
        "model.patch_generator.pos_embed": positions[:, 1:],
        "model.patch_generator.embedder.weight": rest.pop("patch_embed.proj.weight").flatten(1),  # [C, 3*P*P]
        "model.patch_generator.embedder.bias": rest.pop("patch_embed.proj.bias"),
    }
    native |= {f"model.{k}": v for k, v in rest.items()}
    config = RadioConfig(
        backbone=trunk,
        version=identity.version,
        preferred_resolution=preferred_resolution,
        supports_vitdet=False,
        dtype=str(positions.dtype).removeprefix("torch."),
    )
    return Checkpoint(config, native, identity)
