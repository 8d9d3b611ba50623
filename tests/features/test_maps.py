"""Photos to feature maps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from amradio import RadioModel
from amradio.backbones.callables import CallableBackbone
from amradio.errors import CapabilityError, ImageError, OptionError, ResolutionError
from amradio.features import attention_map, feature_map, feature_maps
from amradio.images import ResizePolicy, to_tensor
from amradio.models.configs import AdaptorConfig, HeadConfig, RadioConfig, ViTConfig
from amradio.models.output import RadioOutput

OWN_SIZE = ResizePolicy("nearest")


def radio(**options: Any) -> RadioModel:
    head = HeadConfig(input_dim=32, hidden_dim=16, output_dim=24)
    trunk = ViTConfig(embed_dim=32, depth=3, num_heads=2, mlp_hidden_dim=48, patch_size=16, position_grid=(8, 8))
    config = RadioConfig(
        backbone=trunk, summary_idxs=(0,), adaptors={"clip": AdaptorConfig(head_idx=0, summary=head, features=head)}
    )
    return RadioModel(config, **options).eval().requires_grad_(False)


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_equals_a_forward_pass_by_hand() -> None:
    model, picture = radio(), photo(64, 96)
    found = feature_map(model, picture, OWN_SIZE)
    expected = model(to_tensor(picture)[None], feature_fmt="NHWC")
    torch.testing.assert_close(found.features, expected.features[0])
    torch.testing.assert_close(found.summary, expected.summary[0])
    assert found.features.shape == (4, 6, 32)
    assert (found.photo.size, found.photo.mode) == ((96, 64), "RGB")
    np.testing.assert_array_equal(found.photo, picture)
    found.features.requires_grad_()  # an ordinary tensor, not one of inference mode


def test_the_photo_is_what_the_backbone_saw() -> None:
    found = feature_map(radio(), photo(100, 151), ResizePolicy("shortest", (50,)))
    assert found.photo.size == (80, 48)  # 75.5 and 50, to multiples of 16
    assert found.features.shape[:2] == (3, 5)


@pytest.mark.parametrize("layer", [0, 1, -1, -3])
def test_layers_are_those_of_forward_intermediates(layer: int) -> None:
    model, picture = radio(), photo(32, 48)
    found = feature_map(model, picture, OWN_SIZE, layer=layer)
    (expected,) = model.forward_intermediates(to_tensor(picture)[None], [layer], norm=True, intermediates_only=True)
    torch.testing.assert_close(found.features, expected[0].permute(1, 2, 0))
    torch.testing.assert_close(found.summary, expected[0].mean((1, 2)))
    raw = feature_map(model, picture, OWN_SIZE, layer=layer, norm=False)
    (expected,) = model.forward_intermediates(to_tensor(picture)[None], [layer], intermediates_only=True)
    torch.testing.assert_close(raw.features, expected[0].permute(1, 2, 0))


def test_views() -> None:
    model, picture = radio(adaptors=["clip"]), photo(32, 48)
    found = feature_map(model.view("clip"), picture, OWN_SIZE)
    torch.testing.assert_close(found.features, model(to_tensor(picture)[None], feature_fmt="NHWC")["clip"].features[0])
    assert found.features.shape == (2, 3, 24)
    assert feature_map(model.view("backbone"), picture, OWN_SIZE, layer=1).features.shape == (2, 3, 32)
    with pytest.raises(CapabilityError, match="The adaptor 'clip' does not give features of its blocks"):
        feature_map(model.view("clip"), picture, OWN_SIZE, layer=1)
    with pytest.raises(OptionError, match=r"2 outputs \(backbone, clip\); take one of them: model\.view\(NAME\)"):
        feature_map(model, picture, OWN_SIZE)


class Plain(torch.nn.Module):
    """Mean colours of patches; counts its calls, and fails above a number of pixels."""

    def __init__(self, most: int | None = None) -> None:
        super().__init__()
        self.batches: list[int] = []
        self.most = most

    def forward(self, images: torch.Tensor) -> RadioOutput:
        if self.most is not None and images.shape[0] * images.shape[2] * images.shape[3] > self.most:
            raise torch.OutOfMemoryError("fake device out of memory")
        self.batches.append(len(images))
        maps = torch.nn.functional.avg_pool2d(images, 8)
        return RadioOutput(images.mean((2, 3)), maps.flatten(2).transpose(1, 2))


def test_many_photos_of_mixed_sizes_come_in_order() -> None:
    network = Plain()
    backbone = CallableBackbone(network, patch_size=8).eval()
    pictures = [photo(16, 16 + 8 * (i % 2), i) for i in range(10)]
    network.batches.clear()
    found = list(feature_maps(backbone, pictures, OWN_SIZE, batch_size=3))
    for one, picture in zip(found, pictures, strict=True):
        np.testing.assert_array_equal(one.photo, picture)
        torch.testing.assert_close(one.summary, to_tensor(picture).mean((1, 2)))
    assert len(network.batches) < 10  # batched although sizes alternate


def test_photos_are_read_lazily() -> None:
    read = []

    def stream() -> Iterator[Image.Image]:
        for i in range(1000):
            read.append(i)
            yield photo(16, 16, i)

    maps = feature_maps(radio(), stream(), OWN_SIZE, batch_size=2)
    assert not read
    for _ in range(4):
        next(maps)
    assert len(read) == 4


def test_smaller_passes_when_memory_runs_out() -> None:
    network = Plain()
    backbone = CallableBackbone(network, patch_size=8).eval()
    network.batches.clear()
    network.most = 2 * 16 * 16
    pictures = [photo(16, 16, i) for i in range(8)]
    found = list(feature_maps(backbone, pictures, OWN_SIZE, batch_size=8))
    assert network.batches == [2] * 4
    for one, picture in zip(found, pictures, strict=True):
        np.testing.assert_array_equal(one.photo, picture)
    with pytest.raises(ResolutionError, match="Out of memory for one photo alone, at 32 x 32 pixels"):
        feature_map(backbone, photo(32, 32), OWN_SIZE)


def test_refusals() -> None:
    model = radio()
    with pytest.raises(ImageError, match="Expected an RGB picture"):
        feature_map(model, Image.new("L", (32, 32)), OWN_SIZE)
    with pytest.raises(OptionError, match=r"Block index 3 is out of range \(0 to 2"):
        feature_map(model, photo(32, 32), OWN_SIZE, layer=3)
    with pytest.raises(OptionError, match="batch_size must be at least 1"):
        feature_maps(model, [], OWN_SIZE, batch_size=0)
    with pytest.raises(OptionError, match="training mode"):
        feature_maps(model.train(), [], OWN_SIZE)
    backbone = CallableBackbone(Plain(), patch_size=8).eval()
    with pytest.raises(CapabilityError, match="A CallableBackbone does not give features of its blocks"):
        feature_maps(backbone, [], OWN_SIZE, layer=1)


def test_attention() -> None:
    model, picture = radio(adaptors=["clip"]), photo(35, 48)
    found = attention_map(model.view("clip"), picture, OWN_SIZE, layer=1)
    expected = model.prefix_attention(to_tensor(found.photo)[None], 1)[0]
    assert found.patches.shape == (2, 1, 2, 3)
    torch.testing.assert_close(found.patches.flatten(2), expected[..., 1:])
    torch.testing.assert_close(found.prefix, expected[..., :1])
    torch.testing.assert_close(found.patches.sum((2, 3)) + found.prefix.sum(-1), torch.ones(2, 1))
    assert found.num_cls_tokens == 1
    assert found.photo.size == (48, 32)
    backbone = CallableBackbone(Plain(), patch_size=8).eval()
    with pytest.raises(CapabilityError, match="A CallableBackbone does not show its attention"):
        attention_map(backbone, picture, OWN_SIZE)
