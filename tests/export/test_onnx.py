"""ONNX files against the models they were made from, over sizes that were not traced."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import amradio
from amradio.backbones.exported import ExportedBackbone, ExportInfo, OutputInfo
from amradio.errors import LayoutError, MissingDependencyError, OptionError, ResolutionError
from amradio.export import Agreement, ExportOptions, compare, export_onnx
from amradio.export.onnx import _finish, data_dependent_operators
from amradio.models.radio import RadioModel

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

Toy = Callable[..., RadioModel]
FP32 = 1e-5  # of the largest value
GRIDS = [(1, 1), (1, 7), (9, 9), (12, 3), (5, 16), (14, 14)]  # in steps: smaller, equal, larger than the stored 9 x 9


def check(model: RadioModel, path: Path, sizes: Sequence[Sequence[int]] | None = None, within: float = FP32) -> None:
    """Every output of a file is what the model computes, at all sizes."""
    backbone = amradio.load_backbone(f"onnx:{path}")
    assert isinstance(backbone, ExportedBackbone)
    agreement = compare(model, backbone, sizes)
    assert max(agreement.difference.values()) < within, agreement
    names = ["backbone", *model.adaptors]
    assert list(agreement.difference) == [f"{name} {part}" for name in names for part in ("summary", "features")]
    assert data_dependent_operators(onnx.load(path)) == []


def grids(step: int) -> list[tuple[int, int]]:
    return [(h * step, w * step) for h, w in GRIDS]


def test_one_graph_for_all_sizes_and_outputs(whole: RadioModel, whole_file: Path) -> None:
    check(whole, whole_file, grids(8))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_one_graph_for_all_numbers_of_images(whole: RadioModel, whole_file: Path, count: int) -> None:
    images = torch.rand(count, 3, 40, 24)
    found = amradio.load_backbone(f"onnx:{whole_file}", adaptor="sam")(images, "NCHW")
    expected = whole(images, "NCHW")["sam"]
    assert found.features.shape == expected.features.shape == (count, 6, 10, 6)
    torch.testing.assert_close(found.features, expected.features, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.summary, expected.summary, rtol=0, atol=1e-5)


def test_the_graph_is_documented_by_its_names(whole_file: Path) -> None:
    graph = onnx.load(whole_file).graph
    assert [v.name for v in graph.input] == ["images"]
    assert [v.name for v in graph.output] == [
        *("summary", "features"),
        *("clip_summary", "clip_features"),
        *("sam_summary", "sam_features"),
    ]
    dims = [d.dim_param or d.dim_value for d in graph.input[0].type.tensor_type.shape.dim]
    assert dims[1] == 3
    assert all(isinstance(dims[i], str) for i in (0, 2, 3))


def test_the_file_says_all_that_must_be_known(whole_file: Path) -> None:
    described = {p.key: p.value for p in onnx.load(whole_file).metadata_props}
    assert described["format"] == "amradio-export"
    assert described["amradio_version"] == amradio.__version__
    export = json.loads(described["export"])
    assert (export["patch_size"], export["step"], export["precision"]) == (8, 8, "fp32")
    assert export["preferred_resolution"] == [64, 64]
    assert (export["version"], export["license"], export["source_sha256"]) == ("toy", "MIT", "ab" * 32)
    assert [o["name"] for o in export["outputs"]] == ["backbone", "clip", "sam"]


@pytest.mark.slow
def test_windows(toy: Toy, tmp_path: Path) -> None:
    model = toy()
    model.set_vitdet(2, num_windowed=1)
    path = export_onnx(model, tmp_path / "windows.onnx")
    check(model, path, grids(16))
    backbone = amradio.load_backbone(f"onnx:{path}")
    assert backbone.min_resolution_step == 16
    with pytest.raises(ResolutionError, match=r"needs multiples of 16 pixels, got 24x32 .* supported size is 32x32"):
        backbone(torch.rand(1, 3, 24, 32))


@pytest.mark.slow
@pytest.mark.parametrize(
    "trunk",
    [
        {"position": "window", "layer_scale": 0.1, "norm": "dyt", "mlp": "swiglu", "patch_norm": True},
        {"position": "resize", "position_of_prefix": True, "mlp_norm": True, "pool": "avg", "final_norm": True},
    ],
)
def test_every_kind_of_trunk(toy: Toy, tmp_path: Path, trunk: dict[str, Any]) -> None:
    model = toy(depth=1, **trunk)
    check(model, export_onnx(model, tmp_path / "trunk.onnx"), grids(8), within=1e-4)


@pytest.mark.slow
def test_aligned_corners(toy: Toy, tmp_path: Path) -> None:
    config = dataclasses.replace(toy(depth=1).config, position_interpolation="align_corners")
    model = RadioModel(config).eval()
    check(model, export_onnx(model, tmp_path / "aligned.onnx"), grids(8))


@pytest.mark.slow
def test_the_model_in_the_package(tmp_path: Path) -> None:
    """Its stem pads by the remainder of the size, so one graph is for multiples of the stem's stride."""
    model = amradio.load("amradio-tiny", adaptors=["minilm"])
    path = export_onnx(model, tmp_path / "tiny.onnx")
    check(model, path, [(32, 32), (96, 160), (32, 128), (224, 64)])
    backbone = amradio.load_backbone(f"onnx:{path}")
    assert backbone.min_resolution_step == 32
    assert backbone.identity.license == model.identity.license
    with pytest.raises(ResolutionError, match="needs multiples of 32 pixels, got 48x32"):
        backbone(torch.rand(1, 3, 48, 32))


