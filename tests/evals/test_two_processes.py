"""Zero-shot, retrieval and position under gloo: two processes give the numbers of one, and share out the work."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SCRIPT = Path(__file__).parent / "two_processes.py"


def make_pictures(folder: Path, per_class: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for c in range(6):
        (folder / f"class{c}").mkdir(parents=True)
        for i in range(per_class):
            pixels = np.clip(rng.normal(rng.uniform(0, 255, 3), 30, (20, 28, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"class{c}" / f"{i}.png")
    (folder / "class0" / "broken.png").write_bytes(b"not a picture")
    (folder / "class5" / "broken.png").write_bytes(b"not a picture")


def close(a, b) -> bool:
    """Whether two results are equal but for rounding."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[k], b[k]) for k in a)
    return a == pytest.approx(b, rel=1e-4, abs=1e-6) if isinstance(a, float) else a == b


def test_two_processes_give_the_numbers_of_one(tmp_path: Path) -> None:
    make_pictures(tmp_path / "train", 3, 0)
    make_pictures(tmp_path / "eval", 2, 1)
    lines = [
        json.dumps({"path": f"eval/class{c}/{i}.png", "captions": [f"picture {i} of class{c}", f"a class{c} {i}"]})
        for c in range(6)
        for i in (0, 1, "broken")
        if i != "broken" or c == 0
    ]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(SCRIPT), str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    pictures: list[int] = []
    alone = runpy.run_path(str(SCRIPT))["measure"](tmp_path, None, lambda backbone: pictures.append(backbone.pictures))
    alone = json.loads(json.dumps(alone))
    ranks = [json.loads((tmp_path / f"rank{r}.json").read_text()) for r in range(2)]
    assert ranks[0]["result"] == ranks[1]["result"]
    for name, result in ranks[0]["result"].items():
        assert close(result, alone[name]), (name, result, alone[name])
    assert sum(r["pictures"] for r in ranks) == pictures[0]
    assert min(r["pictures"] for r in ranks) > 0.4 * pictures[0]
    assert len(alone["zero-shot"]["failures"]["eval"]) == 2
    assert len(alone["ridge"]["failures"]["train"]) == 2
