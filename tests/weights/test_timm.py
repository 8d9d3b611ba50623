"""timm's layout of C-RADIO backbones, against a small forward pass written down from timm's names.

timm itself is not needed (it imports torchvision); the names, shapes and configs here are those of timm 1.0.31.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from amradio.errors import CheckpointError, LayoutError
from amradio.models.configs import RadioConfig, ViTConfig
from amradio.models.normalizers import CLIP_MEAN, CLIP_STD
from amradio.models.radio import RadioModel
from amradio.weights import timm
from amradio.weights.checkpoint import Checkpoint, Identity, build_model
from amradio.weights.convert import save
from amradio.weights.layouts import read_checkpoint

TOY = ViTConfig(embed_dim=32, depth=2, num_heads=4, mlp_hidden_dim=100, position_grid=(12, 12), num_registers=3)


def model_of(trunk: ViTConfig = TOY, **fields: Any) -> RadioModel:
    model = RadioModel(RadioConfig(backbone=trunk, **fields)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "reg_token" not in key:
                parameter.normal_(mean=float("norm" in key or "gamma" in key), std=0.2)
    return model


def timm_forward(state: dict[str, torch.Tensor], images: torch.Tensor, heads: int, corners: bool) -> torch.Tensor:
    """What timm computes from its own names: class token, registers, patches; [B, N, C]."""
    x = F.conv2d(
        images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"],
        stride=state["patch_embed.proj.weight"].shape[-1],
    )  # fmt: skip
    h, w = x.shape[-2:]
    grid = round(state["pos_embed"].shape[1] ** 0.5)
    positions = state["pos_embed"].reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
    if (h, w) != (grid, grid):
        side = max(h, w)
        positions = F.interpolate(positions, (side, side), mode="bilinear", align_corners=corners)[..., :h, :w]
    x = (x + positions).flatten(2).transpose(1, 2)
    prefix = [state[k].expand(len(x), -1, -1) for k in ("cls_token", "reg_token") if k in state]
    x = torch.cat([*prefix, x], 1)
    c = x.shape[-1]
    for i in range(len({k.split(".")[1] for k in state if k.startswith("blocks.")})):
        p = {k.removeprefix(f"blocks.{i}."): v for k, v in state.items() if k.startswith(f"blocks.{i}.")}
        y = F.layer_norm(x, (c,), p["norm1.weight"], p["norm1.bias"], 1e-6)
        q, k, v = (
            t.reshape(*t.shape[:2], heads, -1).transpose(1, 2)
            for t in F.linear(y, p["attn.qkv.weight"], p.get("attn.qkv.bias")).split(c, -1)
        )
        y = ((q @ k.transpose(-1, -2)) * (c // heads) ** -0.5).softmax(-1) @ v
        y = F.linear(y.transpose(1, 2).flatten(2), p["attn.proj.weight"], p["attn.proj.bias"])
        x = x + y * p.get("ls1.gamma", torch.ones(c))
        y = F.layer_norm(x, (c,), p["norm2.weight"], p["norm2.bias"], 1e-6)
        y = F.linear(
            F.gelu(F.linear(y, p["mlp.fc1.weight"], p["mlp.fc1.bias"])), p["mlp.fc2.weight"], p["mlp.fc2.bias"]
        )
        x = x + y * p.get("ls2.gamma", torch.ones(c))
    return x


def naflex(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same weights as a ``naflexvit_*`` model of timm saves them."""
    out = {}
    for key, tensor in state.items():
        if key == "patch_embed.proj.weight":
            out["embeds.proj.weight"] = tensor.permute(0, 2, 3, 1).flatten(1).contiguous()
        elif key == "patch_embed.proj.bias":
            out["embeds.proj.bias"] = tensor
        elif key == "pos_embed":
            side = round(tensor.shape[1] ** 0.5)
            out["embeds.pos_embed"] = tensor.reshape(1, side, side, -1)
        else:
            out[key if key.startswith("blocks.") else f"embeds.{key}"] = tensor
    return out


