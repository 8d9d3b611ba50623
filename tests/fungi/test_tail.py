"""Split forward passes, against gradients that plain autograd materialises for every token."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import amradio
from amradio.backbones.adapter import Geometry
from amradio.backbones.callables import CallableBackbone
from amradio.backbones.timm import TimmBackbone
from amradio.errors import CapabilityError, ResolutionError
from amradio.fungi import Split, make_splitter
from amradio.fungi.layers import find_layer
from amradio.fungi.tail import SplitsLastBlock, TrunkSplitter
from amradio.fungi.taps import TapSplitter
from amradio.weights.checkpoint import Identity

TRUNKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layer scale": {"layer_scale": 0.3, "final_norm": True},
    "registers": {"num_cls_tokens": 2, "num_registers": 3, "final_norm": True},
    "no bias": {"qkv_bias": False, "mlp": "swiglu"},
    "scaled norm": {"scaled_norm": True, "mlp_norm": True},
    "average": {"pool": "avg", "final_norm": True},
    "one block": {"depth": 1},
}
HF: dict[str, dict[str, Any]] = {
    "Dinov2": {},
    "Dinov2WithRegisters": {"num_register_tokens": 3},
    "DINOv3ViT": {"num_register_tokens": 4, "intermediate_size": 64},
    "ViT": {"intermediate_size": 64, "arguments": {"add_pooling_layer": False}},
    "CLIPVision": {"intermediate_size": 64},
    "SiglipVision": {"intermediate_size": 64},
}


def materialised(backbone: Any, layer: nn.Linear, images: Tensor, loss: Callable[[Any], Tensor]) -> Tensor:
    """The gradient [B, T, H, J] of a loss with respect to weight and bias, a copy of which every token has."""
    copies: list[Tensor] = []

    def own_weights(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        inputs = args[0]
        if layer.bias is not None:
            inputs = F.pad(inputs, (0, 1), value=1.0)
        weight = layer.weight if layer.bias is None else torch.cat([layer.weight, layer.bias[:, None]], 1)
        copies.append(weight.detach().expand(*inputs.shape[:2], -1, -1).clone().requires_grad_())
        return torch.einsum("bthj,btj->bth", copies[-1], inputs)

    handle = layer.register_forward_hook(own_weights)
    try:
        output = backbone(images)
    finally:
        handle.remove()
    return torch.autograd.grad(loss(output), copies[0])[0]


def loss_of(output: Any) -> Tensor:
    """Something that depends on the summary and on all features, differently on each."""
    summary, features = output
    weights = torch.linspace(-1, 1, features.shape[-1])
    return (summary.tanh() * 3).sum() + (features.sin() * weights).sum(-1).square().sum()


def outer(split: Split, upstream: Tensor, bias: bool) -> Tensor:
    inputs = F.pad(split.inputs, (0, 1), value=1.0) if bias else split.inputs
    return upstream[..., None] * inputs[..., None, :]


def check(backbone: Any, kind: type, layer: str | None = None, size: tuple[int, int] = (16, 24)) -> None:
    splitter = make_splitter(backbone, layer)
    assert isinstance(splitter, kind)
    _, module = find_layer(backbone, layer)
    images = torch.rand(2, 3, *size)
    split = splitter(images)
    expected_output = backbone(images)
    torch.testing.assert_close(split.summary.detach(), expected_output[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(split.patches.detach(), expected_output[1], atol=1e-5, rtol=1e-5)
    summary, patches = (t.detach().requires_grad_() for t in (split.summary, split.patches))
    gradients = torch.autograd.grad(loss_of((summary, patches)), [summary, patches])
    found = outer(split, split.upstream([split.summary, split.patches], gradients), splitter.shape.bias)
    expected = materialised(backbone, module, images, loss_of)
    torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-4)
    # The summary by itself, which need not carry along what it does not depend on.
    only = splitter(images, summary_only=True)
    torch.testing.assert_close(only.summary.detach(), expected_output[0], atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(only.summary)
    short = outer(only, only.upstream([only.summary], [weights]), splitter.shape.bias).sum(1)
    long = materialised(backbone, module, images, lambda o: (o[0] * weights).sum()).sum(1)
    torch.testing.assert_close(short, long, atol=1e-5 * float(long.abs().max()), rtol=1e-4)


def is_clean(module: nn.Module) -> bool:
    return all(
        not m._forward_hooks and not m._forward_pre_hooks and not m._backward_hooks for m in module.modules()
    ) and all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize("name", TRUNKS)
def test_our_own_trunk(name: str, tiny: Any) -> None:
    check(tiny(**TRUNKS[name]), TrunkSplitter)


def test_windows(tiny: Any) -> None:
    model = tiny(depth=5)
    model.set_vitdet(2)
    check(model, TrunkSplitter, size=(32, 32))


@pytest.mark.parametrize("layer", ["blocks.0.attn.proj", "backbone.blocks.1.mlp.fc2", "model.blocks.0.mlp.fc1"])
def test_another_layer_of_our_trunk(layer: str, tiny: Any) -> None:
    check(tiny(), TapSplitter, layer)


@pytest.mark.parametrize("kind", HF)
def test_transformers(kind: str, tmp_path: Path) -> None:
    import transformers

    options = dict(HF[kind])
    arguments = options.pop("arguments", {})
    trunk = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8, "image_size": 32}
    model = getattr(transformers, f"{kind}Model")(
        getattr(transformers, f"{kind}Config")(**{**trunk, **options}), **arguments
    )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(tmp_path)
    statistics = {"image_mean": (0.5, 0.4, 0.3), "image_std": (0.2, 0.3, 0.4)}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(statistics))
    backbone: Any = amradio.load_backbone(f"hf:{tmp_path}")
    check(backbone, TapSplitter)
    splitter = make_splitter(backbone)
    split = splitter(torch.rand(1, 3, 16, 16))
    registers = options.get("num_register_tokens", 0)
    has_class_token = kind != "SiglipVision"
    assert split.prefix.shape == (1, has_class_token + registers, 32)
    assert splitter.num_cls_tokens == has_class_token
    if kind.startswith("D"):  # whose summary is the first of the final tokens
        torch.testing.assert_close(split.prefix[:, 0], split.summary)
    assert is_clean(backbone)


class TimmLike(nn.Module):
    """A vision transformer as timm builds it, with a class token and registers."""

    num_prefix_tokens, num_reg_tokens = 3, 2

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 16, 8, 8)
        self.prefix = nn.Parameter(torch.randn(1, 3, 16))
        self.blocks = nn.ModuleList(TimmBlock() for _ in range(2))
        self.norm = nn.LayerNorm(16)

    def forward_features(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images).flatten(2).mT
        x = torch.cat([self.prefix.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool) -> Tensor:
        return x[:, 0]


class TimmBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.attn = nn.Module()
        self.attn.qkv, self.attn.proj = nn.Linear(16, 48), nn.Linear(16, 16)
        self.fc = nn.Linear(16, 16)
        self.gamma = nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attn.qkv(self.norm1(x))[:, None].chunk(3, dim=-1)
        y = self.attn.proj(F.scaled_dot_product_attention(q, k, v)[:, 0])
        y.mul_(self.gamma)  # in place, as some do
        x = x + y
        return x + F.gelu(self.fc(self.norm2(x)))


def geometry(width: int) -> Geometry:
    return Geometry(patch_size=8, embed_dim=width, summary_dim=width, min_resolution_step=8)


def timm_like() -> TimmBackbone:
    torch.manual_seed(3)
    identity = Identity(source="toy", layout="timm")
    return TimmBackbone(TimmLike().eval(), geometry(16), identity, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


def test_timm() -> None:
    backbone = timm_like()
    check(backbone, TapSplitter)
    split = make_splitter(backbone)(torch.rand(1, 3, 16, 16))
    assert split.prefix.shape == (1, 3, 16)
    assert make_splitter(backbone).num_cls_tokens == 1
    assert is_clean(backbone)


def test_a_callable() -> None:
    network = TimmLike().eval()
    network.forward = network.forward_features  # type: ignore[method-assign]
    backbone = CallableBackbone(network, patch_size=8, num_prefix_tokens=3)
    check(backbone, TapSplitter)
    assert make_splitter(backbone)(torch.rand(1, 3, 16, 16)).prefix.shape == (1, 3, 16)


def test_parameters_that_want_gradients_get_none(tiny: Any) -> None:
    for backbone in (tiny().requires_grad_(True), timm_like().requires_grad_(True)):
        split = make_splitter(backbone)(torch.rand(2, 3, 16, 16))
        assert not split.inputs.requires_grad
        split.upstream([split.summary], [torch.ones_like(split.summary)])
        assert is_clean(backbone)
        assert all(p.requires_grad for p in backbone.parameters())
    backbone = tiny()
    make_splitter(backbone)(torch.rand(1, 3, 16, 16))
    assert not any(p.requires_grad for p in backbone.parameters())


def test_nothing_before_the_layer_is_recorded() -> None:
    backbone = timm_like().requires_grad_(True)
    split = make_splitter(backbone)(torch.rand(1, 3, 16, 16))
    seen, todo = set(), [split.patches.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [n for n, _ in node.next_functions]
    variables = {id(n.variable) for n in seen if hasattr(n, "variable")}
    names = {n for n, p in backbone.named_parameters() if id(p) in variables}
    assert names <= {n for n in names if n.startswith(("network.norm.", "network.blocks.1."))}
    assert id(split.leaf) in variables
    assert "network.blocks.1.attn.qkv.weight" not in names


@pytest.mark.parametrize("make", ["trunk", "tap"])
def test_it_works_inside_inference_mode_and_leaves_modes_as_they_were(make: str, tiny: Any) -> None:
    backbone = tiny() if make == "trunk" else timm_like().requires_grad_(False)
    images = torch.rand(1, 3, 16, 16)
    splitter = make_splitter(backbone)
    with torch.no_grad():
        outside = splitter(images)
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        split = splitter(images * 1)  # a tensor of inference mode
        assert torch.is_inference_mode_enabled()
        gradient = split.upstream([split.summary], [torch.ones_like(split.summary)])
    assert torch.is_grad_enabled()
    torch.testing.assert_close(gradient, outside.upstream([outside.summary], [torch.ones_like(outside.summary)]))


def test_hooks_go_away_when_the_network_fails() -> None:
    backbone = timm_like()
    splitter = make_splitter(backbone)
    handle = backbone.network.norm.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        splitter(torch.rand(1, 3, 16, 16))
    handle.remove()
    assert is_clean(backbone)
    assert torch.is_grad_enabled()


def test_tiny_gradients_survive_half_precision(tiny: Any) -> None:
    model = tiny(final_norm=True)
    images = torch.rand(2, 3, 16, 16)
    weights = torch.randn(2, 32)
    exact = make_splitter(model)(images)
    expected = exact.upstream([exact.summary], [weights * 1e-9])
    half = make_splitter(model.half())(images)
    found = half.upstream([half.summary], [weights * 1e-9])
    assert found.dtype == torch.float32
    cosine = F.cosine_similarity(found.flatten(1) * 1e9, expected.flatten(1) * 1e9)
    assert (cosine > 0.999).all()


def test_a_backbone_may_know_by_itself(tiny: Any) -> None:
    model = tiny()

    class Own(nn.Module):
        def split_last_block(self, layer: str | None = None) -> Any:
            return make_splitter(model, layer)

    assert isinstance(Own(), SplitsLastBlock)
    assert make_splitter(Own(), "blocks.1.attn.proj").layer == "model.blocks.1.attn.proj"


# ---- what is refused ----


def test_names_of_layers(tiny: Any) -> None:
    model = tiny()
    assert find_layer(model)[0] == "model.blocks.1.attn.proj"
    for name in ("backbone.blocks.1.attn.proj", "blocks.1.attn.proj", "module.model.blocks.1.attn.proj"):
        assert find_layer(model, name)[1] is model.blocks[1].attn.proj
    with pytest.raises(CapabilityError, match=r"no linear layer 'blocks.7.attn.proj'. Nearest names: model.blocks"):
        find_layer(model, "blocks.7.attn.proj")
    with pytest.raises(
        CapabilityError, match=r"'attn.proj' is the end of several layers' names: model.blocks.0.attn.p"
    ):
        find_layer(model, "attn.proj")
    with pytest.raises(CapabilityError, match=r"model.blocks.0.norm1 is a LayerNorm, and gradients are taken of a"):
        find_layer(model, "blocks.0.norm1")
    convolutional = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 4))
    with pytest.raises(CapabilityError, match=r"Say which linear layer's gradient is wanted, with layer=.* are: 1\."):
        find_layer(convolutional)


def test_attention_of_torch_is_passed_over() -> None:
    module = nn.ModuleDict(
        {"attn": nn.MultiheadAttention(8, 2), "self_attn": nn.ModuleDict({"out_proj": nn.Linear(8, 8)})}
    )
    assert find_layer(module)[0] == "self_attn.out_proj"


class Odd(nn.Module):
    """A network whose layers are used in ways that single images have no gradients of."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.layer, self.embed = nn.Linear(4, 4), nn.Conv2d(3, 4, 8, 8)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images).flatten(2).mT
        if self.how == "unused":
            return x
        if self.how == "twice":
            return self.layer(self.layer(x))
        if self.how == "merged":
            return self.layer(x.flatten(0, 1)).view_as(x)
        with torch.no_grad():
            return self.layer(x) * 1


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("unused", r"fn.layer is not called in a forward pass: it is unused, or"),
        ("twice", "fn.layer is called more than once"),
        ("merged", r"fn.layer gives the shape \[8, 4\] for 2 images"),
        ("hidden", "does not depend on the layer through operations that torch records"),
    ],
)
def test_layers_without_gradients_of_single_images(how: str, message: str) -> None:
    backbone = CallableBackbone(Odd(how), patch_size=8)
    splitter = make_splitter(backbone, "layer")

    def run() -> None:
        split = splitter(torch.rand(2, 3, 16, 16))
        split.upstream([split.summary], [torch.ones_like(split.summary)])

    with pytest.raises(CapabilityError, match=message):
        run()
    assert is_clean(backbone)


def test_only_modules_have_layers() -> None:
    with pytest.raises(CapabilityError, match="the backbone is a object"):
        make_splitter(object())


@pytest.mark.parametrize("make", ["trunk", "tap"])
def test_sizes_are_checked_before_anything_runs(make: str, tiny: Any) -> None:
    splitter = make_splitter(tiny() if make == "trunk" else timm_like())
    with pytest.raises(ResolutionError, match=r"17x16 .height x width.. The nearest supported size is 16x16"):
        splitter(torch.rand(1, 3, 17, 16))
    with pytest.raises(ResolutionError, match=r"must be \[B, 3, H, W\], got the shape \[3, 16, 16\]"):
        splitter(torch.rand(3, 16, 16))
