"""``amradio convert``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

Layout = Literal["native", "official", "huggingface", "transformers", "timm"]


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Rewrite a checkpoint in another layout, exactly."""

    source: tyro.conf.Positional[str]
    """Version key, Hugging Face repository, or path."""
    target: tyro.conf.Positional[Path]
    """File or directory to write."""
    to: Layout = "native"
    """native: one safetensors file with its description; official: .pth.tar; huggingface: directory in the official
    format; transformers: directory for the RadioModel of transformers; timm: safetensors for timm."""
    backbone_only: bool = False
    """Leave out what the layout cannot hold (adaptors, normalizers) instead of refusing."""
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
        located = locate(self.source, with_adaptors=not self.backbone_only)
        # With what the catalog knows: licence, ViTDet schedule and resolutions are in no official file.
        written = save(read_located(located), self.target, self.to, backbone_only=self.backbone_only)
        if self.json:
            print(json.dumps({"source": located.source, "target": str(written), "layout": self.to}))
        else:
            print(f"wrote {written} ({self.to})")
        return 0