@pytest.mark.parametrize("interpolation", ["half_pixel", "align_corners"])
@pytest.mark.parametrize(
    "trunk",
    [
        TOY,
        dataclasses.replace(TOY, layer_scale=1e-5, num_registers=0),
        dataclasses.replace(TOY, patch_size=14, qkv_bias=False),
    ],
)
def test_timm_computes_the_same(trunk: ViTConfig, interpolation: Any, tmp_path: Path) -> None:
    model = model_of(trunk, position_interpolation=interpolation)
    path = save(model, tmp_path / "m", "timm")
    state, config = load_file(path / "model.safetensors"), json.loads((path / "config.json").read_text())
    assert config["architecture"] == "naflexvit_large_patch16_radio_v3"
    back, _ = build_model(read_checkpoint(path))
    for h, w in [(12, 12), (4, 9), (20, 3)]:
        images = torch.rand(2, 3, h * trunk.patch_size, w * trunk.patch_size)
        with torch.no_grad():
            prefix, patches = model.model(images)
            want = timm_forward(
                state, images, config["model_args"]["num_heads"], config["model_args"]["pos_embed_align_corners"]
            )
            assert torch.equal(back(images).features, model(images).features)
        torch.testing.assert_close(torch.cat([prefix, patches], 1), want, rtol=1e-5, atol=2e-5)


def test_a_named_architecture_of_other_sizes(tmp_path: Path) -> None:
    path = save(model_of(), tmp_path / "m", "timm")
    config = json.loads((path / "config.json").read_text())
    del config["model_args"]["pos_embed_align_corners"]  # which timm leaves to the name
    for name, wanted in (("base", "align_corners"), ("large", "half_pixel")):
        changed = config | {"architecture": f"naflexvit_{name}_patch16_radio_v3"}
        (path / "config.json").write_text(json.dumps(changed))
        assert read_checkpoint(path).config.position_interpolation == wanted


def test_names_and_shapes_are_those_of_timm(tmp_path: Path) -> None:
    trunk = dataclasses.replace(TOY, layer_scale=1e-5, unused_reg_tokens=4)
    state = load_file(save(model_of(trunk), tmp_path / "m.safetensors", "timm", backbone_only=True))
    block = {
        "norm1.weight": [32], "norm1.bias": [32], "attn.qkv.weight": [96, 32], "attn.qkv.bias": [96],
        "attn.proj.weight": [32, 32], "attn.proj.bias": [32], "ls1.gamma": [32], "norm2.weight": [32],
        "norm2.bias": [32], "mlp.fc1.weight": [100, 32], "mlp.fc1.bias": [100], "mlp.fc2.weight": [32, 100],
        "mlp.fc2.bias": [32], "ls2.gamma": [32],
    }  # fmt: skip
    wanted = {
        "cls_token": [1, 1, 32], "reg_token": [1, 3, 32], "pos_embed": [1, 144, 32],
        "patch_embed.proj.weight": [32, 3, 16, 16], "patch_embed.proj.bias": [32],
    }  # fmt: skip
    wanted |= {f"blocks.{i}.{k}": v for i in range(2) for k, v in block.items()}
    assert {k: list(v.shape) for k, v in state.items()} == wanted
    assert not state["patch_embed.proj.bias"].any()


def test_a_model_that_timm_saved(tmp_path: Path) -> None:
    model = model_of()
    path = save(model, tmp_path / "m", "timm")
    save_file(naflex(load_file(path / "model.safetensors")), path / "model.safetensors")
    back = read_checkpoint(path)
    assert back.config == model.config
    mine = model.state_dict()
    assert all(torch.equal(v, mine[k]) for k, v in back.tensors.items())
    assert len(back.tensors) == len(mine) - 1  # summary_idxs


