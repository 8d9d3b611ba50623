"""DINO and DINOv2 weights in our trunk, against transformers' own implementations of both."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import amradio
from amradio.errors import CheckpointError, CheckpointKeyError, CheckpointShapeError, UnknownModelError
from amradio.models.radio import RadioModel
from amradio.weights import download
from amradio.weights.dino import IMAGENET_MEAN, IMAGENET_STD
from amradio.weights.dino_catalog import DINO_MODELS
from amradio.weights.download import FetchedFile

NATIVE = (32, 32)
Names = Callable[[Any], dict[str, Tensor]]


def conditioned(images: Tensor) -> Tensor:
    return (images - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)


def assert_same(ours: amradio.RadioOutput, theirs: Any, prefix: int, atol: float = 2e-5) -> None:
    tokens = theirs.last_hidden_state
    torch.testing.assert_close(ours.summary, tokens[:, 0], atol=atol, rtol=1e-4)
    torch.testing.assert_close(ours.features, tokens[:, prefix:], atol=atol, rtol=1e-4)


def dino_file(tmp_path: Path, tensors: dict[str, Any]) -> str:
    torch.save(tensors, tmp_path / "weights.pth")
    return f"dino:{tmp_path / 'weights.pth'}"


@pytest.mark.parametrize("swiglu", [False, True])
def test_dinov2_equals_transformers(toy: Any, official_names: Names, tmp_path: Path, swiglu: bool) -> None:
    theirs = toy("Dinov2", use_swiglu_ffn=swiglu)
    ours = amradio.load_backbone(dino_file(tmp_path, official_names(theirs)))
    images = torch.rand(2, 3, *NATIVE)
    with torch.inference_mode():
        assert_same(ours(images), theirs(conditioned(images)), prefix=1)


@pytest.mark.parametrize("size", [NATIVE, (48, 24), (16, 64), (8, 8)])
def test_dinov2_with_registers_equals_transformers_at_every_size(
    toy: Any, official_names: Names, tmp_path: Path, size: tuple[int, int]
) -> None:
    theirs = toy("Dinov2WithRegisters", num_register_tokens=3)
    ours = amradio.load_backbone(dino_file(tmp_path, official_names(theirs)))
    images = torch.rand(2, 3, *size)
    with torch.inference_mode():
        assert_same(ours(images), theirs(conditioned(images)), prefix=4)


def test_dino_equals_transformers_vit(toy: Any, official_names: Names, tmp_path: Path) -> None:
    theirs = toy("ViT", intermediate_size=512, layer_norm_eps=1e-6, arguments={"add_pooling_layer": False})
    ours = amradio.load_backbone(dino_file(tmp_path, official_names(theirs)))
    images = torch.rand(2, 3, *NATIVE)
    with torch.inference_mode():
        assert_same(ours(images), theirs(conditioned(images)), prefix=1)
        # At other sizes transformers leaves out the offset of 0.1 positions that the official code adds.
        images = torch.rand(1, 3, 48, 40)
        assert_same(ours(images), theirs(conditioned(images), interpolate_pos_encoding=True), prefix=1, atol=0.2)


@pytest.mark.parametrize("wrap", ["teacher", "chunks", "module"])
def test_training_checkpoints_are_understood(toy: Any, official_names: Names, tmp_path: Path, wrap: str) -> None:
    tensors = official_names(toy("Dinov2"))
    plain = amradio.load_backbone(dino_file(tmp_path, tensors))
    if wrap == "chunks":
        wrapped = {re.sub(r"^blocks\.(\d+)", r"blocks.0.\1", k): v for k, v in tensors.items()}
    elif wrap == "module":
        wrapped = {f"module.backbone.{k}": v for k, v in tensors.items()} | {"module.head.mlp.0.weight": torch.zeros(1)}
    else:
        teacher = {f"backbone.{k}": v for k, v in tensors.items()} | {"dino_head.mlp.0.weight": torch.zeros(1)}
        wrapped = {"teacher": teacher, "student": {}, "epoch": 3}
    images = torch.rand(1, 3, *NATIVE)
    with torch.inference_mode():
        torch.testing.assert_close(amradio.load_backbone(dino_file(tmp_path, wrapped))(images), plain(images))


def test_it_is_a_frozen_model_that_can_do_what_radio_can(toy: Any, official_names: Names, tmp_path: Path) -> None:
    spec = dino_file(tmp_path, official_names(toy("Dinov2")))
    model = amradio.load_backbone(spec, dtype=torch.bfloat16)
    assert isinstance(model, RadioModel)
    assert isinstance(model, amradio.Backbone)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert model.identity.layout == "dino"
    assert model.get_nearest_supported_resolution(33, 5) == (32, 8)
    assert model.blocks[-1].attn.proj.weight.shape == (128, 128)
    final, (first, last) = model.forward_intermediates(torch.rand(1, 3, 16, 24), [0, -1], norm=True)
    assert first.shape == (1, 128, 2, 3)
    torch.testing.assert_close(last, final.features)
    assert final.summary.dtype == torch.bfloat16


def test_it_survives_our_own_layout_and_no_other(toy: Any, official_names: Names, tmp_path: Path) -> None:
    model = amradio.load_backbone(dino_file(tmp_path, official_names(toy("Dinov2"))))
    amradio.save(model, tmp_path / "model.safetensors")
    images = torch.rand(1, 3, 48, 24)
    with torch.inference_mode():
        torch.testing.assert_close(amradio.load(tmp_path / "model.safetensors")(images), model(images), rtol=0, atol=0)
    for layout in ("official", "huggingface", "timm"):
        with pytest.raises(amradio.AmradioError, match="resize"):
            amradio.save(model, tmp_path / "other", layout=layout)


def test_training_mode_changes_nothing_but_gradients(toy: Any, official_names: Names, tmp_path: Path) -> None:
    model = amradio.load_backbone(dino_file(tmp_path, official_names(toy("Dinov2"))))
    images = torch.rand(1, 3, 48, 24)
    expected = model(images)
    torch.testing.assert_close(model.train()(images), expected)


def cubic_weights(stored: int, wanted: int, scale: float) -> Tensor:
    """Keys' cubic kernel (a = -0.75) with borders repeated: rows are targets, columns sources."""
    matrix = torch.zeros(wanted, stored, dtype=torch.float64)
    for i in range(wanted):
        centre = (i + 0.5) / scale - 0.5
        base = int(centre // 1)
        for j in range(base - 1, base + 3):
            t, a = abs(centre - j), -0.75
            inner = (a + 2) * t**3 - (a + 3) * t**2 + 1
            outer = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
            matrix[i, min(max(j, 0), stored - 1)] += inner if t <= 1 else outer
    return matrix


@pytest.mark.parametrize("grid", [(3, 7), (5, 4), (8, 2)])
def test_positions_are_resized_at_the_scale_that_is_slightly_off(
    toy: Any, official_names: Names, tmp_path: Path, grid: tuple[int, int]
) -> None:
    model = amradio.load_backbone(dino_file(tmp_path, official_names(toy("Dinov2"))))
    stored = model.model.patch_generator.pos_embed.detach()[0].unflatten(0, (4, 4)).double()  # [4, 4, C]
    rows, columns = (cubic_weights(4, side, (side + 0.1) / 4) for side in grid)
    expected = torch.einsum("ij,jkc,lk->ilc", rows, stored, columns).flatten(0, 1)
    found = model.model.patch_generator.positions(1, grid)[0]
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)


