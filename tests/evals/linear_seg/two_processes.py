"""Probes that one process and several must agree on: ``torchrun two_processes.py FOLDER`` writes what it measures."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch

from amradio.distributed import Group, init_group
from amradio.evals.linear_seg import PROTOCOLS, Augmentation, LinearSegConfig, linear_seg_policy, run_linear_seg
from amradio.evals.linear_seg.config import LinearSegProtocol
from amradio.evals.runner import Setup
from amradio.features import ExtractOptions
from amradio.images.segmentation import open_segmentation

SCHEDULES = {
    "ridge": PROTOCOLS["ridge"],
    "clean": LinearSegProtocol(name="clean", iterations=30, batch_size=3, warmup=3),
    "crops": LinearSegProtocol(
        name="crops",
        augmentation=Augmentation(),
        iterations=6,
        batch_size=3,
        warmup=2,
        inference="slide",
        snapped=False,
    ),
}


def measure(folder: Path, group: Group | None) -> dict[str, Any]:
    """Everything that is compared, by protocol."""
    spec = importlib.util.spec_from_file_location("parts", Path(__file__).with_name("conftest.py"))
    assert spec is not None
    assert spec.loader is not None
    parts = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(parts)
    backbone = parts.ColourBackbone()
    train, val = open_segmentation(folder / "train"), open_segmentation(folder / "val")
    found: dict[str, Any] = {}

    def kept(name: str) -> dict[str, Any]:
        return {} if SCHEDULES[name].solver == "ridge" else {"checkpoint": folder / f"{name}-{group is None}.state"}

    for name, protocol in SCHEDULES.items():
        setup = Setup(linear_seg_policy(backbone, [16]), ExtractOptions(batch_size=2, workers=2), group=group)
        report = run_linear_seg(backbone, train, val, LinearSegConfig(protocol=protocol), setup, **kept(name))
        found[name] = {
            "metrics": {key: metric.value for key, metric in report.metrics.items()},
            "loss": report.details.get("loss", []),
            "failed": report.failed,
        }
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    with init_group("cpu") as own:
        assert own is not None
        result = measure(Path(sys.argv[1]), own)
        (Path(sys.argv[1]) / f"rank{own.rank}.json").write_text(json.dumps(result))
