"""Real processes, joined by gloo, are one."""

import hashlib
import random
import signal
import time

import pytest
import torch

pytestmark = pytest.mark.slow

SIZES = [(8, 8), (8, 12), (12, 8), (16, 8)] * 12


def contents(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_two_processes_are_one(labelled, program, tmp_path):
    images = labelled(SIZES, broken={0, 17, 35})
    program("both", images.name, tmp_path / "one")
    program("both", images.name, tmp_path / "two", processes=2)
    assert len(contents(tmp_path / "one" / "embeddings")) == 13
    assert contents(tmp_path / "two" / "embeddings") == contents(tmp_path / "one" / "embeddings")

    whole, own, small = torch.load(tmp_path / "one" / "tables" / "0.pt")
    positions, labels, summaries, failures, _ = whole
    assert len(positions) == 45
    assert torch.equal(own[0], positions)
    parts = [torch.load(tmp_path / "two" / "tables" / f"{rank}.pt") for rank in range(2)]
    for gathered, _, _ in parts:
        assert torch.equal(gathered[0], positions)
        assert torch.equal(gathered[1], labels)
        assert torch.equal(gathered[2]["backbone"], summaries["backbone"])
        assert gathered[3] == failures
    assert parts[0][0][4]["wall_s"] == parts[1][0][4]["wall_s"]

    owns = [part[1] for part in parts]
    together = torch.cat([o[0] for o in owns])
    assert together.sort().values.tolist() == positions.tolist()
    rows = torch.cat([o[2]["backbone"] for o in owns])[together.argsort()]
    assert torch.equal(rows, summaries["backbone"])
    assert sorted(owns[0][3] + owns[1][3]) == failures

    assert torch.equal(parts[0][2][2]["backbone"], small[2]["backbone"])
    assert parts[1][2][2]["backbone"].shape == (0, 5)  # there was nothing left for this process to do


def test_a_process_that_breaks_down_ends_all_of_them(labelled, program, tmp_path):
    images = labelled(SIZES)
    start = time.monotonic()
    assert program("embed", images.name, tmp_path / "out", "fail", processes=2, check=False) != 0
    assert time.monotonic() - start < 60
    program("embed", images.name, tmp_path / "out")
    program("embed", images.name, tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_killed_at_any_moment(labelled, start, program, tmp_path):
    """Killed without warning again and again, then completed: the same bytes as if nothing had happened."""
    images, out = labelled(SIZES * 4, broken={5}), tmp_path / "out"
    program("embed", images.name, tmp_path / "whole")
    rng = random.Random(0)
    for _ in range(5):
        before = len(list(out.glob("*.parquet"))) if out.exists() else 0
        with start("embed", images.name, out, SECONDS_A_BATCH="0.05") as process:
            while process.poll() is None and len(list(out.glob("*.parquet")) if out.exists() else ()) <= before:
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.2))
            assert process.poll() is None
            process.send_signal(signal.SIGKILL)
    program("embed", images.name, out)
    assert contents(out) == contents(tmp_path / "whole")
