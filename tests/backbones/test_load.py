"""`load`: from a name, a file or a directory to a model, and every way in which that can be refused."""

from __future__ import annotations

import argparse
import re
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import amradio
from amradio.backbones import load as loading
from amradio.errors import (
    CheckpointError,
    CheckpointKeyError,
    CheckpointShapeError,
    ConfigError,
    LayoutError,
    OptionError,
    UnknownAdaptorError,
    UnknownModelError,
    UnsafeCheckpointError,
)
from amradio.weights import download
from amradio.weights.download import FetchedFile

Edit = Callable[..., Path]


@pytest.fixture
def models(goldens: Path) -> Path:
    return goldens / "models"


@pytest.fixture
def edit(models: Path, tmp_path: Path) -> Edit:
    """Writes a changed copy of an official checkpoint: ``edit(file, change)``; `change` gets the payload."""

    def write(name: str, change: Callable[[dict[str, Any]], None]) -> Path:
        with torch.serialization.safe_globals([argparse.Namespace]):
            payload = torch.load(models / name, weights_only=True)
        change(payload)
        torch.save(payload, tmp_path / "edited.pth.tar")
        return tmp_path / "edited.pth.tar"

    return write


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any download fails the test."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"downloads {args}")

    for name in ("fetch_url", "fetch_hub_model"):
        monkeypatch.setattr(download, name, fail)


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch, models: Path) -> Callable[[str], list[str]]:
    """Lets every published address give one of the golden files; returns the list of addresses asked for."""

    def stand_in(name: str) -> list[str]:
        asked: list[str] = []

        def fetch(url: str, **_: Any) -> FetchedFile:
            asked.append(url)
            path = models / name
            return FetchedFile(
                path=path, sha256="ab" * 32, source=url, size=path.stat().st_size, revision="c0ffee", from_cache=False
            )

        monkeypatch.setattr(download, "fetch_url", fetch)
        return asked

    return stand_in


@pytest.fixture(autouse=True)
def _licences_unsaid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_licence_said", set())


# ---- names ----


def test_a_version_brings_what_the_catalog_knows(published: Callable[[str], list[str]]) -> None:
    asked = published("v3_small.pth.tar")
    model = amradio.load("c-radio_v4-h", progress=False)
    assert len(asked) == 1
    assert asked[0].startswith("https://huggingface.co/nvidia/C-RADIOv4-H/")
    assert (model.patch_size, model.max_resolution, model.preferred_resolution) == (16, 2048, (512, 512))
    assert not model.training
    identity = model.identity
    assert (identity.source, identity.version, identity.layout) == (asked[0], "c-radio_v4-h", "official")
    assert (identity.sha256, identity.revision) == ("ab" * 32, "c0ffee")
    assert "NVIDIA Open Model License" in identity.license


def test_no_name_is_the_default_version(published: Callable[[str], list[str]]) -> None:
    published("v3_small.pth.tar")
    assert amradio.load().identity.version == "c-radio_v4-h"


def test_the_catalog_s_schedule_is_used(published: Callable[[str], list[str]]) -> None:
    published("vitdet12.pth.tar")
    with pytest.warns(loading.NonCommercialWarning):
        model = amradio.load("radio_v2.1", vitdet_window_size=2)
    assert [i for i, is_global in enumerate(model.model._global) if is_global] == [5, 11]
    model = amradio.load("radio_v2.1", vitdet_window_size=2, vitdet_num_windowed=2)
    assert [i for i, is_global in enumerate(model.model._global) if is_global] == [2, 5, 8, 11]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("c-radio_v5", "c-radio_v"),
        ("radio-v2.5-l", "radio_v2.5-l"),
        ("eradio_v1", "e-radio_v2"),
        ("missing.pth.tar", "missing.pth.tar looks like a path, but there is no such file or directory."),
        ("./nothing", "./nothing looks like a path, but there is no such file or directory."),
    ],
)
@pytest.mark.usefixtures("no_network")
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(UnknownModelError, match=re.escape(message)):
        amradio.load(name)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("version", ["c-radio_v3-l", "e-radio_v2"])
def test_windows_are_refused_before_any_download(version: str) -> None:
    with pytest.raises(OptionError) as raised:
        amradio.load(version, vitdet_window_size=8)
    assert str(raised.value) == (
        f"vitdet_window_size is not supported for {version}. Set it to None, or use a version that supports it; "
        "`amradio models` shows which."
    )


