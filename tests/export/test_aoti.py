"""Packages of AOTInductor. Compiling one takes a minute, so one serves all tests."""

from __future__ import annotations

import dataclasses
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import amradio
from amradio.backbones import aoti as loader
from amradio.backbones.aoti import METADATA, machine
from amradio.backbones.exported import ExportedBackbone, ExportInfo, OutputInfo
from amradio.errors import (
    CheckpointError,
    LayoutError,
    MissingDependencyError,
    OptionError,
    ResolutionError,
    UnknownAdaptorError,
    UnknownModelError,
)
from amradio.export import ExportOptions, compare, export_aoti
from amradio.models.radio import RadioModel

HERE = machine(torch.device("cpu"))
INFO = ExportInfo(
    precision="fp32",
    patch_size=8,
    step=8,
    outputs=(OutputInfo(name="backbone", summary_dim=3, embed_dim=3),),
    environment={"torch": "2.0", **HERE},
)


@pytest.fixture(scope="module")
def package(toy: Callable[..., RadioModel], tmp_path_factory: pytest.TempPathFactory) -> tuple[RadioModel, Path]:
    """A ViT with registers and an adaptor that upsamples, compiled for all sizes."""
    if not any(shutil.which(name) for name in ("g++", "clang++")):
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("aoti")
    model = toy(["sam"], depth=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "cache"))
        return model, export_aoti(model, folder / "model.pt2")


@pytest.mark.compile
def test_one_package_for_all_sizes(package: tuple[RadioModel, Path]) -> None:
    model, path = package
    backbone = amradio.load_backbone(f"aoti:{path}", trust_remote_code=True)
    assert isinstance(backbone, ExportedBackbone)
    assert isinstance(backbone, amradio.Backbone)
    agreement = compare(model, backbone, [(8, 8), (8, 56), (72, 72), (96, 24), (112, 112)])
    assert max(agreement.difference.values()) < 1e-5, agreement
    images = torch.rand(5, 3, 40, 24)
    expected = model(images, "NCHW")
    view = amradio.load_backbone(f"aoti:{path}", trust_remote_code=True, adaptor="sam")
    found = view(images.double().transpose(2, 3).contiguous().transpose(2, 3), "NCHW")
    torch.testing.assert_close(found.features, expected["sam"].features, rtol=0, atol=1e-5)
    identity = backbone.identity
    assert (identity.layout, identity.version, identity.license) == ("aoti", "toy", "MIT")
    assert list(backbone.parameters()) == []
    with pytest.raises(ResolutionError, match="takes sides of at most 32768 pixels, got 8x32776"):
        backbone(torch.empty(1, 3, 8, 32776))
    with pytest.raises(OptionError, match="was compiled for cpu, not for meta"):
        backbone.to("meta")


@pytest.mark.compile
def test_nothing_of_it_runs_without_trust(package: tuple[RadioModel, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "_loaded", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(OptionError, match=r"is compiled code, which runs with all your .* trust_remote_code=True"):
        amradio.load_backbone(f"aoti:{package[1]}")


def write(path: Path, info: ExportInfo | None = INFO, **changes: Any) -> Path:
    """A file with the description of a package and nothing else."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("model/version", "1")
        if info is not None:
            file.writestr(f"model/{METADATA}", json.dumps({**info.to_metadata(), **changes}))
    return path


def load(path: Path, **options: Any) -> Any:
    return amradio.load_backbone(f"aoti:{path}", trust_remote_code=True, **options)


def test_files_that_are_not_right(tmp_path: Path) -> None:
    with pytest.raises(UnknownModelError, match=r"There is no file .*m.pt2. `amradio convert MODEL m.pt2 --to aoti`"):
        load(tmp_path / "m.pt2")
    (tmp_path / "text.pt2").write_text("hello")
    with pytest.raises(CheckpointError, match=r"text.pt2 is no package of AOTInductor, or damaged"):
        load(tmp_path / "text.pt2")
    with pytest.raises(LayoutError, match=r"was not written by amradio: .*aoti_load_package"):
        load(write(tmp_path / "foreign.pt2", None))
    with pytest.raises(LayoutError, match="version 7 of the format"):
        load(write(tmp_path / "newer.pt2", format_version="7"))
    with pytest.raises(UnknownAdaptorError, match="has no output 'clip'"):
        load(write(tmp_path / "plain.pt2"), adaptor="clip")
    with pytest.raises(CheckpointError, match=r"plain.pt2 cannot be loaded by torch .*; it was made with torch 2.0: "):
        load(tmp_path / "plain.pt2")


def test_code_for_another_machine_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "_loaded", lambda *_: pytest.fail("it was loaded"))
    elsewhere = {**HERE, "capability": f"{HERE['capability']} avx1024"}
    with pytest.raises(OptionError, match=r"was compiled for a cpu with avx1024, which this machine does not have"):
        load(write(tmp_path / "m.pt2", dataclasses.replace(INFO, environment=elsewhere)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(OptionError, match="was compiled for cuda, and torch sees no GPU"):
        load(write(tmp_path / "m.pt2", dataclasses.replace(INFO, environment={"device": "cuda"})))
    with pytest.raises(LayoutError, match="does not say which device it was compiled for"):
        load(write(tmp_path / "m.pt2", dataclasses.replace(INFO, environment={})))


def test_a_compiler_is_needed(toy: Callable[..., RadioModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(MissingDependencyError, match=r"needs a C\+\+ compiler, and none of g\+\+, clang\+\+"):
        export_aoti(toy(), tmp_path / "m.pt2")


def test_what_cannot_be_exported(toy: Callable[..., RadioModel], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="precision must be one of fp32, fp16, bf16, got 'int8'"):
        export_aoti(toy(), tmp_path / "m.pt2", ExportOptions(precision="int8"))
    with pytest.raises(LayoutError, match=r"is one file whose name ends in .pt2, got .*m.so"):
        export_aoti(toy(), tmp_path / "m.so")
