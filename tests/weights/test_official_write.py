"""Writing the official ``.pth.tar`` layout, with published training arguments and with made-up ones."""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from amradio.errors import LayoutError
from amradio.models.configs import AdaptorConfig, ERadioConfig, HeadConfig, RadioConfig, ViTConfig
from amradio.models.eradio import ERADIO_VARIANTS
from amradio.models.radio import RadioModel
from amradio.weights import official
from amradio.weights.checkpoint import Checkpoint, Identity
from amradio.weights.fidelity import differences
from amradio.weights.synthesis import args_from_config, mlp_ratio_of

MODELS = Path(__file__).parents[1] / "goldens" / "radio" / "models"
TOY = ViTConfig(embed_dim=16, depth=2, num_heads=2, mlp_hidden_dim=64, position_grid=(8, 8))


def payload_of(path: Path) -> Any:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


def checkpoint_of(config: RadioConfig) -> Checkpoint:
    return Checkpoint.of(RadioModel(config, tuple(config.adaptors)))


def test_the_file_is_what_the_official_loader_expects(tmp_path: Path) -> None:
    source = official.read(MODELS / "v21_mlpnorm_bf16.pth.tar")
    payload = payload_of(official.write(source, tmp_path / "m.pth.tar"))
    assert set(payload) == {"arch", "epoch", "state_dict", "args"}
    args = payload["args"]
    assert isinstance(args, argparse.Namespace)
    assert args.dtype is torch.bfloat16
    assert args.amp_dtype is torch.bfloat16
    assert args.model == payload["arch"] == "vit_huge_patch16_224_mlpnorm"
    for name in ("pretrained", "in_chans", "input_size", "model_kwargs", "spectral_reparam", "cls_token_per_teacher"):
        assert hasattr(args, name)
    prefixes = {k.split(".")[0] for k in payload["state_dict"]}
    assert prefixes == {"base_model", "input_conditioner", "_heads", "_feature_projections"}


@pytest.mark.parametrize("name", ["v3_ls", "nocpe", "dinog", "eradio"])
def test_names_and_shapes_are_the_official_ones(name: str, tmp_path: Path) -> None:
    before = payload_of(MODELS / f"{name}.pth.tar")["state_dict"]
    after = payload_of(official.write(official.read(MODELS / f"{name}.pth.tar"), tmp_path / "m.pth.tar"))["state_dict"]

    def normal(key: str) -> str:
        return key.replace(".grandma", ".gamma")

    # Heads may be named by index or by name; we write names.
    trunk = {normal(k): v for k, v in before.items() if not k.startswith(("_heads", "_feature_projections"))}
    written = {normal(k): v for k, v in after.items() if not k.startswith(("_heads", "_feature_projections"))}
    assert {k: v.shape for k, v in trunk.items()} == {k: v.shape for k, v in written.items()}
    assert all(torch.equal(v, written[k]) for k, v in trunk.items())
    assert len(before) == len(after)


