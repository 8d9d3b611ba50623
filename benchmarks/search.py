"""Time exact search beside the matrix product that it cannot do without, FAISS, and the whole similarity matrix.

    python benchmarks/search.py --out benchmarks/results/search_cpu.json

Contenders: amradio's `top_k`; the same matrix products alone, in the same blocks, whose results are thrown away;
FAISS's flat index; and what RADIO's evaluation scripts do, which is to build the whole similarity matrix and call
``topk`` on it. All answers are compared before anything is timed. In each round every contender runs once, in turn, so
that what slows the machine down slows all of them; a ratio is the median over rounds of (theirs / ours). Peak memory is
measured in a process of its own for each.

The data are unit vectors in 1,000 clusters. Approximate indexes are timed once each, with their recall; what an index
finds depends on the data, so theirs say little about other sets. The plan for the real ImageNet is printed beside.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

import amradio
from amradio.search import Neighbours, build_index, plan_memory, recall_at_k, top_k

CLUSTERS = 1000
IMAGENET = {"num_queries": 50_000, "num_rows": 1_281_167, "dim": 1280, "k": 20}
APPROXIMATE: dict[str, dict[str, Any]] = {
    "faiss:IVF256,Flat": {"nprobe": 16, "train_rows": 20_000},
    "faiss:IVF256,PQ64": {"nprobe": 16, "train_rows": 20_000},
    "scann": {"num_leaves": 256, "num_leaves_to_search": 16},
}
MIN_ROUNDS = 3
FRESH_PAGES_FROM_BYTES = 65536

Search = Callable[[], Neighbours | None]


@dataclass(frozen=True)
class Setting:
    """What is searched.

    Attributes:
        queries: How many.
        rows: Of the database.
        dim: Features.
        k: Neighbours.
        dtype: In which features are stored; FAISS gets float32.
        threads: CPU threads.
        seed: Of the data.
    """

    queries: int
    rows: int
    dim: int
    k: int
    dtype: str
    threads: int
    seed: int = 0

    def data(self) -> tuple[Tensor, Tensor]:
        """Queries [Q, D] and database [N, D], unit vectors around common centres."""
        random = torch.Generator().manual_seed(self.seed)
        centres = normalize(torch.randn(CLUSTERS, self.dim, generator=random), dim=1)

        def around(count: int) -> Tensor:
            rows = torch.randn(count, self.dim, generator=random).mul_(self.dim**-0.5)
            rows += centres[torch.randint(CLUSTERS, (count,), generator=random)]
            return normalize(rows, dim=1).to(getattr(torch, self.dtype))

        return around(self.queries), around(self.rows)


# ---- contenders ----


def ours(s: Setting, queries: Tensor, database: Tensor) -> Search:
    return lambda: top_k(queries, database, s.k)


def products_alone(s: Setting, queries: Tensor, database: Tensor) -> Search:
    plan = plan_memory(s.queries, s.rows, s.dim, s.k)
    buffer = torch.empty(plan.query_rows * plan.database_rows)

    def run() -> None:
        asking = queries.float()
        for block in database.split(plan.database_rows):
            rows = block.float().T
            for chunk in asking.split(plan.query_rows):
                torch.mm(chunk, rows, out=buffer[: len(chunk) * len(block)].view(len(chunk), len(block)))

    return run


def whole_matrix(s: Setting, queries: Tensor, database: Tensor) -> Search:
    def run() -> Neighbours:
        similarity = queries.float() @ database.float().T  # [Q, N]
        found = similarity.topk(s.k, dim=1)
        return Neighbours(found.values, found.indices)

    return run


def faiss_flat(s: Setting, queries: Tensor, database: Tensor) -> Search:
    index = build_index(database, "faiss:Flat")  # it copies the database; that is not timed
    return lambda: index.search(queries, s.k)


OURS = "amradio"
CONTENDERS: dict[str, Callable[[Setting, Tensor, Tensor], Search]] = {
    OURS: ours,
    "matrix products alone": products_alone,
    "whole matrix, then topk": whole_matrix,
    "FAISS flat": faiss_flat,
}


# ---- measuring ----


@dataclass(frozen=True)
class Result:
    """What one contender did.

    Attributes:
        contender: A key of `CONTENDERS`.
        seconds: Median over rounds.
        ratio: Median over rounds of its time over ours; above 1, ours is faster.
        ratio_quartiles: First and third quartile of the same.
        rounds: How often it ran.
        peak_mib: Memory beside queries and database.
        same: Share of our neighbours that it has too; None where it has no result.
    """

    contender: str
    seconds: float
    ratio: float
    ratio_quartiles: tuple[float, float]
    rounds: int
    peak_mib: float
    same: float | None


def measure(s: Setting, args: argparse.Namespace) -> tuple[list[Result], list[str]]:
    """Results of all contenders that can take part, and why the others cannot."""
    queries, database = s.data()
    searches, missing = {}, []
    for name, make in CONTENDERS.items():
        try:
            searches[name] = make(s, queries, database)
        except amradio.AmradioError as e:
            missing.append(f"{name}: {e}")
    answers = {name: search() for name, search in searches.items()}
    exact = answers[OURS]
    assert exact is not None
    same = {name: None if a is None else recall_at_k(a, exact) for name, a in answers.items()}
    if min(share for share in same.values() if share is not None) < 0.9999:  # the last place may go to an equal score
        raise SystemExit(f"The contenders disagree: {same}")
    seconds = timed_rounds(searches, args)
    results = []
    for name, times in seconds.items():
        ratios = [theirs / mine for theirs, mine in zip(times, seconds[OURS], strict=True)]
        q1, median, q3 = statistics.quantiles(ratios, n=4, method="inclusive")
        peak = peak_mib(name, s)
        results.append(Result(name, statistics.median(times), median, (q1, q3), len(times), peak, same[name]))
    return results, missing


def timed_rounds(searches: dict[str, Search], args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds per contender and round; the order turns with every round."""
    now = {"wall": time.perf_counter, "cpu": time.process_time}[args.clock]
    seconds: dict[str, list[float]] = {name: [] for name in searches}
    names, began = list(searches), now()
    for i in range(args.repeats):
        if i >= MIN_ROUNDS and now() - began > args.seconds:
            break
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = now()
            searches[name]()
            seconds[name].append(now() - start)
    return seconds