def test_windows_can_be_insisted_on(published: Callable[[str], list[str]]) -> None:
    published("v3_small.pth.tar")
    assert amradio.load("c-radio_v3-l", vitdet_window_size=2, supports_vitdet=True).window_size == 2


def test_non_commercial_licence_is_said_once_a_version(published: Callable[[str], list[str]]) -> None:
    published("v25_p16.pth.tar")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for version in ("radio_v2.5-l", "radio_v2.5-l", "radio_v2.5-b"):
            amradio.load(version)
    assert {w.category for w in caught} == {loading.NonCommercialWarning}
    assert [str(w.message).split(" are ")[0] for w in caught] == [
        "The weights of radio_v2.5-l",
        "The weights of radio_v2.5-b",
    ]
    assert "research or evaluation only, no commercial use" in str(caught[0].message)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        amradio.load("c-radio_v3-l")


# ---- options ----


def test_overrides_describe_a_file(models: Path) -> None:
    model = amradio.load(
        models / "vitdet12.pth.tar",
        vitdet_window_size=2,
        patch_size=16,
        max_resolution=640,
        preferred_resolution=[384, 512],
        vitdet_num_global=2,
    )
    assert (model.max_resolution, model.preferred_resolution) == (640, (384, 512))
    assert model.preferred_resolution.height == 384
    assert model.min_resolution_step == 32
    assert [i for i, is_global in enumerate(model.model._global) if is_global] == [5, 11]
    plain = amradio.load(str(models / "vitdet12.pth.tar"))
    assert (plain.max_resolution, plain.preferred_resolution, plain.patch_size) == (None, None, 16)
    with pytest.raises(OptionError, match=r"^preferred_resolution must be \(height, width\), got \(1, 2, 3\)\.$"):
        amradio.load(models / "vitdet12.pth.tar", preferred_resolution=(1, 2, 3))
    with pytest.raises(OptionError, match=r"^vitdet_window_size is not supported for .*vitdet12"):
        amradio.load(models / "vitdet12.pth.tar", vitdet_window_size=2, supports_vitdet=False)
    with pytest.raises(OptionError, match=r"^vitdet_window_size must be at least 1, got 0\.$"):
        amradio.load(models / "vitdet12.pth.tar", vitdet_window_size=0)


def test_position_interpolation(models: Path, published: Callable[[str], list[str]]) -> None:
    path = models / "v25_p16.pth.tar"

    def interpolation(source: Any, choice: Any) -> str:
        return amradio.load(source, position_interpolation=choice).model.patch_generator.interpolation

    assert interpolation(path, None) == "half_pixel"
    assert interpolation(path, "half_pixel") == "half_pixel"
    assert interpolation(path, "align_corners") == "align_corners"
    with pytest.raises(OptionError, match=r"^position_interpolation='published' needs a model loaded by its published"):
        interpolation(path, "published")
    with pytest.raises(OptionError, match=r"^position_interpolation must be 'half_pixel', .* got 'bicubic'\.$"):
        interpolation(path, "bicubic")
    published("v25_p16.pth.tar")
    with pytest.warns(loading.NonCommercialWarning):
        assert interpolation("radio_v2.5-l", None) == "half_pixel"
    assert interpolation("radio_v2.5-l", "torch_hub") == "half_pixel"
    assert interpolation("radio_v2.5-l", "published") == "align_corners"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_device_and_dtype(models: Path, dtype: torch.dtype) -> None:
    model = amradio.load(models / "v25_p16.pth.tar", "clip", device="cpu", dtype=dtype)
    assert model.dtype == dtype
    assert model.input_conditioner.norm_mean.dtype == torch.float32


def test_published_dtype_is_the_default(models: Path) -> None:
    model = amradio.load(models / "v21_mlpnorm_bf16.pth.tar", "clip")
    assert model.dtype == torch.bfloat16
    assert model.adaptors["clip"].head_mlp.fc1.weight.dtype == torch.float32


def test_adaptors(models: Path) -> None:
    path = models / "v25_p16.pth.tar"
    assert list(amradio.load(path, "clip").adaptors) == ["clip"]
    assert list(amradio.load(path, ("sam", "clip", "sam")).adaptors) == ["sam", "clip"]
    assert list(amradio.load(path, []).adaptors) == []
    with pytest.raises(UnknownAdaptorError) as raised:
        amradio.load(path, ["clip", "dino"])
    assert str(raised.value) == (
        "Unable to find the specified adaptor name 'dino'. Known names: ['clip', 'siglip', 'sam']."
    )


