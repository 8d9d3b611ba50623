"""Layout detection, and round trips of every golden model through all layouts that hold everything."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from amradio.errors import CheckpointKeyError, CheckpointShapeError, LayoutError, OptionError, UnsafeCheckpointError
from amradio.models.configs import RadioConfig, ViTConfig
from amradio.models.radio import RadioModel
from amradio.weights.checkpoint import Checkpoint, build_model
from amradio.weights.convert import convert, save
from amradio.weights.layouts import LAYOUTS, UNDERSTOOD, detect, read_checkpoint

MODELS = Path(__file__).parents[1] / "goldens" / "radio" / "models"
NAMES = sorted(p.name.removesuffix(".pth.tar") for p in MODELS.iterdir() if p.name != "keys.pth.tar")
PLAIN = ["cls2_dup", "damp", "ls_grandma", "p14_single", "spec1", "v25_p16", "v3_ls", "v3_small", "v4_attn", "vitdet12"]
TARGETS = {"native": "m.safetensors", "official": "m.pth.tar", "huggingface": "m", "pretrained": "p"}


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for key, tensor in a.items():
        assert tensor.dtype == b[key].dtype, key
        assert torch.equal(tensor, b[key]), key


def outputs(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    model, _ = build_model(checkpoint, list(checkpoint.config.adaptors))
    size = model.get_nearest_supported_resolution(64, 80)
    if isinstance(checkpoint.config.backbone, ViTConfig) and checkpoint.config.backbone.position == "fixed":
        size = (64, 64)
    with torch.no_grad():
        found = model(torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)))
    found = found if isinstance(found, dict) else {"backbone": found}
    return {f"{name}.{part}": getattr(o, part) for name, o in found.items() for part in ("summary", "features")}


@pytest.mark.parametrize("name", NAMES)
def test_every_golden_model_survives_every_layout(name: str, tmp_path: Path) -> None:
    source = MODELS / f"{name}.pth.tar"
    first = read_checkpoint(source)
    path = source
    for i, layout in enumerate(["native", "official", "pretrained", "huggingface", "native"]):
        path = convert(path, tmp_path / str(i) / TARGETS[layout], layout)
        assert detect(path) is LAYOUTS[layout]
        now = read_checkpoint(path)
        assert now.identity.layout == layout
        assert_same_bits(first.tensors, now.tensors)
        assert_same_bits(first.unused, now.unused)
        # Hugging Face configs state the patch size; None means the same.
        patch_size = now.config.patch_size or first.config.backbone.patch_size
        assert patch_size == first.config.backbone.patch_size
        assert dataclasses.replace(now.config, patch_size=None) == first.config
    assert_same_bits(outputs(first), outputs(now))


@pytest.mark.parametrize("layout", ["native", "official", "huggingface"])
def test_backbone_only_leaves_heads_out(layout: str, tmp_path: Path) -> None:
    source = MODELS / "v3_small.pth.tar"
    whole = read_checkpoint(source)
    bare = read_checkpoint(convert(source, tmp_path / TARGETS[layout], layout, backbone_only=True))
    assert bare.config.adaptors == {}
    assert not bare.config.feature_normalizer
    assert bare.config.inter_normalizer is None
    kept = ("model.", "input_conditioner.")
    assert_same_bits({k: v for k, v in whole.tensors.items() if k.startswith(kept)}, bare.tensors)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in PLAIN])
@pytest.mark.parametrize("layout", ["transformers", "timm"])
def test_models_that_other_libraries_lack_are_refused_by_name(name: str, layout: str, tmp_path: Path) -> None:
    parts = {
        "cpe_off": "position embeddings of the kind 'window'",
        "dinog": "a SwiGLU MLP, a final norm, a bias in the patch embedding",
        "dyt": "DyT norms",
        "eps_vit": "a norm inside the MLP",
        "eradio": "the E-RADIO trunk",
        "inter_shared": "a final norm",
        "nocpe": "position embeddings of the kind 'fixed'",
        "scaled_ln": "scaled norms",
    }
    if name in ("ema", "spec2"):  # these are plain once folded
        convert(MODELS / f"{name}.pth.tar", tmp_path / "m", layout, backbone_only=True)
        return
    with pytest.raises(LayoutError) as raised:
        convert(MODELS / f"{name}.pth.tar", tmp_path / "m", layout, backbone_only=True)
    assert f"The {layout} layout cannot represent " in str(raised.value)
    assert parts.get(name, "and this model has ") in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_what_a_layout_cannot_hold_is_listed(tmp_path: Path) -> None:
    source = MODELS / "v3_small.pth.tar"
    with pytest.raises(LayoutError) as raised:
        convert(source, tmp_path / "m", "transformers")
    assert str(raised.value) == (
        f"The transformers layout has no place for parts of {source}: the adaptors clip, siglip2-g, dino_v2, sam; the "
        f"feature normalizer; the normalizer of intermediate features. Pass backbone_only=True (--backbone-only on the "
        f"command line) to leave them out, or choose another layout: native holds everything, huggingface "
        "everything that RADIO models have."
    )
    assert not list(tmp_path.iterdir())


def test_an_incomplete_checkpoint_is_not_spread(tmp_path: Path) -> None:
    source = MODELS / "keys.pth.tar"
    with pytest.raises(CheckpointKeyError) as raised:
        convert(source, tmp_path / "m.safetensors")
    assert str(raised.value) == (
        f"The tensors in {source} do not fit the model that it describes.\n"
        f"Missing (2): model.blocks.0.norm1.bias, model.blocks.1.norm2.weight.\n"
        f"Unexpected (3): model.foo.weight, model.cls, unrelated.\n"
        f"It is not written anywhere."
    )


def test_contradicting_shapes_are_not_spread(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(MODELS / "p14_single.pth.tar")
    checkpoint.tensors["model.blocks.0.norm1.bias"] = torch.zeros(3)
    with pytest.raises(CheckpointShapeError, match=r"model.blocks.0.norm1.bias is \[3\], expected \[64\]\."):
        save(checkpoint, tmp_path / "m.safetensors")
    deep = dataclasses.replace(checkpoint.config.backbone, depth=10**9)
    broken = dataclasses.replace(checkpoint, config=dataclasses.replace(checkpoint.config, backbone=deep))
    with pytest.raises(CheckpointShapeError, match="describes a model of 1000000002 blocks but has only"):
        save(broken, tmp_path / "m.safetensors")


def test_a_model_in_memory_is_saved_with_its_present_weights(tmp_path: Path) -> None:
    model, _ = build_model(read_checkpoint(MODELS / "v25_p16.pth.tar"), ["clip"])
    with torch.no_grad():
        model.model.blocks[0].mlp.fc1.weight.mul_(2)
    loaded = read_checkpoint(save(model, tmp_path / "m.safetensors"))
    assert list(loaded.config.adaptors) == ["clip"]
    assert_same_bits({k: v for k, v in model.state_dict().items() if k != "summary_idxs"}, loaded.tensors)
    half = read_checkpoint(save(model.to(torch.bfloat16), tmp_path / "m.pth.tar", "official"))
    assert half.config.dtype == half.config.args["dtype"] == "bfloat16"


def test_tensors_that_share_storage_are_saved_apart(tmp_path: Path) -> None:
    config = RadioConfig(backbone=ViTConfig(embed_dim=8, depth=1, num_heads=1, mlp_hidden_dim=8, position_grid=(4, 4)))
    model = RadioModel(config).eval()
    model.model.blocks[0].norm1.weight = model.model.blocks[0].norm2.weight  # tied
    for layout, target in TARGETS.items():
        loaded = read_checkpoint(save(model, tmp_path / target, layout))
        assert torch.equal(loaded.tensors["model.blocks.0.norm1.weight"], torch.ones(8))


def test_unknown_layout(tmp_path: Path) -> None:
    with pytest.raises(OptionError) as raised:
        convert(MODELS / "p14_single.pth.tar", tmp_path / "m", "transformer")
    assert str(raised.value) == (
        "Unknown layout 'transformer'. Nearest names: transformers, pretrained. Choose from: native, official, "
        "huggingface, transformers, timm, pretrained."
    )


class TestDetect:
    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(LayoutError, match=r"m\.pth\.tar does not exist\.$"):
            detect(tmp_path / "m.pth.tar")

    @pytest.mark.parametrize(
        ("make", "found"),
        [
            (lambda p: p.write_bytes(b"hello"), "a file of 5 bytes that is neither safetensors nor a torch.save file"),
            (lambda p: p.mkdir(), "a directory without a readable config.json, with no files"),
            (
                lambda p: save_file({"visual.proj": torch.zeros(2), "logit_scale": torch.zeros(1)}, p),
                "a safetensors file with tensors ['logit_scale', 'visual.proj']",
            ),
        ],
    )
    def test_what_was_found_and_what_is_understood(self, make: Any, found: str, tmp_path: Path) -> None:
        path = tmp_path / "m"
        make(path)
        with pytest.raises(LayoutError) as raised:
            detect(path)
        assert str(raised.value) == (
            f"{path} is in no layout that amradio reads: it is {found}.\nUnderstood are:\n{UNDERSTOOD}"
        )

    def test_directory_of_another_model(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"model_type": "vit", "architectures": ["ViTModel"], "hidden_size": 8}')
        with pytest.raises(LayoutError) as raised:
            detect(tmp_path)
        assert "it is a directory whose config.json has {'architectures': ['ViTModel'], 'model_type': 'vit'}.\n" in str(
            raised.value
        )

    def test_the_weights_of_a_directory_alone(self, tmp_path: Path) -> None:
        path = convert(MODELS / "p14_single.pth.tar", tmp_path / "hf", "huggingface")
        with pytest.raises(LayoutError) as raised:
            detect(path / "model.safetensors")
        assert f"without its config.json: pass the directory {path}." in str(raised.value)

    def test_every_layout_knows_only_its_own(self, tmp_path: Path) -> None:
        source = MODELS / "p14_single.pth.tar"
        paths = {
            layout: convert(source, tmp_path / layout / TARGETS.get(layout, "m"), layout, backbone_only=True)
            for layout in LAYOUTS
        }
        for layout, path in paths.items():
            assert [name for name, module in LAYOUTS.items() if module.matches(path)] == [layout]

    def test_nothing_is_unpickled(self, tmp_path: Path) -> None:
        path = tmp_path / "bomb.pth.tar"
        torch.save({"state_dict": {}, "args": Bomb(tmp_path / "ran")}, path)
        assert detect(path).NAME == "official"
        legacy = tmp_path / "legacy.pth"
        legacy.write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
        assert detect(legacy).NAME == "official"
        assert not (tmp_path / "ran").exists()


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def test_a_pickle_bomb_is_refused_and_named(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pth.tar"
    torch.save({"state_dict": {}, "args": Bomb(tmp_path / "ran")}, path)
    with pytest.raises(UnsafeCheckpointError) as raised:
        convert(path, tmp_path / "m.safetensors")
    assert "its pickle refers to code that is not on the allow-list: " in str(raised.value)
    assert "pathlib." in str(raised.value)
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "m.safetensors").exists()
