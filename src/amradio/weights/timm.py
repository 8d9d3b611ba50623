"""The layout of timm's C-RADIO backbones (timm 1.0.31): safetensors with its ViT names, and perhaps ``config.json``.

timm keeps the trunk alone. Of the prefix tokens it calls the first one class token and all others registers; summary
tokens, the input conditioner and adaptors are dropped. Its ``vit_*`` classes resample the position grid to one size
when they load, and save that; its ``naflexvit_*`` classes keep the grid and compute what RADIO computes at every size.
We write the names of the former with the whole grid, which both load.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amradio.errors import CheckpointError, LayoutError
from amradio.models.configs import PositionInterpolation, RadioConfig, ViTConfig
from amradio.models.normalizers import CLIP_MEAN, CLIP_STD
from amradio.weights.checkpoint import Checkpoint, Identity
from amradio.weights.fidelity import differences, heads_of, require_nothing_lost, require_plain, without_heads
from amradio.weights.files import atomic_directory
from amradio.weights.synthesis import mlp_ratio_of
from amradio.weights.tensorfiles import (
    CONFIG,
    WEIGHTS,
    config_of,
    is_safetensors,
    read_directory,
    read_header,
    read_json,
    read_tensors,
    to_json_text,
    write_tensors,
)

NAME = "timm"

_METADATA = "timm"
_EMBED = "patch_embed.proj.weight"
_NAFLEX_EMBED = "embeds.proj.weight"
_BLOCK = re.compile(r"^blocks\.(\d+)\.")
_LAYER_SCALE_INIT = 1e-5
_PUBLISHED_GRID = 128


@dataclass(frozen=True)
class _Architecture:
    """A C-RADIO architecture of timm, with what its own layout drops: the meaning of the prefix tokens."""

    embed_dim: int
    depth: int
    num_heads: int
    num_cls_tokens: int
    num_registers: int
    summary_idxs: tuple[int, ...]
    mlp_hidden_dim: int
    layer_scale: bool = False
    align_corners: bool = False

    @property
    def interpolation(self) -> PositionInterpolation:
        return "align_corners" if self.align_corners else "half_pixel"


_V3: Mapping[str, Any] = {"num_cls_tokens": 4, "num_registers": 4, "summary_idxs": (0, 1, 2)}
_V4: Mapping[str, Any] = {"num_cls_tokens": 3, "num_registers": 7, "summary_idxs": (0, 1)}
_ARCHITECTURES: Mapping[str, _Architecture] = {
    "base_patch16_radio_v3": _Architecture(
        768, 12, 12, mlp_hidden_dim=3072, layer_scale=True, align_corners=True, **_V3
    ),
    "large_patch16_radio_v3": _Architecture(1024, 24, 16, mlp_hidden_dim=4096, layer_scale=True, **_V3),
    "huge_patch16_radio_v3": _Architecture(1280, 32, 16, mlp_hidden_dim=5120, align_corners=True, **_V3),
    "giant_patch16_radio_v3": _Architecture(1536, 40, 24, mlp_hidden_dim=6144, **_V3),
    "so400m_patch16_radio_v4": _Architecture(1152, 27, 16, mlp_hidden_dim=4304, **_V4),
    "huge_patch16_radio_v4": _Architecture(1280, 32, 16, mlp_hidden_dim=5120, **_V4),
}
_NAFLEX = "naflexvit_"
_FALLBACK = "large_patch16_radio_v3"  # any architecture does when all its sizes are overridden


def matches(path: Path) -> bool:
    """Whether a path is a C-RADIO model of timm's, by the names in its header or config."""
    if path.is_dir():
        return "_radio_" in str(config_of(path).get("architecture", ""))
    try:
        header = read_header(path) if is_safetensors(path) else None
    except CheckpointError:
        return False
    return header is not None and (_METADATA in header.metadata or _has_timm_names(header.shapes))


