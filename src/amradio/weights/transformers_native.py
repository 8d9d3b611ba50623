"""The layout of the ``RadioModel`` that is part of the ``transformers`` library (since its version 5.13).

It is for plain C-RADIO backbones: cropped positions resized without aligned corners, no final norm, no adaptors, no
normalizers. Tensors come under two sets of names: those of the official Hugging Face layout, which ``save_pretrained``
writes by default, and those of the modules, with separate query, key and value.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amradio.errors import CheckpointError, LayoutError
from amradio.models.configs import RadioConfig, ViTConfig
from amradio.weights.checkpoint import Checkpoint, Identity, torch_dtype
from amradio.weights.fidelity import (
    heads_of,
    require_nothing_lost,
    require_plain,
    require_same,
    without_heads,
)
from amradio.weights.files import atomic_directory
from amradio.weights.synthesis import mlp_ratio_of
from amradio.weights.tensorfiles import (
    CONFIG,
    WEIGHTS,
    config_of,
    read_directory,
    read_json,
    to_json_text,
    write_tensors,
)

NAME = "transformers"
MODEL_TYPE = "radio"

_ROOT = "radio_model."
_SUMMARY_IDXS = "summary_idxs"
_DEFAULTS: Mapping[str, Any] = {  # of the library's config class
    "hidden_size": 1280,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "mlp_ratio": 4.0,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "use_swiglu_ffn": False,
    "qkv_bias": True,
    "layerscale_value": 1.0,
    "num_channels": 3,
    "patch_size": 16,
    "max_img_size": 2048,
    "num_cls_tokens": 3,
    "num_registers": 7,
    "video_temporal_patch_size": None,
    "summary_idxs": (0, 1),
    "dtype": "float32",
}
_FIXED = {"hidden_act": "gelu", "layer_norm_eps": 1e-6, "use_swiglu_ffn": False, "video_temporal_patch_size": None}
_EMBEDDINGS = {
    "embeddings.patch_projection.weight": "model.patch_generator.embedder.weight",
    "embeddings.position_embedding": "model.patch_generator.pos_embed",
    "embeddings.cls_register_token": "model.patch_generator.cls_token.token",
}
_LAYER = re.compile(r"^(?:encoder\.layer|model\.blocks)\.(\d+)\.(.+)$")
_QKV = re.compile(r"^attention\.([qkv])_proj\.(weight|bias)$")
_LAYER_SCALE = re.compile(r"^layer_scale([12])\.lambda1$")
_NATIVE_LAYER_SCALE = re.compile(r"\.ls([12])\.gamma$")


def matches(path: Path) -> bool:
    """Whether a path is a directory whose ``config.json`` is one of the library's own for this model."""
    if not path.is_dir():
        return False
    config = config_of(path)
    return config.get("model_type") == MODEL_TYPE and "args" not in config


def read(path: Path) -> Checkpoint:
    """Read a directory that ``transformers.RadioModel.save_pretrained`` wrote.

    Args:
        path: A directory of ``config.json`` and ``model.safetensors``, or shards with an index.

    Returns:
        The checkpoint; there are no adaptors.

    Raises:
        LayoutError: The directory is of another layout, or has parts that amradio does not know.
        CheckpointError: A file is missing or damaged.
    """
    if not matches(path):
        raise LayoutError(f"{path} is no directory of transformers' RadioModel: no {CONFIG} with model_type 'radio'.")
    config = read_json(path / CONFIG)
    return _parse(config, read_directory(path), str(path))


def write(checkpoint: Checkpoint, path: Path, *, backbone_only: bool = False) -> Path:
    """Write a directory that ``transformers.RadioModel.from_pretrained`` reads, for equal outputs.

    Tensors that no model reads are left out.

    Args:
        checkpoint: What to write.
        path: The directory; files in it are replaced once all new ones are complete.
        backbone_only: Leave out adaptors and normalizers, for which there is no place.

    Returns:
        The path.

    Raises:
        LayoutError: `path` is a file; the model is not a plain C-RADIO backbone; or it has parts without a place
            here, and not `backbone_only`.
    """
    if path.is_file():
        raise LayoutError(f"{path} is a file, but the {NAME} layout is a directory.")
    source = checkpoint.identity.source
    require_plain(checkpoint.config, source, NAME)
    if not backbone_only:
        require_nothing_lost(heads_of(checkpoint.config), source, NAME)
    checkpoint = without_heads(checkpoint)
    config, state = _config_json(checkpoint), _state(checkpoint)
    _require_same(checkpoint, _parse(config, state, str(path)).config)
    with atomic_directory(path) as part:
        write_tensors(state, part / WEIGHTS, {"format": "pt"})
        (part / CONFIG).write_text(to_json_text(config), encoding="utf-8")
    return path


# ---- reading ----