def test_a_view_does_not_drag_its_storage_along(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(RadioConfig(backbone=TOY))
    big = torch.zeros(1_000_000)
    checkpoint.tensors["model.blocks.0.norm1.weight"] = big[:16]
    assert official.write(checkpoint, tmp_path / "m.pth.tar").stat().st_size < 1_000_000


head = st.builds(
    HeadConfig,
    version=st.sampled_from(["v1", "v2"]),
    input_dim=st.just(16),
    hidden_dim=st.sampled_from([8, 12]),
    output_dim=st.sampled_from([4, 8]),
    num_inner=st.integers(0, 2),
)
trunks = st.builds(
    ViTConfig,
    embed_dim=st.just(16),
    depth=st.integers(1, 3),
    num_heads=st.sampled_from([1, 2, 4]),
    mlp_hidden_dim=st.integers(1, 70),
    patch_size=st.sampled_from([14, 16]),
    in_chans=st.sampled_from([3, 4]),
    qkv_bias=st.booleans(),
    layer_scale=st.sampled_from([None, 1e-5, 0.1]),
    final_norm=st.booleans(),
    position_grid=st.sampled_from([(14, 14), (16, 16), (37, 37), (7, 7)]),
    num_cls_tokens=st.integers(1, 5),
    num_registers=st.integers(0, 5),
    unused_reg_tokens=st.sampled_from([0, 4]),
)
norms = st.sampled_from([{}, {"mlp_norm": True}, {"norm": "dyt"}, {"scaled_norm": True}, {"position": "window"}])
fixed = st.builds(
    ViTConfig,
    embed_dim=st.just(16),
    depth=st.just(1),
    num_heads=st.just(2),
    mlp_hidden_dim=st.sampled_from([16, 64]),
    position=st.just("fixed"),
    position_grid=st.sampled_from([(14, 14), (4, 6)]),
    position_of_prefix=st.booleans(),
    final_norm=st.booleans(),
    patch_bias=st.just(True),
)
students = st.builds(
    ViTConfig,
    embed_dim=st.just(24),
    depth=st.integers(1, 2),
    num_heads=st.just(2),
    mlp_hidden_dim=st.just(64),
    mlp=st.just("swiglu"),
    patch_size=st.just(14),
    layer_scale=st.sampled_from([1e-5, 0.5]),
    final_norm=st.just(True),
    patch_bias=st.just(True),
    position_grid=st.sampled_from([(8, 8), (16, 16), (37, 37)]),
    num_cls_tokens=st.just(1),
    num_registers=st.integers(1, 5),
)


@settings(max_examples=150)
@given(trunk=st.one_of(trunks.flatmap(lambda t: norms.map(lambda n: dataclasses.replace(t, **n))), fixed, students))
def test_made_up_arguments_describe_every_trunk(trunk: ViTConfig) -> None:
    tokens = range(1 if trunk.patch_bias else trunk.num_cls_tokens)
    config = RadioConfig(backbone=trunk, summary_idxs=tuple(tokens)[:3])
    assert differences(config, official.describe(args_from_config(config), {}), ["teachers"]) == []


@given(heads=st.lists(st.tuples(head, head), min_size=1, max_size=4), data=st.data())
@settings(max_examples=25)
def test_made_up_arguments_describe_adaptors(heads: list[tuple[HeadConfig, HeadConfig]], data: st.DataObject) -> None:
    trunk = dataclasses.replace(TOY, num_cls_tokens=data.draw(st.integers(len(heads), 5)), num_registers=2)
    slots = data.draw(st.permutations(range(trunk.num_cls_tokens)))
    upsample = data.draw(st.sampled_from([1, 2]))
    adaptors = {
        f"t{i}": AdaptorConfig(
            head_idx=slots[i] if trunk.num_cls_tokens > 1 else 0,
            summary=summary,
            features=dataclasses.replace(features, upsample_factor=upsample),
        )
        for i, (summary, features) in enumerate(heads)
    }
    config = RadioConfig(backbone=trunk, adaptors=adaptors)
    with tempfile.TemporaryDirectory() as folder:
        back = official.read(official.write(checkpoint_of(config), Path(folder) / "m.pth.tar"))
    assert dict(back.config.adaptors) == adaptors
    assert back.config.summary_idxs == (0,)
    # The official code takes versions from the arguments, not from the tensors.
    for teacher in back.config.args["teachers"]:
        adaptor = adaptors.get(teacher["name"])
        if adaptor is not None:
            args = back.config.args
            assert (teacher.get("mlp_version") or args["mlp_version"]) == adaptor.summary.version
            assert (teacher.get("spatial_mlp_version") or args["spatial_mlp_version"]) == adaptor.features.version


@pytest.mark.parametrize(
    "trunk",
    [
        *ERADIO_VARIANTS.values(),
        ERadioConfig(dim=6, in_dim=8, depths=(1, 1, 2, 1), num_heads=(1, 1, 2, 4), window_size=(None, None, (4, 4), 4)),
        ERadioConfig(layer_scale=0.1, qkv_bias=True, final_norm=True),
    ],
)
def test_made_up_arguments_describe_eradio(trunk: ERadioConfig) -> None:
    config = RadioConfig(backbone=trunk)
    args = args_from_config(config)
    assert args["model_kwargs"]["return_full_features"] is True
    assert differences(config, official.describe(args, {}), ["teachers"]) == []


def test_published_names_are_found_again() -> None:
    for name in ("base", "large"):
        source = {"model": f"vit_{name}_patch16_v2_224", "model_kwargs": {}, "cpe_max_size": 2048, "teachers": []}
        args = args_from_config(official.describe(source, {}))
        assert (args["model"], args["model_kwargs"]) == (source["model"], {})


@given(hidden=st.integers(1, 10_000), width=st.integers(1, 3000))
def test_mlp_ratio_gives_the_hidden_width_back(hidden: int, width: int) -> None:
    assert int(width * mlp_ratio_of(hidden, width)) == hidden


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_norm": True}, "backbone.patch_norm is True, read back as False."),
        ({"position_grid": (8, 4)}, "backbone.position_grid is [8, 4], read back as [8, 8]."),
        (
            {"mlp_norm": True, "norm": "dyt"},
            "backbone.mlp_norm is True, read back as False; backbone.norm is 'dyt', read back as 'layernorm'.",
        ),
    ],
)
def test_what_arguments_cannot_say_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = RadioConfig(backbone=dataclasses.replace(TOY, **change))
    with pytest.raises(LayoutError) as raised:
        official.write(checkpoint_of(config), tmp_path / "m.pth.tar")
    assert str(raised.value) == f"The official layout cannot hold memory as it is: {message}"
    assert not list(tmp_path.iterdir())


def test_position_interpolation_is_not_lost_silently(tmp_path: Path) -> None:
    config = RadioConfig(backbone=TOY, position_interpolation="align_corners")
    with pytest.raises(LayoutError) as raised:
        official.write(checkpoint_of(config), tmp_path / "m.pth.tar")
    assert str(raised.value) == (
        "The official layout cannot hold memory as it is: position_interpolation is 'align_corners', read back as "
        "'half_pixel'. Load it with position_interpolation='half_pixel' first, or write the native layout."
    )


def test_published_arguments_that_contradict_the_model_are_refused(tmp_path: Path) -> None:
    checkpoint = official.read(MODELS / "v25_p16.pth.tar")
    changed = dataclasses.replace(checkpoint, config=dataclasses.replace(checkpoint.config, summary_idxs=(0, 3)))
    with pytest.raises(LayoutError, match=r"summary_idxs is \[0, 3\], read back as \[0, 1, 2\]\.$"):
        official.write(changed, tmp_path / "m.pth.tar")


def test_what_the_catalog_knows_does_not_hinder(tmp_path: Path) -> None:
    checkpoint = official.read(MODELS / "v25_p16.pth.tar")
    known = dataclasses.replace(
        checkpoint.config, version="radio_v2.5-b", max_resolution=2048, patch_size=16, vitdet_num_global=4
    )
    path = official.write(dataclasses.replace(checkpoint, config=known), tmp_path / "m.pth.tar")
    assert official.read(path).config == checkpoint.config


def test_target_is_a_directory(tmp_path: Path) -> None:
    with pytest.raises(LayoutError) as raised:
        official.write(Checkpoint(RadioConfig(backbone=TOY), {}, Identity(source="m", layout="memory")), tmp_path)
    assert str(raised.value) == f"{tmp_path} is a directory, but the official layout is one file. Name a file in it."