# ---- one size ----


@pytest.fixture(scope="module")
def fixed(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> tuple[RadioModel, Path]:
    """A file for two images of one size, with maps."""
    model = toy(["clip"])
    options = ExportOptions(size=(24, 40), batch=2, feature_fmt="NCHW")
    return model, export_onnx(model, tmp_path_factory.mktemp("onnx") / "fixed.onnx", options)


def test_a_file_for_one_size(fixed: tuple[RadioModel, Path]) -> None:
    model, path = fixed
    check(model, path)
    backbone = amradio.load_backbone(f"onnx:{path}")
    assert backbone.preferred_resolution == (24, 40)
    assert backbone.get_nearest_supported_resolution(500, 500) == (24, 40)
    with pytest.raises(ResolutionError, match=r"accepts one size only, got 24x48 .* nearest supported size is 24x40"):
        backbone(torch.rand(1, 3, 24, 48))


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("feature_fmt", ["NLC", "NCHW", "NHWC"])
def test_a_file_for_a_number_of_images_takes_any(fixed: tuple[RadioModel, Path], count: int, feature_fmt: str) -> None:
    model, path = fixed
    images = torch.rand(count, 3, 24, 40)
    found, expected = amradio.load_backbone(f"onnx:{path}")(images, feature_fmt), model(images, feature_fmt)["backbone"]
    torch.testing.assert_close(found.summary, expected.summary, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.features, expected.features, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_eradio(eradio: Toy, tmp_path: Path) -> None:
    model = eradio(["clip"])
    with pytest.raises(OptionError, match=r"E-RADIO resizes its maps .* pass size=\(height, width\)"):
        export_onnx(model, tmp_path / "e.onnx")
    check(model, export_onnx(model, tmp_path / "e.onnx", ExportOptions(size=(96, 160))), within=1e-4)


# ---- precisions ----


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "difference", "cosine"), [("fp16", 5e-3, 0.99999), ("int8", 0.1, 0.99)])
def test_precisions(toy: Toy, tmp_path: Path, precision: str, difference: float, cosine: float) -> None:
    model = toy(["clip"])
    path = export_onnx(model, tmp_path / "small.onnx", ExportOptions(precision=precision, size=(24, 40)))
    assert model.dtype == torch.float32
    backbone = amradio.load_backbone(f"onnx:{path}")
    assert isinstance(backbone, ExportedBackbone)
    agreement = compare(model, backbone)
    assert max(agreement.difference.values()) < difference, agreement
    assert min(agreement.cosine.values()) > cosine, agreement
    stored = {t.data_type for t in onnx.load(path).graph.initializer if len(t.dims) == 2 and min(t.dims) >= 16}
    wanted = {"fp16": onnx.TensorProto.FLOAT16, "int8": onnx.TensorProto.INT8}[precision]
    assert wanted in stored
    expected = torch.float16 if precision == "fp16" else torch.float32
    found = backbone.forward_all(torch.rand(1, 3, 24, 40))
    assert (found["backbone"].features.dtype, found["clip"].features.dtype) == (expected, torch.float32)


