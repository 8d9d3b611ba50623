import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from amradio.search import plan_memory, top_k

PROGRAM = Path(__file__).with_name("two_processes.py")
CASES = [
    ("defaults", 9, {}),
    ("more than a part has", 70, {}),
    ("little memory", 9, {"memory_limit_bytes": 4 * 2**20}),
    ("bfloat16", 9, {"dtype": torch.bfloat16}),
]


def manhattan(queries, rows):
    return -(queries[:, None] - rows[None]).abs().sum(2)  # [q, d]


@pytest.fixture(scope="module", params=["continuous", "ties"])
def searched(request, tmp_path_factory):
    """Queries, database, and what each of two processes found."""
    folder = tmp_path_factory.mktemp(request.param)
    random = torch.Generator().manual_seed(0)
    queries, database = torch.randn(301, 24, generator=random), torch.randn(2000, 24, generator=random)
    if request.param == "ties":
        queries, database = queries.round()[:, :4], database.round()[:, :4]
    inputs = {
        "queries": queries,
        "database": database,
        "query_bounds": [(0, 200), (200, 301)],
        "row_bounds": [(0, 60), (60, 2000)],  # the first holds fewer rows than some k
        "cases": CASES,
    }
    torch.save(inputs, folder / "inputs.pt")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, *launcher, str(PROGRAM), str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return queries, database, [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize(("name", "k", "options"), CASES, ids=[name for name, _, _ in CASES])
def test_two_processes_find_what_one_finds(searched, name, k, options):
    queries, database, found = searched
    alone = top_k(queries, database, k, **options)
    for i, part in enumerate(alone):
        assert torch.equal(torch.cat([found[rank][name][i] for rank in range(2)]), part)


def test_so_they_do_with_a_similarity(searched):
    queries, database, found = searched
    alone = top_k(queries, database, 9, similarity=manhattan)
    assert torch.equal(torch.cat([part["similarity"][1] for part in found]), alone.indices)


@pytest.mark.parametrize("name", ["shared", "index"])
def test_shared_queries_are_answered_everywhere(searched, name):
    queries, database, found = searched
    alone = top_k(queries, database, 9)
    for part in found:
        assert torch.equal(part[name][0], alone.scores)
        assert torch.equal(part[name][1], alone.indices)


def test_every_process_raises_what_one_found(searched):
    found = searched[2]
    assert found[0]["errors"] == found[1]["errors"]
    bad_rows, bad_queries, k, options, dim, shared, overlap, offsets = found[0]["errors"]
    assert bad_rows.startswith("Process 1: Row 1939 of the database holds nan")
    assert bad_queries.startswith("Process 1: Row 2 of the queries holds nan")
    assert k == "k must be from 1 to 2000, the number of rows in the database; got 2001."
    assert options.startswith("Processes 0 and 1 search with different options")
    assert dim.startswith("Process 1: Queries have 3 features")
    assert shared.startswith(
        "With shared_queries every process passes the same queries; the processes passed [200, 100]"
    )
    assert overlap == "Parts of the database overlap: one ends before row 70, another begins at 10."
    assert offsets == "Either every process gives an offset or none does."


def test_a_plan_counts_what_processes_exchange():
    alone = plan_memory(50_000, 100_000, 64, 20)
    several = plan_memory(50_000, 100_000, 64, 20, world_size=8)
    assert several.parts["exchange"] > 8 * 8 * several.pass_rows * 20 * 12
    assert several.total_bytes <= several.limit_bytes
    assert several.pass_rows < alone.pass_rows
    tight = plan_memory(10_000, 100_000, 64, 20, world_size=8, memory_limit_bytes=64 * 2**20)
    assert tight.total_bytes <= 64 * 2**20