def read(path: Path) -> Checkpoint:
    """Read a C-RADIO backbone of timm's.

    What timm drops is filled in as timm's users do: the conditioner holds the constants of the model's config, or
    OpenAI CLIP's, which all of them have; summary tokens are those of the published architecture, or the first token
    alone for sizes that are none. A grid that a ``vit_*`` class has resampled allows only images of that size.

    Args:
        path: A ``.safetensors`` file, or a directory of ``config.json`` and ``model.safetensors``.

    Returns:
        The checkpoint, with the position interpolation that timm uses for the architecture.

    Raises:
        LayoutError: It is no C-RADIO model of timm's, or its heads cannot be known.
        CheckpointError: A file is missing, damaged or inconsistent.
    """
    if path.is_dir():
        return _parse(read_json(path / CONFIG), read_directory(path), str(path))
    metadata = read_header(path).metadata
    return _parse(_config_in(metadata, path), read_tensors(path), str(path))


def write(checkpoint: Checkpoint, path: Path, *, backbone_only: bool = False) -> Path:
    """Write a backbone for timm.

    Tensors that no model reads are left out.

    Args:
        checkpoint: What to write.
        path: With the suffix ``.safetensors`` a file, for ``timm.create_model(NAME, pretrained=True,
            pretrained_cfg_overlay={"file": path})``; otherwise a directory, for
            ``timm.create_model("local-dir:" + path, pretrained=True)``. The directory also holds what timm keeps in a
            model's config: sizes, position interpolation and conditioner constants.
        backbone_only: Leave out what timm has no place for.

    Returns:
        The path.

    Raises:
        LayoutError: The model is not a plain C-RADIO backbone, or has parts without a place here, and not
            `backbone_only`.
    """
    source = checkpoint.identity.source
    require_plain(checkpoint.config, source, NAME)
    as_file = path.suffix == ".safetensors"
    if path.exists() and path.is_dir() == as_file:
        raise LayoutError(f"{path} exists and is {'a directory' if as_file else 'a file'}; name another target.")
    backbone = without_heads(checkpoint)
    state, config = _state(backbone), _config_json(backbone)
    if as_file:  # timm reads no config from a file, so what only a config says must count as lost
        del config["pretrained_cfg"], config["model_args"]["pos_embed_align_corners"]
    if not backbone_only:
        lost = heads_of(checkpoint.config) + _lost(backbone, _parse(config, state, str(path)))
        require_nothing_lost(lost, source, NAME)
    if as_file:
        write_tensors(state, path, {"format": "pt", _METADATA: json.dumps(config)})
        return path
    with atomic_directory(path) as part:
        write_tensors(state, part / WEIGHTS, {"format": "pt"})
        (part / CONFIG).write_text(to_json_text(config), encoding="utf-8")
    return path


# ---- reading ----


def _has_timm_names(names: Mapping[str, Any]) -> bool:
    """Whether tensor names are those of a C-RADIO trunk in timm: registers, and neither final norm nor classifier."""
    embedding = (_EMBED in names and "reg_token" in names) or (_NAFLEX_EMBED in names and "embeds.reg_token" in names)
    return embedding and "norm.weight" not in names and "head.weight" not in names


