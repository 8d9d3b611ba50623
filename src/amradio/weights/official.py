"""The official ``.pth.tar`` layout: a pickled dict of ``state_dict`` and training ``args``."""

from __future__ import annotations

import argparse
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amradio.errors import CheckpointError, LayoutError
from amradio.models.architectures import DINO_STUDENTS
from amradio.models.configs import InterNormalizerConfig, RadioConfig
from amradio.weights.args import adaptor_of, backbone_of, check_arguments, folded_args, summary_positions
from amradio.weights.checkpoint import Checkpoint, Identity, jsonable, torch_dtype
from amradio.weights.fidelity import require_same, without_heads
from amradio.weights.files import atomic_file
from amradio.weights.pickles import load_pickle
from amradio.weights.spectral import SpectralSettings, fold_parametrizations
from amradio.weights.synthesis import args_from_config
from amradio.weights.tensorfiles import is_safetensors, owned

NAME = "official"

_TRUNK = "base_model."
_SUMMARY, _SPATIAL = "_heads.", "_feature_projections."
_NORMALIZERS = {
    "_feature_normalizer.": "feature_normalizer.",
    "_intermediate_feature_normalizer.": "inter_feature_normalizer.",
}
_LAYER_SCALE = re.compile(r"^(blocks\.\d+\.ls[12])\.(?:gamma|grandma)$")
_PICKLE_PROTO, _MAX_PROTOCOL = 0x80, 5  # the first bytes of a pickle: an opcode and the protocol version
_DTYPE_ARGS = ("dtype", "amp_dtype")


def matches(path: Path) -> bool:
    """Whether a path is a file that ``torch.save`` made, by its first bytes. Nothing is unpickled."""
    if not path.is_file():
        return False
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("data.pkl") for name in archive.namelist())
    with path.open("rb") as f:
        start = f.read(2)
    return len(start) == 2 and start[0] == _PICKLE_PROTO and start[1] <= _MAX_PROTOCOL and not is_safetensors(path)


def read(path: Path) -> Checkpoint:
    """Read an official checkpoint file.

    Args:
        path: A ``.pth.tar`` file.

    Returns:
        The checkpoint: exponential moving average if there is one, parametrisations folded.

    Raises:
        UnsafeCheckpointError: The pickle refers to something that is not on the allow-list.
        CheckpointError: The file is damaged or has another content.
        ConfigError: The training arguments describe an unknown model.
    """
    payload = load_pickle(path)
    if not (
        isinstance(payload, Mapping) and "args" in payload and ("state_dict" in payload or "state_dict_ema" in payload)
    ):
        found = sorted(map(str, payload))[:10] if isinstance(payload, Mapping) else type(payload).__name__
        raise CheckpointError(f"{path} is no RADIO checkpoint: it needs 'state_dict' and 'args', but holds {found}.")
    args: dict[str, Any] = jsonable(payload["args"])
    check_arguments(args)
    state = payload.get("state_dict")
    if "state_dict_ema" in payload:
        # The moving average was taken of effective weights.
        state = payload["state_dict_ema"]
        args |= {"spectral_reparam": False, "spectral_heads": False, "damp": None}
    if not isinstance(state, Mapping) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()
    ):
        raise CheckpointError(f"{path} is no RADIO checkpoint: its state dict is not a dict of tensors.")
    tensors, unused = _translate(_folded(_unwrapped(state), args), args)
    args |= {"spectral_reparam": False, "spectral_heads": False, "damp": None}
    return Checkpoint(describe(args, tensors), tensors, Identity(source=str(path), layout=NAME), unused)