def test_compat_numbers_tokens_as_the_official_code_does(edit: Edit) -> None:
    def repeat(payload: dict[str, Any]) -> None:
        payload["args"].teachers = [{"name": "a"}, {"name": "a"}, {"name": "b"}]
        payload["state_dict"] = {
            k: v for k, v in payload["state_dict"].items() if not k.startswith(("_heads", "_feat"))
        }

    path = edit("cls2_dup.pth.tar", repeat)
    assert amradio.load(path).summary_idxs.tolist() == [0, 1]
    assert amradio.load(path, compat="official").summary_idxs.tolist() == [0, 2]


def test_loading_inside_inference_mode_gives_a_trainable_model(models: Path) -> None:
    with torch.inference_mode():
        model = amradio.load(models / "v25_p16.pth.tar", dtype=torch.float64)
        assert torch.is_inference_mode_enabled()
        model(torch.rand(1, 3, 64, 64))
    model(torch.rand(1, 3, 64, 64)).summary.sum().backward()
    assert all(p.grad is not None for p in model.model.blocks.parameters())


def test_loaded_tensors_belong_to_the_model(models: Path) -> None:
    path = models / "v25_p16.pth.tar"
    before = path.read_bytes()
    with torch.no_grad():
        for p in amradio.load(path).parameters():
            p.zero_()
    assert path.read_bytes() == before
    assert amradio.load(path).model.patch_generator.pos_embed.any()


# ---- keys and shapes ----


def spoil(payload: dict[str, Any]) -> None:
    state = payload["state_dict"]
    del state["base_model.blocks.1.norm2.bias"]
    state["base_model.blocks.7.extra"] = torch.ones(1)
    state["optimizer.step"] = torch.ones(1)


def test_strict_accounting(edit: Edit) -> None:
    path = edit("v25_p16.pth.tar", spoil)
    with pytest.raises(CheckpointKeyError) as raised:
        amradio.load(path)
    report = (
        f"The tensors in {path} do not fit the model that it describes.\n"
        "Missing (1): model.blocks.1.norm2.bias.\n"
        "Unexpected (2): model.blocks.7.extra, optimizer.step."
    )
    advice = "\nPass strict=False to load what fits, with missing tensors at their initial values."
    assert str(raised.value) == report + advice
    with pytest.warns(UserWarning, match="do not fit the model") as caught:
        model = amradio.load(path, strict=False)
    assert [str(w.message) for w in caught] == [report]
    assert caught[0].filename == __file__
    assert not model.blocks[1].norm2.bias.any()
    assert model(torch.rand(1, 3, 64, 64)).summary.isfinite().all()


def test_unloaded_adaptors_are_not_unexpected_but_damaged_ones_are_missing(edit: Edit) -> None:
    def drop(payload: dict[str, Any]) -> None:
        del payload["state_dict"]["_heads.0.final.0.bias"]

    path = edit("v25_p16.pth.tar", drop)
    amradio.load(path)
    with pytest.raises(CheckpointKeyError, match=r"Missing \(1\): adaptors\.clip\.head_mlp\.final\.0\.bias\."):
        amradio.load(path, "clip")


def test_a_wrong_shape_is_refused_even_if_not_strict(edit: Edit) -> None:
    def reshape(payload: dict[str, Any]) -> None:
        payload["state_dict"]["base_model.blocks.0.norm1.weight"] = torch.ones(3)

    path = edit("v25_p16.pth.tar", reshape)
    for strict in (True, False):
        with pytest.raises(CheckpointShapeError) as raised:
            amradio.load(path, strict=strict)
        assert "1 tensors in" in str(raised.value)
        assert "model.blocks.0.norm1.weight is [3], expected [64]" in str(raised.value)


