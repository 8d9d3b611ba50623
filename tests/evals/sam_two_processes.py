"""SAM-COCO by one process or several: ``torchrun sam_two_processes.py FOLDER`` writes what each of them reports."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import torch

from amradio.distributed import Group, init_group
from amradio.evals.runner import Setup
from amradio.evals.sam_coco import run_sam_coco, sam_policy
from amradio.features import ExtractOptions
from amradio.images.segmentation.objects import open_coco_instances

HERE = Path(__file__).parent


def measure(folder: Path, group: Group | None) -> dict[str, Any]:
    """What must not depend on the number of processes."""
    backbone = runpy.run_path(str(HERE / "test_sam_coco.py"))["MeanColours"]()
    decoder = runpy.run_path(str(HERE.parent / "sam" / "conftest.py"))["ColourDecoder"]()
    setup = Setup(sam_policy(backbone, decoder), ExtractOptions(batch_size=2, workers=1), group=group)
    report = run_sam_coco(backbone, decoder, open_coco_instances(folder), setup=setup)
    return {
        "metrics": {name: metric.value for name, metric in report.metrics.items()},
        "per_class": report.per_class,
        "details": report.details,
        "notes": list(report.notes),
        "failed": report.failed,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    with init_group("cpu") as own:
        assert own is not None
        found = measure(Path(sys.argv[1]), own)
        Path(sys.argv[1], f"rank{own.rank}.json").write_text(json.dumps(found))
