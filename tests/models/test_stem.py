"""The convolutional stem against the network that it stands for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import amradio
from amradio.errors import ConfigError, LayoutError
from amradio.models.configs import RadioConfig, ViTConfig
from amradio.models.efficientnet import EfficientNetLite, folded_norms
from amradio.models.patches import PatchGenerator
from amradio.models.radio import RadioModel
from amradio.models.stem import EfficientNetStem

TRUNK = ViTConfig(
    embed_dim=32, depth=2, num_heads=2, mlp_hidden_dim=64, stem="efficientnet-lite0", position_grid=(4, 4)
)


@pytest.fixture(scope="module")
def network() -> EfficientNetLite:
    torch.manual_seed(0)
    network = EfficientNetLite(16).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    return network


def test_folded_norms_change_nothing(network: EfficientNetLite) -> None:
    folded = EfficientNetLite(16, folded=True)
    folded.load_state_dict(folded_norms(network.state_dict()))
    images = torch.randn(2, 3, 80, 112)
    with torch.inference_mode():
        torch.testing.assert_close(folded(images)[0], network(images)[0], atol=1e-4, rtol=1e-4)
        for stride, maps in network.maps(images).items():
            torch.testing.assert_close(folded.maps(images)[stride], maps, atol=1e-4, rtol=1e-4)
            assert maps.shape[-2:] == (-(-80 // stride), -(-112 // stride))


def test_tokens_are_the_two_maps_side_by_side(network: EfficientNetLite) -> None:
    stem = EfficientNetStem(432, 1)
    stem.network.load_state_dict(folded_norms(network.state_dict()))
    with torch.no_grad():
        stem.project.weight.copy_(torch.eye(432))
        stem.project.bias.zero_()
    images = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        tokens, maps = stem(images)[0], network.maps(images)
    grid = tokens.unflatten(1, (4, 6))
    torch.testing.assert_close(grid[..., :112], maps[16].permute(0, 2, 3, 1), atol=1e-4, rtol=1e-4)
    # Away from the border every fine position is a weighted mean (3/4, 1/4 on each axis) of its coarse neighbours.
    coarse = maps[32].permute(0, 2, 3, 1)
    rows = 0.75 * coarse[:, 0] + 0.25 * coarse[:, 1]
    torch.testing.assert_close(grid[:, 1, 1, 112:], 0.75 * rows[:, 0] + 0.25 * rows[:, 1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [(16, 16), (48, 80), (64, 64), (112, 64)])
def test_a_model_with_this_stem_takes_any_multiple_of_sixteen(size: tuple[int, int]) -> None:
    model = RadioModel(RadioConfig(backbone=TRUNK)).eval()
    with torch.inference_mode():
        summary, features = model(torch.rand(2, 3, *size), feature_fmt="NCHW")
    assert summary.shape == (2, 32)
    assert features.shape == (2, 32, size[0] // 16, size[1] // 16)


def test_training_and_evaluation_are_alike() -> None:
    stem = EfficientNetStem(8, 2)
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        for trained, evaluated in zip(stem.train()(images), stem.eval()(images[:1]), strict=True):
            torch.testing.assert_close(trained[:1], evaluated, atol=1e-6, rtol=1e-5)


def test_the_pooled_vector_reaches_the_class_tokens_and_no_register(network: EfficientNetLite) -> None:
    generator = PatchGenerator(dataclasses.replace(TRUNK, num_cls_tokens=2, num_registers=3)).eval()
    stem = generator.embedder
    assert isinstance(stem, EfficientNetStem)
    stem.network.load_state_dict(folded_norms(network.state_dict()))
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        vector, prefix = network(images)[0], generator(images)[:, :5]
        added = (prefix - generator.cls_token.token).numpy()
    vector = vector.double().numpy()
    normalised = (vector - vector.mean(1, keepdims=True)) / np.sqrt(vector.var(1, keepdims=True) + 1e-5)
    weight, bias = (x.detach().double().numpy() for x in (stem.project_pooled.weight, stem.project_pooled.bias))
    np.testing.assert_allclose(added[:, :2].reshape(2, 64), normalised @ weight.T + bias, atol=1e-3)
    assert (added[:, 2:] == 0).all()


def test_it_needs_a_class_token() -> None:
    with pytest.raises(ConfigError, match="needs at least one class token"):
        dataclasses.replace(TRUNK, num_cls_tokens=0)


def test_our_layout_holds_it_and_others_say_that_they_do_not(tmp_path: Path) -> None:
    model = RadioModel(RadioConfig(backbone=TRUNK)).eval()
    path = amradio.save(model, tmp_path / "model.safetensors")
    images = torch.rand(1, 3, 64, 48)
    with torch.inference_mode():
        assert torch.equal(amradio.load(path)(images).features, model(images).features)
    for layout in ("official", "huggingface", "transformers", "timm"):
        with pytest.raises(LayoutError):
            amradio.save(model, tmp_path / layout, layout=layout)


def test_patches_of_another_size() -> None:
    with pytest.raises(ConfigError, match="takes 3 channels to patches of 16 pixels, got in_chans=3 and patch_size=14"):
        dataclasses.replace(TRUNK, patch_size=14)
