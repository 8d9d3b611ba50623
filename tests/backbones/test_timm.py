"""The adapter of timm's models, against stand-ins that have the attributes and methods of timm 1.0."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import amradio
from amradio.errors import CapabilityError, MissingDependencyError, OptionError, UnknownModelError

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
DESCRIBED = {"architecture": "vit_toy", "tag": "best", "mean": MEAN, "std": STD, "license": "apache-2.0"}


class Tokens(nn.Module):
    """What timm's vision transformers look like from outside: one class token and two registers."""

    num_prefix_tokens = 3
    num_features = head_hidden_size = 6
    feature_info = ({"reduction": 8}, {"reduction": 8})

    def __init__(self, dynamic_img_size: bool = False) -> None:
        super().__init__()
        self.dynamic_img_size = dynamic_img_size
        self.pretrained_cfg = {**DESCRIBED, "input_size": (3, 32, 32), "fixed_input_size": True}
        self.pos_embed = nn.Parameter(torch.randn(1, 3, 6))
        self.proj = nn.Conv2d(3, 6, 8, 8)

    def forward_features(self, x: Tensor) -> Tensor:
        tokens = self.proj(x).flatten(2).mT
        return torch.cat([self.pos_embed + tokens.mean(1, keepdim=True), tokens], dim=1)

    def forward_head(self, x: Tensor, pre_logits: bool) -> Tensor:
        assert pre_logits
        return x[:, 0]

    def forward_intermediates(
        self, x: Tensor, indices: list[int], norm: bool, output_fmt: str, intermediates_only: bool
    ) -> Any:
        assert indices == sorted(set(indices))
        assert (output_fmt, intermediates_only) == ("NCHW", False)
        return self.forward_features(x), [self.proj(x) * (i + 1) for i in indices]


class Maps(nn.Module):
    """What timm's convolutional networks look like from outside; as Swin, channels last if `last`."""

    num_features = 4
    head_hidden_size = 5
    feature_info = ({"reduction": 8}, {"reduction": 16})

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.output_fmt = "NHWC" if last else "NCHW"
        self.pretrained_cfg = {**DESCRIBED, "input_size": (3, 48, 48), "fixed_input_size": False}
        self.proj, self.head = nn.Conv2d(3, 4, 16, 16), nn.Linear(4, 5)

    def forward_features(self, x: Tensor) -> Tensor:
        maps = self.proj(x)
        return maps.permute(0, 2, 3, 1) if self.output_fmt == "NHWC" else maps

    def forward_head(self, x: Tensor, pre_logits: bool) -> Tensor:
        return self.head(x.mean((1, 2)) if self.output_fmt == "NHWC" else x.mean((2, 3)))

    def forward_intermediates(self, x: Tensor, **_: Any) -> Any:
        raise NotImplementedError


def make_maps(last: bool = False, **options: Any) -> nn.Module:
    if options:
        raise TypeError(f"Maps.__init__() got an unexpected keyword argument {next(iter(options))!r}")
    return Maps(last)


class Hiera(nn.Module):
    """Tokens without a count of prefix tokens."""

    feature_info = ({"reduction": 32},)
    num_features = 4

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.pretrained_cfg = {**DESCRIBED, "input_size": (3, 32, 32)}
        self.pos_embed = nn.Parameter(torch.zeros(1))

    def forward_intermediates(self, *_: Any) -> Any:
        raise NotImplementedError


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Puts a stand-in in timm's place; returns the arguments of every model made."""
    calls: list[dict[str, Any]] = []
    made: dict[str, Callable[..., nn.Module]] = {
        "vit_toy": Tokens,
        "beit_toy": lambda **options: make_maps(**options) if options else Tokens(),
        "resnet_toy": make_maps,
        "swin_toy": lambda **options: make_maps(last=True, **options),
        "hiera_toy": Hiera,
    }

    def create_model(name: str, pretrained: bool, num_classes: int, cache_dir: str, **options: Any) -> nn.Module:
        calls.append({"name": name, "pretrained": pretrained, "num_classes": num_classes, **options})
        architecture, _, tag = name.partition(".")
        if tag not in ("", "best"):
            raise RuntimeError(f"Invalid pretrained tag ({tag}) for {architecture}.")
        return made[architecture](**options)

    timm = types.ModuleType("timm")
    vars(timm).update(
        __version__="1.0.31",
        create_model=create_model,
        is_model=lambda name: name.partition(".")[0] in made,
        list_models=lambda: list(made),
        list_pretrained=lambda: ["vit_toy.best"],
    )
    monkeypatch.setitem(sys.modules, "timm", timm)
    return calls


