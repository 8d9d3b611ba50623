"""Writing ONNX files, by torch's dynamo exporter.

The graph takes images in [0, 1] and standardises them itself. It has no branches and no loops, so that every runtime
can take it whole.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from amradio.backbones.exported import ExportInfo
from amradio.errors import LayoutError, MissingDependencyError, OptionError
from amradio.export.program import INPUT, ExportOptions, describe, export_program, quietly
from amradio.models.radio import RadioModel
from amradio.weights.trust import sha256_of

PRECISIONS = ("fp32", "fp16", "int8")
OPSET = 20
"""The first with GELU as one operator."""
OPSETS = (18, 25)
"""The first that torch's exporter writes, and the last that it can convert these graphs to."""

DATA_DEPENDENT = ("If", "Loop", "Scan", "NonZero", "Compress", "Unique", "SequenceMap")
"""Operators with which the work to do, or the shape of a result, depends on values."""

_QUANTISED = ("MatMul", "Gemm")
_PREPARED = {"onnx.quant.pre_process": "onnxruntime.quant"}  # the exporter has folded and fused what can be


def export_onnx(
    model: RadioModel,
    path: str | os.PathLike[str],
    options: ExportOptions | None = None,
    *,
    opset: int = OPSET,
    external_data: bool = False,
    verify: Callable[[Path], object] | None = None,
) -> Path:
    """Write a model as an ONNX file that `load_backbone("onnx:FILE")` takes with no further word.

    The graph's input is ``images``, float32 [B, 3, H, W] in [0, 1]. Its outputs are ``summary`` and ``features``, and
    ``NAME_summary`` and ``NAME_features`` of each adaptor that is loaded, in float32; those of the backbone in float16
    with ``fp16``.

    ``int8`` stores the weights of linear layers in 8 bits, a scale for each output channel, and quantises what comes
    into them at run time, a scale for each tensor (ONNX Runtime's dynamic quantisation); convolutions and attention
    stay in float32. It is for CPUs.

    Args:
        model: The model, with the adaptors and the windows that are wanted.
        path: The file; parents are made, an existing file is replaced once the new one is complete.
        options: Sizes, layout, precision.
        opset: Version of the ONNX operators, from 18 to 25.
        external_data: Put the weights into a file of their own beside it, ``FILE.data``. Weights of more than 2 GB,
            which is what one file can hold, are in any case.
        verify: Called with the complete file before it gets its name; if it raises, everything stays as it was.

    Returns:
        The path.

    Raises:
        MissingDependencyError: onnx, onnxscript or (for int8) onnxruntime is not installed.
        OptionError: An option is not valid, or does not fit the model.
        ResolutionError: The model does not take the size.
        LayoutError: The model cannot be exported.
    """
    options = options or ExportOptions()
    options.check(model, PRECISIONS)
    target = Path(path)
    if target.is_dir():
        raise LayoutError(f"{target} is a directory, but an ONNX export is a file. Name a file in it.")
    onnx = _import("onnx")
    _import("onnxscript")
    _check_opset(onnx, opset)
    quantisation = _import("onnxruntime.quantization") if options.precision == "int8" else None
    environment = {"torch": torch.__version__, "onnx": onnx.__version__, "opset": str(opset)}
    info = describe(model, options, None, environment)
    names = [name for output in info.outputs for name in (output.summary, output.features)]
    exported = export_program(model, options, torch.device("cpu"))
    with quietly():
        program: Any = torch.onnx.export(
            exported, input_names=[INPUT], output_names=names, opset_version=opset, dynamo=True, verbose=False
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        part = Path(folder, target.name)
        with quietly():
            program.save(part, external_data=external_data or None)
            if quantisation is not None:
                part = _quantised(onnx, quantisation, part, external_data)
        _finish(onnx, part, info, opset)
        if verify is not None:
            verify(part)
        for file in sorted(part.parent.iterdir(), key=lambda f: f == part):  # the graph last: it makes the rest valid
            file.replace(target.parent / file.name)
    return target


def data_dependent_operators(model: Any) -> list[str]:
    """Operators in an ``onnx.ModelProto``, functions included, whose work or shapes depend on values."""
    used = {node.op_type for node in _nodes(model)}
    return [name for name in DATA_DEPENDENT if name in used]


def _nodes(model: Any) -> Iterator[Any]:
    yield from model.graph.node
    for function in model.functions:
        yield from function.node


def _quantised(onnx: Any, quantisation: Any, path: Path, external_data: bool) -> Path:
    """A quantised copy in a folder of its own, under the same name."""
    target = path.parent / "int8" / path.name
    target.parent.mkdir()
    graph = onnx.load(path, load_external_data=False)
    del graph.graph.value_info[:]  # the exporter's shapes of what it has folded since contradict those inferred anew
    onnx.helper.set_model_props(graph, _PREPARED)
    onnx.save(graph, path)
    quantisation.quantize_dynamic(
        path,
        target,
        op_types_to_quantize=list(_QUANTISED),
        per_channel=True,
        # 7 of the 8 bits: products of pairs are added in 16 bits on CPUs without VNNI, which 8 bits would overflow.
        reduce_range=True,
        weight_type=quantisation.QuantType.QInt8,
        use_external_data_format=external_data or path.with_name(f"{path.name}.data").exists(),
    )
    return target


def _check_opset(onnx: Any, opset: int) -> None:
    first, last = OPSETS[0], min(OPSETS[1], onnx.defs.onnx_opset_version())
    if not first <= opset <= last:
        raise OptionError(
            f"opset must be from {first} to {last} with onnx {onnx.__version__}, got {opset}. {OPSET} is the default."
        )


def _finish(onnx: Any, path: Path, info: ExportInfo, opset: int) -> None:
    """Look through the graph, and write into it what it is."""
    model = onnx.load(path, load_external_data=False)
    written = {entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")}
    if written != {opset}:
        raise LayoutError(
            f"The exporter wrote version {', '.join(map(str, sorted(written)))} of the operators instead of {opset}: "
            f"torch {torch.__version__} cannot convert this graph. Pass opset={OPSET}, or upgrade torch and onnxscript."
        )
    found = data_dependent_operators(model)
    if found:
        raise LayoutError(
            f"The graph has the operators {', '.join(found)}, whose work depends on values. This should not be: report "
            f"it with the model's name, the options and torch {torch.__version__}."
        )
    beside = {file.name: sha256_of(file) for file in path.parent.iterdir() if file != path and file.is_file()}
    onnx.helper.set_model_props(model, dataclasses.replace(info, data_files=beside).to_metadata())
    model.producer_name, model.doc_string = "amradio", f"{info.version or info.source}: images in [0, 1] to features"
    onnx.save(model, path)


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise MissingDependencyError(
            f"ONNX files are written with the package {name.partition('.')[0]}, which cannot be imported ({e}). "
            f"Install it with `pip install 'amradio[onnx]'`."
        ) from e
