"""Imports: which modules may use which, what importing costs, and names that must agree."""

from __future__ import annotations

import ast
import importlib
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import amradio

SRC = Path(amradio.__file__).parent

# The house, from top to bottom: a room may use rooms on lower floors only. See docs/architecture.md.
FLOORS = [
    {"cli"},
    {"app"},
    {"evals", "distill", "viz"},
    {"fungi"},
    {"features", "search", "sam", "hf", "export"},
    {"backbones"},
    {"weights"},
    {"models", "text"},
    {"images", "statistics"},
    {"hub", "distributed", "packages"},
    {"errors"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

OPTIONAL = (
    "av",
    "datasets",
    "faiss",
    "gradio",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "open_clip",
    "ray",
    "scann",
    "timm",
    "torchvision",
    "transformers",
)
HEAVY = ("PIL", "huggingface_hub", "numpy", "pyarrow", "torch", "torchmetrics", "tqdm", *OPTIONAL)


def modules_after(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded after running some code."""
    program = f"{code}\nimport json, sys\nprint(json.dumps(sorted({{m.partition('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    return set(json.loads(done.stdout.splitlines()[-1]))


def all_modules() -> list[str]:
    return ["amradio", *(m.name for m in pkgutil.walk_packages([str(SRC)], "amradio."))]


def imported_rooms(path: Path) -> set[str]:
    """The parts of amradio that a source file imports, at its top or inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {n.split(".")[1] for n in names if n.startswith("amradio.")}


@pytest.mark.parametrize("path", [pytest.param(p, id=str(p.relative_to(SRC))) for p in sorted(SRC.rglob("*.py"))])
def test_a_room_uses_lower_floors_only(path: Path) -> None:
    room = path.relative_to(SRC).parts[0].removesuffix(".py")
    if room in ("__init__", "__main__"):
        return
    assert room in FLOOR_OF, f"{room} has no place in the house: add it here and to docs/architecture.md"
    for other in imported_rooms(path) - {room, "__version__"}:
        assert FLOOR_OF.get(other, -1) > FLOOR_OF[room], f"{path.relative_to(SRC)} imports amradio.{other}"


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert not modules_after("import amradio") & set(HEAVY)


def test_asking_for_load_needs_only_torch() -> None:
    loaded = modules_after("import amradio; amradio.load, amradio.RadioModel, amradio.save")
    assert not loaded & {*OPTIONAL, "PIL", "pyarrow", "torchmetrics"}


def test_help_needs_no_torch() -> None:
    assert not modules_after("from amradio.cli import main; main(['--help'])") & {
        "torch",
        "numpy",
        "pyarrow",
        *OPTIONAL,
    }


def test_every_module_can_be_imported_without_the_optional_packages() -> None:
    blocked = "".join(f"sys.modules[{name!r}] = None\n" for name in OPTIONAL)
    imports = "".join(f"import {name}\n" for name in all_modules() if not name.endswith("__main__"))
    modules_after(f"import sys\n{blocked}{imports}")


@pytest.mark.parametrize("name", sorted(amradio.__all__))
def test_exported_names_exist(name: str) -> None:
    assert getattr(amradio, name) is not None
    assert name in dir(amradio)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="module 'amradio' has no attribute 'lood'"):
        amradio.lood  # noqa: B018


def test_the_version_is_the_same_everywhere(root: Path) -> None:
    version = amradio.__version__
    assert f'\nversion = "{version}"\n' in (root / "pyproject.toml").read_text(encoding="utf-8")
    assert f"\nversion: {version}\n" in (root / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\n## {version}" in (root / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_package_is_marked_as_typed() -> None:
    assert (SRC / "py.typed").is_file()
    assert importlib.import_module("amradio").__doc__