def _parse(config: Mapping[str, Any], state: Mapping[str, Tensor], source: str) -> Checkpoint:
    known = {k: config[k] if config.get(k) is not None else default for k, default in _DEFAULTS.items()}
    unlike = [f"{k}={known[k]!r}" for k, wanted in _FIXED.items() if known[k] != wanted]
    if unlike:
        raise LayoutError(f"{source} has {', '.join(unlike)}, which amradio has no model for.")
    wrong = [
        f"{k}={v!r}" for k, v in known.items() if isinstance(_DEFAULTS[k], int) and type(v) is not type(_DEFAULTS[k])
    ]
    if wrong:
        raise CheckpointError(f"The {CONFIG} of {source} has values of the wrong type: {', '.join(wrong)}.")
    tensors = _to_native(state, source)
    layer_scale = _without_identity_scales(tensors, known["layerscale_value"])
    grid = known["max_img_size"] // known["patch_size"]
    backbone = ViTConfig(
        embed_dim=known["hidden_size"],
        depth=known["num_hidden_layers"],
        num_heads=known["num_attention_heads"],
        mlp_hidden_dim=int(known["hidden_size"] * known["mlp_ratio"]),
        patch_size=known["patch_size"],
        in_chans=known["num_channels"],
        qkv_bias=known["qkv_bias"],
        layer_scale=layer_scale,
        position_grid=(grid, grid),
        num_cls_tokens=known["num_cls_tokens"],
        num_registers=known["num_registers"],
    )
    stored = state.get(_ROOT + _SUMMARY_IDXS, state.get(_SUMMARY_IDXS))
    indices = known["summary_idxs"] if stored is None else stored.tolist()
    dtype = str(config.get("dtype") or config.get("torch_dtype") or known["dtype"]).removeprefix("torch.")
    torch_dtype(dtype)
    described = RadioConfig(backbone=backbone, summary_idxs=tuple(indices), dtype=dtype)
    return Checkpoint(described, tensors, Identity(source=source, layout=NAME))


def _to_native(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        name = key.removeprefix(_ROOT)
        layer = _LAYER.match(name)
        if name == _SUMMARY_IDXS:
            continue
        if layer is None:
            tensors[_EMBEDDINGS.get(name, name)] = tensor
            continue
        inside = _LAYER_SCALE.sub(r"ls\1.gamma", layer[2]).replace("attention.o_proj.", "attn.proj.")
        split = _QKV.match(inside)
        if split:
            parts.setdefault(f"model.blocks.{layer[1]}.attn.qkv.{split[2]}", {})[split[1]] = tensor
        else:
            tensors[f"model.blocks.{layer[1]}.{inside}"] = tensor
    for name, found in parts.items():
        if set(found) != set("qkv"):
            raise CheckpointError(f"{source} has only {sorted(found)} of the three projections of {name}.")
        tensors[name] = torch.cat([found[k] for k in "qkv"])  # [3 * C, ...]
    return tensors


def _without_identity_scales(tensors: dict[str, Tensor], value: float) -> float | None:
    """Take out layer scales that are all ones, which the library has in models without layer scale.

    Returns:
        The initial layer scale of the model, None if it has none.
    """
    scales = [k for k in tensors if _NATIVE_LAYER_SCALE.search(k)]
    if all(bool((tensors[k] == 1).all()) for k in scales):
        for k in scales:
            del tensors[k]
        return None
    return value


# ---- writing ----


def _config_json(checkpoint: Checkpoint) -> dict[str, Any]:
    config = checkpoint.config
    b = config.backbone
    assert isinstance(b, ViTConfig)  # require_plain has seen to it
    condition = {k: checkpoint.tensors[f"input_conditioner.{k}"] for k in ("norm_mean", "norm_std")}
    return {
        "architectures": ["RadioModel"],
        "model_type": MODEL_TYPE,
        "hidden_size": b.embed_dim,
        "num_hidden_layers": b.depth,
        "num_attention_heads": b.num_heads,
        "mlp_ratio": mlp_ratio_of(b.mlp_hidden_dim, b.embed_dim),
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "use_swiglu_ffn": False,
        "qkv_bias": b.qkv_bias,
        "layerscale_value": 1.0 if b.layer_scale is None else b.layer_scale,
        "num_channels": b.in_chans,
        "patch_size": b.patch_size,
        "max_img_size": b.position_grid[0] * b.patch_size,
        "num_cls_tokens": b.num_cls_tokens,
        "num_registers": b.num_registers,
        "summary_idxs": list(config.summary_idxs),
        **{k: v.float().flatten().tolist() for k, v in condition.items()},
        "dtype": config.dtype,
    }


def _state(checkpoint: Checkpoint) -> dict[str, Tensor]:
    state = {_ROOT + _SUMMARY_IDXS: torch.tensor(checkpoint.config.summary_idxs, dtype=torch.int64)}
    for name, tensor in checkpoint.tensors.items():
        if name != "model.reg_token":
            state[_ROOT + _NATIVE_LAYER_SCALE.sub(r".layer_scale\1.lambda1", name)] = tensor
    return state


def _require_same(checkpoint: Checkpoint, after: RadioConfig) -> None:
    """Compare without teacher records and unread register rows, which change no number."""
    b = checkpoint.config.backbone
    assert isinstance(b, ViTConfig)  # require_plain has seen to it
    read_only = dataclasses.replace(b, unused_reg_tokens=0)
    trimmed = dataclasses.replace(checkpoint.config, backbone=read_only, teachers=())
    indices = checkpoint.config.summary_idxs
    if max(indices) >= b.num_cls_tokens:
        raise LayoutError(
            f"The {NAME} layout cannot hold {checkpoint.identity.source}: its summary reads tokens {list(indices)}, "
            f"but transformers' RadioModel reads only the {b.num_cls_tokens} class tokens."
        )
    require_same(dataclasses.replace(checkpoint, config=trimmed), after, NAME)
