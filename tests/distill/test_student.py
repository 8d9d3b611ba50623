"""The student: described by teachers, filled from checkpoints, and the same on any number of processes."""

import dataclasses

import pytest
import torch

import amradio
from amradio.distill.draws import BatchDraws, positions_from
from amradio.distill.parametrize import SpectralNorm, WeightNoise, add_parametrizations, fold_parametrizations
from amradio.distill.student import Widths, build_student, radio_config
from amradio.errors import ConfigError
from amradio.models.configs import ERadioConfig, RadioConfig, ViTConfig, to_json
from amradio.models.radio import RadioModel

WIDTHS = {"one": Widths(12, 12), "two": Widths(10, 10)}


def test_a_token_and_two_heads_for_each_teacher(config):
    c = config(teachers__1__summary={"in_backbone": False}, teachers__0__features={"head": {"hidden_dim": 24}})
    description = radio_config(c, WIDTHS)
    assert description.backbone.num_cls_tokens == 2
    assert description.summary_idxs == (0,)
    one, two = description.adaptors["one"], description.adaptors["two"]
    assert (one.head_idx, two.head_idx) == (0, 1)
    assert (one.summary.output_dim, one.features.output_dim, one.features.hidden_dim) == (12, 12, 24)
    assert two.features.output_dim == 40  # upsampled by 2
    assert [t["name"] for t in description.teachers] == ["one", "two"]
    assert [t["use_summary"] for t in description.teachers] == [True, False]


def test_a_published_architecture(config):
    c = config(
        student={"architecture": "vit_tiny_patch16_224", "registers": 6, "max_size": 512, "model_kwargs": {"depth": 2}}
    )
    backbone = radio_config(c, WIDTHS).backbone
    assert (backbone.embed_dim, backbone.depth, backbone.position_grid) == (192, 2, (32, 32))
    assert (backbone.num_cls_tokens, backbone.num_registers, backbone.position) == (2, 6, "cpe")


def test_an_eradio_student(config):
    backbone = ERadioConfig(
        dim=8, in_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), window_size=(None, None, 4, 4),
        sr_ratio=(1, 1, 1, 1), full_features_head_dim=16, cpb_mlp_hidden=8,
    )  # fmt: skip
    c = config(student={"model": {"backbone": to_json(backbone)}})
    student, _ = build_student(c, radio_config(c, WIDTHS))
    said = student(torch.rand(2, 3, 32, 32), ["one", "two"])
    assert said["one"].summary.shape == (2, 12)
    assert said["two"].features.shape == (2, 10, 4, 4)


def test_predictions_are_those_of_the_model(config):
    c = config()
    student, _ = build_student(c, radio_config(c, WIDTHS))
    student.eval()
    images = torch.rand(2, 3, 32, 24)
    wanted = student.radio(images, feature_fmt="NCHW")
    found = student(images, ["two"])
    assert list(found) == ["two"]
    torch.testing.assert_close(found["two"].summary, wanted["two"].summary)
    torch.testing.assert_close(found["two"].features, wanted["two"].features)


def test_the_first_weights_depend_on_the_seed_only(config):
    def first(seed):
        torch.rand(7)
        c = config(seed=seed)
        return build_student(c, radio_config(c, WIDTHS))[0].state_dict()

    a, b, other = first(0), first(0), first(1)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert any(not torch.equal(a[k], other[k]) for k in a)


def test_mean_and_deviation_of_the_input(config):
    c = config(student__mean=[0.5, 0.5, 0.5], student__std=[0.5, 0.25, 0.5])
    student, _ = build_student(c, radio_config(c, WIDTHS))
    assert student.radio.input_conditioner.norm_std.flatten().tolist() == [0.5, 0.25, 0.5]


# ---- starting from a checkpoint ----


@pytest.fixture
def start(tmp_path, head):
    """A checkpoint with two class tokens and an adaptor for the teacher ``two``."""
    backbone = ViTConfig(embed_dim=16, depth=2, num_heads=2, mlp_hidden_dim=32, patch_size=8, position_grid=(8, 8),
                         num_cls_tokens=2)  # fmt: skip
    torch.manual_seed(5)
    model = RadioModel(RadioConfig(backbone=backbone, adaptors={"two": head(16, 10, 10, 1)}), ["two"])
    return model, str(amradio.save(model, tmp_path / "start.safetensors"))


def test_a_student_that_is_what_its_checkpoint_describes(config, start):
    model, path = start
    c = config(student={"init": path}, teachers__1__features={"upsample": 1})
    student, loaded = build_student(c, radio_config(c, WIDTHS))
    assert loaded == {"two"}
    state = student.radio.state_dict()
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert student.radio.adaptors["one"].head_idx == 0


