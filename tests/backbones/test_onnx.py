"""ONNX files as backbones, with graphs written by hand: mean colours of patches and of whole images."""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import amradio
from amradio.backbones import exported
from amradio.backbones.exported import ExportedBackbone, ExportInfo, OutputInfo
from amradio.backbones.onnx import _chosen
from amradio.backbones.protocol import HasIdentity
from amradio.cli import main
from amradio.errors import (
    CapabilityError,
    CheckpointError,
    LayoutError,
    MissingDependencyError,
    OptionError,
    ResolutionError,
    UnknownAdaptorError,
    UnknownModelError,
)
from amradio.features.manifest import describe_model
from amradio.models.configs import Resolution
from amradio.weights.trust import sha256_of

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

PATCH = 8
BACKBONE = OutputInfo(name="backbone", summary_dim=3, embed_dim=3)
CLIP = OutputInfo(name="clip", summary_dim=3, embed_dim=3, teacher={"name": "clip", "type": "open_clip", "model": "x"})
INFO = ExportInfo(
    precision="fp32",
    patch_size=PATCH,
    step=PATCH,
    feature_fmt="NCHW",
    outputs=(BACKBONE, CLIP),
    preferred_resolution=Resolution(32, 48),
    version="colours",
    license="MIT",
)


def write(
    path: Path, info: ExportInfo | None = INFO, *, names: tuple[str, ...] = ("", "clip_"), batch: Any = "n"
) -> Path:
    """A graph whose outputs named ``clip_...`` are the negatives of the others."""
    helper, floats = onnx.helper, onnx.TensorProto.FLOAT
    nodes = [
        helper.make_node("AveragePool", ["images"], ["features"], kernel_shape=[PATCH] * 2, strides=[PATCH] * 2),
        helper.make_node("ReduceMean", ["images"], ["summary"], axes=[2, 3], keepdims=0),
        helper.make_node("Neg", ["features"], ["clip_features"]),
        helper.make_node("Neg", ["summary"], ["clip_summary"]),
    ]
    shapes = {"summary": [batch, 3], "features": [batch, 3, "h", "w"]}
    outputs = [helper.make_tensor_value_info(f"{p}{k}", floats, v) for p in names for k, v in shapes.items()]
    images = helper.make_tensor_value_info("images", floats, [batch, 3, "height", "width"])
    graph = helper.make_graph(nodes, "colours", [images], outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    if info is not None:
        helper.set_model_props(model, info.to_metadata())
    onnx.save(model, path)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "colours.onnx")


def load(path: Path, **options: Any) -> ExportedBackbone:
    backbone = amradio.load_backbone(f"onnx:{path}", **options)
    assert isinstance(backbone, ExportedBackbone)
    return backbone


def check(backbone: ExportedBackbone, images: Tensor, sign: float = 1.0, within: float = 1e-6) -> None:
    """Mean colours by torch."""
    summary, features = backbone(images, "NCHW")
    torch.testing.assert_close(summary, sign * images.float().mean(dim=(2, 3)), rtol=0, atol=within)
    torch.testing.assert_close(features, sign * F.avg_pool2d(images.float(), PATCH), rtol=0, atol=within)


def test_it_is_a_backbone(file: Path) -> None:
    backbone = load(file)
    assert isinstance(backbone, amradio.Backbone)
    assert isinstance(backbone, HasIdentity)
    assert (backbone.patch_size, backbone.min_resolution_step) == (8, 8)
    assert (backbone.embed_dim, backbone.summary_dim, backbone.preferred_resolution) == (3, 3, (32, 48))
    assert backbone.get_nearest_supported_resolution(30, 3) == (32, 8)
    assert list(backbone.parameters()) == []
    identity = backbone.identity
    assert (identity.layout, identity.version, identity.license) == ("onnx", "colours", "MIT")
    assert (identity.source, identity.sha256) == (str(file), sha256_of(file))


@pytest.mark.parametrize("size", [(8, 8), (32, 48), (80, 16)])
@pytest.mark.parametrize("count", [1, 3])
def test_what_it_computes(file: Path, size: tuple[int, int], count: int) -> None:
    images = torch.rand(count, 3, *size)
    check(load(file), images)
    check(load(file, adaptor="clip"), images, sign=-1.0)
    found = load(file).forward_all(images)
    assert list(found) == ["backbone", "clip"]
    assert torch.equal(found["clip"].features, -found["backbone"].features)