def _config_in(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    try:
        config = json.loads(metadata.get(_METADATA, "{}"))
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise LayoutError(f"{path} has damaged metadata under {_METADATA!r}: {metadata[_METADATA][:80]!r}.")
    return config


def _parse(config: Mapping[str, Any], state: Mapping[str, Tensor], source: str) -> Checkpoint:
    state = _classic(state)
    missing = [name for name in (_EMBED, "pos_embed", "cls_token", "blocks.0.attn.qkv.weight") if name not in state]
    if missing:
        raise LayoutError(f"{source} is no C-RADIO model of timm: it lacks {', '.join(missing)}.")
    name = str(config.get("architecture", "")).split(".")[0]
    arguments = dict(config.get("model_args") or {})
    tensors = _to_native(state)
    grid = _square_grid(state["pos_embed"].shape[1], source)
    width, chans, patch, _ = state[_EMBED].shape
    layers = {int(m[1]) for m in map(_BLOCK.match, state) if m}
    has_scale = "blocks.0.ls1.gamma" in state
    hidden = state["blocks.0.mlp.fc1.weight"].shape[0] if "blocks.0.mlp.fc1.weight" in state else 4 * width
    prefix = tensors["model.patch_generator.cls_token.token"].shape[0]
    known = _architecture(name, width, max(layers) + 1, hidden, has_scale, prefix)
    num_heads = arguments.get("num_heads") or (known and known.num_heads)
    if not num_heads:
        raise LayoutError(
            f"{source} does not say how many attention heads its model of width {width} and depth {len(layers)} has: "
            f"no architecture of timm's C-RADIO models fits. Pass the directory with its {CONFIG}."
        )
    # Resampled grids come from vit_* classes, which crop nothing and take one size only.
    whole = name.startswith(_NAFLEX) or grid >= _PUBLISHED_GRID
    backbone = ViTConfig(
        embed_dim=width,
        depth=max(layers) + 1,
        num_heads=num_heads,
        mlp_hidden_dim=hidden,
        patch_size=patch,
        in_chans=chans,
        qkv_bias="blocks.0.attn.qkv.bias" in state,
        layer_scale=arguments.get("init_values") or _LAYER_SCALE_INIT if has_scale else None,
        position="cpe" if whole else "fixed",
        position_grid=(grid, grid),
        num_cls_tokens=known.num_cls_tokens if known else 1,
        num_registers=known.num_registers if known else prefix - 1,
        patch_bias="model.patch_generator.embedder.bias" in tensors,
    )
    stated = arguments.get("pos_embed_align_corners")
    # An architecture's name settles this for other sizes, too: timm saves no more of it when sizes are overridden.
    meant = known or _ARCHITECTURES.get(_plain_name(name))
    interpolation: PositionInterpolation = meant.interpolation if meant else "half_pixel"
    if stated is not None:
        interpolation = "align_corners" if stated else "half_pixel"
    described = RadioConfig(
        backbone=backbone,
        summary_idxs=known.summary_idxs if known else (0,),
        position_interpolation=interpolation,
    )
    return Checkpoint(described, tensors | _conditioner(config), Identity(source=source, layout=NAME))


def _architecture(name: str, width: int, depth: int, hidden: int, has_scale: bool, prefix: int) -> _Architecture | None:
    """The published architecture that a model is: the named one if its sizes fit, or else the only one that does."""
    fitting = {
        key: a
        for key, a in _ARCHITECTURES.items()
        if (a.embed_dim, a.depth, a.mlp_hidden_dim, a.layer_scale) == (width, depth, hidden, has_scale)
        and a.num_cls_tokens + a.num_registers == prefix
    }
    return fitting.get(_plain_name(name)) or next(iter(fitting.values()), None)


def _plain_name(name: str) -> str:
    """The name of an architecture without the class of timm's that implements it."""
    return name.removeprefix(_NAFLEX).removeprefix("vit_")


def _square_grid(count: int, source: str) -> int:
    grid = math.isqrt(count)
    if grid * grid != count:
        raise LayoutError(
            f"{source} has {count} position embeddings, which make no square grid; C-RADIO models have no position for "
            f"prefix tokens."
        )
    return grid


def _classic(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by the names and in the shapes of timm's ``vit_*`` classes."""
    if _NAFLEX_EMBED not in state:
        return dict(state)
    classic = {k: v for k, v in state.items() if not k.startswith("embeds.")}
    for key, tensor in state.items():
        if key == _NAFLEX_EMBED:
            side = math.isqrt(tensor.shape[1] // 3)
            classic[_EMBED] = tensor.unflatten(1, (side, side, -1)).permute(0, 3, 1, 2)  # [C, chans, P, P]
        elif key == "embeds.proj.bias":
            classic["patch_embed.proj.bias"] = tensor
        elif key == "embeds.pos_embed":
            classic["pos_embed"] = tensor.flatten(1, 2) if tensor.ndim == 4 else tensor  # [1, rows*cols, C]
        elif key.startswith("embeds."):
            classic[key.removeprefix("embeds.")] = tensor
    return classic


def _to_native(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if key in ("cls_token", "reg_token"):
            continue
        if key == "patch_embed.proj.bias":
            if bool(tensor.any()):  # timm's embedding always has a bias, RADIO's none
                tensors["model.patch_generator.embedder.bias"] = tensor
        elif key == _EMBED:
            tensors["model.patch_generator.embedder.weight"] = tensor.flatten(1)  # [C, chans*P*P]
        elif key == "pos_embed":
            tensors["model.patch_generator.pos_embed"] = tensor
        else:
            tensors[f"model.{key}"] = tensor
    tokens = [state[k][0] for k in ("cls_token", "reg_token") if k in state]  # each [tokens, C]
    tensors["model.patch_generator.cls_token.token"] = torch.cat(tokens)
    return tensors


def _conditioner(config: Mapping[str, Any]) -> dict[str, Tensor]:
    stated = config.get("pretrained_cfg") or config
    constants = {"norm_mean": stated.get("mean") or CLIP_MEAN, "norm_std": stated.get("std") or CLIP_STD}
    return {f"input_conditioner.{k}": torch.tensor(v).view(-1, 1, 1) for k, v in constants.items()}  # [3, 1, 1]


# ---- writing ----


def _state(checkpoint: Checkpoint) -> dict[str, Tensor]:
    b = checkpoint.config.backbone
    assert isinstance(b, ViTConfig)  # require_plain has seen to it
    state: dict[str, Tensor] = {}
    for name, tensor in checkpoint.tensors.items():
        if not name.startswith("model.") or name == "model.reg_token":
            continue
        key = name[len("model.") :]
        if key == "patch_generator.embedder.weight":
            state[_EMBED] = tensor.unflatten(1, (b.in_chans, b.patch_size, b.patch_size))  # [C, chans, P, P]
            state["patch_embed.proj.bias"] = tensor.new_zeros(b.embed_dim)
        elif key == "patch_generator.pos_embed":
            state["pos_embed"] = tensor
        elif key == "patch_generator.cls_token.token":
            state["cls_token"] = tensor[None, :1].clone()  # [1, 1, C]
            if len(tensor) > 1:
                state["reg_token"] = tensor[None, 1:].clone()  # [1, tokens - 1, C]
        else:
            state[key] = tensor
    return state


def _config_json(checkpoint: Checkpoint) -> dict[str, Any]:
    """What timm needs to know to build the model again, as in its own ``config.json``."""
    config = checkpoint.config
    b = config.backbone
    assert isinstance(b, ViTConfig)  # require_plain has seen to it
    wanted = (b.embed_dim, b.depth, b.num_heads, b.mlp_hidden_dim, b.layer_scale is not None)
    tokens = (b.num_cls_tokens, b.num_registers, config.summary_idxs)
    name = next(
        (
            key
            for key, a in _ARCHITECTURES.items()
            if (a.embed_dim, a.depth, a.num_heads, a.mlp_hidden_dim, a.layer_scale) == wanted
            and (a.num_cls_tokens, a.num_registers, a.summary_idxs) == tokens
        ),
        _FALLBACK,
    )
    mean, std = (
        checkpoint.tensors[f"input_conditioner.{k}"].float().flatten().tolist() for k in ("norm_mean", "norm_std")
    )
    side = (config.preferred_resolution or (512, 512))[0]
    return {
        "architecture": f"{_NAFLEX}{name}",
        "num_classes": 0,
        "num_features": b.embed_dim,
        "global_pool": "token",
        "model_args": {
            "patch_size": b.patch_size,
            "embed_dim": b.embed_dim,
            "depth": b.depth,
            "num_heads": b.num_heads,
            "mlp_ratio": mlp_ratio_of(b.mlp_hidden_dim, b.embed_dim),
            "qkv_bias": b.qkv_bias,
            "init_values": b.layer_scale,
            "reg_tokens": b.num_prefix_tokens - 1,
            "pos_embed_grid_size": list(b.position_grid),
            "pos_embed_align_corners": config.position_interpolation == "align_corners",
        },
        "pretrained_cfg": {
            "input_size": [b.in_chans, side, side],
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": mean,
            "std": std,
            "num_classes": 0,
            "first_conv": "embeds.proj",
            "classifier": "head",
            "license": checkpoint.identity.license,
        },
    }


def _lost(before: Checkpoint, after: Checkpoint) -> list[str]:
    """What timm cannot give back of a backbone, as phrases."""
    b = before.config.backbone
    assert isinstance(b, ViTConfig)  # require_plain has seen to it
    trimmed = dataclasses.replace(
        before.config, backbone=dataclasses.replace(b, unused_reg_tokens=0), teachers=(), patch_size=None
    )
    lost = differences(trimmed, after.config)
    for k in ("norm_mean", "norm_std"):
        mine, given = (c.tensors[f"input_conditioner.{k}"].float().flatten().tolist() for c in (before, after))
        if mine != given:
            lost.append(f"the conditioner's {k} is {mine}, read back as {given}")
    return lost