def published(name: str) -> RadioModel:
    """A model of the sizes of a published one that takes little memory: weights without storage of their own."""
    a = timm._ARCHITECTURES[name]
    trunk = ViTConfig(
        embed_dim=a.embed_dim,
        depth=a.depth,
        num_heads=a.num_heads,
        mlp_hidden_dim=a.mlp_hidden_dim,
        layer_scale=1e-5 if a.layer_scale else None,
        position_grid=(128, 128),
        num_cls_tokens=a.num_cls_tokens,
        num_registers=a.num_registers,
    )
    with torch.device("meta"):
        return RadioModel(
            RadioConfig(backbone=trunk, summary_idxs=a.summary_idxs, position_interpolation=a.interpolation)
        )


@pytest.mark.parametrize(
    ("name", "count", "indices", "interpolation"),
    [
        ("base_patch16_radio_v3", 98_251_776, (0, 1, 2), "align_corners"),
        ("large_patch16_radio_v3", 319_930_368, (0, 1, 2), "half_pixel"),
        ("huge_patch16_radio_v3", 651_642_880, (0, 1, 2), "align_corners"),
        ("giant_patch16_radio_v3", 1_159_618_560, (0, 1, 2), "half_pixel"),
        ("so400m_patch16_radio_v4", 431_237_232, (0, 1), "half_pixel"),
        ("huge_patch16_radio_v4", 651_645_440, (0, 1), "half_pixel"),
    ],
)
def test_published_architectures_lose_nothing(
    name: str, count: int, indices: tuple[int, ...], interpolation: str
) -> None:
    model = published(name)
    # The published counts, without the conditioner and the unread registers.
    assert sum(p.numel() for p in model.parameters()) == count
    b = model.config.backbone
    sizes = (b.embed_dim, b.depth, b.mlp_hidden_dim, b.layer_scale is not None, b.num_prefix_tokens)
    found = timm._architecture(f"vit_{name}", *sizes)
    assert found is timm._ARCHITECTURES[name]
    assert (found.num_heads, found.summary_idxs, found.interpolation) == (b.num_heads, indices, interpolation)


@pytest.fixture(scope="module")
def base_checkpoint() -> Checkpoint:
    """A float16 file's worth of C-RADIOv3-B."""
    model = published("base_patch16_radio_v3")
    tensors = {
        k: torch.zeros(v.shape, dtype=torch.float16) for k, v in model.state_dict().items() if k != "summary_idxs"
    }
    tensors["input_conditioner.norm_mean"] = torch.tensor(CLIP_MEAN).view(-1, 1, 1)
    tensors["input_conditioner.norm_std"] = torch.tensor(CLIP_STD).view(-1, 1, 1)
    return Checkpoint(model.config, tensors, Identity(source="memory", layout="memory"))