def test_feature_formats(file: Path) -> None:
    images = torch.rand(2, 3, 16, 24)
    maps = F.avg_pool2d(images, PATCH)
    for feature_fmt, expected in {
        "NCHW": maps,
        "NHWC": maps.permute(0, 2, 3, 1),
        "NLC": maps.flatten(2).transpose(1, 2),
    }.items():
        torch.testing.assert_close(load(file)(images, feature_fmt).features, expected)
    with pytest.raises(OptionError, match="Unsupported feature_fmt: 'NDC'"):
        load(file)(images, "NDC")


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.half(),
        lambda x: x.double(),
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.transpose(2, 3),
        lambda x: x[::2, :, :, ::2],
        lambda x: x.requires_grad_(),
        lambda x: x[:1].expand(4, -1, -1, -1),
    ],
)
def test_images_of_any_kind_in_memory(file: Path, change: Callable[[Tensor], Tensor]) -> None:
    check(load(file), change(torch.rand(4, 3, 32, 16)).detach(), within=1e-3)


def test_images_that_it_cannot_take(file: Path) -> None:
    with pytest.raises(OptionError, match=r"Images must be floating point in \[0, 1\], got torch.uint8"):
        load(file)(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(ResolutionError, match=r"colours.onnx needs multiples of 8 pixels, got 20x16"):
        load(file)(torch.rand(1, 3, 20, 16))


@pytest.mark.parametrize("count", [1, 4, 5])
def test_a_fixed_number_of_images_is_filled_up(tmp_path: Path, count: int) -> None:
    path = write(tmp_path / "four.onnx", dataclasses.replace(INFO, batch=4), batch=4)
    check(load(path), torch.rand(count, 3, 16, 16))


@pytest.mark.parametrize("feature_fmt", ["NLC", "NCHW", "NHWC"])
@pytest.mark.parametrize("batch", [None, 4])
def test_no_images(tmp_path: Path, batch: int | None, feature_fmt: str) -> None:
    path = write(tmp_path / "m.onnx", dataclasses.replace(INFO, batch=batch), batch=batch or "n")
    summary, features = load(path)(torch.rand(0, 3, 16, 24), feature_fmt)
    assert summary.shape == (0, 3)
    assert features.shape == {"NLC": (0, 6, 3), "NCHW": (0, 3, 2, 3), "NHWC": (0, 2, 3, 3)}[feature_fmt]


def test_one_size_only(tmp_path: Path) -> None:
    path = write(tmp_path / "fixed.onnx", dataclasses.replace(INFO, size=Resolution(16, 24)))
    backbone = load(path)
    check(backbone, torch.rand(1, 3, 16, 24))
    assert backbone.get_nearest_supported_resolution(99, 99) == backbone.preferred_resolution == (16, 24)
    with pytest.raises(ResolutionError, match=r"accepts one size only, got 16x16 .* nearest supported size is 16x24"):
        backbone(torch.rand(1, 3, 16, 16))


# ---- precision and place ----


def test_a_file_stays_as_it_is(file: Path) -> None:
    backbone = load(file, device="cpu", dtype=torch.float32)
    assert backbone.to(torch.float32).eval() is backbone
    with pytest.raises(OptionError, match=r"was exported in fp32 and shows float32; it cannot be cast to float16"):
        load(file, dtype=torch.float16)
    with pytest.raises(OptionError, match=r"runs on CPUExecutionProvider, not on meta. Install an onnxruntime build"):
        backbone.to("meta")


def test_providers(file: Path) -> None:
    for name in ("cpu", "CPUExecutionProvider", ["cpu"]):
        check(load(file, providers=name), torch.rand(1, 3, 8, 8))
    with pytest.raises(OptionError, match=r"has no provider 'tensorrt', only .*CPUExecutionProvider"):
        load(file, providers="tensorrt,cpu")
    with pytest.raises(OptionError, match=r"has no option 'provider'. Nearest names: providers"):
        load(file, provider="cpu")


@pytest.mark.parametrize("threads", [0, -1, "4", "two", 1.5, True])
def test_threads_that_cannot_be(file: Path, threads: Any) -> None:
    with pytest.raises(OptionError, match=f"threads must be a whole number from 1, or None, got {threads!r}"):
        load(file, threads=threads)


@pytest.mark.parametrize("providers", [3, [], [None]])
def test_providers_that_cannot_be(file: Path, providers: Any) -> None:
    with pytest.raises(OptionError, match="providers must be names of execution providers"):
        load(file, providers=providers)


def test_cuda_is_chosen_where_both_sides_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    both = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    runtime = types.SimpleNamespace(get_available_providers=lambda: both, __version__="1.0")
    assert _chosen(runtime, None) == ["CPUExecutionProvider"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert _chosen(runtime, None) == both[1:]
    assert _chosen(runtime, "TensorRT, cuda") == both
    assert _chosen(runtime, "cuda") == both[1:]


def test_files_are_told_apart_by_their_content(file: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other.onnx", dataclasses.replace(INFO, license="other"))
    one, two = describe_model(load(file)), describe_model(load(other))
    assert one["weights_sha256"] != two["weights_sha256"]
    assert one == describe_model(load(file))
    assert one["weights_sha256"] != describe_model(load(file, adaptor="clip"))["weights_sha256"]


# ---- text ----


def test_the_text_side_of_an_adaptor(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Tower:
        tokenizer = staticmethod(len)

        def encode_text(self, tokens: Any, normalize: bool = False) -> Tensor:
            return torch.full((1, 3), float(tokens))

    monkeypatch.setattr(exported, "load_text_tower", lambda teacher, **_: Tower() if teacher["model"] == "x" else None)
    backbone = load(file, adaptor="clip")
    assert torch.equal(backbone.encode_text(backbone.tokenizer(["a", "b"])), torch.full((1, 3), 2.0))
    with pytest.raises(CapabilityError, match=r"The output 'backbone' of .* has no text side"):
        _ = load(file).text


# ---- files that are not right ----


def test_files_of_others_are_refused_with_what_they_have(tmp_path: Path) -> None:
    path = write(tmp_path / "foreign.onnx", None)
    with pytest.raises(LayoutError) as error:
        load(path)
    said = str(error.value)
    assert said.startswith(f"{path} was not written by amradio: its metadata has no format='amradio-export'. It has")
    assert "images ['n', 3, 'height', 'width'] tensor(float)" in said
    assert "pass that to load_backbone" in said


def test_damaged_and_newer_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownModelError, match=r"There is no file .*none.onnx. `amradio convert MODEL none.onnx --to"):
        load(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(CheckpointError, match=r"text.onnx cannot be read by ONNX Runtime .* damaged, no ONNX file"):
        load(tmp_path / "text.onnx")
    path = write(tmp_path / "edited.onnx", names=("",))
    with pytest.raises(LayoutError, match=r"lacks clip_features, clip_summary, which its metadata describes"):
        load(path)
    path = write(tmp_path / "odd.onnx", dataclasses.replace(INFO, precision="fp3"))
    with pytest.raises(LayoutError, match="has metadata that no export has"):
        load(path)
    monkeypatch.setattr(ExportInfo, "to_metadata", lambda _: {"format": "amradio-export", "format_version": "9"})
    with pytest.raises(LayoutError, match=r"in version 9 of the format; amradio .* reads up to version 1. Upgrade"):
        load(write(tmp_path / "newer.onnx"))
    monkeypatch.setattr(
        ExportInfo, "to_metadata", lambda _: {"format": "amradio-export", "format_version": "1", "export": "{"}
    )
    with pytest.raises(LayoutError, match=r"has damaged metadata: .* Export the model again"):
        load(write(tmp_path / "damaged.onnx"))


@pytest.mark.parametrize(
    "change",
    [
        {"batch": 0},
        {"batch": -2},
        {"step": 0},
        {"max_side": -1},
        {"size": Resolution(0, 16)},
        {"preferred_resolution": Resolution(16, -1)},
        {"outputs": ()},
        {"outputs": (CLIP,)},
        {"outputs": (BACKBONE, BACKBONE)},
        {"outputs": (dataclasses.replace(BACKBONE, embed_dim=-3),)},
        {"outputs": (dataclasses.replace(BACKBONE, summary_dim=0),)},
        {"outputs": (dataclasses.replace(BACKBONE, upsample_factor=0),)},
        {"outputs": (dataclasses.replace(BACKBONE, upsample_factor=3),)},
        {"outputs": (dataclasses.replace(BACKBONE, dtype="float31"),)},
    ],
)
def test_metadata_that_no_export_has(tmp_path: Path, change: dict[str, Any]) -> None:
    path = write(tmp_path / "odd.onnx", dataclasses.replace(INFO, **change))
    with pytest.raises(LayoutError, match=r"odd.onnx .* has metadata that no export has"):
        load(path)


def test_several_outputs_at_once(file: Path) -> None:
    images = torch.rand(2, 3, 16, 24)
    backbone = load(file)
    before = describe_model(backbone)
    found = backbone.with_adaptors(["clip", "clip"])(images)
    assert list(found) == ["backbone", "clip"]
    assert torch.equal(found["clip"].features, -found["backbone"].features)
    for name in found:
        assert torch.equal(backbone.view(name)(images).features, found[name].features)
    assert list(backbone(images)) == ["backbone", "clip"]
    assert describe_model(backbone) != before  # so that embeddings of both are not taken for each other's
    with pytest.raises(UnknownAdaptorError, match="has no output 'clap'"):
        backbone.with_adaptors(["clap"])


def test_unknown_adaptors(file: Path) -> None:
    with pytest.raises(UnknownAdaptorError, match=r"has no output 'clap', only \['backbone', 'clip'\]. .* names: clip"):
        load(file, adaptor="clap")


def test_the_extra_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match=r"by the package onnxruntime, .* 'amradio\[onnx\]'"):
        load(file)


def test_weights_beside_the_file_stay_beside_it(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    inner = tmp_path / "inner"
    inner.mkdir()
    path = write(inner / "m.onnx", dataclasses.replace(INFO, data_files={"../secret": sha256_of(secret)}))
    with pytest.raises(CheckpointError, match=r"needs its weights in the file ../secret beside it"):
        load(path)


# ---- by name ----


def test_commands_take_it_by_name(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    photos = tmp_path / "photos"
    for name, colour in [("red", (200, 30, 30)), ("blue", (30, 30, 200))]:
        for split in ("train", "val"):
            (photos / split / name).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (40, 32), colour).save(photos / split / name / f"{i}.png")
    spec = f"onnx:{file}"
    options = ["--model", spec, "--resolution", "32", "--json"]
    assert main(["features", str(photos), "-o", str(tmp_path / "out"), *options]) == 0
    assert '"model": "colours"' in capsys.readouterr().out
    knn = ["eval", "knn", "--train", str(photos / "train"), "--eval", str(photos / "val"), "--k", "1"]
    assert main([*knn, *options]) == 0
    assert '"top1' in capsys.readouterr().out


def test_commands_take_its_adaptors(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    Image.new("RGB", (40, 32), (200, 30, 30)).save(tmp_path / "red.png")
    words = [str(tmp_path / "red.png"), "--model", f"onnx:{file}", "--resolution", "32", "--adaptors", "clip"]
    assert main(["features", *words, "-o", str(tmp_path / "out"), "--format", "npz"]) == 0
    assert main(["embed", *words, "-o", str(tmp_path / "embedded")]) == 0
    assert main(["embed", *words, "-o", str(tmp_path / "none"), "--adaptors", "clap"]) == 1
    assert "has no output 'clap', only ['backbone', 'clip']" in capsys.readouterr().err
    from amradio.features import load_embeddings

    embeddings = load_embeddings(tmp_path / "embedded")
    assert list(embeddings.names) == ["backbone", "clip"]


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("adaptor=clip", "adaptor is given by --adaptor or --adaptors"),
        ("dtype=float16", "dtype is given by --dtype"),
        ("spec=x", "spec is given by the model itself"),
        ("threads=two", "threads must be a whole number from 1, or None, got 'two'"),
    ],
)
def test_options_that_cannot_be(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, said: str
) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    words = ["embed", str(tmp_path / "a.png"), "-o", str(tmp_path / "o"), "--model", f"onnx:{file}"]
    assert main([*words, "--model-option", option]) == 1
    assert said in capsys.readouterr().err


def test_options_of_one_kind_do_not_go_with_adaptors_of_radio(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    words = ["embed", str(tmp_path / "a.png"), "-o", str(tmp_path / "o"), "--adaptors", "minilm"]
    assert main([*words, "--model-option", "strict=false"]) == 1
    assert "--model-option strict=false does not go with adaptors of a RADIO model" in capsys.readouterr().err
