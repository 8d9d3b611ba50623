"""The RadioModel of ``transformers``: an independent implementation that must agree with ours, both ways."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from amradio.errors import CheckpointError, LayoutError
from amradio.models.configs import RadioConfig, ViTConfig
from amradio.models.radio import RadioModel
from amradio.weights import transformers_native
from amradio.weights.checkpoint import Checkpoint, build_model
from amradio.weights.convert import save
from amradio.weights.layouts import read_checkpoint

transformers = pytest.importorskip("transformers", minversion="5.13")

TRUNKS = {
    "v2.5": ViTConfig(embed_dim=64, depth=3, num_heads=4, mlp_hidden_dim=256, num_cls_tokens=4, num_registers=4),
    "v3, layer scale": ViTConfig(
        embed_dim=48, depth=2, num_heads=4, mlp_hidden_dim=192, layer_scale=1e-5, num_cls_tokens=4, num_registers=4,
        unused_reg_tokens=4,
    ),
    "v4, odd MLP": ViTConfig(embed_dim=32, depth=2, num_heads=2, mlp_hidden_dim=119, num_cls_tokens=3, num_registers=7),
    "patch 14": ViTConfig(embed_dim=32, depth=2, num_heads=2, mlp_hidden_dim=64, patch_size=14, qkv_bias=False),
}  # fmt: skip
GRIDS = [(4, 4), (12, 12), (8, 14), (3, 1), (15, 6), (16, 16)]


def model_of(name: str) -> RadioModel:
    trunk = dataclasses.replace(TRUNKS[name], position_grid=(12, 12))
    indices = (0, 2) if trunk.num_cls_tokens > 2 else (0,)
    model = RadioModel(RadioConfig(backbone=trunk, summary_idxs=indices)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "gamma" in key:
                parameter.uniform_(0.5, 1.5)
            elif "reg_token" not in key:
                parameter.normal_(std=0.1 if parameter.ndim > 1 else 0.5)
    model.input_conditioner.norm_mean.copy_(torch.tensor([0.4, 0.5, 0.6]).view(-1, 1, 1))
    return model


def theirs(path: Path) -> Any:
    model, info = transformers.RadioModel.from_pretrained(path, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(params=sorted(TRUNKS))
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[RadioModel, Any]:
    """Our model, and theirs with the weights that we wrote."""
    model = model_of(request.param)
    return model, theirs(save(model, tmp_path / "m", "transformers"))


def test_both_compute_the_same(pair: tuple[RadioModel, Any]) -> None:
    ours, reference = pair
    for h, w in GRIDS:
        images = torch.rand(2, 3, h * ours.patch_size, w * ours.patch_size)
        with torch.no_grad():
            mine, want = ours(images), reference(images)
        torch.testing.assert_close(mine.summary, want.summary, rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(mine.features, want.features, rtol=1e-5, atol=2e-5)


def test_packed_input_computes_the_same(pair: tuple[RadioModel, Any]) -> None:
    ours, reference = pair
    if not hasattr(reference, "_forward_packed"):
        pytest.skip("this transformers has no packed input")
    p = ours.patch_size
    images = [torch.rand(1, 3, h * p, w * p) for h, w in GRIDS]
    patches = [
        i.reshape(3, i.shape[2] // p, p, -1, p).permute(1, 3, 0, 2, 4).flatten(0, 1).flatten(1)  # [h*w, 3*P*P]
        for i in images
    ]
    with torch.no_grad():
        packed = reference(torch.cat(patches), image_grid_hw=torch.tensor(GRIDS))
        mine = [ours(i) for i in images]
    torch.testing.assert_close(torch.cat([o.summary for o in mine]), packed.summary, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(torch.cat([o.features[0] for o in mine]), packed.features, rtol=1e-5, atol=2e-5)


def test_intermediates_are_their_hidden_states(pair: tuple[RadioModel, Any]) -> None:
    ours, reference = pair
    images = torch.rand(1, 3, 4 * ours.patch_size, 6 * ours.patch_size)
    with torch.no_grad():
        want = reference(images, output_hidden_states=True).hidden_states[1:]
        mine = ours.forward_intermediates(images, output_fmt="NLC", intermediates_only=True)
    skip = ours.num_summary_tokens
    for a, b in zip(mine, want[-len(mine) :], strict=True):
        torch.testing.assert_close(a, b[:, skip:], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("original_names", [True, False])
@pytest.mark.parametrize("name", sorted(TRUNKS))
def test_what_they_save_is_read_exactly(name: str, original_names: bool, tmp_path: Path) -> None:
    model = model_of(name)
    reference = theirs(save(model, tmp_path / "a", "transformers"))
    reference.save_pretrained(tmp_path / "b", save_original_format=original_names)
    names = load_file(tmp_path / "b" / "model.safetensors")
    assert any(k.startswith("radio_model.") for k in names) is original_names
    back = read_checkpoint(tmp_path / "b")
    assert back.identity.layout == "transformers"
    trimmed = dataclasses.replace(model.config.backbone, unused_reg_tokens=0)
    expected = dataclasses.replace(model.config, backbone=trimmed)
    assert back.config == expected
    mine = {k: v for k, v in model.state_dict().items() if k not in ("summary_idxs", "model.reg_token")}
    assert mine.keys() == back.tensors.keys()
    assert all(torch.equal(v, back.tensors[k]) for k, v in mine.items())
    images = torch.rand(1, 3, 2 * model.patch_size, 3 * model.patch_size)
    with torch.no_grad():
        assert torch.equal(build_model(back)[0](images).features, model(images).features)


def test_a_model_that_they_initialise(tmp_path: Path) -> None:
    config = transformers.RadioConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, max_img_size=128, num_cls_tokens=3, num_registers=5
    )
    reference = transformers.RadioModel(config).eval()
    reference.save_pretrained(tmp_path)
    ours, _ = build_model(read_checkpoint(tmp_path))
    assert ours.config.backbone.layer_scale is None  # theirs are all ones
    assert ours.config.summary_idxs == (0, 1)
    images = torch.rand(1, 3, 48, 80)
    with torch.no_grad():
        torch.testing.assert_close(ours(images).features, reference(images).features, rtol=1e-5, atol=2e-5)


def test_half_precision_weights_of_a_float32_model(tmp_path: Path) -> None:
    checkpoint = Checkpoint.of(model_of("v2.5"))
    half = dataclasses.replace(checkpoint, tensors={k: v.half() for k, v in checkpoint.tensors.items()})
    path = save(half, tmp_path / "m", "transformers")
    back = read_checkpoint(path)
    assert {v.dtype for v in back.tensors.values()} == {torch.float16}
    ours, reference = build_model(half)[0], theirs(path)
    assert reference.dtype == torch.float32
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(images).features, reference(images).features, rtol=1e-5, atol=2e-5)


def test_config_is_one_that_the_library_accepts(tmp_path: Path) -> None:
    path = save(model_of("v4, odd MLP"), tmp_path / "m", "transformers")
    config = transformers.RadioConfig.from_pretrained(path)
    assert (config.num_cls_tokens, config.num_registers, config.summary_idxs) == (3, 7, [0, 2])
    assert config.norm_mean == pytest.approx([0.4, 0.5, 0.6])
    assert json.loads((path / "config.json").read_text())["model_type"] == "radio"


class TestRefusals:
    """Texts of errors; which models are refused is tested with the conversions."""

    def test_summary_of_registers(self, tmp_path: Path) -> None:
        trunk = dataclasses.replace(TRUNKS["v2.5"], position_grid=(4, 4))
        model = RadioModel(RadioConfig(backbone=trunk, summary_idxs=(0, 5)))
        with pytest.raises(LayoutError) as raised:
            save(model, tmp_path / "m", "transformers")
        assert str(raised.value) == (
            "The transformers layout cannot hold memory: its summary reads tokens [0, 5], but transformers' RadioModel "
            "reads only the 4 class tokens."
        )

    def test_aligned_corners(self, tmp_path: Path) -> None:
        trunk = dataclasses.replace(TRUNKS["v2.5"], position_grid=(4, 4))
        model = RadioModel(RadioConfig(backbone=trunk, position_interpolation="align_corners"))
        with pytest.raises(LayoutError) as raised:
            save(model, tmp_path / "m", "transformers", backbone_only=True)
        assert str(raised.value) == (
            "The transformers layout cannot hold memory as it is: position_interpolation is 'align_corners', read back "
            "as 'half_pixel'. Load it with position_interpolation='half_pixel' first, or write the native layout."
        )

    def test_target_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "m").write_text("")
        with pytest.raises(LayoutError, match="is a file, but the transformers layout is a directory"):
            save(model_of("v2.5"), tmp_path / "m", "transformers")

    @pytest.mark.parametrize(
        ("changes", "found"),
        [
            ({"use_swiglu_ffn": True}, "use_swiglu_ffn=True"),
            ({"hidden_act": "relu", "layer_norm_eps": 1e-5}, "hidden_act='relu', layer_norm_eps=1e-05"),
            ({"video_temporal_patch_size": 2}, "video_temporal_patch_size=2"),
        ],
    )
    def test_variants_of_theirs(self, changes: dict[str, Any], found: str, tmp_path: Path) -> None:
        path = save(model_of("v2.5"), tmp_path / "m", "transformers")
        self.edit(path, **changes)
        with pytest.raises(LayoutError) as raised:
            read_checkpoint(path)
        assert str(raised.value) == f"{path} has {found}, which amradio has no model for."

    def test_damage(self, tmp_path: Path) -> None:
        path = save(model_of("v2.5"), tmp_path / "m", "transformers")
        self.edit(path, hidden_size="64")
        with pytest.raises(CheckpointError, match=r"has values of the wrong type: hidden_size='64'\.$"):
            read_checkpoint(path)
        with pytest.raises(LayoutError, match="is no directory of transformers' RadioModel"):
            transformers_native.read(tmp_path)

    def test_a_projection_is_missing(self, tmp_path: Path) -> None:
        reference = theirs(save(model_of("v2.5"), tmp_path / "a", "transformers"))
        reference.save_pretrained(tmp_path / "b", save_original_format=False)
        file = tmp_path / "b" / "model.safetensors"
        tensors = load_file(file)
        del tensors["encoder.layer.1.attention.k_proj.bias"]
        save_file(tensors, file)
        with pytest.raises(
            CheckpointError, match=r"has only \['q', 'v'\] of the three projections of model\.blocks\.1"
        ):
            read_checkpoint(tmp_path / "b")

    def edit(self, path: Path, **changes: Any) -> None:
        file = path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
