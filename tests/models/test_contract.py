"""What holds for every architecture, on toy sizes."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import amradio
from amradio.errors import CheckpointError, LayoutError, ResolutionError, UnsafeCheckpointError
from amradio.models.architectures import DINO_STUDENTS, VIT_ARCHITECTURES
from amradio.models.eradio import ERADIO_VARIANTS
from amradio.models.radio import RadioModel
from amradio.weights.catalog import CatalogEntry, entries

Toy = Callable[..., RadioModel]

VITS = [*VIT_ARCHITECTURES, *DINO_STUDENTS]
ARCHITECTURES = [*VITS, *ERADIO_VARIANTS]
ONE_OF_EACH_KIND = [
    "vit_base_patch16_v2_224",
    "vit_huge_patch16_224_mlpnorm",
    "vit_large_dyt_patch16_224",
    "dino_v2_g_student",
]

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)
every_vit = pytest.mark.parametrize("name", VITS)


def step_of(model: RadioModel) -> int:
    """What image sides are multiples of."""
    return max(model.min_resolution_step, model.model.input_multiple)


def images_for(model: RadioModel, rows: int = 2, cols: int = 3, batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, rows * step_of(model), cols * step_of(model))


def flat(output: Any) -> list[Tensor]:
    pairs = output.values() if isinstance(output, dict) else [output]
    return [t for pair in pairs for t in pair]


def assert_same(got: Any, want: Any, **tolerance: float) -> None:
    got, want = flat(got), flat(want)
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


PUBLISHED_AS = {
    "ViT-B/16": "vit_base_patch16_224",
    "ViT-L/16": "vit_large_patch16_224",
    "ViT-H/16": "vit_huge_patch16_224",
    "ViT-H/14": "vit_huge_patch14_224",
    "ViT-g/16": "vit_giant_patch16_224",
    "ViT-SO400M/16": "vit_so400m_patch16_224",
    "DINOv2 ViT-g/14": "dino_v2_g_student",
    "E-RADIO": "eradio",
}


@pytest.mark.parametrize("entry", entries(), ids=lambda e: e.version)
def test_the_catalog_s_architectures_are_all_here(entry: CatalogEntry) -> None:
    names = [name for kind, name in PUBLISHED_AS.items() if entry.architecture.startswith(kind)]
    assert len(names) == 1
    assert names[0] in ARCHITECTURES
    assert (14 if "14" in names[0] or "dino" in names[0] else 16) == entry.patch_size


# ---- shapes and sizes ----


@every_architecture
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (1, 6), (6, 1), (9, 3), (8, 8)])
@torch.no_grad()
def test_any_aspect_ratio_down_to_one_step(toy: Toy, name: str, rows: int, cols: int) -> None:
    model = toy(name)
    images = images_for(model, rows, cols)
    summary, features = model(images)
    positions = (images.shape[-2] // model.patch_size) * (images.shape[-1] // model.patch_size)
    assert summary.shape == (2, model.summary_dim)
    assert features.shape == (2, positions, model.embed_dim)
    assert summary.isfinite().all()
    assert features.isfinite().all()


@every_architecture
@torch.no_grad()
def test_wrong_sizes_are_refused_with_the_nearest_right_one(toy: Toy, name: str) -> None:
    model = toy(name)
    step = step_of(model)
    with pytest.raises(ResolutionError) as raised:
        model(torch.rand(1, 3, 2 * step + 1, 3 * step - 1))
    assert any(f"nearest supported size is {2 * step}{x}{3 * step}" in str(raised.value) for x in ("x", " x "))
    with pytest.raises(ResolutionError, match=f"nearest supported size is {step} ?x ?{step}"):
        model(torch.rand(1, 3, 0, step))


@every_architecture
@torch.no_grad()
def test_feature_formats_are_the_same_numbers(toy: Toy, name: str) -> None:
    model = toy(name, ["clip", "sam"])
    images = images_for(model)
    outputs = {fmt: model(images, feature_fmt=fmt) for fmt in ("NLC", "NCHW", "NHWC")}
    for key in ("backbone", "clip", "sam"):
        nlc, nchw, nhwc = (outputs[fmt][key].features for fmt in outputs)
        finer = 2 if key == "sam" else 1
        assert nchw.shape[-2:] == tuple(finer * s // model.patch_size for s in images.shape[-2:])
        assert torch.equal(nchw.flatten(2).transpose(1, 2), nlc)
        assert torch.equal(nhwc.flatten(1, 2), nlc)
        for other in outputs.values():
            assert torch.equal(other[key].summary, outputs["NLC"][key].summary)


@every_architecture
@torch.no_grad()
def test_images_of_a_batch_do_not_see_each_other(toy: Toy, name: str) -> None:
    model = toy(name, ["clip", "sam"])
    images = images_for(model, batch=3)
    whole = flat(model(images))
    for i in range(3):
        for alone, among in zip(flat(model(images[i : i + 1])), whole, strict=True):
            torch.testing.assert_close(alone, among[i : i + 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 2])
@every_vit
@torch.no_grad()
def test_an_empty_batch_gives_empty_outputs(toy: Toy, name: str, window: int | None) -> None:
    model = toy(name, ["clip", "sam"], model_kwargs={"depth": 8})
    model.set_vitdet(window)
    images = images_for(model)
    assert [t.shape for t in flat(model(images[:0]))] == [(0, *t.shape[1:]) for t in flat(model(images))]


# ---- blocks ----


@every_vit
@pytest.mark.parametrize("indices", [None, 2, [1, 0], [-1, 0, -3], [3, 3]])
@pytest.mark.parametrize("window", [None, 2])
@torch.no_grad()
def test_intermediates_are_the_blocks_run_by_hand(
    toy: Toy, by_hand: Callable[..., list[Tensor]], name: str, indices: Any, window: int | None
) -> None:
    model = toy(name, model_kwargs={"depth": 4})
    model.set_vitdet(window, num_windowed=1)
    images = images_for(model)
    states = by_hand(model, images, windowed=() if window is None else (0, 2))
    asked = {None: range(4), 2: (2, 3)}.get(indices if not isinstance(indices, list) else -1, indices)
    final, found = model.forward_intermediates(images, indices, output_fmt="NLC")
    assert len(found) == len(asked)
    for i, features in zip(asked, found, strict=True):
        torch.testing.assert_close(features, states[i][:, model.num_summary_tokens :], atol=1e-5, rtol=1e-5)
    assert_same(final, model(images), atol=0, rtol=0)


@pytest.mark.parametrize("name", list(ERADIO_VARIANTS))
@torch.no_grad()
def test_intermediates_of_eradio_are_its_stages(toy: Toy, name: str) -> None:
    model = toy(name)
    images = images_for(model)
    final, maps = model.forward_intermediates(images)
    assert [tuple(m.shape[1:]) for m in maps] == [
        (16 * 2**i, images.shape[-2] // (4 * 2**i), images.shape[-1] // (4 * 2**i)) for i in range(4)
    ]
    assert_same(final, model(images, feature_fmt="NCHW"), atol=0, rtol=0)
    last, first = model.forward_intermediates(images, [-1, 0], intermediates_only=True)
    assert torch.equal(last, maps[3])
    assert torch.equal(first, maps[0])


@every_vit
@torch.no_grad()
def test_windows_can_be_switched_on_and_off(toy: Toy, name: str) -> None:
    model = toy(name, model_kwargs={"depth": 8})
    images = torch.rand(2, 3, 4 * model.patch_size, 6 * model.patch_size)
    before = model(images)
    model.set_vitdet(2)
    assert (model.window_size, model.min_resolution_step) == (2, 2 * model.patch_size)
    windowed = model(images)
    assert not torch.allclose(windowed.features, before.features, atol=1e-3)
    with pytest.raises(ResolutionError, match=f"nearest supported size is {4 * model.patch_size}x"):
        model(torch.rand(1, 3, 5 * model.patch_size, 6 * model.patch_size))
    model.set_vitdet(2, num_windowed=0)  # a period of one block leaves every block global
    assert_same(model(images), before, atol=1e-5, rtol=1e-5)
    model.set_vitdet(None)
    assert_same(model(images), before, atol=0, rtol=0)


# ---- numerics ----


@every_architecture
@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.04), (torch.float16, 0.005)])
@torch.no_grad()
def test_half_precision_is_close_to_float32(toy: Toy, name: str, dtype: torch.dtype, error: float) -> None:
    model = toy(name, ["clip", "sam"])
    images = images_for(model)
    want = model(images)
    got = model.to(dtype)(images)
    assert {t.dtype for t in got["backbone"]} == {dtype}
    assert {t.dtype for key in ("clip", "sam") for t in got[key]} == {torch.float32}
    for a, b in zip(flat(got), flat(want), strict=True):
        assert (a.float() - b).norm() <= error * b.norm()


@every_vit
@pytest.mark.parametrize("training", [False, True])
def test_checkpointing_changes_no_output_and_no_gradient(toy: Toy, name: str, training: bool) -> None:
    model = toy(name, ["clip", "sam"]).train(training)
    images = images_for(model)
    found = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(3)
        outputs = flat(model(images))
        sum(t.square().mean() for t in outputs).backward()
        found.append((outputs, {k: p.grad for k, p in model.named_parameters() if p.grad is not None}))
    (outputs, grads), (again, grads_again) = found
    torch.testing.assert_close(again, outputs, atol=0, rtol=0)
    torch.testing.assert_close(grads_again, grads, atol=1e-6, rtol=1e-5)


@every_architecture
def test_gradients_reach_every_parameter(toy: Toy, name: str) -> None:
    model = toy(name, ["clip", "sam"])
    outputs = model(images_for(model))
    sum(t.square().mean() for t in flat(outputs)).backward()
    silent = {k for k, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    assert not silent


# ---- graphs ----

SIZES = [(2, 2), (3, 2), (2, 5), (4, 4), (8, 8), (9, 4), (4, 9), (1, 1), (1, 3), (6, 7), (10, 10), (5, 3)]
SQUARE_WIDE_TALL = [(2, 2), (3, 4), (8, 8), (2, 5), (5, 3), (10, 10)]  # where positions are already known to be right


def check_compiled(model: RadioModel, sizes: list[tuple[int, int]] = SIZES) -> None:
    """After one pass over the sizes nothing is compiled any more, no limit is hit, and the numbers are right."""
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    graphs = []
    for _ in range(2):
        for rows, cols in sizes:
            images = images_for(model, rows, cols)
            with torch.no_grad():
                assert_same(compiled(images), model(images), atol=1e-4, rtol=1e-4)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] <= torch._dynamo.config.recompile_limit
    assert not counters["graph_break"]
    assert not counters["frames"].get("total", 0) > counters["frames"].get("ok", 0)
    torch._dynamo.reset()


def test_compiling_settles_after_one_pass(toy: Toy) -> None:
    check_compiled(toy("vit_base_patch16_224"))


@pytest.mark.slow
def test_compiling_settles_with_adaptors(toy: Toy) -> None:
    check_compiled(toy("vit_base_patch16_224", ["clip", "sam"]), SQUARE_WIDE_TALL)


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_compiling_settles_for_each_kind_of_block(toy: Toy, name: str) -> None:
    check_compiled(toy(name, model_kwargs={"depth": 1}), SQUARE_WIDE_TALL)


@pytest.mark.slow
def test_compiling_settles_where_positions_are_only_cropped(toy: Toy) -> None:
    model = toy("vit_base_patch16_224", model_kwargs={"img_size": 128, "depth": 1})
    assert model.model.config.position == "window"
    check_compiled(model)


@pytest.mark.slow
def test_compiling_settles_with_windows(toy: Toy) -> None:
    model = toy("vit_base_patch16_224", model_kwargs={"depth": 3})
    model.set_vitdet(2, num_windowed=1)
    check_compiled(model)


def check_exported(model: RadioModel) -> None:
    """A program exported at one size is right at other sizes, whatever the aspect ratio."""
    step = step_of(model)
    sides = {i: step * torch.export.Dim(n, min=2, max=64) for i, n in ((2, "rows"), (3, "cols"))}
    with torch.no_grad():
        program = torch.export.export(model, (images_for(model, 6, 4),), dynamic_shapes=(sides,)).module()
        for rows, cols in ((6, 4), (3, 5), (4, 4), (7, 12), (12, 2)):
            images = images_for(model, rows, cols)
            assert_same(program(images), model(images), atol=1e-4, rtol=1e-4)


def test_an_exported_program_runs_at_other_sizes(toy: Toy) -> None:
    check_exported(toy("vit_base_patch16_224", ["clip", "sam"]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_every_kind_of_block_can_be_exported(toy: Toy, name: str) -> None:
    check_exported(toy(name))


@pytest.mark.slow
def test_windows_can_be_exported(toy: Toy) -> None:
    model = toy("vit_base_patch16_224", model_kwargs={"depth": 3})
    model.set_vitdet(2, num_windowed=1)
    check_exported(model)


# ---- files ----

SUFFIX = {"native": ".safetensors", "official": ".pth.tar"}
UNLIKE_CRADIO = {
    "vit_large_dyt_patch16_224": "DyT norms",
    "vit_huge_patch16_224_mlpnorm": "a norm inside the MLP",
    "dino_v2_l_student": "a final norm, a bias in the patch embedding",
    "dino_v2_g_student": "a SwiGLU MLP, a final norm, a bias in the patch embedding",
    **dict.fromkeys(ERADIO_VARIANTS, "the E-RADIO trunk"),
}


@every_architecture
@pytest.mark.parametrize("layout", ["native", "official", "huggingface"])
@torch.no_grad()
def test_layouts_that_hold_everything_load_identically(toy: Toy, tmp_path: Path, name: str, layout: str) -> None:
    model = toy(name, ["clip", "sam"])
    amradio.save(model, tmp_path / f"model{SUFFIX.get(layout, '')}", layout)
    again = amradio.load(tmp_path / f"model{SUFFIX.get(layout, '')}", ["clip", "sam"])
    images = images_for(model)
    assert_same(again(images), model(images), atol=0, rtol=0)


@every_architecture
@pytest.mark.parametrize("layout", ["transformers", "timm"])
@torch.no_grad()
def test_layouts_of_other_libraries_load_identically_or_say_why_not(
    toy: Toy, tmp_path: Path, name: str, layout: str
) -> None:
    model = toy(name, ["clip"])
    reason = UNLIKE_CRADIO.get(name)
    if reason:
        with pytest.raises(LayoutError, match=f"The {layout} layout cannot represent .* has {reason}"):
            amradio.save(model, tmp_path / "model", layout, backbone_only=True)
        return
    with pytest.raises(LayoutError, match=r"adaptors? .*clip.*backbone_only=True"):
        amradio.save(model, tmp_path / "model", layout)
    amradio.save(model, tmp_path / "model", layout, backbone_only=True)
    images = images_for(model)
    want, got = model(images)["backbone"], amradio.load(tmp_path / "model")(images)
    assert torch.equal(got.features, want.features)
    kept = got.summary.shape[1]  # timm knows one class token
    assert torch.equal(got.summary, want.summary[:, :kept])
    assert kept == (model.embed_dim if layout == "timm" else model.summary_dim)


@every_architecture
@torch.no_grad()
def test_a_model_survives_pickling_and_its_state_dict(toy: Toy, name: str) -> None:
    model = toy(name, ["clip", "sam"])
    images = images_for(model)
    want = model(images)
    assert_same(pickle.loads(pickle.dumps(model))(images), want, atol=0, rtol=0)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    fresh = RadioModel(model.config, ["clip", "sam"]).eval()
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert_same(fresh(images), want, atol=0, rtol=0)


class Bomb:
    """Unpickling this would make a directory."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