# ---- published models ----


@pytest.mark.parametrize("name", sorted(DINO_MODELS))
def test_published_models_fit_their_description(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from amradio.backbones import dino

    asked: list[str] = []

    def fetch(url: str, **_: Any) -> FetchedFile:
        asked.append(url)
        return FetchedFile(path=tmp_path, sha256="ab" * 32, source=url, size=1, from_cache=False)

    monkeypatch.setattr(download, "fetch_url", fetch)
    monkeypatch.setattr(dino, "read_dino", lambda _: official_shapes(name))
    monkeypatch.setattr(dino, "build_model", lambda checkpoint: (laid_out(checkpoint), None))
    model = amradio.load_backbone(name)
    entry = DINO_MODELS[name]
    assert asked == [entry.url]
    assert model.summary_dim == model.embed_dim == entry.embed_dim
    assert model.patch_size == entry.patch_size
    assert model.preferred_resolution == (224, 224)
    assert (model.identity.version, model.identity.sha256) == (name, "ab" * 32)
    assert model.identity.license == "Apache License 2.0"


def official_shapes(name: str) -> dict[str, Tensor]:
    """The tensors of a published model on the meta device, by the sizes that the papers and model cards give."""
    entry = DINO_MODELS[name]
    c, p = entry.embed_dim, entry.patch_size
    rows = 1 + {8: 28, 16: 14, 14: 37}[p] ** 2
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, c),
        "pos_embed": (1, rows, c),
        "patch_embed.proj.weight": (c, 3, p, p),
        "patch_embed.proj.bias": (c,),
        "norm.weight": (c,),
        "norm.bias": (c,),
    }
    if name.endswith("_reg"):
        shapes["register_tokens"] = (1, 4, c)
    linear = {"attn.qkv": (3 * c, c), "attn.proj": (c, c)}
    linear |= (
        {"mlp.w12": (8192, c), "mlp.w3": (c, 4096)}
        if "vitg" in name
        else {"mlp.fc1": (4 * c, c), "mlp.fc2": (c, 4 * c)}
    )
    for i in range({384: 12, 768: 12, 1024: 24, 1536: 40}[c]):
        for layer, (out, width) in linear.items():
            shapes |= {f"blocks.{i}.{layer}.weight": (out, width), f"blocks.{i}.{layer}.bias": (out,)}
        for norm in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{norm}.weight": (c,), f"blocks.{i}.{norm}.bias": (c,)}
        if name.startswith("dinov2"):
            shapes |= {f"blocks.{i}.ls1.gamma": (c,), f"blocks.{i}.ls2.gamma": (c,)}
    return {k: torch.empty(v, device="meta") for k, v in shapes.items()}


