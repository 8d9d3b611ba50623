"""E-RADIO against stored outputs of the official code, against naive re-derivations, and against itself."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from amradio.errors import CapabilityError, ConfigError, OptionError, ResolutionError
from amradio.models.cache import TensorCache
from amradio.models.configs import ERadioConfig, from_json, to_json
from amradio.models.eradio import ERADIO_VARIANTS, ERadio
from amradio.models.eradio_bias import PositionBias, relative_coords, relative_index
from amradio.models.eradio_blocks import ConvBN

GOLDENS = Path(__file__).parents[1] / "goldens" / "radio"
ALL_CASES = json.loads((GOLDENS / "index.json").read_text())["cases"]
CASES = {c["name"]: c for c in ALL_CASES if c.get("model") == "eradio"}
WITH_OUTPUTS = sorted(set(CASES) - {"eradio_err"})

SMALL = ERadioConfig(
    dim=4,
    in_dim=4,
    depths=(1, 1, 1, 1),
    num_heads=(1, 1, 2, 4),
    window_size=(None, None, (4, 4), 4),
    full_features_head_dim=12,
    cpb_mlp_hidden=8,
)
UNUSUAL = {
    "small": {},
    "plain_convolutions": {"yolo_arch": False},
    "pooling": {"conv_base": False},
    "depthwise": {"conv_groups_ratio": 1.0},
    "layer_scale": {"layer_scale": 0.3, "qkv_bias": True},
    "neck_from_stage_1": {"neck_start_stage": 1},
    "neck_identity": {"full_features_head_dim": 16},
    "final_norm": {"final_norm": True},
    "padded_windows": {"window_size": (None, None, (4, 3), 4)},
    "three_resolutions": {"window_size": (None, None, 2, 4), "sr_ratio": (1, 1, (4, 2, 1), 1)},
}


@pytest.fixture(scope="module")
def checkpoint() -> dict[str, Any]:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(GOLDENS / "models" / "eradio.pth.tar", weights_only=True)


@pytest.fixture
def backbone_state(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    prefix = "base_model."
    return {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}


@pytest.fixture
def golden_model(checkpoint: dict[str, Any], backbone_state: dict[str, Tensor]) -> ERadio:
    kwargs = {k: v for k, v in checkpoint["args"].model_kwargs.items() if k != "return_full_features"}
    model = ERadio(from_json(ERadioConfig, kwargs)).eval()
    model.load_state_dict(backbone_state, strict=True)  # half weights into float32 parameters
    return model


@pytest.fixture
def conditioned(checkpoint: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    mean, std = (checkpoint["state_dict"][f"input_conditioner.{n}"].float() for n in ("norm_mean", "norm_std"))
    return lambda u8: (u8.float() / 255 - mean) / std


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@torch.no_grad()
def randomised(config: ERadioConfig) -> ERadio:
    """A model whose norms, statistics and biases are nothing like their initial values."""
    model = ERadio(config).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.uniform_(0.7, 1.3)
            module.bias.normal_(0, 0.2)
        elif isinstance(module, PositionBias):
            for p in module.cpb_mlp.parameters():
                p.normal_()
    return model


@torch.no_grad()
def outputs(model: ERadio, x: Tensor) -> Tensor:
    """Summary and features in one tensor [B, 1 + L, D], without gradients."""
    summary, features = model(x)
    return torch.cat([summary[:, None], features], dim=1)


def position_biases(model: ERadio) -> list[PositionBias]:
    return [m for m in model.modules() if isinstance(m, PositionBias)]


# ---- the official numbers ----


@pytest.mark.parametrize("name", WITH_OUTPUTS)
@torch.no_grad()
def test_official_outputs(name: str, golden_model: ERadio, conditioned: Callable[[Tensor], Tensor]) -> None:
    case = CASES[name]
    stored = load_file(GOLDENS / case["file"])
    compared = 0
    for call in case["calls"]:
        if call["fn"] != "forward":
            getattr(golden_model, call["fn"])(*([call["arg"]] if "arg" in call else []))
            continue
        summary, features = golden_model(conditioned(stored[call["input"]]))
        for key, actual in (("summary", summary), ("features", features)):
            for stem in (call["id"], f"{call['id']}.backbone"):
                if f"{stem}.{key}" in stored:
                    torch.testing.assert_close(actual, stored[f"{stem}.{key}"], atol=2e-5, rtol=1e-5)
                    compared += 1
    assert compared >= 2


def test_size_error_says_what_the_official_one_says_and_the_nearest_size(golden_model: ERadio) -> None:
    official = CASES["eradio_err"]["calls"][0]["error"]["message"]
    with pytest.raises(ResolutionError) as e:
        golden_model(torch.zeros(1, 3, 112, 128))
    assert str(e.value) == f"{official}. The nearest supported size is 128 x 128."
    with pytest.raises(ResolutionError, match="nearest supported size is 32 x 64"):
        golden_model(torch.zeros(1, 3, 3, 65))


def test_the_table_is_used_as_stored(golden_model: ERadio, backbone_state: dict[str, Tensor]) -> None:
    name = "levels.2.blocks.0.attention_blocks.0.attn.pos_emb_funct.relative_coords_table"
    stored = backbone_state[name].float()
    exact = relative_coords(4, 4)
    assert not torch.equal(stored, exact)  # half precision has rounded it
    assert torch.equal(golden_model.state_dict()[name], stored)
    torch.testing.assert_close(stored, exact, atol=1e-3, rtol=1e-3)


# ---- position bias ----


@pytest.mark.parametrize("window", [1, 2, 5])
def test_bias_against_its_definition(window: int) -> None:
    trained = 4
    bias = PositionBias(trained, num_heads=3, hidden_dim=6)
    first, _, last = bias.cpb_mlp
    actual = bias.compute(window)[0]

    def coordinate(offset: int) -> float:
        v = 8 * offset / (trained - 1)
        return math.copysign(math.log2(abs(v) + 1) / math.log2(8), v)

    for query in range(window**2):
        for key in range(window**2):
            dy, dx = query // window - key // window, query % window - key % window
            hidden = F.relu(first(torch.tensor([coordinate(dy), coordinate(dx)])))
            torch.testing.assert_close(actual[:, query, key], 16 * torch.sigmoid(last(hidden)))


@given(st.integers(1, 9))
def test_index_addresses_the_offset(window: int) -> None:
    index = relative_index(window)
    assert index.shape == (window**2, window**2)
    assert torch.equal(index + index.T, torch.full_like(index, (2 * window - 1) ** 2 - 1))  # offsets are opposite
    assert index.unique().numel() == (2 * window - 1) ** 2


def test_bias_is_computed_once(golden_model: ERadio, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    compute = PositionBias.compute
    monkeypatch.setattr(PositionBias, "compute", lambda self, w: calls.append(w) or compute(self, w))
    x = torch.randn(1, 3, 64, 64)
    first = outputs(golden_model, x)
    once = len(calls)
    assert once == len(position_biases(golden_model))
    assert torch.equal(outputs(golden_model, x), first)
    with torch.inference_mode():
        golden_model(torch.randn(2, 3, 32, 96))
    assert len(calls) == once
    golden_model(x)  # with gradients
    assert len(calls) == 2 * once


def _load(m: ERadio) -> None:
    m.load_state_dict({k: v * 1.5 if "cpb_mlp" in k else v for k, v in m.state_dict().items()})


def _load_assign(m: ERadio) -> None:
    m.load_state_dict({k: v * 1.5 if "cpb_mlp" in k else v for k, v in m.state_dict().items()}, assign=True)


def _load_part(m: ERadio) -> None:
    for bias in position_biases(m):
        bias.cpb_mlp.load_state_dict({k: v * 1.5 for k, v in bias.cpb_mlp.state_dict().items()})


def _in_place(m: ERadio) -> None:
    with torch.no_grad():
        for bias in position_biases(m):
            bias.cpb_mlp[2].weight.mul_(1.5)


def _new_storage(m: ERadio) -> None:
    for bias in position_biases(m):
        for p in bias.cpb_mlp.parameters():
            p.data = p.data * 1.5


def _optimiser_step(m: ERadio) -> None:
    optimiser = torch.optim.SGD([p for b in position_biases(m) for p in b.cpb_mlp.parameters()], lr=0.5)
    m(torch.ones(1, 3, 32, 32))[1].square().sum().backward()
    optimiser.step()


def _table(m: ERadio) -> None:
    for bias in position_biases(m):
        bias.relative_coords_table.mul_(0.5)


CHANGES = [_load, _load_assign, _load_part, _in_place, _new_storage, _optimiser_step, _table]


@pytest.mark.parametrize("deployed", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_bias_is_never_stale(change: Callable[[ERadio], None], deployed: bool) -> None:
    model = randomised(SMALL)
    if deployed:
        model.switch_to_deploy()
    x = torch.randn(1, 3, 64, 64)
    before = outputs(model, x)
    cached = position_biases(model)[0](torch.float32).detach()
    change(model)
    fresh = copy.deepcopy(model)  # its cache is empty
    assert not torch.equal(position_biases(fresh)[0](torch.float32), cached)
    after = outputs(model, x)
    assert torch.equal(after, outputs(fresh, x))
    assert not torch.equal(after, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_bias_follows_the_dtype(dtype: torch.dtype) -> None:
    model = randomised(SMALL)
    x = torch.randn(1, 3, 64, 64)
    reference = outputs(model, x)
    model.to(dtype)
    actual = outputs(model, x.to(dtype))
    assert actual.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float64 else 0.1
    torch.testing.assert_close(actual.float(), reference, atol=tolerance, rtol=tolerance)


def test_cache_is_bounded_and_stays_out_of_copies() -> None:
    source, cache = torch.ones(2), TensorCache(capacity=2)
    for key in range(5):
        cache.get([source], (key,), lambda: source * 2)
    assert len(cache._entries) == 2
    assert not copy.deepcopy(cache)._entries
    assert not pickle.loads(pickle.dumps(cache))._entries
    model = randomised(SMALL)
    keys = set(model.state_dict())
    outputs(model, torch.randn(1, 3, 32, 32))
    assert set(model.state_dict()) == keys


def test_cache_made_in_inference_mode_serves_outside_it() -> None:
    model = randomised(SMALL)
    x = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        model(x)
    bias = position_biases(model)[0]
    with torch.no_grad():
        assert not bias(torch.float32).is_inference()
    with torch.inference_mode():  # parameters without version counters are not cached for
        born_there = PositionBias(3, 2, 4)
        before = born_there(torch.float32)
        born_there.cpb_mlp[2].weight.mul_(3)
        assert not torch.equal(born_there(torch.float32), before)


def test_gradients_reach_the_bias_after_inference() -> None:
    model = randomised(SMALL)
    x = torch.randn(1, 3, 64, 64, requires_grad=True)
    outputs(model, x.detach())
    model(x)[1].square().sum().backward()
    # The last norm is read by the intermediates only, and this model has none.
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(p.grad.abs().max() > 0 for b in position_biases(model) for p in b.cpb_mlp.parameters())
    assert x.grad is not None
    assert x.grad.abs().max() > 0


# ---- deployment and windows ----


@pytest.mark.parametrize("name", UNUSUAL)
def test_deployment_keeps_the_numbers(name: str) -> None:
    model = randomised(dataclasses.replace(SMALL, **UNUSUAL[name]))
    deployed = copy.deepcopy(model)
    deployed.switch_to_deploy()  # before any forward pass
    for x in (torch.randn(2, 3, 64, 96), torch.randn(1, 3, 128, 128)):
        torch.testing.assert_close(outputs(deployed, x), outputs(model, x), atol=2e-5, rtol=1e-5)
    state = {k: v.clone() for k, v in deployed.state_dict().items()}
    deployed.switch_to_deploy()  # changes nothing more
    assert all(torch.equal(v, state[k]) for k, v in deployed.state_dict().items())
    assert not any(isinstance(m, ConvBN) and m.bn is not None for m in deployed.modules())
    fresh = ERadio(model.config).eval()
    fresh.switch_to_deploy()
    fresh.load_state_dict(state, strict=True)
    assert torch.equal(outputs(fresh, x), outputs(deployed, x))


def test_deployed_keys_and_stored_bias(golden_model: ERadio) -> None:
    name = "levels.3.blocks.0.attention_blocks.0.attn.pos_emb_funct"
    with torch.no_grad():
        golden_model.get_buffer(f"{name}.relative_bias").zero_()  # as in a checkpoint that never saw an image
    golden_model.switch_to_deploy()
    keys = set(golden_model.state_dict())
    assert {"patch_embed.conv_down.2.conv.bias", "levels.0.blocks.m.0.cv2.conv.bias"} <= keys
    assert {"levels.2.downsample.reduction.conv.bias", "high_res_neck.neck_features_proj.1.norm.running_var"} <= keys
    assert not any(".bn." in k for k in keys)
    bias = golden_model.get_submodule(name)
    assert isinstance(bias, PositionBias)
    assert torch.equal(bias.relative_bias, bias.compute(4))


@pytest.mark.parametrize("name", ["small", "pooling", "padded_windows"])
def test_window_change_after_deployment_is_as_before_it(name: str) -> None:
    model = randomised(dataclasses.replace(SMALL, **UNUSUAL[name]))
    deployed = copy.deepcopy(model)
    deployed.switch_to_deploy()
    shapes = {k: v.shape for k, v in deployed.state_dict().items()}
    x = torch.randn(1, 3, 96, 160)
    original = outputs(model, x)
    for window in (2, 1, 5):
        model.change_window_size(window)
        deployed.change_window_size(window)
        changed = outputs(model, x)
        torch.testing.assert_close(outputs(deployed, x), changed, atol=2e-5, rtol=1e-5)
        assert not torch.allclose(changed, original, atol=1e-4)
    assert {k: v.shape for k, v in deployed.state_dict().items()} == shapes


def test_windows_there_and_back(golden_model: ERadio) -> None:
    x = torch.randn(1, 3, 128, 96)
    before = outputs(golden_model, x)
    golden_model.change_window_size(3)
    outputs(golden_model, x)
    golden_model.change_window_size(4)
    assert torch.equal(outputs(golden_model, x), before)


@given(side=st.integers(32, 2048), max_window=st.integers(1, 20))
def test_optimal_window_is_the_largest_fitting_divisor(side: int, max_window: int) -> None:
    model = _META_MODEL
    window = model.set_optimal_window_size([side + 7, side], max_window)
    cells = side // 32
    assert window == max(n for n in range(1, max_window + 1) if cells % n == 0)
    assert {b.window_size for b in position_biases(model)} == {window}


with torch.device("meta"):
    _META_MODEL = ERadio(SMALL)


def test_window_errors() -> None:
    model = _META_MODEL
    with pytest.raises(OptionError, match="window_size must be at least 1, got 0"):
        model.change_window_size(0)
    with pytest.raises(OptionError, match=r"No window fits image_dim=31 .* at least 32 pixels"):
        model.set_optimal_window_size(31)


# ---- kinds of models ----


@pytest.mark.parametrize("name", UNUSUAL)
def test_shapes(name: str) -> None:
    config = dataclasses.replace(SMALL, **UNUSUAL[name])
    assert from_json(ERadioConfig, to_json(config)) == config
    model = randomised(config)
    patch = 8 if config.neck_start_stage == 1 else 16
    assert (model.patch_size, model.input_multiple, model.num_cls_tokens, model.num_prefix_tokens) == (patch, 32, 1, 1)
    with torch.no_grad():
        summary, features = model(torch.randn(2, 3, 64, 160))
    assert summary.shape == (2, config.embed_dim)
    assert features.shape == (2, 64 // patch * (160 // patch), config.embed_dim)
    torch.testing.assert_close(summary, features.mean(1))


PARAMETERS = {  # counted on the official architectures, without their last norm
    "eradio": 389_598_784,
    "eradio_xxxtiny": 10_255_008,
    "eradio_xxxtiny_8x_ws12": 6_258_016,
    "eradio_xxxtiny_8x_ws16": 6_275_424,
}


@pytest.mark.parametrize("name", ERADIO_VARIANTS)
def test_published_architectures(name: str) -> None:
    with torch.device("meta"):
        model = ERadio(ERADIO_VARIANTS[name]).eval()
        summary, features = model(torch.empty(1, 3, 224, 224))
    d = 1536 if "tiny" not in name else 256
    cells = 28 if name.endswith("8x_ws16") else 14
    assert summary.shape == (1, d)
    assert features.shape == (1, cells**2, d)
    count = sum(p.numel() for p in model.parameters())
    assert count == PARAMETERS[name.replace("_large_fullres_ws16", "")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depths": (1, 1, 1)}, r"depths needs one entry a stage, 4 in all, got \(1, 1, 1\)"),
        ({"neck_start_stage": 0}, "neck_start_stage must be in 1 to 3, got 0"),
        ({"conv_groups_ratio": -1.0}, "conv_groups_ratio must be at least 0, got -1.0"),
        ({"num_heads": (1, 1, 3, 4)}, "Stage 2 is 16 wide, not divisible by its 3 heads"),
        ({"window_size": (None, None, None, 4)}, "window_size of stage 2 must be at least 2, got None"),
        ({"window_size": (None, None, 4, 1)}, "window_size of stage 3 must be at least 2, got 1"),
        ({"sr_ratio": (1, 1, (0, 1), 1)}, r"sr_ratio of stage 2 must be at least 1, got \(0, 1\)"),
        ({"sr_ratio": (1, 1, (3, 8), 1), "window_size": (None, None, 4, 4)}, "which every ratio must divide"),
    ],
)
def test_inconsistent_descriptions(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ERadio(dataclasses.replace(SMALL, **change))


def test_convolution_as_matrix_product_is_the_convolution() -> None:
    for stride in (1, 2):
        for fused in (False, True):
            conv = ConvBN(64, 96, 3, stride=stride, activation="silu").eval()
            if fused:
                conv.fuse()
            x = torch.randn(2, 64, 5, 7)
            with torch.no_grad():
                assert conv._is_weight_bound(x)
                actual = conv(x)
            assert not conv._is_weight_bound(x)  # gradients are on
            torch.testing.assert_close(actual, conv(x).detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_format_does_not_matter(memory_format: torch.memory_format) -> None:
    model = randomised(SMALL)
    x = torch.randn(2, 3, 64, 96)
    reference = outputs(model, x)
    actual = outputs(model.to(memory_format=memory_format), x.to(memory_format=memory_format))
    torch.testing.assert_close(actual, reference, atol=1e-5, rtol=1e-5)


def test_autocast_and_half_precision() -> None:
    model = randomised(SMALL)
    x = torch.randn(1, 3, 64, 64)
    reference = outputs(model, x)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            torch.testing.assert_close(outputs(model, x).float(), reference, atol=0.1, rtol=0.1)
    actual = outputs(copy.deepcopy(model).half(), x.half())
    torch.testing.assert_close(actual.float(), reference, atol=0.02, rtol=0.02)


@pytest.mark.parametrize(("grad", "deployed"), [(True, False), (False, True)])
def test_compiles_without_graph_breaks(grad: bool, deployed: bool) -> None:
    model = randomised(SMALL)
    if deployed:
        model.switch_to_deploy()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 3, 96, 64)
    with torch.set_grad_enabled(grad):
        for actual, expected in zip(compiled(x), model(x), strict=True):
            torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_model_settles_after_one_pass_over_the_sizes() -> None:
    model = randomised(dataclasses.replace(SMALL, sr_ratio=(1, 1, 2, 1)))
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    images = [torch.randn(1, 3, h, w) for h, w in ((64, 64), (96, 160), (160, 96))]
    for x in images:
        for actual, expected in zip(compiled(x), model(x), strict=True):
            torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-5)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for x in images:
            compiled(x)


def test_export() -> None:
    model = randomised(SMALL)
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        torch.testing.assert_close(program.module()(x), model(x), atol=2e-5, rtol=1e-5)


# ---- intermediates ----


@torch.no_grad()
def test_intermediates_are_the_stages_maps() -> None:
    model = randomised(dataclasses.replace(SMALL, final_norm=True))
    x = torch.randn(2, 3, 64, 96)
    (summary, features), maps = model.forward_intermediates(x)
    assert [tuple(m.shape) for m in maps] == [(2, 4, 16, 24), (2, 8, 8, 12), (2, 16, 4, 6), (2, 32, 2, 3)]
    assert torch.equal(torch.cat([summary[:, None], features], 1), outputs(model, x))
    neck = model.high_res_neck.neck_features_proj
    torch.testing.assert_close((neck[0](maps[2]) + neck[1](maps[3])).flatten(2).transpose(1, 2), features)
    for indices, expected in ((2, [2, 3]), ([-1, 0], [3, 0]), ((1, 1), [1, 1]), ([], [])):
        for early in (False, True):
            chosen = model.forward_intermediates(x, indices, stop_early=early, intermediates_only=True)
            assert all(torch.equal(a, maps[i]) for a, i in zip(chosen, expected, strict=True))
    (nlc,) = model.forward_intermediates(x, [1], output_fmt="NLC", intermediates_only=True)
    assert torch.equal(nlc, maps[1].flatten(2).transpose(1, 2))
    normed = model.forward_intermediates(x, norm=True, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(normed[:3], maps[:3], strict=True))
    assert torch.equal(normed[3], model.norm(maps[3]))


@torch.no_grad()
def test_stopping_early_runs_no_later_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomised(SMALL)
    model.levels[2].register_forward_hook(lambda *_: pytest.fail("stage 2 was run"))
    model.forward_intermediates(torch.zeros(1, 3, 32, 32), [1, 0], stop_early=True, intermediates_only=True)


def test_intermediates_errors() -> None:
    model, x = _META_MODEL, torch.empty(1, 3, 32, 32, device="meta")
    with pytest.raises(CapabilityError, match="no prefix tokens: its summary is the mean"):
        model.forward_intermediates(x, return_prefix_tokens=True)
    with pytest.raises(
        OptionError, match=r"Block index 4 is out of range \(0 to 3, or -4 to -1 from the end\).*4 stages"
    ):
        model.forward_intermediates(x, [0, 4])
    with pytest.raises(OptionError, match="last 5 blocks were asked for, but n must be in 1 to 4"):
        model.forward_intermediates(x, 5)
    with pytest.raises(OptionError, match="Unsupported output_fmt: 'NHWC'"):
        model.forward_intermediates(x, output_fmt="NHWC")
    with pytest.raises(OptionError, match="stop_early needs intermediates_only=True"):
        model.forward_intermediates(x, stop_early=True)
    with pytest.raises(ResolutionError, match="divisible by 32"):
        model.forward_intermediates(torch.empty(1, 3, 48, 32, device="meta"))