def test_a_published_model_needs_no_config(base_checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = save(base_checkpoint, tmp_path / "m.safetensors", "timm")
    state = load_file(path)
    save_file(state, tmp_path / "bare.safetensors")  # without metadata
    assert timm.matches(tmp_path / "bare.safetensors")
    assert read_checkpoint(tmp_path / "bare.safetensors").config == base_checkpoint.config
    save_file(naflex(state), path)
    assert read_checkpoint(path).config == base_checkpoint.config


def test_a_resampled_grid_takes_one_size_only(base_checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = save(base_checkpoint, tmp_path / "m.safetensors", "timm")
    state = load_file(path)
    state["pos_embed"] = torch.zeros(1, 32 * 32, 768)  # as a vit_* model of timm saves it
    (tmp_path / "dir").mkdir()
    save_file(state, tmp_path / "dir" / "model.safetensors")
    config = {"architecture": "vit_base_patch16_radio_v3", "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    (tmp_path / "dir" / "config.json").write_text(json.dumps(config))
    checkpoint = read_checkpoint(tmp_path / "dir")
    assert (checkpoint.config.backbone.position, checkpoint.config.backbone.position_grid) == ("fixed", (32, 32))
    assert checkpoint.tensors["input_conditioner.norm_std"].flatten().tolist() == [0.25] * 3


class TestRefusals:
    def test_what_a_file_cannot_hold(self, tmp_path: Path) -> None:
        trunk = dataclasses.replace(TOY, num_cls_tokens=2)
        model = model_of(trunk, summary_idxs=(0, 1), position_interpolation="align_corners")
        model.input_conditioner.norm_mean.zero_()
        with pytest.raises(LayoutError) as raised:
            save(model, tmp_path / "m.safetensors", "timm")
        mean = torch.tensor(CLIP_MEAN).tolist()
        assert str(raised.value) == (
            f"The timm layout has no place for parts of memory: backbone.num_cls_tokens is 2, read back as 1; "
            f"backbone.num_registers is 3, read back as 4; summary_idxs is [0, 1], read back as [0]; "
            f"position_interpolation is 'align_corners', read back as 'half_pixel'; the conditioner's norm_mean is "
            f"[0.0, 0.0, 0.0], read back as {mean}. Pass backbone_only=True (--backbone-only on the command line) to "
            f"leave them out, or choose another layout: native holds everything, huggingface "
            f"everything that RADIO models have."
        )
        assert not list(tmp_path.iterdir())
        back = read_checkpoint(save(model, tmp_path / "m.safetensors", "timm", backbone_only=True))
        assert back.config.summary_idxs == (0,)

    def test_a_directory_holds_the_conditioner_and_the_interpolation(self, tmp_path: Path) -> None:
        model = model_of(position_interpolation="align_corners")
        model.input_conditioner.norm_mean.fill_(0.3)
        back = read_checkpoint(save(model, tmp_path / "m", "timm"))
        assert torch.equal(back.tensors["input_conditioner.norm_mean"], model.input_conditioner.norm_mean)
        assert back.config.position_interpolation == "align_corners"

    def test_another_vit_of_timm(self, tmp_path: Path) -> None:
        path = save(model_of(), tmp_path / "m.safetensors", "timm")
        state = load_file(path) | {"norm.weight": torch.ones(32)}
        save_file(state, path)
        with pytest.raises(LayoutError, match="is in no layout that amradio reads: it is a safetensors file with"):
            read_checkpoint(path)

    def test_heads_that_nothing_tells(self, tmp_path: Path) -> None:
        path = save(model_of(), tmp_path / "m.safetensors", "timm")
        save_file(load_file(path), path)
        with pytest.raises(LayoutError) as raised:
            read_checkpoint(path)
        assert str(raised.value) == (
            f"{path} does not say how many attention heads its model of width 32 and depth 2 has: no architecture of "
            f"timm's C-RADIO models fits. Pass the directory with its config.json."
        )

    def test_damage(self, tmp_path: Path) -> None:
        path = save(model_of(), tmp_path / "m.safetensors", "timm")
        state = load_file(path)
        save_file(state, path, {"timm": "{"})
        with pytest.raises(LayoutError, match=r"has damaged metadata under 'timm': '{'"):
            read_checkpoint(path)
        save_file({k: v for k, v in state.items() if k != "pos_embed"}, path, {"timm": "{}"})
        with pytest.raises(LayoutError, match=r"is no C-RADIO model of timm: it lacks pos_embed\.$"):
            read_checkpoint(path)
        save_file(state | {"pos_embed": torch.zeros(1, 145, 32)}, path, {"timm": "{}"})
        with pytest.raises(LayoutError, match="has 145 position embeddings, which make no square grid"):
            read_checkpoint(path)
        path.write_bytes(path.read_bytes()[:-5])
        with pytest.raises(CheckpointError, match="is truncated"):
            read_checkpoint(path)

    def test_target_of_the_wrong_kind(self, tmp_path: Path) -> None:
        (tmp_path / "m.safetensors").mkdir()
        (tmp_path / "m").write_text("")
        with pytest.raises(LayoutError, match=r"exists and is a directory; name another target\.$"):
            save(model_of(), tmp_path / "m.safetensors", "timm")
        with pytest.raises(LayoutError, match=r"exists and is a file; name another target\.$"):
            save(model_of(), tmp_path / "m", "timm")