def describe(args: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> RadioConfig:
    """The model that training arguments and tensors describe together.

    Args:
        args: Official training arguments as a JSON object.
        tensors: Weights by native names.

    Returns:
        The config, without what only the catalog knows.

    Raises:
        CheckpointError: An adaptor's tensors are incomplete.
        ConfigError: The training arguments describe an unknown model.
    """
    backbone = backbone_of(args)
    names = list(dict.fromkeys(t["name"] for t in args.get("teachers") or []))
    adaptors = {}
    for name in names:
        prefix = f"adaptors.{name}."
        shapes = {k[len(prefix) :]: list(t.shape) for k, t in tensors.items() if k.startswith(prefix)}
        if shapes:
            adaptors[name] = adaptor_of(args, backbone, name, shapes)
    rotation = tensors.get("inter_feature_normalizer.rotation")
    inter = None
    if rotation is not None:
        means = tensors.get("inter_feature_normalizer.means", rotation)
        inter = InterNormalizerConfig(num_intermediates=means.shape[0], rotation_per_layer=rotation.ndim == 3)
    dtype = str(args.get("dtype") or "float32").removeprefix("torch.")
    torch_dtype(dtype)
    return RadioConfig(
        backbone=backbone,
        summary_idxs=summary_positions(args, backbone),
        adaptors=adaptors,
        teachers=tuple(args.get("teachers") or ()),
        feature_normalizer="feature_normalizer.tx" in tensors,
        inter_normalizer=inter,
        dtype=dtype,
        args=dict(args),
    )


def _unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without what `torch.compile` and `DistributedDataParallel` put into them."""
    clean = {}
    for key, tensor in state.items():
        parts = [p for p in key.split(".") if p != "_orig_mod"]
        while parts and parts[0] == "module":
            parts = parts[1:]
        clean[".".join(parts)] = tensor
    return clean


def _folded(state: Mapping[str, Tensor], args: Mapping[str, Any]) -> dict[str, Tensor]:
    trunk = {k: v for k, v in state.items() if k.startswith(_TRUNK)}
    rest = {k: v for k, v in state.items() if not k.startswith(_TRUNK)}
    return fold_parametrizations(trunk, SpectralSettings.of(args.get("spectral_reparam"))) | fold_parametrizations(
        rest, SpectralSettings()
    )


def _translate(state: Mapping[str, Tensor], args: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Official names to native names; returns (tensors, unused)."""
    tensors: dict[str, Tensor] = {}
    unused: dict[str, Tensor] = {}
    heads = _head_prefixes(args)
    for key, tensor in state.items():
        if key.startswith(_TRUNK):
            name = trunk_to_native(key[len(_TRUNK) :], args)
            if name is None:
                unused[key] = tensor
            else:
                tensors[f"model.{name}"] = native_trunk_tensor(name, tensor)
            continue
        renamed = next(
            (new + key[len(old) :] for old, new in (heads | _NORMALIZERS).items() if key.startswith(old)), key
        )
        if renamed == key and key.startswith((_SUMMARY, _SPATIAL)):
            unused[key] = tensor  # a head that no teacher record names
        else:
            tensors[renamed] = tensor
    return tensors, unused


def _head_prefixes(args: Mapping[str, Any]) -> dict[str, str]:
    """Official prefixes of adaptor tensors, by index and by name, to native ones; a name's first teacher counts."""
    prefixes = {}
    seen = set()
    for i, teacher in enumerate(args.get("teachers") or []):
        name = teacher["name"]
        if name in seen:
            continue
        seen.add(name)
        for official, native in ((_SUMMARY, "head_mlp"), (_SPATIAL, "feat_mlp")):
            for key in (str(i), name):
                prefixes[f"{official}{key}."] = f"adaptors.{name}.{native}."
    return prefixes


def trunk_to_native(name: str, args: Mapping[str, Any]) -> str | None:
    """Translate the name of a trunk tensor.

    Args:
        name: Official name without ``base_model.``.
        args: Official training arguments.

    Returns:
        The native name without ``model.``, or None for tensors that are stored and never read.
    """
    if str(args.get("model")) in DINO_STUDENTS:
        if name.startswith("input_conditioner.") or name == "inner.mask_token":
            return None
        name = name.removeprefix("inner.")
    if args.get("cpe_max_size") is None:
        name = _PLAIN_TO_NATIVE.get(name, name)
    scale = _LAYER_SCALE.match(name)
    return f"{scale[1]}.gamma" if scale else name


_PLAIN_TO_NATIVE = {
    "cls_token": "patch_generator.cls_token.token",
    "pos_embed": "patch_generator.pos_embed",
    "patch_embed.proj.weight": "patch_generator.embedder.weight",
    "patch_embed.proj.bias": "patch_generator.embedder.bias",
}


def native_trunk_tensor(name: str, tensor: Tensor) -> Tensor:
    """Bring a plain ViT's patch convolution and class token into the native shapes; others pass.

    Args:
        name: Native name.
        tensor: The tensor as stored.

    Returns:
        [C, chans*P*P] for the patch embedding, [tokens, C] for the prefix tokens.
    """
    if name == "patch_generator.embedder.weight" and tensor.ndim == 4:
        return tensor.flatten(1)  # [C, chans * P * P]
    if name == "patch_generator.cls_token.token" and tensor.ndim == 3:
        return tensor[0]  # [tokens, C]
    return tensor


def write(checkpoint: Checkpoint, path: Path, *, backbone_only: bool = False) -> Path:
    """Write an official checkpoint file.

    Args:
        checkpoint: What to write. Without published training arguments, arguments that describe it are made up.
        path: The file; parents are made, an existing file is replaced once the new one is complete.
        backbone_only: Leave out adaptors and normalizers.

    Returns:
        The path.

    Raises:
        LayoutError: Training arguments cannot describe this model; each field in question is named.
    """
    if path.is_dir():
        raise LayoutError(f"{path} is a directory, but the {NAME} layout is one file. Name a file in it.")
    if backbone_only:
        checkpoint = without_heads(checkpoint)
    args = args_for(checkpoint, NAME)
    state = {}
    for name, tensor in checkpoint.tensors.items():
        key, value = native_to_official(name, tensor, args)
        state[key] = owned(value)
    state |= {name: owned(tensor) for name, tensor in checkpoint.unused.items()}
    payload = {
        "arch": args["model"],
        "epoch": 0,
        "state_dict": state,
        "args": argparse.Namespace(**_with_dtypes(args)),
    }
    with atomic_file(path) as part:
        torch.save(payload, part)
    return path


def args_for(checkpoint: Checkpoint, layout: str) -> dict[str, Any]:
    """Training arguments that describe a checkpoint: the published ones, or made-up ones where there are none.

    Args:
        checkpoint: What is to be written.
        layout: Name of the layout, for messages.

    Returns:
        The arguments as a JSON object, checked to give the checkpoint's description back.

    Raises:
        LayoutError: No arguments do; each field in question is named.
    """
    config = checkpoint.config
    args = folded_args(config.args) | {"dtype": config.dtype} if config.args else args_from_config(config)
    ignore = () if config.args else ("teachers",)  # made-up arguments complete the records
    require_same(checkpoint, describe(args, checkpoint.tensors), layout, ignore)
    return args


def native_to_official(name: str, tensor: Tensor, args: Mapping[str, Any]) -> tuple[str, Tensor]:
    """Translate the name and shape of any tensor; the inverse of reading.

    Args:
        name: Native name.
        tensor: Its tensor.
        args: Official training arguments.

    Returns:
        Official name, and the tensor in the official shape.
    """
    if name.startswith("model."):
        trunk, tensor = native_to_trunk(name[len("model.") :], tensor, args)
        return f"{_TRUNK}{trunk}", tensor
    for part, prefix in ((".head_mlp.", _SUMMARY), (".feat_mlp.", _SPATIAL)):
        if name.startswith("adaptors.") and part in name:
            teacher, rest = name[len("adaptors.") :].split(part, 1)
            return f"{prefix}{teacher}.{rest}", tensor
    renamed = next((old + name[len(new) :] for old, new in _NORMALIZERS.items() if name.startswith(new)), name)
    return renamed, tensor


def native_to_trunk(name: str, tensor: Tensor, args: Mapping[str, Any]) -> tuple[str, Tensor]:
    """Translate the name and shape of a trunk tensor; the inverse of `trunk_to_native` and `native_trunk_tensor`.

    Args:
        name: Native name without ``model.``.
        tensor: Its tensor.
        args: Official training arguments.

    Returns:
        Official name without ``base_model.``, and the tensor in the official shape.
    """
    if args.get("cpe_max_size") is None:
        if name == "patch_generator.embedder.weight":
            side = backbone_of(args).patch_size
            tensor = tensor.unflatten(1, (-1, side, side))  # [C, chans, P, P]
        elif name == "patch_generator.cls_token.token":
            tensor = tensor[None]  # [1, tokens, C]
        name = {native: plain for plain, native in _PLAIN_TO_NATIVE.items()}.get(name, name)
    if str(args.get("model")) in DINO_STUDENTS:
        name = f"inner.{name}"
    return name, tensor


def _with_dtypes(args: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with dtype names turned into dtypes, as the official code expects them."""
    named = {k: args[k] for k in _DTYPE_ARGS if isinstance(args.get(k), str)}
    return {**args, **{k: torch_dtype(name) for k, name in named.items()}}
