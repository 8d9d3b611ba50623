"""``amradio convert``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from amradio.cli.convert_export import EXPORTS, ExportArguments, refuse_suffix

Layout = Literal["native", "official", "huggingface", "transformers", "timm", "pretrained", "onnx", "aoti"]


@dataclass(frozen=True, kw_only=True)
class Convert(ExportArguments):
    """Rewrite a checkpoint in another layout, exactly, or export it as a file that runs without amradio."""

    source: tyro.conf.Positional[str]
    """Version key, Hugging Face repository, or path."""
    target: tyro.conf.Positional[Path]
    """File or directory to write."""
    to: Layout = "native"
    """native: one safetensors file with its description; official: .pth.tar; huggingface: directory in the official
    format; transformers: directory for the RadioModel of transformers; timm: safetensors for timm; pretrained:
    directory for AutoModel after `import amradio.hf`; onnx: for ONNX Runtime and others; aoti: compiled code."""
    backbone_only: bool = False
    """Leave out what the layout cannot hold (adaptors, normalizers) instead of refusing; not for onnx and aoti, whose
    files have the adaptors of --adaptors."""
    overwrite: bool = False
    """Replace an existing target."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> int:
        """Convert and say what was written; returns the exit code."""
        from amradio.backbones.load import read_located
        from amradio.backbones.locate import locate
        from amradio.errors import OptionError
        from amradio.weights.convert import save

        if self.target.exists() and not self.overwrite:
            raise OptionError(f"{self.target} exists already; pass --overwrite to replace it.")
        if self.to in EXPORTS:
            if self.backbone_only:
                raise OptionError(
                    f"--backbone-only goes with layouts of weights, not with --to {self.to}: the file has the "
                    f"backbone, and the adaptors that --adaptors names."
                )
            report = self.export(self.source, self.target, self.to)
            print(json.dumps(report) if self.json else _described(report))
            return 0
        self.refuse_given(self.to)
        refuse_suffix(self.target, self.to)
        located = locate(self.source, with_adaptors=not self.backbone_only)
        # With what the catalog knows: licence, ViTDet schedule and resolutions are in no official file.
        written = save(read_located(located), self.target, self.to, backbone_only=self.backbone_only)
        if self.json:
            print(json.dumps({"source": located.source, "target": str(written), "layout": self.to}))
        else:
            print(f"wrote {written} ({self.to})")
        return 0


def _described(report: Mapping[str, Any]) -> str:
    lines = [f"wrote {report['target']} ({report['layout']}, {report['precision']}, {report['sizes']})"]
    lines += [f"not compared with torch: {report['unchecked']}"] if "unchecked" in report else []
    for name, difference in report.get("difference", {}).items():
        lines.append(f"  {name}: differs from torch by {difference:.1e} at most, cosine {report['cosine'][name]:.6f}")
    return "\n".join(lines)