def peak_mib(name: str, s: Setting) -> float:
    """Peak memory of one search, in a process of its own."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(FRESH_PAGES_FROM_BYTES)  # freed blocks go back to the system at once
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_mib, (name, s))


def _peak_mib(name: str, s: Setting) -> float:
    torch.set_num_threads(s.threads)
    queries, database = s.data()
    small = Setting(64, 4096, s.dim, s.k, s.dtype, s.threads)
    CONTENDERS[name](small, *small.data())()  # libraries initialise themselves
    before = _status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    CONTENDERS[name](s, queries, database)()  # an index's copy of the database counts
    return (_status_bytes("VmHWM") - before) / 2**20


def _status_bytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


@dataclass(frozen=True)
class Approximate:
    """What an approximate index did.

    Attributes:
        spec: As given to `build_index`.
        options: The same.
        build_seconds: Training and filling.
        search_seconds: The fastest of three searches.
        recall: At k, against exact search.
    """

    spec: str
    options: dict[str, Any]
    build_seconds: float
    search_seconds: float
    recall: float


def approximate(s: Setting, args: argparse.Namespace) -> tuple[list[Approximate], list[str]]:
    """Time and recall of indexes, and why others are left out."""
    now = {"wall": time.perf_counter, "cpu": time.process_time}[args.clock]
    queries, database = s.data()
    exact, results, missing = top_k(queries, database, s.k), [], []
    for spec, options in APPROXIMATE.items():
        start = now()
        try:
            index = build_index(database, spec, **options)
        except amradio.AmradioError as e:
            missing.append(f"{spec}: {e}")
            continue
        built, times = now() - start, []
        for _ in range(3):
            start = now()
            found = index.search(queries, s.k)
            times.append(now() - start)
        results.append(Approximate(spec, options, built, min(times), recall_at_k(found, exact)))
    return results, missing


# ---- reporting ----


def machine() -> dict[str, Any]:
    versions = {"python": platform.python_version(), "amradio": amradio.__version__}
    for name in ("torch", "numpy", "faiss-cpu", "scann"):
        if importlib.util.find_spec(name.removesuffix("-cpu")) is not None:
            versions[name] = importlib.metadata.version(name)
    info = Path("/proc/cpuinfo")
    cpu = re.search(r"^model name\s*: (.*)$", info.read_text() if info.exists() else "", re.MULTILINE)
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu[1] if cpu else platform.processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


def markdown(report: dict[str, Any]) -> str:
    m = report["machine"]
    lines = [
        "# Search",
        "",
        f"- Machine: {m['cpu']}, {m['system']}, threads: {m['threads']}, {m['cpu_capability']}",
        f"- Versions: {', '.join(f'{k} {v}' for k, v in m['versions'].items())}",
        f"- Clock: {report['clock']} time",
        "",
        "| queries x rows x features | dtype | k | contender | seconds | theirs / ours (quartiles) | rounds | "
        "peak MiB | same neighbours |",
        "| --- | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for one in report["measured"]:
        s = Setting(**one["setting"])
        case = f"{s.queries:,} x {s.rows:,} x {s.dim} | {s.dtype} | {s.k}"
        for r in one["results"]:
            quartiles = "-".join(f"{q:.2f}" for q in r["ratio_quartiles"])
            ratio = "1" if r["contender"] == OURS else f"{r['ratio']:.2f} ({quartiles})"
            same = "" if r["same"] is None else f"{r['same']:.5%}"
            lines.append(
                f"| {case} | {r['contender']} | {r['seconds']:.2f} | {ratio} | {r['rounds']} | {r['peak_mib']:,.0f} "
                f"| {same} |"
            )
    lines += ["", "Approximate indexes, on the first of these:", ""]
    lines += ["| index | options | build s | search s | recall |", "| --- | --- | ---: | ---: | ---: |"]
    for a in report["approximate"]:
        options = ", ".join(f"{k}={v}" for k, v in a["options"].items())
        lines.append(
            f"| {a['spec']} | {options} | {a['build_seconds']:.1f} | {a['search_seconds']:.2f} | {a['recall']:.3f} |"
        )
    lines += ["", "The plan for ImageNet-1k on a CPU:", "", "```text", report["imagenet"], "```", ""]
    if report["left_out"]:
        lines += ["Left out:", "", *(f"- {line}" for line in report["left_out"]), ""]
    return "\n".join(lines)


# ---- command line ----


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--queries", type=int, default=2000, help="queries")
    parser.add_argument("--rows", type=int, default=50_000, help="rows of the database")
    parser.add_argument("--dims", type=int, nargs="+", default=[512, 1280], help="features")
    parser.add_argument("--k", type=int, default=20, help="neighbours")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of storage")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: this process's own time, for a shared machine"
    )
    parser.add_argument("--repeats", type=int, default=9, help="rounds at most")
    parser.add_argument("--seconds", type=float, default=30, help=f"no more rounds after this, but {MIN_ROUNDS}")
    parser.add_argument("--approximate", action=argparse.BooleanOptionalAction, default=True, help="also indexes")
    parser.add_argument("--out", type=Path, help="JSON file; a Markdown file is written beside it")
    args = parser.parse_args()
    if not Path("/proc/self/clear_refs").exists():
        parser.error("peak memory is measured on Linux only")
    return args


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    report: dict[str, Any] = {
        "machine": machine(),
        "clock": args.clock,
        "imagenet": plan_memory(**IMAGENET).describe(),
        "measured": [],
        "approximate": [],
        "left_out": [],
    }
    settings = [Setting(args.queries, args.rows, dim, args.k, args.dtype, args.threads) for dim in args.dims]
    for s in settings:
        results, missing = measure(s, args)
        report["measured"].append({"setting": asdict(s), "results": [asdict(r) for r in results]})
        report["left_out"] += [line for line in missing if line not in report["left_out"]]
    if args.approximate:
        found, missing = approximate(settings[0], args)
        report["approximate"] = [asdict(a) for a in found]
        report["left_out"] += missing
    print(markdown(report))
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        args.out.with_suffix(".md").write_text(markdown(report), encoding="utf-8")


if __name__ == "__main__":
    main()