@pytest.mark.parametrize("size", [(32, 32), (16, 40)])
def test_a_vision_transformer(
    asked: list[dict[str, Any]], size: tuple[int, int], standardised: Callable[[Tensor], Tensor]
) -> None:
    backbone = amradio.load_backbone("timm:vit_toy.best")
    assert asked == [{"name": "vit_toy.best", "pretrained": True, "num_classes": 0, "dynamic_img_size": True}]
    assert isinstance(backbone, amradio.Backbone)
    assert (backbone.patch_size, backbone.embed_dim, backbone.summary_dim) == (8, 6, 6)
    assert backbone.preferred_resolution == (32, 32)
    assert not backbone.training
    assert not any(p.requires_grad for p in backbone.parameters())
    images = torch.rand(2, 3, *size)
    tokens = backbone.network.forward_features(standardised(images))
    found = backbone(images)
    torch.testing.assert_close(found, amradio.RadioOutput(tokens[:, 0], tokens[:, 3:]))
    final, (last, first) = backbone.forward_intermediates(images, [-1, 0], output_fmt="NLC")
    torch.testing.assert_close(final, found)
    torch.testing.assert_close(last, 2 * tokens[:, 3:])
    torch.testing.assert_close(first, tokens[:, 3:])
    only = backbone.forward_intermediates(images, 1, intermediates_only=True)
    assert [tuple(m.shape) for m in only] == [(2, 6, size[0] // 8, size[1] // 8)]


def test_its_identity(asked: list[dict[str, Any]]) -> None:
    identity = amradio.load_backbone("timm:vit_toy.best").identity
    assert (identity.source, identity.version, identity.license) == ("timm:vit_toy.best", "vit_toy.best", "apache-2.0")
    untrained = amradio.load_backbone("timm:vit_toy", pretrained=False).identity
    assert (untrained.version, untrained.license) == (None, None)


@pytest.mark.parametrize("name", ["resnet_toy", "swin_toy"])
def test_a_convolutional_network(
    asked: list[dict[str, Any]], name: str, standardised: Callable[[Tensor], Tensor]
) -> None:
    backbone = amradio.load_backbone(f"timm:{name}")
    assert "dynamic_img_size" not in asked[-1]
    assert (backbone.patch_size, backbone.embed_dim, backbone.summary_dim) == (16, 4, 5)
    assert backbone.get_nearest_supported_resolution(30, 90) == (32, 96)
    images = torch.rand(2, 3, 32, 48)
    maps = backbone.network.proj(standardised(images))
    summary, features = backbone(images, "NCHW")
    torch.testing.assert_close(features, maps)
    torch.testing.assert_close(summary, backbone.network.head(maps.mean((2, 3))))


def test_a_model_of_one_size_says_so(asked: list[dict[str, Any]]) -> None:
    backbone = amradio.load_backbone("timm:beit_toy")
    assert backbone.get_nearest_supported_resolution(100, 7) == (32, 32)
    with pytest.raises(amradio.AmradioError, match=r"timm:beit_toy accepts one size only, got 40x32.*size is 32x32"):
        backbone(torch.rand(1, 3, 40, 32))


def test_models_that_do_not_describe_their_tokens_are_refused(asked: list[dict[str, Any]]) -> None:
    with pytest.raises(
        CapabilityError, match=r"'hiera_toy' \(Hiera\) does not say which part of its output are features"
    ):
        amradio.load_backbone("timm:hiera_toy")


def test_unknown_names_and_weights_are_refused(asked: list[dict[str, Any]]) -> None:
    with pytest.raises(UnknownModelError, match=r"timm 1.0.31 has no model 'vit_tay'. Nearest names: vit_toy"):
        amradio.load_backbone("timm:vit_tay")
    with pytest.raises(UnknownModelError, match=r"Invalid pretrained tag \(worst\).*Nearest names: vit_toy.best"):
        amradio.load_backbone("timm:vit_toy.worst")


@pytest.mark.parametrize("option", [{"token": "x"}, {"revision": "main"}, {"local_files_only": True}])
def test_options_that_timm_has_not_are_refused(asked: list[dict[str, Any]], option: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"timm takes no {next(iter(option))}="):
        amradio.load_backbone("timm:vit_toy", **option)


def test_without_timm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'amradio\[timm\]'.*torchvision that fits"):
        amradio.load_backbone("timm:vit_small_patch16_224")