def laid_out(checkpoint: Any) -> RadioModel:
    from amradio.weights.checkpoint import lay_out

    model, report = lay_out(checkpoint, ())
    assert not report, report.describe("the published model")
    model.identity = checkpoint.identity
    return model


def test_addresses_are_the_published_ones() -> None:
    urls = {name: entry.url.removeprefix("https://dl.fbaipublicfiles.com/") for name, entry in DINO_MODELS.items()}
    assert urls["dino_vits8"] == "dino/dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth"
    assert urls["dino_vitb16"] == "dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth"
    assert urls["dinov2_vitg14"] == "dinov2/dinov2_vitg14/dinov2_vitg14_pretrain.pth"
    assert urls["dinov2_vits14_reg"] == "dinov2/dinov2_vits14/dinov2_vits14_reg4_pretrain.pth"
    assert len(DINO_MODELS) == 12


# ---- refusals ----


def test_unknown_names_are_refused() -> None:
    with pytest.raises(
        UnknownModelError, match="'dinov2_vits15' is neither a published DINO or DINOv2 model nor a file"
    ):
        amradio.load_backbone("dino:dinov2_vits15")


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no state dict of DINO or DINOv2: it lacks cls_token, pos_embed"):
        amradio.load_backbone(dino_file(tmp_path, {"conv1.weight": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=r"no state dict of DINO or DINOv2: it holds \['epoch'\]"):
        amradio.load_backbone(dino_file(tmp_path, {"epoch": 3}))


def test_damaged_state_dicts_are_refused(toy: Any, official_names: Names, tmp_path: Path) -> None:
    tensors = official_names(toy("Dinov2"))
    with pytest.raises(CheckpointError, match="has 15 patch positions"):
        amradio.load_backbone(dino_file(tmp_path, tensors | {"pos_embed": torch.zeros(1, 16, 128)}))
    with pytest.raises(CheckpointError, match=r"patch_embed.proj.weight is \[128\]"):
        amradio.load_backbone(dino_file(tmp_path, tensors | {"patch_embed.proj.weight": torch.zeros(128)}))
    with pytest.raises(CheckpointKeyError, match=r"Unexpected \(1\): model.blocks.0.lora"):
        amradio.load_backbone(dino_file(tmp_path, tensors | {"blocks.0.lora": torch.zeros(1)}))
    with pytest.raises(CheckpointShapeError, match=r"model.norm.bias is \[3\], expected \[128\]"):
        amradio.load_backbone(dino_file(tmp_path, tensors | {"norm.bias": torch.zeros(3)}))


@pytest.mark.slow
def test_it_compiles_without_a_break(toy: Any, official_names: Names, tmp_path: Path) -> None:
    model = amradio.load_backbone(dino_file(tmp_path, official_names(toy("Dinov2"))))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        for size in [(32, 32), (48, 24), (16, 40), (24, 64)]:
            images = torch.rand(1, 3, *size)
            torch.testing.assert_close(compiled(images), model(images), atol=1e-5, rtol=1e-4)
