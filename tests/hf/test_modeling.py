"""The model of transformers computes what the plain one does, and behaves as transformers' users expect."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", minversion="5.13")

from transformers import PreTrainedModel

from amradio.errors import CapabilityError, OptionError, ResolutionError, UnknownAdaptorError
from amradio.hf import AmradioConfig, AmradioModel
from amradio.models.configs import ERadioConfig, ViTConfig
from amradio.models.radio import RadioModel
from amradio.models.vit import Block

Make = Callable[[str], RadioModel]
Same = Callable[[Any, Any], None]


@pytest.fixture
def model(radio: RadioModel) -> AmradioModel:
    return AmradioModel.from_radio(radio)


@torch.no_grad()
@pytest.mark.parametrize("feature_fmt", ["NLC", "NCHW", "NHWC"])
def test_the_same_numbers(radio: RadioModel, model: AmradioModel, images: Tensor, same: Same, feature_fmt: str) -> None:
    out = model(images, feature_fmt=feature_fmt)
    same(radio(images, feature_fmt), out)
    assert out.pooler_output is out.summary
    assert out[0] is out.last_hidden_state
    assert out.hidden_states is None


@torch.no_grad()
def test_other_sizes_and_dtypes(radio: RadioModel, model: AmradioModel, same: Same) -> None:
    for size in ((32, 32), (96, 32), (128, 160)):
        images = torch.rand(1, 3, *size)
        same(radio(images), model(images))
    radio.bfloat16()
    same(radio(images), AmradioModel.from_radio(radio)(images))


@torch.no_grad()
def test_hidden_states(radio: RadioModel, model: AmradioModel, images: Tensor) -> None:
    out = model(images, output_hidden_states=True)
    maps = radio.forward_intermediates(images, intermediates_only=True, norm_alpha_scheme="none")
    if isinstance(radio.config.backbone, ERadioConfig):
        assert len(out.hidden_states) == 4
        for state, wanted in zip(out.hidden_states, maps, strict=True):
            assert torch.equal(state, wanted)
        return
    trunk, prefix = radio.config.backbone, radio.config.backbone.num_prefix_tokens
    assert len(out.hidden_states) == trunk.depth + 1 == model.config.num_hidden_layers + 1
    assert {tuple(s.shape) for s in out.hidden_states} == {(2, prefix + 96, 32)}
    for state, wanted in zip(out.hidden_states[1:], maps, strict=True):
        assert torch.equal(state[:, prefix:].transpose(1, 2).unflatten(2, (8, 12)), wanted)
    assert torch.equal(out.hidden_states[0], radio.model.patch_generator(radio.input_conditioner(images)))
    assert torch.equal(out.last_hidden_state, radio.model.norm(out.hidden_states[-1]))


@torch.no_grad()
def test_some_hidden_states(make_radio: Make, images: Tensor) -> None:
    model = AmradioModel.from_radio(make_radio("vit"))
    every = model(images, output_hidden_states=True).hidden_states
    for wanted, kept in (([1, -1], {1, 3}), (2, {2}), (-4, {0}), ([], set())):
        found = model(images, output_hidden_states=wanted).hidden_states
        assert {i for i, state in enumerate(found) if state is not None} == kept
        assert all(state is None or torch.equal(state, every[i]) for i, state in enumerate(found))
    for wanted, bad in ((4, 4), (-5, -5), ([1, 7], 7)):
        with pytest.raises(OptionError, match=f"There is no hidden state {bad}: they go from 0 to 3, or from -4 to -1"):
            model(images, output_hidden_states=wanted)
    model.config.output_hidden_states = True
    assert len(model(images).hidden_states) == 4
    assert model(images, output_hidden_states=False).hidden_states is None
    assert isinstance(model(images, return_dict=False), tuple)


@torch.no_grad()
def test_windows(make_radio: Make, images: Tensor, same: Same) -> None:
    radio = make_radio("adaptors")
    radio.set_vitdet(4, num_windowed=1)
    model = AmradioModel.from_radio(radio)
    assert (model.config.vitdet_window_size, model.config.vitdet_num_windowed) == (4, 1)
    out = model(images, output_hidden_states=True)
    same(radio(images), out)
    same(model.to_radio()(images), out)
    maps = radio.forward_intermediates(images, intermediates_only=True, norm_alpha_scheme="none", output_fmt="NLC")
    for state, wanted in zip(out.hidden_states[1:], maps, strict=True):
        assert torch.equal(state[:, 5:], wanted)  # patches in row-major order again
    with pytest.raises(ResolutionError, match="The nearest supported size is 64x64"):
        model(images[..., :72])
    for windowed in (0, 2, 5):
        model.radio.set_vitdet(2, num_windowed=windowed)
        same(model.to_radio()(images), model(images))


# ---- attention ----


@torch.no_grad()
@pytest.mark.parametrize("kind", ["vit", "adaptors", "dyt", "mean"])
def test_eager_attention(model: AmradioModel, images: Tensor) -> None:
    plain = model(images, output_hidden_states=True)
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    out = model(images, output_attentions=True)
    torch.testing.assert_close(out.last_hidden_state, plain.last_hidden_state, rtol=1e-4, atol=1e-5)
    assert len(out.attentions) == model.config.num_hidden_layers
    blocks = [m for m in model.radio.model.blocks if isinstance(m, Block)]
    for block, state, weights in zip(blocks, plain.hidden_states[:-1], out.attentions, strict=True):
        torch.testing.assert_close(weights, block.attention(state, state.shape[1]), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


@torch.no_grad()
def test_attention_of_windows(make_radio: Make, images: Tensor) -> None:
    radio = make_radio("vit")
    radio.set_vitdet(2, num_windowed=2)
    model = AmradioModel.from_radio(radio, attn_implementation="eager")
    shapes = [tuple(w.shape) for w in model(images, output_attentions=True).attentions]
    assert shapes == [(2 * 24, 2, 4, 4), (2 * 24, 2, 4, 4), (2, 2, 101, 101)]


def test_attention_that_nobody_computes(make_radio: Make, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(logging.Logger, "warning_once", lambda self, text: said.append(text))
    assert not AmradioModel.from_radio(make_radio("vit"))(images, output_attentions=True).attentions
    assert not AmradioModel.from_radio(make_radio("eradio"))(images, output_attentions=True).attentions
    assert said == [
        "Attention weights are computed only by the eager implementation, and 'sdpa' is in use. Load the model with "
        "attn_implementation='eager', or call model.set_attn_implementation('eager').",
        "E-RADIO's attention weights are not available; only vision transformers' are.",
    ]


def test_flash_attention_that_is_not_installed(make_radio: Make) -> None:
    transformers = pytest.importorskip("transformers")
    if transformers.utils.is_flash_attn_2_available():
        pytest.skip("flash-attn is installed")
    with pytest.raises(ImportError, match="FlashAttention2 has been toggled on"):
        AmradioModel.from_radio(make_radio("vit"), attn_implementation="flash_attention_2")


@torch.no_grad()
def test_flash_attention_does_not_get_float32(
    make_radio: Make, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    dtypes = []

    def flash(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: None, **_: Any) -> tuple[Tensor, None]:
        dtypes.append(q.dtype)
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2), None

    radio = make_radio("adaptors")
    radio.model.bfloat16()
    model = AmradioModel.from_radio(radio)
    plain = model(images)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", flash)
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "flash_attention_2")
    out = model(images)
    assert dtypes == 3 * [torch.bfloat16]  # the blocks, and not the head in float32
    torch.testing.assert_close(out.adaptors["sam"].features, plain.adaptors["sam"].features)


@torch.no_grad()
def test_an_attention_of_ones_own(make_radio: Make, images: Tensor) -> None:
    from transformers import AttentionInterface

    calls = []

    def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: None, **options: Any) -> tuple[Tensor, None]:
        calls.append(options["scaling"])
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2), None

    AttentionInterface.register("counted", attend)
    model = AmradioModel.from_radio(make_radio("adaptors"))
    plain = model(images)
    model.set_attn_implementation("counted")
    torch.testing.assert_close(model(images).features, plain.features)
    assert calls == 3 * [16**-0.5] + 2 * [2**-0.5]  # three blocks, then the two of the adaptor with its 16 heads


# ---- training ----


def test_gradients_reach_hidden_states_and_attention(make_radio: Make, images: Tensor) -> None:
    model = AmradioModel.from_radio(make_radio("vit"), attn_implementation="eager")
    out = model(images, output_hidden_states=True, output_attentions=True)
    for tensor in (*out.hidden_states, *out.attentions):
        tensor.retain_grad()
    out.features.square().sum().backward()
    assert all(t.grad is not None and t.grad.abs().max() > 0 for t in (*out.hidden_states, *out.attentions))


@pytest.mark.parametrize("kind", ["vit", "adaptors", "mean"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(radio: RadioModel, images: Tensor, reentrant: bool) -> None:
    plain, saving = (AmradioModel.from_radio(copy.deepcopy(radio)) for _ in range(2))
    saving.activation_checkpointing_enable({"use_reentrant": reentrant})
    assert saving.is_activation_checkpointing
    for model in (plain, saving):
        model(images).features.square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        assert a.grad is None or torch.equal(a.grad, b.grad), name
    saving.activation_checkpointing_disable()
    assert not saving.is_activation_checkpointing


def test_gradient_checkpointing_that_cannot_be(make_radio: Make) -> None:
    with pytest.raises(CapabilityError, match="ERadio has no gradient checkpointing"):
        AmradioModel.from_radio(make_radio("eradio")).activation_checkpointing_enable()
    with pytest.raises(OptionError, match="every_n_layers must be 1, got 2"):
        AmradioModel.from_radio(make_radio("vit")).activation_checkpointing_enable(every_n_layers=2)


class Parent(PreTrainedModel):  # type: ignore[misc]
    """A model with another one in it, such as LLaVA with its tower."""

    config_class = AmradioConfig
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, vision: AmradioModel) -> None:
        super().__init__(vision.config)
        self.vision = vision
        self.gradient_checkpointing = False


def test_gradient_checkpointing_of_a_model_around_it(make_radio: Make, images: Tensor) -> None:
    plain = AmradioModel.from_radio(make_radio("vit"))
    parent = Parent(AmradioModel.from_radio(make_radio("vit")))
    parent.activation_checkpointing_enable({"use_reentrant": True})
    assert parent.vision.gradient_checkpointing
    trunk = parent.vision.radio.model
    assert trunk.checkpoint.keywords == {"use_reentrant": True}
    calls: list[Any] = []
    checkpoint = trunk.checkpoint
    trunk.checkpoint = lambda block, x: calls.append(block) or checkpoint(block, x)
    for model in (plain, parent.vision):
        model(images).features.square().sum().backward()
    assert calls == list(trunk.blocks)
    for (name, a), b in zip(plain.named_parameters(), parent.vision.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        assert a.grad is None or torch.equal(a.grad, b.grad), name
    parent.activation_checkpointing_disable()
    assert not parent.vision.gradient_checkpointing


def test_eradio_keeps_out_of_the_gradient_checkpointing_around_it(make_radio: Make) -> None:
    parent = Parent(AmradioModel.from_radio(make_radio("eradio")))
    parent.activation_checkpointing_enable()
    assert parent.gradient_checkpointing
    assert not parent.vision.gradient_checkpointing
    parent.activation_checkpointing_disable()


def test_training_mode_draws_positions(make_radio: Make, images: Tensor) -> None:
    model = AmradioModel.from_radio(make_radio("vit")).train()
    with torch.no_grad():
        assert not torch.equal(model(images).features, model(images).features)


# ---- building ----


def test_random_weights_are_a_matter_of_the_seed(kind: str, radio: RadioModel, images: Tensor) -> None:
    config = AmradioConfig.from_radio(radio.config)
    torch.manual_seed(3)
    first = AmradioModel(config)
    torch.manual_seed(3)
    second = AmradioModel(config)
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
        if a.ndim > 1 and a.is_floating_point() and name in dict(first.named_parameters()) and "reg_token" not in name:
            assert 0.01 < a.std() < 0.03, name
    assert torch.isfinite(first.eval()(images).last_hidden_state).all()
    assert first.dtype == torch.float32


def test_what_is_not_random(make_radio: Make) -> None:
    fresh = RadioModel(make_radio("adaptors").config, ["clip", "sam"])
    built = AmradioModel(AmradioConfig.from_radio(fresh.config)).radio
    names = [n for n in fresh.state_dict() if n.endswith((".gamma", "norm1.weight", "norm1.bias", "norm_mean", "tx"))]
    names += ["feature_normalizer.mean", "inter_feature_normalizer.alphas", "inter_feature_normalizer.rotation"]
    for name in (*names, "summary_idxs", "model.norm.weight", "adaptors.sam.head_mlp.pre_norm.0.weight"):
        assert torch.equal(built.state_dict()[name], fresh.state_dict()[name]), name
    assert len(names) > 20
    hybrid = RadioModel(make_radio("eradio").config, ["clip"])
    made = AmradioModel(AmradioConfig.from_radio(hybrid.config)).radio.state_dict()
    kept = [n for n in hybrid.state_dict() if n.endswith(("_table", "_index", "_bias", "gamma1", "running_var"))]
    assert len(kept) > 10
    assert all(torch.equal(made[n], hybrid.state_dict()[n]) for n in kept)


def test_the_input_embeddings(radio: RadioModel, model: AmradioModel) -> None:
    layer = model.get_input_embeddings()
    assert isinstance(layer, nn.Linear) == isinstance(radio.config.backbone, ViTConfig)
    replaced = copy.deepcopy(layer)
    model.set_input_embeddings(replaced)
    assert model.get_input_embeddings() is replaced
    assert model.get_output_embeddings() is None


def test_the_input_embeddings_of_a_convolutional_stem() -> None:
    model = AmradioModel.from_pretrained("amradio-tiny")
    layer = model.get_input_embeddings()
    shapes = []
    layer.register_forward_hook(lambda _, __, output: shapes.append(tuple(output.shape)))
    model(torch.rand(1, 3, 64, 96))
    assert shapes == [(1, 24, model.config.hidden_size)]
    replaced = copy.deepcopy(layer)
    model.set_input_embeddings(replaced)
    assert model.get_input_embeddings() is replaced is model.radio.model.patch_generator.embedder.project


def test_weights_are_shared_with_the_plain_model(radio: RadioModel, model: AmradioModel, images: Tensor) -> None:
    back = model.to_radio()
    for (name, a), b, c in zip(radio.named_parameters(), model.parameters(), back.parameters(), strict=True):
        assert a is b is c, name
    assert not any("hf" in type(m).__module__ for m in back.modules())
    assert back.config == radio.config
    assert back.train().training is True
    assert model.train().to_radio().training


def test_adaptors_are_chosen(make_radio: Make, images: Tensor) -> None:
    config = make_radio("adaptors").config
    assert list(AmradioModel(AmradioConfig.from_radio(config)).radio.adaptors) == ["clip", "sam"]
    assert list(AmradioModel(AmradioConfig.from_radio(config, ["sam"])).radio.adaptors) == ["sam"]
    with pytest.raises(UnknownAdaptorError) as raised:
        AmradioConfig.from_radio(config, ["dino"])
    assert str(raised.value) == "Unable to find the specified adaptor name 'dino'. Known names: ['clip', 'sam']."


@torch.no_grad()
@pytest.mark.parametrize("kind", ["adaptors"])
def test_it_can_be_exported(model: AmradioModel, images: Tensor) -> None:
    exported = torch.export.export(model, (images,)).module()
    torch.testing.assert_close(exported(images).features, model(images).features)


@torch.no_grad()
def test_it_can_be_compiled_in_one_graph(make_radio: Make, images: Tensor) -> None:
    model = AmradioModel.from_radio(make_radio("adaptors"))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    out = compiled(images)
    torch.testing.assert_close(out.features, model(images).features)
    torch.testing.assert_close(out.adaptors["sam"].features, model(images).adaptors["sam"].features)


def test_sizes_that_do_not_fit(make_radio: Make) -> None:
    model = AmradioModel.from_radio(make_radio("vit"))
    with pytest.raises(ResolutionError, match="The nearest supported size is 64x72"):
        model(torch.rand(1, 3, 65, 70))
