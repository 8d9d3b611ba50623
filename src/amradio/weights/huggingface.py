"""The official Hugging Face layout: a directory of ``config.json`` and safetensors, read without its remote code.

``config.json`` carries the training arguments of the ``.pth.tar`` and what the version table knows; tensors are named
as in memory under ``radio_model.``, with parametrisations folded.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amradio.errors import CheckpointError, CheckpointShapeError, LayoutError
from amradio.models.architectures import DINO_STUDENTS
from amradio.models.configs import (
    AdaptorConfig,
    ERadioConfig,
    HeadConfig,
    InterNormalizerConfig,
    RadioConfig,
    Resolution,
    ViTConfig,
)
from amradio.weights.args import folded_args, head_of, head_position, summary_positions
from amradio.weights.catalog import is_catalog_name, resolve
from amradio.weights.checkpoint import Checkpoint, Identity, names_in, with_prefix
from amradio.weights.fidelity import require_same, without_heads
from amradio.weights.files import atomic_directory
from amradio.weights.official import args_for, describe, native_to_trunk, native_trunk_tensor, trunk_to_native
from amradio.weights.tensorfiles import (
    CONFIG,
    WEIGHTS,
    config_of,
    read_directory,
    read_json,
    to_json_text,
    write_tensors,
)

NAME = "huggingface"

_ROOT = "radio_model."
_TRUNK = "model."
_SUMMARY_IDXS = "summary_idxs"
_OFFICIAL_TRUNK = "base_model."
_OFFICIAL_HEADS = ("_heads.", "_feature_projections.")
_LAYER_SCALE = re.compile(r"^((?:inner\.)?blocks\.\d+\.ls[12])\.gamma$")


def matches(path: Path) -> bool:
    """Whether a path is a directory whose ``config.json`` carries training arguments."""
    return path.is_dir() and isinstance(config_of(path).get("args"), Mapping)


def read(path: Path) -> Checkpoint:
    """Read a directory in the official Hugging Face layout.

    Args:
        path: A directory of ``config.json`` and ``model.safetensors``, or shards with an index.

    Returns:
        The checkpoint, with every adaptor whose weights are there.

    Raises:
        LayoutError: ``config.json`` is of another layout.
        CheckpointError: A file is missing, damaged or inconsistent.
        ConfigError: The training arguments describe an unknown model.
    """
    config = read_json(path / CONFIG) if (path / CONFIG).is_file() else {}
    if not isinstance(config.get("args"), Mapping):
        raise LayoutError(
            f"{path} is no RADIO directory: it needs a {CONFIG} with 'args', but has {sorted(config)[:10]}."
        )
    return _parse(config, read_directory(path), str(path))


def write(checkpoint: Checkpoint, path: Path, *, backbone_only: bool = False) -> Path:
    """Write a directory in the official Hugging Face layout; it holds adaptors of every kind.

    The official class reads it, adaptors included as far as that class supports them. No code is shipped, so there is
    no ``auto_map``.

    Args:
        checkpoint: What to write. Without published training arguments, arguments that describe it are made up.
        path: The directory; files in it are replaced once all new ones are complete.
        backbone_only: Leave out adaptors and normalizers.

    Returns:
        The path.

    Raises:
        LayoutError: `path` is a file, or the layout cannot describe this model; each field in question is named.
    """
    if path.is_file():
        raise LayoutError(f"{path} is a file, but the {NAME} layout is a directory.")
    if backbone_only:
        checkpoint = without_heads(checkpoint)
    args = args_for(checkpoint, NAME)
    config = _config_json(checkpoint.config, args)
    state = _state(checkpoint, args)
    back = _parse(config, state, str(path))
    require_same(checkpoint, back.config, NAME, () if checkpoint.config.args else ("teachers",))
    with atomic_directory(path) as part:
        write_tensors(state, part / WEIGHTS, {"format": "pt"})
        (part / CONFIG).write_text(to_json_text(config), encoding="utf-8")
    return path


# ---- reading ----


def _parse(config: Mapping[str, Any], state: Mapping[str, Tensor], source: str) -> Checkpoint:
    args = folded_args(config["args"])
    tensors: dict[str, Tensor] = {}
    unused: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name = key[len(_ROOT) :] if key.startswith(_ROOT) else None
        if name == _SUMMARY_IDXS:
            continue
        if name is None:
            (unused if key.startswith(_OFFICIAL_HEADS) else tensors)[key] = tensor
        elif name.startswith(_TRUNK):
            trunk = name[len(_TRUNK) :]
            native = trunk_to_native(trunk, args)
            if native is None:
                unused[f"{_OFFICIAL_TRUNK}{trunk}"] = tensor
            else:
                tensors[f"{_TRUNK}{native}"] = native_trunk_tensor(native, tensor)
        else:
            tensors[name] = tensor
    described = _describe(config, args, tensors, state.get(_ROOT + _SUMMARY_IDXS), source)
    return Checkpoint(described, tensors, Identity(source=source, layout=NAME, version=described.version), unused)


def _describe(
    config: Mapping[str, Any],
    args: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    stored_idxs: Tensor | None,
    source: str,
) -> RadioConfig:
    trunk_only = {k: v for k, v in tensors.items() if not k.startswith("adaptors.")}
    described = describe(args, trunk_only)
    b = described.backbone
    recorded = config.get("adaptor_configs") or {}
    if not isinstance(recorded, Mapping):
        raise CheckpointError(f"The adaptor_configs in the {CONFIG} of {source} must be an object, got {recorded!r}.")
    adaptors = {
        name: _adaptor(name, recorded.get(name), args, b, with_prefix(tensors, f"adaptors.{name}."), source)
        for name in _in_teacher_order(names_in(tensors, "adaptors."), args)
    }
    normalizers: dict[str, Any] = {}
    if "feature_normalizer_config" in config:
        normalizers["feature_normalizer"] = config["feature_normalizer_config"] is not None
    if "inter_feature_normalizer_config" in config:
        normalizers["inter_normalizer"] = _inter_normalizer(config["inter_feature_normalizer_config"], source)
    return dataclasses.replace(
        described,
        adaptors=adaptors,
        summary_idxs=_summary_idxs(stored_idxs, args, b),
        **normalizers,
        **_version_fields(config, source),
    )


def _inter_normalizer(recorded: Any, source: str) -> InterNormalizerConfig | None:
    if recorded is None:
        return None
    try:
        return InterNormalizerConfig(
            num_intermediates=int(recorded["num_intermediates"]), rotation_per_layer=bool(recorded["rot_per_layer"])
        )
    except (KeyError, TypeError, ValueError) as e:
        raise CheckpointError(
            f"The inter_feature_normalizer_config in the {CONFIG} of {source} is incomplete ({type(e).__name__}: {e})."
        ) from e


def _summary_idxs(stored: Tensor | None, args: Mapping[str, Any], b: ViTConfig | ERadioConfig) -> tuple[int, ...]:
    """The stored summary tokens, unless there are no such class tokens: then those that the arguments mean.

    The official conversion numbers teachers without regard to repeated names and shared class tokens.
    """
    num_cls = b.num_cls_tokens if isinstance(b, ViTConfig) else 1
    indices = () if stored is None else tuple(int(i) for i in stored.flatten())
    if not indices or min(indices) < 0 or max(indices) >= num_cls:
        return summary_positions(args, b)
    return indices


def _in_teacher_order(names: set[str], args: Mapping[str, Any]) -> list[str]:
    teachers = list(dict.fromkeys(t["name"] for t in args.get("teachers") or []))
    return [n for n in teachers if n in names] + sorted(names - set(teachers))


def _adaptor(
    name: str,
    recorded: Mapping[str, Any] | None,
    args: Mapping[str, Any],
    b: ViTConfig | ERadioConfig,
    tensors: Mapping[str, Tensor],
    source: str,
) -> AdaptorConfig:
    """One adaptor; versions and sizes are those of its tensors, slot and upsampling those of its record."""
    if recorded is not None:
        try:
            head_idx = int(recorded["head_idx"])
            upsample = int(recorded["feature"].get("upsample_factor") or 1)
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise CheckpointError(
                f"The record of adaptor {name!r} in the {CONFIG} of {source} is incomplete ({type(e).__name__}: {e}); "
                f"it needs 'head_idx', 'summary' and 'feature'."
            ) from e
    else:
        teacher = next((t for t in args.get("teachers") or [] if t["name"] == name), None)
        if teacher is None:
            raise CheckpointError(
                f"{source} has weights of an adaptor {name!r}, but neither 'adaptor_configs' nor the teachers of its "
                f"{CONFIG} say what it is."
            )
        head_idx = head_position(args, b, name)
        upsample = int(teacher.get("fd_upsample_factor") or 1)
    heads = {}
    for part, kind in (("head_mlp", "summary"), ("feat_mlp", "feature")):
        shapes = {k: list(t.shape) for k, t in with_prefix(tensors, f"{part}.").items()}
        where = f"The {kind} head of adaptor {name!r} in {source}"
        heads[kind] = head_of(shapes, where, upsample if kind == "feature" else 1)
        _check_sizes(heads[kind], (recorded or {}).get(kind) or {}, where)
    return AdaptorConfig(head_idx=head_idx, summary=heads["summary"], features=heads["feature"])


def _check_sizes(head: HeadConfig, recorded: Mapping[str, Any], where: str) -> None:
    for size in ("input_dim", "hidden_dim", "output_dim"):
        if size in recorded and recorded[size] != getattr(head, size):
            raise CheckpointShapeError(
                f"{where} has {size} {getattr(head, size)} by its tensors, but {recorded[size]} by {CONFIG}. The "
                f"directory was edited inconsistently; get it again."
            )


def _recorded(config: Mapping[str, Any], name: str, kind: type, source: str) -> Any:
    """A field of config.json, None where there is none; a list is a (height, width)."""
    value = config.get(name)
    pair = kind is list and isinstance(value, list) and len(value) == 2 and all(type(v) is int for v in value)
    if value is None or pair or (kind is not list and type(value) is kind):
        return value
    wanted = "[height, width]" if kind is list else f"of type {kind.__name__}"
    raise CheckpointError(f"The {name} in the {CONFIG} of {source} must be {wanted}, got {value!r:.80}.")


def _version_fields(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """What the config says of the version, completed from the catalog where it says nothing."""
    version = _recorded(config, "version", str, source)
    entry = resolve(version) if version and is_catalog_name(version) else None
    size = _recorded(config, "preferred_resolution", list, source) or (entry and entry.preferred_resolution)
    fields: dict[str, Any] = {
        "version": version,
        "patch_size": _recorded(config, "patch_size", int, source) or (entry and entry.patch_size),
        "max_resolution": _recorded(config, "max_resolution", int, source) or (entry and entry.max_resolution),
        "preferred_resolution": Resolution(*size) if size else None,
    }
    if entry is not None:
        for name in ("supports_vitdet", "vitdet_num_windowed", "vitdet_num_global"):
            fields[name] = getattr(entry, name)
    return fields


# ---- writing ----


def _config_json(config: RadioConfig, args: Mapping[str, Any]) -> dict[str, Any]:
    dim = config.backbone.embed_dim
    inter = config.inter_normalizer
    size = config.preferred_resolution
    known = {  # without these the official class consults its version table, so nulls must not be written
        "version": config.version,
        "max_resolution": config.max_resolution,
        "preferred_resolution": size and list(size),
    }
    return {k: v for k, v in known.items() if v is not None} | {
        "architectures": ["RADIOModel"],
        "args": dict(args),
        "patch_size": config.patch_size or config.backbone.patch_size,
        "adaptor_names": None,
        "adaptor_configs": {name: _adaptor_json(a) for name, a in config.adaptors.items()},
        "vitdet_window_size": None,
        "feature_normalizer_config": {"embed_dim": dim} if config.feature_normalizer else None,
        "inter_feature_normalizer_config": inter
        and {
            "num_intermediates": inter.num_intermediates,
            "embed_dim": dim,
            "rot_per_layer": inter.rotation_per_layer,
        },
        "dtype": config.dtype,
    }


def _adaptor_json(adaptor: AdaptorConfig) -> dict[str, Any]:
    spatial = {"upsample_factor": adaptor.features.upsample_factor, "upsample_rank": None}
    return {
        "head_idx": adaptor.head_idx,
        "summary": _head_json(adaptor.summary),
        "feature": _head_json(adaptor.features) | spatial,
    }


def _head_json(head: HeadConfig) -> dict[str, Any]:
    return {k: getattr(head, k) for k in ("input_dim", "hidden_dim", "output_dim", "num_inner")}


def _stored_idxs(config: RadioConfig, args: Mapping[str, Any]) -> tuple[int, ...]:
    """The summary tokens as stored.

    Trunks with a single summary vector never use them, but the official class insists on as many as it counts teachers.
    """
    b = config.backbone
    if not isinstance(b, ViTConfig) or b.position == "fixed" or args["model"] in DINO_STUDENTS:
        teachers = args.get("teachers") or []
        return tuple(i for i, t in enumerate(teachers) if t.get("use_summary", True)) or (0,)
    return config.summary_idxs


def _state(checkpoint: Checkpoint, args: Mapping[str, Any]) -> dict[str, Tensor]:
    indices = _stored_idxs(checkpoint.config, args)
    state = {_ROOT + _SUMMARY_IDXS: torch.tensor(indices, dtype=torch.int64)}
    for name, tensor in checkpoint.tensors.items():
        if name.startswith(_TRUNK):
            trunk, tensor = native_to_trunk(name[len(_TRUNK) :], tensor, args)
            # Loaders of the Hugging Face library rewrite names that contain "gamma", hence the official renaming.
            trunk = _LAYER_SCALE.sub(r"\1.grandma", trunk)
            state[f"{_ROOT}{_TRUNK}{trunk}"] = tensor
        else:
            state[_ROOT + name] = tensor
    for name, tensor in checkpoint.unused.items():
        inner = name.startswith(_OFFICIAL_TRUNK)
        state[f"{_ROOT}{_TRUNK}{name[len(_OFFICIAL_TRUNK) :]}" if inner else name] = tensor
    return state
