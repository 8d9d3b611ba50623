"""A tower's tokens are those of the model, in the order and number that its config says."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

pytest.importorskip("transformers")

import amradio
from amradio.errors import CapabilityError, ConfigError, OptionError, ResolutionError
from amradio.hf import AmradioConfig, AmradioModel, AmradioTower, AmradioTowerConfig
from amradio.models.configs import ERadioConfig, RadioConfig, ViTConfig
from amradio.models.radio import RadioModel

TRUNK = ViTConfig(
    embed_dim=24, depth=3, num_heads=2, mlp_hidden_dim=32, patch_size=8, position_grid=(8, 8), num_cls_tokens=3,
    num_registers=2,
)  # fmt: skip

HYBRID = ERadioConfig(dim=6, in_dim=8, depths=(1, 1, 2, 1), num_heads=(1, 1, 2, 4), window_size=(None, None, (4, 4), 4))


@pytest.fixture(scope="module")
def radio() -> RadioModel:
    """Random; its summary is made of the first and the third class token."""
    torch.manual_seed(0)
    model = RadioModel(RadioConfig(backbone=TRUNK, summary_idxs=(0, 2)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3)
    return model.eval()


def tower(radio: RadioModel, **options: Any) -> AmradioTower:
    return AmradioTower.from_encoder(AmradioModel.from_radio(radio), **options).eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_by_default_tokens_are_the_features(radio: RadioModel, images: Tensor) -> None:
    found = tower(radio)(images)
    summary, features = radio(images)
    assert torch.equal(found.last_hidden_state, features)
    assert torch.equal(found.pooler_output, summary)
    assert found.hidden_states is None
    assert torch.equal(tower(radio)(images, return_dict=False)[0], features)


@torch.no_grad()
def test_tokens_before_the_patches(radio: RadioModel, images: Tensor) -> None:
    summary, features = radio(images)
    kept = tower(radio, prefix_tokens="summary")(images).last_hidden_state
    assert torch.equal(kept[:, :2].flatten(1), summary)
    assert torch.equal(kept[:, 2:], features)
    every = tower(radio, prefix_tokens="all")(images).last_hidden_state
    assert every.shape == (2, 5 + 24, 24)
    assert torch.equal(every[:, [0, 2]], kept[:, :2])


def slow_average(maps: Tensor, factor: int) -> Tensor:
    """[B, h, w, C] to [B, N, C], token by token."""
    rows = [
        maps[:, y : y + factor, x : x + factor].flatten(1, 2).mean(1)
        for y in range(0, maps.shape[1], factor)
        for x in range(0, maps.shape[2], factor)
    ]
    return torch.stack(rows, 1)


def slow_shuffle(maps: Tensor, factor: int) -> Tensor:
    """[B, h, w, C] to [B, N, f² C]: the patches of a token side by side, from left to right and from top to bottom."""
    rows = [
        torch.cat([maps[:, y + dy, x + dx] for dy in range(factor) for dx in range(factor)], -1)
        for y in range(0, maps.shape[1], factor)
        for x in range(0, maps.shape[2], factor)
    ]
    return torch.stack(rows, 1)


@torch.no_grad()
@pytest.mark.parametrize(
    ("reduction", "slow", "wide"), [("average", slow_average, 1), ("pixel_shuffle", slow_shuffle, 4)]
)
def test_fewer_tokens(radio: RadioModel, images: Tensor, reduction: str, slow: Any, wide: int) -> None:
    made = tower(radio, reduction=reduction)
    maps = radio(images, feature_fmt="NHWC").features
    torch.testing.assert_close(made(images).last_hidden_state, slow(maps, 2), atol=1e-6, rtol=1e-6)
    assert (made.config.hidden_size, made.config.patch_size) == (24 * wide, 16)
    assert made.config.num_tokens(32, 48) == 6
    with pytest.raises(
        ResolutionError, match=r"32 x 40 pixels do not consist of whole tokens of 16 x 16 .* Nearest: 32 x 32"
    ):
        made(torch.rand(1, 3, 32, 40))


@torch.no_grad()
def test_hidden_states_are_reduced_likewise(radio: RadioModel, images: Tensor) -> None:
    made = tower(radio, reduction="average", prefix_tokens="summary")
    every = made(images, output_hidden_states=True)
    assert len(every.hidden_states) == 4
    assert torch.equal(every.hidden_states[-1], every.last_hidden_state)
    maps = radio.forward_intermediates(
        images, indices=[0, 1, 2], norm=False, output_fmt="NCHW", intermediates_only=True
    )
    for state, block in zip(every.hidden_states[1:-1], maps, strict=False):
        features = block.features if hasattr(block, "features") else block
        torch.testing.assert_close(state[:, 2:], slow_average(features.permute(0, 2, 3, 1), 2), atol=1e-5, rtol=1e-5)
    some = made(images, output_hidden_states=[-2, 3])
    assert [s is None for s in some.hidden_states] == [True, True, False, False]
    assert torch.equal(some.hidden_states[2], every.hidden_states[2])
    with pytest.raises(OptionError, match="There is no hidden state -5: they go from 0 to 3, or from -4 to -1"):
        made(images, output_hidden_states=-5)


@torch.no_grad()
def test_windows_do_not_change_the_order(radio: RadioModel) -> None:
    x = torch.rand(1, 3, 32, 64)
    made = AmradioTower.from_encoder(AmradioModel.from_radio(radio, vitdet_window_size=2, vitdet_num_global=1))
    plain = RadioModel(radio.config)
    plain.load_state_dict(radio.state_dict())
    plain.eval().set_vitdet(2, num_global=1)
    states = made.eval()(x, output_hidden_states=True).hidden_states
    assert torch.equal(states[-1], plain(x).features)
    blocks = plain.forward_intermediates(x, indices=[1], norm=False, output_fmt="NLC", intermediates_only=True)
    middle = blocks[0].features if hasattr(blocks[0], "features") else blocks[0]
    torch.testing.assert_close(states[2], middle)


def test_configs_that_cannot_be(radio: RadioModel) -> None:
    with pytest.raises(ConfigError, match=r"prefix_tokens must be one of .*'summary'.*, got 'cls'"):
        tower(radio, prefix_tokens="cls")
    with pytest.raises(ConfigError, match="4 times the channels, which prefix tokens do not have"):
        tower(radio, prefix_tokens="all", reduction="pixel_shuffle")
    with pytest.raises(ConfigError, match="reduction_factor must be a whole number from 1, got 0"):
        tower(radio, reduction="average", reduction_factor=0)
    with pytest.raises(ConfigError, match=r"Images of 40 pixels .* multiples of 16\. Nearest: 32"):
        tower(radio, reduction="average", image_size=40)
    with pytest.raises(ConfigError, match=r"image_size must be a number of pixels, .* got '64'"):
        tower(radio, image_size="64")
    mean = RadioConfig(backbone=dataclasses.replace(TRUNK, num_cls_tokens=0, pool="avg"))
    with pytest.raises(ConfigError, match="made of no tokens of its own"):
        AmradioTowerConfig(encoder_config=AmradioConfig.from_radio(mean), prefix_tokens="summary")
    with pytest.raises(OptionError, match=r"got a RadioModel\. Wrap"):
        AmradioTower.from_encoder(radio)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="pooling: not options of a tower"):
        tower(radio, pooling=2)


@torch.no_grad()
def test_e_radio_gives_its_last_stage() -> None:
    model = RadioModel(RadioConfig(backbone=HYBRID)).eval()
    made = tower(model, reduction="pixel_shuffle")
    x = torch.rand(1, 3, 64, 64)
    features = model(x, feature_fmt="NHWC").features
    assert torch.equal(made(x, output_hidden_states=-1).hidden_states[-1], slow_shuffle(features, 2))
    with pytest.raises(CapabilityError, match="only the last one"):
        made(x, output_hidden_states=-2)
    with pytest.raises(ConfigError, match="E-RADIO has no class tokens"):
        tower(model, prefix_tokens="summary")


@torch.no_grad()
def test_it_is_saved_and_found_by_auto_classes(radio: RadioModel, images: Tensor, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModel

    made = tower(radio, reduction="pixel_shuffle", image_size=64)
    made.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, AmradioTowerConfig)
    assert (config.hidden_size, config.patch_size, config.image_size, config.num_hidden_layers) == (96, 16, 64, 3)
    again = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(again(images).last_hidden_state, made(images).last_hidden_state)
    fresh = AutoModel.from_config(config)
    assert fresh(images).last_hidden_state.shape == (2, 6, 96)
    assert fresh(images).last_hidden_state.isfinite().all()


def test_sizes_are_those_that_processors_make(radio: RadioModel) -> None:
    encoder = AmradioModel.from_radio(radio, image_size=40)
    made = AmradioTower.from_encoder(encoder, reduction="pixel_shuffle")
    assert (made.config.image_size, encoder.config.image_size) == (32, 40)
    processor = made.config.image_processor()
    pixels = processor(Image.new("RGB", (90, 70)), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 32, 32)
    assert made.config.num_tokens(32, 32) == made(pixels).last_hidden_state.shape[1] == 4


def test_a_frozen_tower_stays_in_evaluation_mode(radio: RadioModel) -> None:
    copy = RadioModel(radio.config)
    made = AmradioTower.from_encoder(AmradioModel.from_radio(copy))
    assert made.train().training
    made.requires_grad_(False)
    assert not made.train().training
    assert not made.encoder.training


@torch.no_grad()
def test_published_names() -> None:
    made = AmradioTower.from_encoder("amradio-tiny", reduction="average", dtype=torch.bfloat16)
    assert made.dtype == torch.bfloat16
    x = torch.rand(1, 3, 64, 96)
    wanted = slow_average(
        amradio.load("amradio-tiny", dtype=torch.bfloat16)(x.bfloat16(), feature_fmt="NHWC").features, 2
    )
    torch.testing.assert_close(made(x.bfloat16()).last_hidden_state, wanted, atol=2e-2, rtol=2e-2)
