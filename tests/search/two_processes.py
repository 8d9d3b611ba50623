"""Searches that one process and several must agree on: ``torchrun two_processes.py FOLDER`` writes what each finds.

FOLDER holds ``inputs.pt``: queries and database, and for each rank its bounds in both. Each rank writes ``RANK.pt``.
"""

import sys
from pathlib import Path

import torch

from amradio.distributed import init_group
from amradio.errors import OptionError
from amradio.search import build_index, top_k


def main(folder):
    inputs = torch.load(folder / "inputs.pt")
    with init_group("cpu") as group:
        q0, q1 = inputs["query_bounds"][group.rank]
        d0, d1 = inputs["row_bounds"][group.rank]
        queries, rows = inputs["queries"][q0:q1], inputs["database"][d0:d1]
        found = {}
        for name, k, options in inputs["cases"]:
            found[name] = tuple(top_k(queries, rows, k, group=group, **options))
        found["similarity"] = tuple(top_k(queries, rows, 9, group=group, similarity=manhattan))
        shared = {"group": group, "shared_queries": True}
        found["shared"] = tuple(top_k(inputs["queries"], rows, 9, **shared))
        found["index"] = tuple(build_index(rows, "exact", **shared).search(inputs["queries"], 9))
        found["errors"] = [refused(call) for call in wrong_calls(queries, rows, inputs, group)]
    torch.save(found, folder / f"{group.rank}.pt")


def manhattan(queries, rows):
    return -(queries[:, None] - rows[None]).abs().sum(2)  # [q, d]


def wrong_calls(queries, rows, inputs, group):
    """Each is wrong in one process only, or in the way the processes fit together."""
    last = group.rank == group.world_size - 1
    bad_rows, bad_queries = rows.clone(), queries.clone()
    if last:
        bad_rows[len(rows) - 1, 0] = float("nan")
        bad_queries[2, 1] = float("nan")
    total = len(inputs["database"])
    return [
        lambda: top_k(queries, bad_rows, 5, group=group),
        lambda: top_k(bad_queries, rows, 5, group=group),
        lambda: top_k(queries, rows, total + 1, group=group),
        lambda: top_k(queries, rows, 5 + group.rank, group=group),
        lambda: top_k(queries[:, : 3 if last else None], rows, 5, group=group),
        lambda: top_k(queries[: len(queries) - group.rank], rows, 5, group=group, shared_queries=True),
        lambda: top_k(queries, rows, 5, group=group, offset=10),
        lambda: top_k(queries, rows, 5, group=group, offset=0 if last else None),
    ]


def refused(call):
    try:
        call()
    except OptionError as e:
        return str(e)
    return "nothing was refused"


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
