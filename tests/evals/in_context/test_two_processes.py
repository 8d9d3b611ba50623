"""Under gloo two processes give what one gives, and share out the work."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent / "two_processes.py"


def test_two_processes_give_what_one_gives(make_set: Any, masks: Any, tmp_path: Path) -> None:
    make_set("train", masks(7, 1), 1)
    make_set("val", masks(5, 2), 2)
    (tmp_path / "train" / "images" / "p04.png").write_bytes(b"no picture")
    (tmp_path / "val" / "masks" / "p01.png").write_bytes(b"no mask")
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(SCRIPT), str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    alone = json.loads(json.dumps(runpy.run_path(str(SCRIPT))["measure"](tmp_path, None)))
    ranks = [json.loads((tmp_path / f"rank{r}.json").read_text()) for r in range(2)]
    for name in ("clean", "hbird-2.0", "fungi-paper"):
        features = [run[name].pop("features") for run in (alone, *ranks)]
        assert features[1:] == pytest.approx([features[0]] * 2)
        assert ranks[0][name] == ranks[1][name] == alone[name]
        parts = [rank[f"{name} parts"] for rank in ranks]
        whole = alone[f"{name} parts"]
        assert sum(p["pictures"] for p in parts) == whole["pictures"] == 2 * 6 + 4
        assert min(p["pictures"] for p in parts) >= 6
        assert sorted(parts[0]["sheets"] + parts[1]["sheets"]) == sorted(whole["sheets"])
    assert {Path(f["path"]).name for f in alone["clean"]["failures"][0]["train"]} == {"p04.png"}
