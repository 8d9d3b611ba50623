"""The part of ``amradio convert`` that writes files which run without amradio."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from amradio.cli.arguments import Size
from amradio.cli.common import device_of, split_names
from amradio.errors import OptionError

if TYPE_CHECKING:
    from amradio.backbones.exported import ExportedBackbone
    from amradio.models.radio import RadioModel

EXPORTS = ("onnx", "aoti")
"""Values of ``--to`` that are no layout of weights."""
_SUFFIXES = {".onnx": "onnx", ".pt2": "aoti"}


@dataclass(frozen=True, kw_only=True)
class ExportArguments:
    """How a model becomes a file that runs without amradio. A base class of commands: each field is an option."""

    adaptors: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(aliases=["-a"])] = ()
    """onnx, aoti: adaptor whose outputs the file has besides the backbone's. Repeat the option, or separate names by
    commas."""
    size: Size = ()
    """onnx, aoti: the only image size that the file will take; default every size that the model takes."""
    batch: int | None = None
    """onnx, aoti: the only number of images that it will take at once; default any."""
    vitdet_window_size: int | None = None
    """onnx, aoti: side in patches of ViTDet attention windows."""
    precision: Literal["fp32", "fp16", "bf16", "int8"] = "fp32"
    """onnx: fp32, fp16 or int8 (weights of linear layers, for CPUs); aoti: fp32, fp16 or bf16."""
    feature_fmt: Literal["NLC", "NCHW"] = "NLC"
    """onnx, aoti: how features come out: as tokens or as maps."""
    opset: int | None = None
    """onnx: version of the operators; default 20."""
    external_data: bool = False
    """onnx: put weights into a file of their own; above 2 GB they are in any case."""
    device: str = "cpu"
    """aoti: compile for cpu or cuda."""

    def refuse_given(self, layout: str) -> None:
        """Refuse options of export where none takes place.

        Raises:
            OptionError: One is given.
        """
        fields = dataclasses.fields(ExportArguments)
        given = [f"--{f.name.replace('_', '-')}" for f in fields if getattr(self, f.name) != f.default]
        if given:
            raise OptionError(f"{', '.join(given)} goes with --to onnx or --to aoti, not with --to {layout}.")

    def export(self, source: str, target: Path, kind: str) -> dict[str, Any]:
        """Export a model, and compare the file with it.

        Args:
            source: See `amradio.load`.
            target: The file to write.
            kind: ``onnx`` or ``aoti``.

        Returns:
            What was written and how near it is, for printing.

        Raises:
            LayoutError: The file does not compute what the model does; it is not kept, and one that was there stays.
        """
        import torch

        from amradio.backbones.load import load
        from amradio.export import ExportOptions, export_aoti, export_onnx

        if kind == "onnx" and self.device != "cpu":
            raise OptionError("--device goes with --to aoti; an ONNX file runs wherever its runtime does.")
        if kind == "aoti" and (self.opset is not None or self.external_data):
            raise OptionError("--opset and --external-data go with --to onnx.")
        model = load(
            source,
            split_names(self.adaptors),
            vitdet_window_size=self.vitdet_window_size,
            device=device_of(self.device),
            dtype=torch.float32,
        )
        options = ExportOptions(
            size=None if not self.size else (self.size[0], self.size[-1]),
            batch=self.batch,
            feature_fmt=self.feature_fmt,
            precision=self.precision,
        )
        found: dict[str, Any] = {}

        def verify(part: Path) -> None:
            found.update(_compared(model, part, target, kind, self.precision))

        if kind == "onnx":
            opset = {} if self.opset is None else {"opset": self.opset}
            export_onnx(model, target, options, external_data=self.external_data, verify=verify, **opset)
        else:
            export_aoti(model, target, options, verify=verify)
        sizes = "{}x{}".format(*options.size) if options.size else "any size"
        report = {"source": source, "target": str(target), "layout": kind, "precision": self.precision, "sizes": sizes}
        return {**report, **found}


def refuse_suffix(target: Path, layout: str) -> None:
    """Refuse the name of an exported file for a layout of weights.

    Args:
        target: What is to be written.
        layout: Value of ``--to``.

    Raises:
        OptionError: It has such a name.
    """
    suffix = target.suffix.lower()
    if suffix in _SUFFIXES:
        raise OptionError(
            f"{target} has the name of an exported file, and --to {layout} writes weights. Add --to "
            f"{_SUFFIXES[suffix]}, or choose a name that does not end in {suffix}."
        )


def _compared(model: RadioModel, part: Path, target: Path, kind: str, precision: str) -> dict[str, Any]:
    """How near a file that has not got its name yet is to the model, for the report."""
    from amradio.export import compare

    exported, reason = _loaded(part, kind)
    if exported is None:
        return {"unchecked": reason}
    agreement = compare(model, exported)
    agreement.require(precision, str(target))
    return {"difference": agreement.difference, "cosine": agreement.cosine}


def _loaded(path: Path, kind: str) -> tuple[ExportedBackbone | None, str]:
    """The file that was just written, or why it cannot be run here."""
    from amradio.backbones.aoti import load_aoti
    from amradio.backbones.onnx import load_onnx
    from amradio.errors import MissingDependencyError

    if kind == "aoti":
        return load_aoti(str(path), trust_remote_code=True), ""  # we have made it ourselves
    try:
        return load_onnx(str(path), providers="cpu"), ""
    except MissingDependencyError as e:
        return None, str(e)
