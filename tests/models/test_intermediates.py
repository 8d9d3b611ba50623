"""Intermediate features against sums written out block by block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from amradio.errors import CapabilityError, OptionError, ResolutionError
from amradio.models.configs import InterNormalizerConfig
from amradio.models.intermediates import take_indices
from amradio.models.normalizers import InterFeatureNormalizer
from amradio.models.output import RadioOutput
from amradio.models.radio import RadioModel

Toy = Callable[..., RadioModel]
ByHand = Callable[..., list[Tensor]]
DEPTH = 6


def build(toy: Toy, rotation_per_layer: bool | None = None, **args: Any) -> RadioModel:
    """A model of six blocks, with random statistics for its intermediate features if asked for."""
    model = toy("vit_small_patch16_224", model_kwargs={"depth": DEPTH}, **args)
    if rotation_per_layer is not None:
        config = InterNormalizerConfig(num_intermediates=DEPTH, rotation_per_layer=rotation_per_layer)
        model.inter_feature_normalizer = normalizer = InterFeatureNormalizer(model.embed_dim, config)
        for buffer in normalizer.buffers():
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    return model


# ---- indices ----


def test_indices() -> None:
    assert take_indices(None, 3) == [0, 1, 2]
    assert take_indices(2, 3) == [1, 2]
    assert take_indices([2, -3, 0, 2], 3) == [2, 0, 0, 2]
    assert take_indices((), 3) == []


@given(st.integers(1, 20), st.data())
def test_indices_are_those_of_a_list(depth: int, data: st.DataObject) -> None:
    blocks = list(range(depth))
    n = data.draw(st.integers(1, depth))
    assert take_indices(n, depth) == blocks[-n:]
    chosen = data.draw(st.lists(st.integers(-depth, depth - 1)))
    assert take_indices(chosen, depth) == [blocks[i] for i in chosen]


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (0, "The last 0 blocks were asked for, but n must be in 1 to 12."),
        (-1, "The last -1 blocks were asked for, but n must be in 1 to 12."),
        (13, "The last 13 blocks were asked for, but n must be in 1 to 12."),
        ([3, 12], "Block index 12 is out of range (0 to 11, or -12 to -1 from the end)."),
        ([-13], "Block index -13 is out of range (0 to 11, or -12 to -1 from the end)."),
    ],
)
def test_wrong_indices(indices: Any, message: str) -> None:
    with pytest.raises(OptionError) as raised:
        take_indices(indices, 12)
    assert str(raised.value) == message


# ---- aggregation and statistics ----


def slow(model: RadioModel, states: list[Tensor], index: int, previous: int, aggregation: str, scheme: str) -> Tensor:
    """The features of one index, by the definition: sums over tokens of single blocks."""
    prefix = model.num_summary_tokens
    group = [index] if aggregation == "sparse" else list(range(previous + 1, index + 1))
    n = model.inter_feature_normalizer if scheme != "none" else None
    values, alphas = [], []
    for i in group:
        x = states[i][:, prefix:]
        alpha = torch.ones(())
        if n is not None:
            rotation = n.rotation if n.rotation.ndim == 2 else n.rotation[index]
            x = torch.stack([torch.stack([rotation @ (token - n.means[i]) for token in image]) for image in x])
            alpha = n.alphas[i]
        values.append(x)
        alphas.append(alpha)
    if scheme == "pre-alpha":
        return torch.stack([a * v for a, v in zip(alphas, values, strict=True)]).mean(0)
    return torch.stack(alphas).mean() * torch.stack(values).mean(0)


@pytest.mark.parametrize("rotation_per_layer", [None, False, True])
@pytest.mark.parametrize("aggregation", ["sparse", "dense"])
@pytest.mark.parametrize("scheme", ["none", "pre-alpha", "post-alpha"])
@torch.no_grad()
def test_aggregation(toy: Toy, by_hand: ByHand, rotation_per_layer: bool | None, aggregation: Any, scheme: Any) -> None:
    model = build(toy, rotation_per_layer)
    images = torch.rand(2, 3, 32, 48)
    states = by_hand(model, images)
    indices = [4, 1, 3]
    previous = {1: -1, 3: 1, 4: 3}
    found = model.forward_intermediates(
        images, indices, intermediates_only=True, aggregation=aggregation, norm_alpha_scheme=scheme
    )
    for i, features in zip(indices, found, strict=True):
        want = slow(model, states, i, previous[i], aggregation, scheme)
        want = want.transpose(1, 2).reshape(2, model.embed_dim, 2, 3)
        torch.testing.assert_close(features, want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_summaries_are_the_plain_mean_of_the_class_tokens(toy: Toy, by_hand: ByHand) -> None:
    model = build(toy, rotation_per_layer=True)
    images = torch.rand(2, 3, 32, 48)
    states = by_hand(model, images)
    _, found = model.forward_intermediates(images, [1, 4], return_prefix_tokens=True, aggregation="dense")
    for output, group in zip(found, ([0, 1], [2, 3, 4]), strict=True):
        assert isinstance(output, RadioOutput)
        mean = torch.stack([states[i] for i in group]).mean(0)
        want = torch.cat([mean[:, i] for i in model.summary_idxs.tolist()], -1)
        torch.testing.assert_close(output.summary, want, atol=1e-5, rtol=1e-5)


# ---- the final output ----


@pytest.mark.parametrize("norm", [False, True])
@torch.no_grad()
def test_the_final_norm(toy: Toy, by_hand: ByHand, norm: bool) -> None:
    model = build(toy, model_norm=True)
    images = torch.rand(2, 3, 32, 48)
    states = by_hand(model, images)
    final, found = model.forward_intermediates(images, [2, 0], norm=norm, output_fmt="NLC")
    for i, features in zip([2, 0], found, strict=True):
        want = model.model.norm(states[i]) if norm else states[i]
        torch.testing.assert_close(features, want[:, model.num_summary_tokens :], atol=1e-5, rtol=1e-5)
    for a, b in zip(final, model(images), strict=True):  # always normed: it is what forward() gives
        assert torch.equal(a, b)


@torch.no_grad()
def test_stopping_early(toy: Toy, by_hand: ByHand) -> None:
    model = build(toy, model_norm=True)
    images = torch.rand(2, 3, 32, 48)
    last = model.model.norm(by_hand(model, images)[3])
    ran = []
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    final, found = model.forward_intermediates(images, [3, 1], stop_early=True, output_fmt="NLC")
    assert ran == [0, 1, 2, 3]
    assert len(found) == 2
    torch.testing.assert_close(final.features, last[:, model.num_summary_tokens :], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_adaptors_see_only_the_final_output(toy: Toy) -> None:
    model = toy("vit_small_patch16_224", ["clip", "sam"])
    images = torch.rand(2, 3, 32, 48)
    final, found = model.forward_intermediates(images, 1)
    want = model(images, feature_fmt="NCHW")
    assert list(final) == list(want)
    for name in want:
        assert torch.equal(final[name].features, want[name].features)
    assert found[0].shape == (2, model.embed_dim, 2, 3)


@torch.no_grad()
def test_official_compatibility(toy: Toy, by_hand: ByHand) -> None:
    """Indices are a sorted set, and without `norm` the final output is not normed either."""
    model = build(toy, model_norm=True)
    model.compat = "official"
    images = torch.rand(2, 3, 32, 48)
    states = by_hand(model, images)
    final, found = model.forward_intermediates(images, [4, -5, 4], output_fmt="NLC")
    skip = model.num_summary_tokens
    assert len(found) == 2
    for i, features in zip([1, 4], found, strict=True):
        torch.testing.assert_close(features, states[i][:, skip:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(final.features, states[-1][:, skip:], atol=1e-5, rtol=1e-5)
    final, _ = model.forward_intermediates(images, [4], norm=True, output_fmt="NLC")
    assert torch.equal(final.features, model(images).features)


def test_gradients_flow_from_intermediates_and_through_checkpointing(toy: Toy) -> None:
    model = build(toy)
    model.set_grad_checkpointing()
    found = model.forward_intermediates(torch.rand(1, 3, 32, 48), [2], intermediates_only=True)
    found[0].square().sum().backward()
    assert model.blocks[2].mlp.fc2.weight.grad.any()
    assert model.blocks[3].mlp.fc2.weight.grad is None or not model.blocks[3].mlp.fc2.weight.grad.any()


# ---- errors ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_fmt": "NHWC"}, "Unsupported output_fmt: 'NHWC'. Must be one of ['NCHW', 'NLC']."),
        ({"aggregation": "mean"}, "Unsupported aggregation: 'mean'. Must be one of ['sparse', 'dense']."),
        (
            {"norm_alpha_scheme": "alpha"},
            "Unsupported norm_alpha_scheme: 'alpha'. Must be one of ['none', 'pre-alpha', 'post-alpha'].",
        ),
    ],
)
def test_unknown_options(toy: Toy, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as raised:
        build(toy).forward_intermediates(torch.rand(1, 3, 32, 48), **options)
    assert str(raised.value) == message
    assert isinstance(raised.value, AssertionError)  # as timm raises


def test_wrong_size_is_refused(toy: Toy) -> None:
    with pytest.raises(ResolutionError, match="nearest supported size is 32x48"):
        build(toy).forward_intermediates(torch.rand(1, 3, 30, 50))


def test_eradio_has_neither_prefix_tokens_nor_dense_sums(toy: Toy) -> None:
    model, images = toy("eradio"), torch.rand(1, 3, 64, 64)
    with pytest.raises(CapabilityError, match="stages have different strides"):
        model.forward_intermediates(images, aggregation="dense")
    with pytest.raises(CapabilityError, match="E-RADIO has no prefix tokens"):
        model.forward_intermediates(images, return_prefix_tokens=True)
