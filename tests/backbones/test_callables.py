"""Functions and modules as backbones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import amradio
from amradio.backbones.callables import CallableBackbone
from amradio.errors import CapabilityError, OptionError, ResolutionError


def averaged(images: Tensor) -> Tensor:
    """The mean colour of every 8x8 patch: [B, 3, h, w]."""
    return F.avg_pool2d(images, 8)


class Patches(nn.Module):
    """Patch embedding with two prefix tokens, as a sequence."""

    patch_size = 16

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, 6, 16, 16)
        self.prefix = nn.Parameter(torch.randn(1, 2, 6))

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.proj(images).flatten(2).mT
        return torch.cat([self.prefix.expand(len(tokens), -1, -1), tokens], dim=1)


def test_a_map_is_enough() -> None:
    backbone = amradio.load_backbone(averaged)
    assert isinstance(backbone, amradio.Backbone)
    assert (backbone.patch_size, backbone.min_resolution_step) == (8, 8)
    assert (backbone.embed_dim, backbone.summary_dim) == (3, 3)
    assert backbone.preferred_resolution is None
    assert backbone.identity.source == "averaged"
    images = torch.rand(2, 3, 16, 40)
    summary, features = backbone(images, "NCHW")
    torch.testing.assert_close(features, averaged(images))
    torch.testing.assert_close(summary, images.mean(dim=(2, 3)))
    torch.testing.assert_close(backbone(images).features, averaged(images).flatten(2).mT)
    torch.testing.assert_close(backbone(images, "NHWC").features, averaged(images).permute(0, 2, 3, 1))


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: (x.amax((2, 3)), averaged(x)),
        lambda x: [x.amax((2, 3)), averaged(x).flatten(2).mT],
        lambda x: {"summary": x.amax((2, 3)), "features": averaged(x), "more": 1},
        lambda x: {"x_norm_clstoken": x.amax((2, 3)), "x_norm_patchtokens": averaged(x).flatten(2).mT},
        lambda x: amradio.RadioOutput(x.amax((2, 3)), averaged(x)),
    ],
)
def test_every_form_of_output_is_understood(fn: Any) -> None:
    backbone = amradio.load_backbone(fn, patch_size=8)
    images = torch.rand(2, 3, 24, 16)
    summary, features = backbone(images, "NCHW")
    torch.testing.assert_close(summary, images.amax((2, 3)))
    torch.testing.assert_close(features, averaged(images))


def test_a_module_with_prefix_tokens() -> None:
    module = Patches().train()
    backbone = amradio.load_backbone(module, num_prefix_tokens=2, dtype=torch.float64)
    assert not module.training
    assert all(p.requires_grad for p in module.parameters())  # it is the caller's
    assert (backbone.patch_size, backbone.embed_dim) == (16, 6)
    images = torch.rand(1, 3, 32, 48)
    found = backbone(images).features
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, module(images.double())[:, 2:])


def test_channels_last_maps() -> None:
    backbone = amradio.load_backbone(lambda x: averaged(x).permute(0, 2, 3, 1), map_fmt="NHWC")
    images = torch.rand(1, 3, 16, 24)
    torch.testing.assert_close(backbone(images, "NCHW").features, averaged(images))


def test_images_are_standardised_where_statistics_are_given() -> None:
    backbone = amradio.load_backbone(averaged, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 4.0))
    summary = backbone(torch.ones(1, 3, 8, 8)).summary
    torch.testing.assert_close(summary, torch.tensor([[0.9, 0.4, 0.175]]))


def test_what_is_said_about_sizes_is_kept() -> None:
    backbone = amradio.load_backbone(averaged, min_resolution_step=32, preferred_resolution=(64, 96), name="mean")
    assert backbone.preferred_resolution == (64, 96)
    assert backbone.get_nearest_supported_resolution(50, 5) == (64, 32)
    with pytest.raises(ResolutionError, match=r"mean needs multiples of 32 pixels, got 40x32 \(height x width\)"):
        backbone(torch.rand(1, 3, 40, 32))
    with pytest.raises(ResolutionError, match=r"must be \[B, 3, H, W\], got the shape \[3, 32, 32\]"):
        backbone(torch.rand(3, 32, 32))
    with pytest.raises(OptionError, match="Unsupported feature_fmt: 'CHW'"):
        backbone(torch.rand(1, 3, 32, 32), "CHW")


def test_the_probe_runs_without_gradients_where_the_module_is() -> None:
    seen = []

    def spy(images: Tensor) -> Tensor:
        seen.append((images.shape, images.device.type, torch.is_grad_enabled()))
        return averaged(images)

    CallableBackbone(spy)
    assert seen == [((1, 3, 224, 224), "cpu", False)]


@pytest.mark.parametrize(
    ("fn", "options", "message"),
    [
        (lambda x: x.mean((2, 3)), {}, r"returned features of the shape \[1, 3\]"),
        (lambda x: averaged(x).flatten(2).mT, {}, "patch size of .* cannot be told from features of the shape"),
        (averaged, {"patch_size": 16}, "is no 14x14 grid of 16-pixel patches"),
        (Patches(), {}, r"gave 198 tokens for a grid of 14x14 patches.*should be 196: 0 class and register tokens"),
        (lambda x: {"logits": x}, {}, r"returned a dict with \['logits'\]. It must return \(summary"),
        (lambda x: (x, x, x), {}, "returned a tuple of length 3"),
        (lambda x: averaged(x).long(), {}, "returned a tensor of torch.int64"),
        (lambda x: None, {}, "returned NoneType where a floating point tensor was expected"),
        (lambda x: (averaged(x), averaged(x)), {}, r"returned a summary of the shape \[1, 3, 28, 28\]"),
    ],
)
def test_other_outputs_are_refused(fn: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises((CapabilityError, OptionError), match=message):
        amradio.load_backbone(fn, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"map_fmt": "HWC"}, r"map_fmt must be one of \['NCHW', 'NHWC'\]"),
        ({"patch_size": 0}, "patch_size must be at least 1 pixel, got 0"),
        ({"min_resolution_step": -1}, "min_resolution_step must be at least 1 pixel, got -1"),
        ({"preferred_resolution": (1, 2, 3)}, r"preferred_resolution must be \(height, width\)"),
        ({"std": (1, 1, 1)}, "mean and std must be given together"),
        ({"mean": (0, 0, 0), "std": (1, 0, 1)}, "must be 3 numbers each, std above 0"),
        ({"adaptor": "clip"}, "adaptor='clip' is for RADIO models; a callable has no adaptors"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        amradio.load_backbone(averaged, **options)
