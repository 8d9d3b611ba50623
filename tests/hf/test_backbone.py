"""The maps of `AmradioBackbone` are the intermediates of the plain model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", minversion="5.13")

from transformers import AutoBackbone, AutoConfig

from amradio.hf import AmradioBackbone, AmradioConfig, AmradioModel
from amradio.models.configs import ERadioConfig
from amradio.models.radio import RadioModel

Make = Callable[[str], RadioModel]


@torch.no_grad()
def test_the_maps_of_every_stage(radio: RadioModel, images: Tensor) -> None:
    backbone = AmradioBackbone.from_radio(radio)
    names = backbone.stage_names
    backbone.out_features = names
    out = backbone(images)
    wanted = radio.forward_intermediates(images, intermediates_only=True)
    if not isinstance(radio.config.backbone, ERadioConfig):
        assert names[0] == "stem"
        embedded = radio.model.patch_generator(radio.input_conditioner(images))
        stem = embedded[:, radio.config.backbone.num_prefix_tokens :]  # [B, L, C]
        wanted = [stem.transpose(1, 2).unflatten(2, (8, 12)), *wanted]
    assert len(out.feature_maps) == len(names)
    for found, expected in zip(out.feature_maps, wanted, strict=True):
        assert torch.equal(found, expected)
    assert backbone.channels == [m.shape[1] for m in out.feature_maps]
    assert out.hidden_states is None
    assert len(backbone(images, output_hidden_states=True).hidden_states) == len(names)


@torch.no_grad()
def test_windows(make_radio: Make, images: Tensor) -> None:
    radio = make_radio("adaptors")
    radio.set_vitdet(4, num_windowed=2)
    backbone = AmradioBackbone.from_radio(radio, out_indices=[1, 2])
    wanted = radio.forward_intermediates(images, [0, 1], intermediates_only=True)
    for found, expected in zip(backbone(images).feature_maps, wanted, strict=True):
        assert torch.equal(found, expected)


@torch.no_grad()
def test_chosen_stages(make_radio: Make, images: Tensor, tmp_path: Path) -> None:
    radio = make_radio("vit")
    AmradioModel.from_radio(radio).save_pretrained(tmp_path)
    backbone = AmradioBackbone.from_pretrained(tmp_path, out_indices=[1, -1])
    assert backbone.out_features == ["stage1", "stage3"]
    wanted = radio.forward_intermediates(images, [0, 2], intermediates_only=True)
    for found, expected in zip(backbone(images).feature_maps, wanted, strict=True):
        assert torch.equal(found, expected)
    assert len(AmradioBackbone.from_pretrained(tmp_path)(images).feature_maps) == 1  # the last one
    backbone.save_pretrained(tmp_path / "again")
    config = AutoConfig.from_pretrained(tmp_path / "again")
    assert type(config) is AmradioConfig
    assert config.out_indices == [1, -1]
    built = AutoBackbone.from_config(config)
    assert type(built) is AmradioBackbone
    assert [tuple(m.shape) for m in built(images).feature_maps] == [(2, 32, 8, 12)] * 2


def test_stages_that_are_not(make_radio: Make) -> None:
    with pytest.raises(ValueError, match="out_features must be a subset of stage_names"):
        AmradioConfig.from_radio(make_radio("vit").config, out_features=["stage9"])


@torch.no_grad()
def test_attentions(make_radio: Make, images: Tensor) -> None:
    backbone = AmradioBackbone.from_radio(make_radio("vit"), attn_implementation="eager")
    assert [tuple(w.shape) for w in backbone(images, output_attentions=True).attentions] == [(2, 2, 101, 101)] * 3