@pytest.mark.parametrize(
    ("model_kwargs", "args", "error"),
    [
        ({"embed_dim": 2**20}, {}, CheckpointShapeError),
        ({"embed_dim": 2**40}, {}, CheckpointShapeError),
        ({"mlp_ratio": 1e300}, {}, CheckpointShapeError),
        ({"mlp_ratio": float("nan")}, {}, ConfigError),
        ({"depth": 10**7}, {}, CheckpointShapeError),
        ({"depth": -1}, {}, ConfigError),
        ({"depth": "3"}, {}, ConfigError),
        ({"num_heads": 7}, {}, ConfigError),
        ({"patch_size": 0}, {}, ConfigError),
        ({"new_option": 1}, {}, ConfigError),
        ({}, {"cpe_max_size": 10**6}, CheckpointShapeError),
        ({}, {"cpe_max_size": 10**15}, CheckpointShapeError),
        ({}, {"cpe_max_size": "large"}, ConfigError),
        ({}, {"register_multiple": 10**15}, CheckpointShapeError),
        ({}, {"register_multiple": -8}, ConfigError),
        ({}, {"model": "vit_enormous_patch16_224"}, ConfigError),
        ({}, {"model": "radio1d_large_patch16_224"}, ConfigError),
        ({}, {"gp": "map"}, ConfigError),
        ({}, {"dtype": "int8"}, CheckpointError),
        ({}, {"dtype": torch.int64}, CheckpointError),
        ({}, {"teachers": [{"type": "sam"}]}, CheckpointError),
        ({}, {"teachers": [{"name": str(i)} for i in range(40)]}, CheckpointShapeError),
    ],
)
def test_arguments_that_contradict_the_tensors_are_refused_at_once(
    edit: Edit, model_kwargs: dict[str, Any], args: dict[str, Any], error: type[Exception]
) -> None:
    def change(payload: dict[str, Any]) -> None:
        payload["args"].model_kwargs |= model_kwargs
        vars(payload["args"]).update(args)

    path = edit("v25_p16.pth.tar", change)
    start = time.monotonic()
    with pytest.raises(error):
        amradio.load(path, "clip" if "teachers" not in args else None)
    assert time.monotonic() - start < 30  # allocating any of these would take longer, or all memory


def test_missing_arguments_are_named(edit: Edit) -> None:
    with pytest.raises(CheckpointError, match="training arguments lack 'model'; they have"):
        amradio.load(edit("v25_p16.pth.tar", lambda p: delattr(p["args"], "model")))
    with pytest.raises(CheckpointError, match="needs 'state_dict' and 'args', but holds"):
        amradio.load(edit("v25_p16.pth.tar", lambda p: p.pop("args")))
    with pytest.raises(CheckpointError, match="its state dict is not a dict of tensors"):
        amradio.load(edit("v25_p16.pth.tar", lambda p: p["state_dict"].update(step=3)))
    with pytest.raises(CheckpointError, match="training arguments are no record but nothing"):
        amradio.load(edit("v25_p16.pth.tar", lambda p: p.update(args="nothing")))


# ---- hostile and damaged files ----


class Bomb:
    """Unpickling this would write a file."""

    def __reduce__(self) -> Any:
        return exec, ("open('exploded', 'w')",)


def test_pickle_bomb(edit: Edit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = edit("v25_p16.pth.tar", lambda p: p.update(epoch=Bomb()))
    for strict in (True, False):
        with pytest.raises(UnsafeCheckpointError) as raised:
            amradio.load(path, strict=strict)
        assert str(raised.value) == (
            f"{path} is refused: its pickle refers to code that is not on the allow-list: builtins.exec. Allowed "
            "are tensors, plain containers and argparse.Namespace. Nothing was executed, and there is no unsafe "
            "fallback. If you trust the file, convert it to safetensors in a separate, isolated environment; otherwise "
            "get the weights from their publisher."
        )
    assert not (tmp_path / "exploded").exists()


def test_old_format_pickle_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"args": Bomb()}, tmp_path / "old.pth.tar", _use_new_zipfile_serialization=False)
    with pytest.raises(UnsafeCheckpointError, match="exec"):
        amradio.load(tmp_path / "old.pth.tar")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.999])