def test_a_file_that_is_off_is_refused() -> None:
    sizes = (amradio.models.configs.Resolution(16, 16),)
    off = Agreement(sizes=sizes, difference={"a": 1e-7, "clip features": 0.03}, cosine={"a": 1.0, "clip features": 0.9})
    with pytest.raises(LayoutError, match=r"m.onnx does not compute .*: clip features differs by 0.03 .* the 1e-04"):
        off.require("fp32", "m.onnx")
    off.require("int8", "m.onnx")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_values_that_are_not_finite_are_refused_in_any_precision(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, value: float, precision: str
) -> None:
    info = ExportInfo(
        precision=precision,
        patch_size=8,
        step=8,
        outputs=(OutputInfo(name="backbone", summary_dim=64, embed_dim=32),),
    )
    model = toy(depth=1)

    class Overflowing(ExportedBackbone):
        def _compute(self, images: torch.Tensor, wanted: Sequence[OutputInfo]) -> list[Any]:
            output = model(images)
            output.features[0, 1, 2] = value
            return [output]

        def _check_device(self, device: torch.device) -> None: ...

    file = Overflowing(info, info.identity(Path("m.onnx"), "onnx", "ab" * 32))
    for sizes in ([(16, 16)], [(16, 16), (24, 8)]):
        agreement = compare(model, file, sizes)
        assert agreement.difference["backbone features"] == float("inf")
        assert agreement.cosine["backbone features"] == -1
        assert agreement.difference["backbone summary"] == 0
        with pytest.raises(LayoutError, match=rf"backbone features is not finite .* In {precision} a value may be too"):
            agreement.require(precision, "m.onnx")


# ---- files ----


def test_weights_in_a_file_of_their_own(fixed: tuple[RadioModel, Path], tmp_path: Path) -> None:
    model, _ = fixed
    path = export_onnx(model, tmp_path / "m.onnx", ExportOptions(size=(16, 16), batch=1), external_data=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    check(model, path)
    weights = tmp_path / "m.onnx.data"
    content = bytearray(weights.read_bytes())
    content[100] ^= 1
    weights.write_bytes(content)
    with pytest.raises(amradio.errors.IntegrityError, match=r"m.onnx.data is not what it should be: .* in m.onnx"):
        amradio.load_backbone(f"onnx:{path}")
    weights.unlink()
    with pytest.raises(amradio.errors.CheckpointError, match=r"m.onnx cannot be read by ONNX Runtime"):
        amradio.load_backbone(f"onnx:{path}")


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"precision": "bf16"}, OptionError, "precision must be one of fp32, fp16, int8, got 'bf16'"),
        ({"feature_fmt": "NHWC"}, OptionError, "feature_fmt must be NLC or NCHW in an exported file, got 'NHWC'"),
        ({"batch": 0}, OptionError, "batch must be at least 1 image, got 0"),
        ({"size": (16,)}, OptionError, r"size must be \(height, width\) in pixels, got \(16,\)"),
        ({"size": (16, 20)}, ResolutionError, "does not take 16x20 .* the nearest supported size is 16x16"),
    ],
)
def test_options_that_cannot_be(
    whole: RadioModel, tmp_path: Path, options: dict[str, Any], kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind, match=said):
        export_onnx(whole, tmp_path / "m.onnx", ExportOptions(**options))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("opset", [7, 17, 26, 99])
def test_operators_that_cannot_be_written(whole: RadioModel, tmp_path: Path, opset: int) -> None:
    with pytest.raises(
        OptionError, match=rf"opset must be from 18 to 2\d with onnx .*, got {opset}. 20 is the default"
    ):
        export_onnx(whole, tmp_path / "m.onnx", opset=opset)
    assert list(tmp_path.iterdir()) == []


def test_operators_that_were_not_converted(whole_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(whole_file.read_bytes())
    with pytest.raises(LayoutError, match=r"wrote version 20 of the operators instead of 18: .* Pass opset=20"):
        _finish(onnx, path, ExportInfo(precision="fp32", patch_size=8, step=8, outputs=()), 18)


@pytest.mark.slow
def test_older_operators_are_what_the_file_says(toy: Toy, tmp_path: Path) -> None:
    model = toy(depth=1)
    path = export_onnx(model, tmp_path / "m.onnx", ExportOptions(size=(16, 24)), opset=18)
    assert [(entry.domain, entry.version) for entry in onnx.load(path).opset_import] == [("", 18)]
    check(model, path)


def test_a_fixed_position_embedding_needs_a_size(toy: Toy, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"has a fixed position embedding: pass size=\(72, 72\)"):
        export_onnx(toy(position="fixed"), tmp_path / "m.onnx")


def test_a_folder_is_no_file(whole: RadioModel, tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match="is a directory, but an ONNX export is a file"):
        export_onnx(whole, tmp_path)


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_missing_packages_are_named(
    whole: RadioModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=rf"with the package {package}, .* 'amradio\[onnx\]'"):
        export_onnx(whole, tmp_path / "m.onnx")


def test_data_dependent_operators_are_found() -> None:
    helper = onnx.helper
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [None])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.INT64, [1, None])
    graph = helper.make_graph([helper.make_node("NonZero", ["x"], ["y"])], "g", [x], [y])
    assert data_dependent_operators(helper.make_model(graph)) == ["NonZero"]