@every_architecture
def test_a_pickle_bomb_is_refused(toy: Toy, tmp_path: Path, name: str) -> None:
    file = amradio.save(toy(name), tmp_path / "model.pth.tar", "official")
    payload = torch.load(file, weights_only=False)
    torch.save(payload | {"arch": Bomb(tmp_path / "exploded")}, file)
    with pytest.raises(UnsafeCheckpointError, match=rf"not on the allow-list: {os.name}\.mkdir"):
        amradio.load(file)
    assert not (tmp_path / "exploded").exists()


@every_architecture
@pytest.mark.parametrize("layout", ["native", "official", "huggingface"])
def test_a_truncated_file_is_refused(toy: Toy, tmp_path: Path, name: str, layout: str) -> None:
    saved = amradio.save(toy(name), tmp_path / f"model{SUFFIX.get(layout, '')}", layout)
    file = saved / "model.safetensors" if saved.is_dir() else saved
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="truncated"):
        amradio.load(saved)


# ---- adaptors ----


@every_architecture
@torch.no_grad()
def test_a_view_is_one_entry_of_the_output(toy: Toy, name: str) -> None:
    model = toy(name, ["clip", "sam"])
    images = images_for(model)
    outputs = model(images, feature_fmt="NCHW")
    assert list(outputs) == ["backbone", "clip", "sam"]
    for key, want in outputs.items():
        view = model.view(key)
        got = view(images, feature_fmt="NCHW")
        assert_same(got, want, atol=0, rtol=0)
        assert got.summary.shape == (2, view.summary_dim)
        assert got.features.shape[1:] == (view.embed_dim, *(s // view.patch_size for s in images.shape[-2:]))


@every_architecture
@torch.no_grad()
def test_adaptors_leave_the_backbone_as_it_is(toy: Toy, name: str) -> None:
    images = images_for(toy(name))
    with_adaptors = toy(name, ["clip"])
    alone = RadioModel(with_adaptors.config).eval()
    state = {k: v for k, v in with_adaptors.state_dict().items() if not k.startswith("adaptors.")}
    alone.load_state_dict(state)
    assert_same(alone(images), with_adaptors(images)["backbone"], atol=0, rtol=0)