def test_heads_of_another_width_start_anew(config, start):
    _, path = start
    c = config(student={"init": path})  # upsamples by 2, which the checkpoint does not
    _, loaded = build_student(c, radio_config(c, WIDTHS))
    assert loaded == frozenset()


def test_a_checkpoint_for_another_description(config, start):
    model, path = start
    c = config(student__init=path, student__model__backbone__depth=3)  # also a register, which the checkpoint lacks
    student, _ = build_student(c, radio_config(c, WIDTHS))
    tokens = student.radio.model.patch_generator.cls_token.token
    assert torch.equal(tokens[:2], model.model.patch_generator.cls_token.token)
    assert torch.equal(student.radio.blocks[1].mlp.fc1.weight, model.blocks[1].mlp.fc1.weight)
    wrong = config(student__init=path, student__model__backbone__mlp_hidden_dim=48)
    with pytest.raises(ConfigError, match=r"does not fit the student: .*fc1.weight is \[32, 16\], expected \[48, 16\]"):
        build_student(wrong, radio_config(wrong, WIDTHS))


def test_too_few_tokens(config, start):
    _, path = start
    c = config(student={"init": path})
    third = dataclasses.replace(c.teachers[0], name="three")
    c = dataclasses.replace(c, teachers=(*c.teachers, third))
    with pytest.raises(ConfigError, match="2 class tokens, one too few for the teacher 'three'"):
        radio_config(c, WIDTHS | {"three": Widths(4, 4)})


# ---- randomness ----


@pytest.mark.parametrize("parts", [[4], [2, 2], [1, 3]])
def test_position_crops_are_those_of_the_whole_batch(config, parts):
    c = config()
    student, _ = build_student(c, radio_config(c, WIDTHS))
    images = torch.rand(4, 3, 32, 32)
    with positions_from(student, BatchDraws(3, 0, 4)):
        whole = student(images, ["one"])["one"].features
    start, found = 0, []
    for count in parts:
        with positions_from(student, BatchDraws(3, start, 4)):
            found.append(student(images[start : start + count], ["one"])["one"].features)
        start += count
    torch.testing.assert_close(torch.cat(found), whole)
    with positions_from(student, BatchDraws(4, 0, 4)):
        assert not torch.allclose(student(images, ["one"])["one"].features, whole)


def test_trunks_that_draw_nothing_need_no_draws(config):
    backbone = {"kind": "eradio", "dim": 8, "in_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2],
                "window_size": [None, None, 4, 4], "sr_ratio": [1, 1, 1, 1], "full_features_head_dim": 16,
                "cpb_mlp_hidden": 8}  # fmt: skip
    c = config(student={"model": {"backbone": backbone}})
    student, _ = build_student(c, radio_config(c, WIDTHS))
    with positions_from(student, BatchDraws(0, 0, 2)):
        assert student(torch.rand(2, 3, 32, 32), ["one"])["one"].features.shape == (2, 12, 2, 2)


# ---- parametrisations ----


def test_a_spectral_norm_begins_as_the_weight_itself():
    weight = torch.randn(12, 5)
    norm = SpectralNorm(weight, parts=3)
    torch.testing.assert_close(norm(weight), weight, rtol=1e-3, atol=1e-4)


def test_a_spectral_norm_bounds_each_part():
    norm = SpectralNorm(torch.randn(12, 5), parts=3)
    other = torch.randn(12, 5)
    for _ in range(60):
        norm.advance()
        norm(other)
    wanted = torch.nn.functional.softplus(norm.scale) + 0.05
    found = torch.stack([torch.linalg.matrix_norm(p, 2) for p in norm(other).chunk(3)])
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_power_iteration_moves_once_a_step():
    norm = SpectralNorm(torch.randn(6, 5))
    weight = torch.randn(6, 5)
    norm.advance()
    first, u = norm(weight), norm._u.clone()
    assert torch.equal(norm(weight), first)
    assert torch.equal(norm._u, u)
    norm.advance()
    norm.eval()(weight)
    assert torch.equal(norm._u, u)


def test_weight_noise_is_for_training_only():
    noise = WeightNoise(0.1)
    weight = torch.ones(100, 100)
    drawn = noise(weight)
    assert drawn.mean() == pytest.approx(1, abs=0.01)
    assert drawn.std() == pytest.approx(0.1, abs=0.01)
    assert noise.eval()(weight) is weight


def test_parametrisations_fold_into_what_they_compute(config):
    c = config()
    student, _ = build_student(c, radio_config(c, WIDTHS))
    add_parametrizations(student.radio.blocks, spectral=True, damp=0.2)
    student.eval()
    images = torch.rand(1, 3, 32, 32)
    before = student(images, ["one"])["one"].features
    fold_parametrizations(student)
    assert not [n for n, _ in student.named_parameters() if "parametrizations" in n]
    torch.testing.assert_close(student(images, ["one"])["one"].features, before)
