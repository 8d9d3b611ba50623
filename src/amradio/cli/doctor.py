"""``amradio doctor``."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amradio import __version__
from amradio.cli.text import size_of

_REQUIRED = ("torch", "numpy", "PIL", "safetensors", "huggingface_hub", "tqdm", "tyro", "pyarrow")
_OPTIONAL = {"transformers": "hf", "open_clip": "text", "timm": "timm", "torchvision": "timm"}
_DISTRIBUTIONS = {"PIL": "pillow", "open_clip": "open-clip-torch", "huggingface_hub": "huggingface-hub"}
_VARIABLES = (
    "AMRADIO_CACHE",
    "AMRADIO_OFFLINE",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "HF_ENDPOINT",
    "HTTPS_PROXY",
    "CUDA_VISIBLE_DEVICES",
)


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Check the installation: packages, devices, cache, environment."""

    json: bool = False
    """Print one JSON object."""

    def run(self) -> int:
        """Print the findings; returns 1 if something required is broken."""
        findings = examine()
        if self.json:
            print(json.dumps(findings, indent=2))
        else:
            _print(findings)
        return 1 if findings["problems"] else 0


def examine() -> dict[str, Any]:
    """Look at the installation.

    Returns:
        A JSON object; ``problems`` is empty if all is well.
    """
    required = {name: _state(name) for name in _REQUIRED}
    optional = {name: _state(name) for name in _OPTIONAL}
    problems = [f"{name}: {state}" for name, state in required.items() if not state[0].isdigit()]
    for name, state in optional.items():
        if state.startswith("broken"):
            problems.append(f"{name}: {state}. Extra [{_OPTIONAL[name]}]; uninstall it if you do not need it.")
    return {
        "amradio": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": required,
        "optional": optional,
        "devices": _devices() if required["torch"][0].isdigit() else [],
        "cache": _cache(),
        "environment": {k: _shown(k) for k in _VARIABLES if k in os.environ},
        "problems": problems,
    }


def _state(name: str) -> str:
    """A package's version, or what is wrong with it."""
    try:
        version = importlib.metadata.version(_DISTRIBUTIONS.get(name, name))
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
    try:
        importlib.import_module(name)
    except Exception as e:
        return f"broken ({version}): {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
    return version


def _devices() -> list[dict[str, Any]]:
    import torch

    found: list[dict[str, Any]] = [{"device": "cpu", "threads": torch.get_num_threads()}]
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        properties = torch.cuda.get_device_properties(i)
        found.append(
            {
                "device": f"cuda:{i}",
                "name": properties.name,
                "memory": size_of(properties.total_memory),
                "compute capability": f"{major}.{minor}",
                "bfloat16": major >= 8,
            }
        )
    if torch.backends.mps.is_available():
        found.append({"device": "mps"})
    return found


def _cache() -> dict[str, str]:
    from amradio.hub import cache_root

    path = Path(cache_root())
    existing = next(p for p in (path, *path.parents) if p.exists())
    return {"path": str(path), "free": size_of(shutil.disk_usage(existing).free)}


def _shown(variable: str) -> str:
    """A variable's value, without the credentials that a proxy URL may carry."""
    value = os.environ[variable]
    return "set (not shown)" if "@" in value else value


def _print(findings: dict[str, Any]) -> None:
    print(f"amradio {findings['amradio']}, Python {findings['python']}, {findings['platform']}")
    for title in ("packages", "optional", "environment", "cache"):
        print(f"\n{title}")
        for name, state in findings[title].items():
            print(f"  {name}: {state}")
    print("\ndevices")
    for device in findings["devices"]:
        print("  " + ", ".join(f"{v}" if k == "device" else f"{k} {v}" for k, v in device.items()))
    print("\n" + ("\n".join(f"PROBLEM {p}" for p in findings["problems"]) or "everything required works"))
    sys.stdout.flush()
