"""Training arguments for models that have none, so that layouts built around such arguments can hold them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from amradio.models.architectures import DINO_STUDENTS, VIT_ARCHITECTURES, vit_arguments
from amradio.models.configs import ERadioConfig, RadioConfig, ViTConfig, to_json
from amradio.models.eradio import ERADIO_VARIANTS
from amradio.weights.args import folded_args

_UNSET_ARGS = (
    *("in_chans", "input_size", "num_classes", "drop_path", "drop_block", "gp", "bn_momentum", "bn_eps"),
    *("cpe_max_size", "register_multiple", "cpe_num_registers"),
)


def args_from_config(config: RadioConfig) -> dict[str, Any]:
    """Training arguments that describe a model.

    Not every description has arguments that say it; compare what they give back.

    Args:
        config: The model's description.

    Returns:
        Arguments with every entry that the official code reads.
    """
    b = config.backbone
    versions = {
        "mlp_version": _most_common([a.summary.version for a in config.adaptors.values()]),
        "spatial_mlp_version": _most_common([a.features.version for a in config.adaptors.values()]),
    }
    teachers = _teacher_records(config, versions)
    names = {t["name"] for t in teachers}
    args: dict[str, Any] = dict.fromkeys(_UNSET_ARGS)
    args |= {
        "pretrained": False,
        "torchscript": False,
        "initial_checkpoint": "",
        "drop": 0.0,
        "teachers": teachers,
        "dtype": config.dtype,
        **versions,
        "cls_token_per_teacher": False,
        "model_norm": False,
    }
    if isinstance(b, ERadioConfig):
        args["model"], args["model_kwargs"] = _eradio_arguments(b)
        return folded_args(args)
    args["model"], args["model_kwargs"] = _vit_arguments(b)
    args["in_chans"] = b.in_chans
    if b.position != "fixed":
        args["cpe_max_size"] = b.position_grid[0] * b.patch_size
        args["cpe_num_registers"] = b.num_registers or None
    if args["model"] not in DINO_STUDENTS:
        args["gp"] = "avg" if b.pool == "avg" else None
        args["model_norm"] = b.final_norm
        args["cls_token_per_teacher"] = b.position != "fixed" and max(len(names), 1) == b.num_cls_tokens
    return folded_args(args)


def _teacher_records(config: RadioConfig, versions: Mapping[str, str]) -> list[dict[str, Any]]:
    """One record a teacher: the published ones, or ones that name the class tokens and adaptors that there are.

    Each record says of its adaptor what differs from the defaults: token, upsampling, head versions.
    """
    records = [dict(t) for t in config.teachers] or _made_up_records(config)
    tokens = config.backbone.num_cls_tokens if isinstance(config.backbone, ViTConfig) else 1
    for i, record in enumerate(records):
        adaptor = config.adaptors.get(record["name"])
        if adaptor is None:
            continue
        slot = i if tokens > 1 else 0
        defaults = {"token_slot": slot, "fd_upsample_factor": 1, **versions}
        wanted = {
            "token_slot": adaptor.head_idx,
            "fd_upsample_factor": adaptor.features.upsample_factor,
            "mlp_version": adaptor.summary.version,
            "spatial_mlp_version": adaptor.features.version,
        }
        record |= {k: v for k, v in wanted.items() if (record.get(k) or defaults[k]) != v}
    return records


def _made_up_records(config: RadioConfig) -> list[dict[str, Any]]:
    tokens = config.backbone.num_cls_tokens if isinstance(config.backbone, ViTConfig) else 1
    slots: dict[int, str] = {}
    for name, adaptor in config.adaptors.items():
        slots.setdefault(adaptor.head_idx, name)
    names = [slots.get(i, f"token_{i}") for i in range(tokens)] if tokens > 1 else []
    names += [name for name in config.adaptors if name not in names]
    records: list[dict[str, Any]] = [{"name": name, "type": "generic"} for name in names or ["token_0"]]
    for i, record in enumerate(records):
        if tokens > 1 and i not in config.summary_idxs:
            record["use_summary"] = False
    return records


def _most_common(versions: Sequence[str]) -> str:
    return max(versions, key=versions.count) if versions else "v2"


def _eradio_arguments(b: ERadioConfig) -> tuple[str, dict[str, Any]]:
    """The variant that needs the fewest overrides, and those."""
    wanted = to_json(b)
    published = {name: to_json(variant) for name, variant in ERADIO_VARIANTS.items()}
    overrides = {
        name: {k: v for k, v in wanted.items() if k != "kind" and v != known[k]} for name, known in published.items()
    }
    name = min(overrides, key=lambda n: len(overrides[n]))
    return name, {"return_full_features": True, **overrides[name]}


def _vit_arguments(b: ViTConfig) -> tuple[str, dict[str, Any]]:
    """The architecture that needs the fewest overrides, and those."""
    cpe = b.position != "fixed"
    wanted: dict[str, Any] = {
        "embed_dim": b.embed_dim,
        "depth": b.depth,
        "num_heads": b.num_heads,
        "patch_size": b.patch_size,
        "mlp_ratio": mlp_ratio_of(b.mlp_hidden_dim, b.embed_dim),
        "init_values": b.layer_scale,
        "scaled_ln": b.scaled_norm,
        "qkv_bias": b.qkv_bias,
        "class_token": b.num_cls_tokens > 0,
        "reg_tokens": b.unused_reg_tokens if cpe else b.num_registers,
    }
    if not cpe:
        height, width = (side * b.patch_size for side in b.position_grid)
        wanted["img_size"] = height if height == width else [height, width]
        wanted["no_embed_class"] = not b.position_of_prefix
    elif b.position == "window":
        wanted["img_size"] = b.position_grid[0] * b.patch_size
    if cpe and b.patch_bias:
        return _dino_arguments(b)
    best: tuple[str, dict[str, Any]] | None = None
    for name in _names_for(b):
        known = vit_arguments(name, {})
        overrides = {k: v for k, v in wanted.items() if v != known[k]}
        if int(b.embed_dim * known["mlp_ratio"]) == b.mlp_hidden_dim:
            overrides.pop("mlp_ratio", None)
        if b.position == "cpe" and b.position_grid[0] * b.patch_size == known["img_size"]:
            overrides["img_size"] = known["img_size"] + b.patch_size  # equal sizes would mean "window"
        if best is None or len(overrides) < len(best[1]):
            best = name, overrides
    assert best is not None  # _names_for is never empty
    return best


def _names_for(b: ViTConfig) -> list[str]:
    """Architectures whose fixed properties, which no override reaches, are those wanted."""
    if b.scaled_norm:
        return ["vit_giant_patch16_224"]  # the only one of the official ones with the option
    known = {name: vit_arguments(name, {}) for name in VIT_ARCHITECTURES}
    fitting = [n for n, a in known.items() if a["mlp_norm"] == b.mlp_norm and a["norm"] == b.norm]
    return fitting or ["vit_base_patch16_224"]


def _dino_arguments(b: ViTConfig) -> tuple[str, dict[str, Any]]:
    """A trunk with cropped positions and a patch bias can only be a DINOv2 student."""
    name = next(n for n, a in DINO_STUDENTS.items() if a["mlp"] == b.mlp)
    known = vit_arguments(name, {})
    wanted: dict[str, Any] = {
        "embed_dim": b.embed_dim,
        "depth": b.depth,
        "num_heads": b.num_heads,
        "patch_size": b.patch_size,
    }
    if b.layer_scale != 1e-5:
        wanted["init_values"] = b.layer_scale
    if b.mlp == "gelu" and int(b.embed_dim * known["mlp_ratio"]) != b.mlp_hidden_dim:
        wanted["mlp_ratio"] = mlp_ratio_of(b.mlp_hidden_dim, b.embed_dim)
    overrides = {k: v for k, v in wanted.items() if v != known.get(k)}
    if b.position_grid[0] * b.patch_size == known["img_size"]:
        overrides["img_size"] = known["img_size"] + b.patch_size
    return name, overrides


def mlp_ratio_of(hidden_dim: int, embed_dim: int) -> float:
    """The ratio from which ``int(embed_dim * ratio)`` gives the hidden width back.

    Args:
        hidden_dim: Hidden width.
        embed_dim: Width.

    Returns:
        Their quotient, one step up where the product would be rounded down.
    """
    ratio = hidden_dim / embed_dim
    return ratio if int(embed_dim * ratio) == hidden_dim else math.nextafter(ratio, math.inf)
