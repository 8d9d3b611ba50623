"""The model that people call: properties, dtypes, gradients, state, errors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from amradio.backbones.protocol import Backbone
from amradio.errors import CapabilityError, ConfigError, OptionError, ResolutionError, UnknownAdaptorError
from amradio.models.configs import AdaptorConfig, HeadConfig, RadioConfig, Resolution, ViTConfig
from amradio.models.normalizers import CLIP_MEAN, CLIP_STD, InputConditioner
from amradio.models.output import RadioOutput
from amradio.models.radio import RadioModel
from amradio.weights import official

Toy = Callable[..., RadioModel]
Args = Callable[..., dict[str, Any]]
NAME = "vit_small_patch16_224"


# ---- what the model says of itself ----


def test_properties(toy: Toy) -> None:
    model = toy(NAME, ["clip"])
    assert model.patch_size == model.min_resolution_step == 16
    assert model.embed_dim == 32
    assert model.summary_idxs.tolist() == [0, 1]
    assert model.summary_dim == 64
    assert model.num_cls_tokens == 3
    assert model.num_summary_tokens == 4
    assert model.max_resolution is model.preferred_resolution is model.window_size is model.num_video_frames is None
    assert len(model.blocks) == 2
    assert list(model.adaptors) == ["clip"]
    assert model.dtype == torch.float32
    with model.cpe_video_mode(3):
        assert model.num_video_frames == 3


def test_properties_of_eradio(toy: Toy) -> None:
    model = toy("eradio")
    assert model.patch_size == model.min_resolution_step == 16
    assert model.embed_dim == model.summary_dim == 32
    assert model.num_cls_tokens == model.num_summary_tokens == 1
    assert model.window_size is None
    assert model.get_nearest_supported_resolution(90, 112) == (96, 128)
    for what, use in {
        "blocks": lambda: model.blocks,
        "cpe_video_mode": lambda: model.cpe_video_mode(2).__enter__(),
        "gradient checkpointing": lambda: model.set_grad_checkpointing(),
    }.items():
        with pytest.raises(CapabilityError, match=rf"^ERadio has no {what}; only vision transformers have\.$"):
            use()


def test_published_facts_come_from_the_config(toy: Toy) -> None:
    config = RadioConfig(
        backbone=toy(NAME).model.config,
        patch_size=16,
        max_resolution=2048,
        preferred_resolution=Resolution(512, 384),
        vitdet_num_global=2,
    )
    model = RadioModel(config)
    assert model.max_resolution == 2048
    assert model.preferred_resolution.height == 512
    assert model.preferred_resolution.width == 384


@pytest.mark.parametrize("name", [NAME, "eradio"])
def test_models_and_views_are_backbones(toy: Toy, name: str) -> None:
    model = toy(name, ["clip"])
    assert isinstance(model.view("clip"), Backbone)
    assert isinstance(toy(name), Backbone)


# ---- resolutions ----


@pytest.fixture(scope="module")
def models(request: pytest.FixtureRequest) -> dict[str, RadioModel]:
    vit = ViTConfig(embed_dim=4, depth=1, num_heads=1, mlp_hidden_dim=4)
    found = {
        "16": RadioModel(RadioConfig(backbone=vit)),
        "14": RadioModel(RadioConfig(backbone=ViTConfig(**{**vars(vit), "patch_size": 14}))),
        "vitdet": RadioModel(RadioConfig(backbone=vit)),
    }
    found["vitdet"].set_vitdet(3)
    return found


@given(height=st.integers(0, 3000), width=st.integers(0, 3000), which=st.sampled_from(["16", "14", "vitdet"]))
def test_nearest_supported_resolution(models: dict[str, RadioModel], height: int, width: int, which: str) -> None:
    model = models[which]
    step = model.min_resolution_step
    got = model.get_nearest_supported_resolution(height, width)
    assert isinstance(got, Resolution)
    for side, wanted in zip(got, (height, width), strict=True):
        assert side % step == 0
        assert side >= step
        assert abs(side - wanted) <= max(step / 2, step - wanted)  # nothing is nearer
        if abs(side - wanted) * 2 == step and side > step:
            assert (side // step) % 2 == 0  # half-way goes to the even multiple
    assert model.get_nearest_supported_resolution(*got) == got


def test_wrong_size_word_for_word(toy: Toy) -> None:
    with pytest.raises(ResolutionError) as raised:
        toy(NAME)(torch.rand(1, 3, 64, 90))
    assert str(raised.value) == (
        "The input resolution must be a multiple of `self.min_resolution_step=16` on both sides, got 64x90 (height x "
        "width). The nearest supported size is 64x96; `get_nearest_supported_resolution(height, width)` computes it."
    )


def test_an_image_without_a_batch_is_refused(toy: Toy) -> None:
    with pytest.raises(ResolutionError) as raised:
        toy(NAME)(torch.rand(3, 64, 96))
    assert str(raised.value) == "Images must be [B, 3, H, W], got the shape [3, 64, 96]."


def test_unknown_format_is_refused_before_any_work(toy: Toy) -> None:
    model = toy(NAME)
    model.model = None  # type: ignore[assignment]
    with pytest.raises(OptionError) as raised:
        model(torch.rand(1, 3, 64, 90), feature_fmt="NCL")
    assert str(raised.value) == "Unsupported feature_fmt: 'NCL'. Must be one of ['NLC', 'NCHW', 'NHWC']."


# ---- inconsistent descriptions ----


def test_a_token_slot_beyond_the_prefix_tokens_is_refused(make_args: Args) -> None:
    config = official.describe(make_args(NAME), {})
    head = HeadConfig(input_dim=32, hidden_dim=8, output_dim=8)
    with_slot = {"x": AdaptorConfig(head_idx=4, summary=head, features=head)}
    with pytest.raises(ConfigError, match=r"^The summary of adaptor 'x' reads prefix token 4, but the trunk has 4 "):
        RadioModel(RadioConfig(backbone=config.backbone, adaptors=with_slot), ["x"])
    with pytest.raises(ConfigError, match=r"The backbone summary reads prefix token 5, but the trunk has 4 prefix"):
        RadioModel(RadioConfig(backbone=config.backbone, summary_idxs=(0, 5)))


def test_no_class_token_needs_mean_pooling(make_args: Args) -> None:
    without = make_args(NAME, model_kwargs={"class_token": False})
    with pytest.raises(ConfigError, match=r"^The backbone summary reads prefix token 0, but the trunk has 0 prefix"):
        RadioModel(official.describe(without, {}))
    model = RadioModel(official.describe(without | {"gp": "avg"}, {})).eval()
    assert model.num_summary_tokens == 0
    summary, features = model(torch.rand(2, 3, 32, 48))
    assert summary.shape == (2, model.summary_dim) == (2, 32)
    torch.testing.assert_close(summary, features.mean(1))


def test_a_token_slot_among_the_registers_reads_a_register(toy: Toy) -> None:
    model = toy(NAME)
    head = HeadConfig(input_dim=32, hidden_dim=8, output_dim=8)
    adaptors = {"x": AdaptorConfig(head_idx=3, summary=head, features=head)}
    config = RadioConfig(backbone=model.model.config, adaptors=adaptors)
    assert RadioModel(config, ["x"]).num_cls_tokens == 4


@pytest.mark.parametrize("teachers", [None, [], ()])
def test_models_without_teachers(make_args: Args, teachers: Any) -> None:
    model = RadioModel(official.describe(make_args(NAME, teachers=teachers), {})).eval()
    assert model.num_cls_tokens == 1
    assert model(torch.rand(1, 3, 32, 48)).summary.shape == (1, 32)


def test_repeated_teacher_names_share_a_class_token(make_args: Args) -> None:
    teachers = [{"name": "a"}, {"name": "a"}, {"name": "b"}]
    model = RadioModel(official.describe(make_args(NAME, teachers=teachers), {})).eval()
    assert model.num_cls_tokens == 2
    assert model.summary_idxs.tolist() == [0, 1]
    assert model(torch.rand(1, 3, 32, 48)).summary.shape == (1, 64)


@pytest.mark.parametrize(("size", "rows"), [(128, 8), (120, 8), (136, 8), (137, 9), (100, 6)])
def test_the_position_grid_is_rounded_to_patches(make_args: Args, size: int, rows: int) -> None:
    config = official.describe(make_args(NAME, cpe_max_size=size), {})
    assert isinstance(config.backbone, ViTConfig)
    assert config.backbone.position_grid == (rows, rows)


@pytest.mark.parametrize("size", [0, 5])
def test_a_position_grid_has_at_least_one_cell(make_args: Args, size: int) -> None:
    with pytest.raises(ConfigError) as raised:
        official.describe(make_args(NAME, cpe_max_size=size), {})
    assert str(raised.value) == f"cpe_max_size {size} leaves no position grid with patches of 16 pixels."


@pytest.mark.parametrize("teachers", [[{"type": "sam"}], ["clip"], {"clip": 1}, [{"name": 3}]])
def test_teachers_are_records_with_a_name(make_args: Args, teachers: Any) -> None:
    with pytest.raises(ValueError, match="must be a list of records that each have a 'name'"):
        official.describe(make_args(NAME, teachers=teachers), {})


def test_unknown_adaptor_and_view(toy: Toy) -> None:
    with pytest.raises(UnknownAdaptorError) as raised:
        toy(NAME, ["dino_v2"])
    assert str(raised.value) == "Unable to find the specified adaptor name 'dino_v2'. Known names: ['clip', 'sam']."
    with pytest.raises(UnknownAdaptorError) as raised:
        toy(NAME, ["clip"]).view("clap")
    assert str(raised.value) == (
        "No adaptor 'clap' is loaded, only ['backbone', 'clip']. Load the model with adaptors=['clap'] if the "
        "checkpoint has it. Nearest names: clip."
    )


# ---- views ----


def test_a_view_is_described_by_its_adaptor(toy: Toy) -> None:
    model = toy(NAME, ["clip", "sam"])
    clip, sam, backbone = (model.view(n) for n in ("clip", "sam", "backbone"))
    assert (clip.embed_dim, clip.summary_dim, clip.patch_size) == (12, 20, 16)
    assert (sam.embed_dim, sam.summary_dim, sam.patch_size) == (6, 12, 8)
    assert (backbone.embed_dim, backbone.summary_dim, backbone.patch_size) == (32, 64, 16)
    assert clip.get_nearest_supported_resolution(30, 50) == (32, 48)
    assert clip.min_resolution_step == 16
    assert {id(p) for p in clip.parameters()} == {id(p) for p in model.parameters()}
    with pytest.raises(CapabilityError, match="The backbone has no text side"):
        backbone.encode_text(None)
    with pytest.raises(CapabilityError, match="The teacher 'clip' has no text side"):
        _ = clip.tokenizer


# ---- the conditioner ----


def test_conditioner_standardises_and_inverts() -> None:
    conditioner = InputConditioner()
    images = torch.rand(2, 3, 4, 5)
    got = conditioner(images)
    for c in range(3):
        torch.testing.assert_close(got[:, c], (images[:, c] - CLIP_MEAN[c]) / CLIP_STD[c])
    torch.testing.assert_close(conditioner.inverse(got), images)


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.bfloat16().double(),
        lambda m: copy.deepcopy(m).half(),
    ],
)
def test_conditioner_stays_exact(toy: Toy, cast: Callable[[RadioModel], RadioModel]) -> None:
    model = cast(toy(NAME, ["clip"]))
    assert isinstance(model.input_conditioner, InputConditioner)
    assert model.input_conditioner.norm_mean.dtype == torch.float32
    assert torch.equal(model.input_conditioner.norm_mean.flatten(), torch.tensor(CLIP_MEAN))
    assert torch.equal(model.input_conditioner.norm_std.flatten(), torch.tensor(CLIP_STD))
    with torch.no_grad():
        output = model(torch.rand(1, 3, 32, 48))
    assert output["backbone"].features.dtype == model.dtype
    assert output["clip"].features.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_external_preprocessor(toy: Toy, dtype: torch.dtype) -> None:
    model = toy(NAME).to(dtype)
    images = torch.rand(2, 3, 32, 48)
    want = model(images)
    preprocess = model.make_preprocessor_external()
    conditioned = preprocess(images)
    assert conditioned.dtype == dtype
    for a, b in zip(model(conditioned), want, strict=True):
        assert torch.equal(a, b)
    assert isinstance(model.make_preprocessor_external(), torch.nn.Identity)


# ---- training ----


@pytest.mark.parametrize("name", [NAME, "vit_base_patch16_v2_224", "dino_v2_g_student", "eradio"])
def test_training_moves_every_used_parameter(toy: Toy, name: str) -> None:
    model = toy(name, ["clip", "sam"]).train()
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    side = 2 * max(model.min_resolution_step, model.model.input_multiple)
    output = model(torch.rand(4, 3, side, side))
    sum(t.square().mean() for pair in output.values() for t in pair).backward()
    optimizer.step()
    still = {k for k, p in model.named_parameters() if torch.equal(p, before[k])}
    assert still == ({"model.reg_token"} if "v2_224" in name else set())


def test_frozen_backbone_gives_gradients_to_adaptors_only(toy: Toy) -> None:
    model = toy(NAME, ["clip"])
    model.model.requires_grad_(False)
    model(torch.rand(1, 3, 32, 48))["clip"].features.sum().backward()
    assert all(p.grad is None for p in model.model.parameters())
    assert model.adaptors["clip"].feat_mlp.fc1.weight.grad.any()


@pytest.mark.parametrize("name", [NAME, "eradio"])
def test_gradients_reach_the_image(toy: Toy, name: str) -> None:
    images = torch.rand(1, 3, 64, 64, requires_grad=True)
    toy(name)(images).summary.square().sum().backward()
    assert images.grad is not None
    assert images.grad.abs().amin(1).count_nonzero() > 0.99 * 64 * 64


@pytest.mark.parametrize("name", [NAME, "dino_v2_g_student", "eradio"])
@torch.no_grad()
def test_autocast(toy: Toy, name: str) -> None:
    model = toy(name, ["clip", "sam"])
    side = 2 * max(model.min_resolution_step, model.model.input_multiple)
    images = torch.rand(2, 3, side, side)
    want = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(images)
    for key in want:
        for a, b in zip(got[key], want[key], strict=True):
            assert (a.float() - b).norm() < 0.05 * b.norm()
    for a, b in zip(model(images)["clip"], want["clip"], strict=True):  # nothing rounded was kept
        assert torch.equal(a, b)


def test_video_frames_share_their_position_crop(toy: Toy) -> None:
    model = toy(NAME).train()
    frame = torch.rand(1, 3, 32, 48)
    with model.cpe_video_mode(2):
        images = frame.expand(40, -1, -1, -1)
        positions = model.model.patch_generator(model.input_conditioner(images))
        with pytest.raises(OptionError, match="Video mode has 2 frames a video, but the batch of 3 images"):
            model(images[:3])
    pairs = positions.view(20, 2, *positions.shape[1:])
    same = (pairs[:, 0] == pairs[:, 1]).flatten(1).all(1)
    assert same.float().mean() > 0.5  # all but those of which one frame lost its position to dropout
    assert not torch.equal(positions[0], positions[2])


# ---- state ----


def test_a_state_dict_brings_its_summary_positions(toy: Toy) -> None:
    model = toy(NAME)
    images = torch.rand(1, 3, 32, 48)
    first = model(images).summary
    state = model.state_dict() | {"summary_idxs": torch.tensor([1, 0])}
    model.load_state_dict(state)
    swapped = model(images).summary
    assert torch.equal(swapped, torch.cat([first[:, 32:], first[:, :32]], 1))
    model.load_state_dict({"summary_idxs": torch.tensor([1, 1])}, strict=False)
    assert torch.equal(model(images).summary, torch.cat([first[:, 32:], first[:, 32:]], 1))
    assert copy.deepcopy(model)(images).summary.equal(model(images).summary)


def test_state_dict_has_no_derived_tensors(toy: Toy) -> None:
    model = toy(NAME, ["clip"])
    before = set(model.state_dict())
    with torch.no_grad():
        model(torch.rand(1, 3, 32, 48))
    assert set(model.state_dict()) == before
    assert {k.split(".")[0] for k in before} == {"summary_idxs", "input_conditioner", "model", "adaptors"}


def test_output_is_a_named_pair() -> None:
    output = RadioOutput(torch.ones(1, 2), torch.ones(1, 3, 4))
    summary, features = output.to(torch.bfloat16)
    assert (summary.dtype, features.dtype) == (torch.bfloat16, torch.bfloat16)
    assert output[0] is output.summary
    assert output.to("meta").features.is_meta
    assert RadioOutput(None, torch.ones(1)).to(dtype=torch.float64)[0] is None  # type: ignore[arg-type]


# ---- what is kept between calls, and what others may look at ----


@pytest.mark.parametrize("name", [NAME, "eradio"])
@pytest.mark.parametrize("how", [{"fused": True}, {"foreach": True}, {"foreach": False}])
def test_results_follow_every_kind_of_optimizer(toy: Toy, name: str, how: dict[str, bool]) -> None:
    model = toy(name).eval()
    images = torch.rand(1, 3, 64, 96)
    optimizer = torch.optim.AdamW(model.model.parameters(), lr=0.1, **how)
    for _ in range(2):
        with torch.no_grad():
            model(images)
        model(images).features.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            seen, want = model(images), copy.deepcopy(model)(images)  # a copy starts with nothing kept
        assert torch.equal(seen.features, want.features)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside torch's own compiler
def test_compiled_gradients_equal_eager_ones(toy: Toy) -> None:
    model = toy(NAME).eval()
    images = torch.rand(1, 3, 64, 96)  # a batch of one is what inductor once got wrong
    grads = []
    for run in (model, torch.compile(model)):
        model.zero_grad()
        run(images).features.square().mean().backward()
        grads.append([p.grad.clone() for p in model.model.parameters() if p.grad is not None])
    for eager, compiled in zip(*grads, strict=True):
        torch.testing.assert_close(compiled, eager, atol=1e-5, rtol=1e-4)


def test_hooks_see_what_training_would_show_them(toy: Toy) -> None:
    model = toy(NAME).eval()
    seen: list[torch.Tensor] = []
    model.blocks[0].mlp.fc1.register_forward_hook(lambda _m, _i, out: seen.append(out))
    images = torch.rand(1, 3, 64, 64)
    model(images)
    with torch.no_grad():
        model(images)
    torch.testing.assert_close(seen[1], seen[0])


def test_bytes_are_refused(toy: Toy) -> None:
    with pytest.raises(OptionError, match=r"Images must be floating point in \[0, 1\], got torch.uint8"):
        toy(NAME)(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
