"""What drawing may use."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import amradio.viz

FOLDER = Path(amradio.viz.__file__).parent


def test_nothing_here_imports_gradio_or_runs_a_model() -> None:
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert not name.startswith(("gradio", "amradio.evals", "amradio.app", "amradio.backbones")), path


def test_pictures_without_matplotlib() -> None:
    program = """
import sys
sys.modules["matplotlib"] = None
import torch
from PIL import Image
from amradio.viz import Cell, Legend, Sheet, colour_bar, draw_sheet, heat_picture
heat = heat_picture(torch.rand(2, 3), (20, 30))
draw_sheet(Sheet([[Cell(heat, "heat")]], legend=Legend(colour_bar(), "0", "1")))
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
