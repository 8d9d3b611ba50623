"""Models as files that run without this package, and without Python: ONNX, and packages of AOTInductor."""

from __future__ import annotations

from amradio.export.aoti import export_aoti
from amradio.export.check import Agreement, compare
from amradio.export.onnx import export_onnx
from amradio.export.program import ExportOptions

__all__ = ["Agreement", "ExportOptions", "compare", "export_aoti", "export_onnx"]