def test_truncated(models: Path, tmp_path: Path, kept: float) -> None:
    content = (models / "v25_p16.pth.tar").read_bytes()
    path = tmp_path / "cut.pth.tar"
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(CheckpointError) as raised:
        amradio.load(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("content", [b"not a checkpoint", b"\x80\x02.", b"PK\x03\x04"])
def test_other_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pth.tar").write_bytes(content)
    with pytest.raises(CheckpointError):
        amradio.load(tmp_path / "x.pth.tar")
    with pytest.raises(LayoutError):
        amradio.load(tmp_path)


@pytest.mark.parametrize("version", ["2.9.1", "2.9.1+cu128", "1.13.0"])
def test_old_torch_reads_no_pickles(models: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(CheckpointError) as raised:
        amradio.load(models / "v25_p16.pth.tar")
    assert str(raised.value) == (
        f"Reading pickled checkpoints needs torch >= 2.10, this is {version}: older versions can be made to execute "
        "code even by weights_only loading (CVE-2025-32434, CVE-2026-24747). Upgrade torch, or load a safetensors file."
    )


# ---- torch.hub ----


def hub_load(root: Path, *args: Any, **kwargs: Any) -> Any:
    return torch.hub.load(str(root), "radio_model", *args, source="local", **kwargs)


def test_torch_hub(root: Path, models: Path) -> None:
    path = str(models / "v25_p16.pth.tar")
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        model = hub_load(root, version=path, adaptor_names=["clip"], patch_size=16, preferred_resolution=(64, 64))
        summary, features = model(images)["clip"]
        want = amradio.load(path, "clip")(images)["clip"]
    assert torch.equal(summary, want.summary)
    assert torch.equal(features, want.features)
    assert model.preferred_resolution == (64, 64)
    assert hub_load(root, version=path, vitdet_window_size=2).window_size == 2


def test_torch_hub_returns_the_checkpoint(root: Path, models: Path) -> None:
    model, checkpoint = hub_load(root, version=str(models / "v25_p16.pth.tar"), return_checkpoint=True)
    assert {"args", "state_dict"} <= set(checkpoint)
    assert checkpoint["args"].model == "vit_base_patch16_224"
    stored = checkpoint["state_dict"]["base_model.blocks.0.norm1.weight"].float()
    assert torch.equal(stored, model.blocks[0].norm1.weight)


def test_torch_hub_is_lenient(root: Path, edit: Edit) -> None:
    path = str(edit("v25_p16.pth.tar", spoil))
    with pytest.warns(UserWarning, match=r"Missing \(1\): model\.blocks\.1\.norm2\.bias"):
        hub_load(root, version=path)
    with pytest.raises(CheckpointKeyError):
        hub_load(root, version=path, strict=True)


def test_torch_hub_refusals(root: Path, models: Path) -> None:
    path = str(models / "v25_p16.pth.tar")
    with pytest.raises(UnknownAdaptorError):
        hub_load(root, version=path, adaptor_names="nope")
    with pytest.raises(OptionError, match=r"^neck_name='encoder': no released model has necks; pass None\.$"):
        hub_load(root, version=path, neck_name="encoder")
    with pytest.raises(OptionError, match="vitdet_window_size is not supported for c-radio_v3-b"):
        hub_load(root, version="c-radio_v3-b", vitdet_window_size=4)


def test_the_default_dtype_does_not_leak_in(goldens: Path) -> None:
    path = goldens / "models" / "v25_p16.pth.tar"
    want = amradio.load(path, ["clip"])
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = amradio.load(path, ["clip"])
    finally:
        torch.set_default_dtype(torch.float32)
    for (name, a), b in zip(model.state_dict().items(), want.state_dict().values(), strict=True):
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name


def test_a_small_file_cannot_ask_for_any_amount_of_memory(goldens: Path, tmp_path: Path) -> None:
    file = torch.load(goldens / "models" / "v25_p16.pth.tar", weights_only=False)
    file["state_dict"] = {k: v.new_zeros(1).expand(v.shape) for k, v in file["state_dict"].items()}
    torch.save(file, tmp_path / "bomb.pth.tar")
    with pytest.raises(CheckpointShapeError, match=r"only \d+ bytes of it are stored"):
        amradio.load(tmp_path / "bomb.pth.tar")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 8}, "patch_size=8 contradicts the checkpoint, whose patches are 16 px"),
        ({"vitdet_num_windowed": -1}, "vitdet_num_windowed must be at least 0, got -1"),
        ({"vitdet_num_global": 0}, "vitdet_num_global must be at least 1, got 0"),
    ],
)
def test_impossible_descriptions(goldens: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        amradio.load(goldens / "models" / "v25_p16.pth.tar", **options)


@pytest.mark.parametrize("kind", ["laughs", "cycle"])
def test_arguments_cannot_exhaust_memory(goldens: Path, tmp_path: Path, kind: str) -> None:
    file = torch.load(goldens / "models" / "v25_p16.pth.tar", weights_only=False)
    bomb: Any = []
    if kind == "laughs":
        for _ in range(40):
            bomb = [bomb, bomb]
    else:
        bomb.append(bomb)
    vars(file["args"])["extra"] = bomb
    torch.save(file, tmp_path / "bomb.pth.tar")
    with pytest.raises(CheckpointError, match="The training arguments have more than"):
        amradio.load(tmp_path / "bomb.pth.tar")
