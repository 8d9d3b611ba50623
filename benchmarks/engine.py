"""Time the feature engine: beside the bare model, with its decoding, and with batches of mixed sizes.

    python benchmarks/engine.py photos/ --memory --out benchmarks/results/engine_cpu.json

Three questions, each answered by contenders that take turns in one run, with random weights of published geometry:

- What does the engine cost? The model on batches that lie ready, beside the engine on pictures that are decoded.
- What does decoding cost? The same pictures from their files, in full, as drafts, and with the faster resizing.
- What does it gain to fill batches of one shape from a look-ahead? Beside that, the grouping of RADIO's evaluation
  scripts: within each batch of the data loader, the pictures of each exact shape. How full batches get depends on the
  shapes alone, so that is counted for more pictures and larger batches, too.

`--memory` also measures how the peak memory of `embed` grows with the number of pictures, in processes of their own.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import platform
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import amradio
from amradio.features import EmbedOptions, ExtractOptions, StageTimer, embed, extract
from amradio.features.bucketing import batches_by_shape
from amradio.features.loader import DecodeOptions, load_picture
from amradio.images import MAX_PIXELS, WHITE, ImageSource, ResizePolicy, open_images, to_uint8_tensor
from amradio.models.configs import RadioConfig, ViTConfig
from amradio.models.output import RadioOutput

GEOMETRY = {"vit-s": (384, 6), "vit-b": (768, 12)}  # width, heads; 12 blocks
MODEL, ENGINE = "model alone", "engine"
ORIGINAL = "grouping within batches"
FILL_COUNT, FILL_BATCHES, LOOK_AHEADS = 1000, (8, 32, 128), (4, 16)
MEMORY_COUNTS = (20_000, 100_000)
SHARD_OF_TINY = 10_000


@dataclass(frozen=True)
class Result:
    """What one contender did.

    Attributes:
        question: What it is about.
        contender: What ran.
        images_per_s: Median over rounds.
        ratio: Median over rounds of its speed over the first contender's in the same round.
        ratio_quartiles: First and third quartile of the same.
        rounds: How often it ran.
        batch_fill: Mean share of a batch that was used.
        decode_ms: Thread time for one picture, to decode and resize it.
    """

    question: str
    contender: str
    images_per_s: float
    ratio: float
    ratio_quartiles: tuple[float, float]
    rounds: int
    batch_fill: float | None = None
    decode_ms: float | None = None


@dataclass(frozen=True)
class Decoded:
    """A picture that needs no decoding."""

    id: str
    image: Image.Image
    location: str = "memory"

    def decode(self, **_: Any) -> Image.Image:
        return self.image


def build(name: str, device: str) -> nn.Module:
    width, heads = GEOMETRY[name]
    torch.manual_seed(0)
    vit = ViTConfig(
        embed_dim=width, depth=12, num_heads=heads, mlp_hidden_dim=4 * width, position_grid=(128, 128),
        num_cls_tokens=4, num_registers=4,
    )  # fmt: skip
    return amradio.RadioModel(RadioConfig(backbone=vit, summary_idxs=(0, 1, 2))).eval().to(device)


def decoded(sources: Sequence[ImageSource], model: Any, policy: ResizePolicy) -> list[ImageSource]:
    """Pictures at the sizes for the model, held in memory."""
    found: list[ImageSource] = []
    for source in sources:
        image = source.decode(max_pixels=MAX_PIXELS, background=WHITE)
        size = model.get_nearest_supported_resolution(*policy.target_size(image.height, image.width))
        found.append(Decoded(source.id, policy.apply(image, size)))
    return found


def run_batches(model: Any, batches: Sequence[Tensor], device: torch.device) -> None:
    """What the engine does with a batch, and nothing else: uint8 [B, 3, H, W] to summaries on the CPU."""
    with torch.inference_mode():
        for batch in batches:
            model(batch.to(device).float().div_(255), feature_fmt="NCHW").summary.to("cpu")


def grouped_as_published(pictures: Sequence[Tensor], batch_size: int) -> list[Tensor]:
    """Within each batch of the loader, the pictures of each exact shape."""
    batches = []
    for start in range(0, len(pictures), batch_size):
        by_shape: dict[Any, list[Tensor]] = defaultdict(list)
        for picture in pictures[start : start + batch_size]:
            by_shape[picture.shape].append(picture)
        batches += [torch.stack(group) for group in by_shape.values()]
    return batches


def compare(
    question: str, contenders: dict[str, Callable[[], float | None]], count: int, rounds: int, device: str
) -> list[Result]:
    """Run all contenders in turn, starting with another one each round; each returns its batch fill."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    fill: dict[str, float | None] = {}
    names = list(contenders)
    for name in names:  # warm up: caches, allocator
        contenders[name]()
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            wait()
            start = time.perf_counter()
            fill[name] = contenders[name]()
            wait()
            seconds[name].append(time.perf_counter() - start)
    results = []
    for name, times in seconds.items():
        ratios = [first / mine for first, mine in zip(seconds[names[0]], times, strict=True)]
        q1, median, q3 = statistics.quantiles(ratios, n=4, method="inclusive")
        speed = count / statistics.median(times)
        results.append(Result(question, name, speed, median, (q1, q3), rounds, fill[name]))
        print(row(results[-1]), flush=True)
    return results


def measure(args: argparse.Namespace) -> list[Result]:
    device = torch.device(args.device)
    model = build(args.model, args.device)
    sources = list(itertools.islice(open_images(args.pictures, args.split), args.count))
    options: dict[str, Any] = {"batch_size": args.batch, "device": device, "workers": args.workers, "keep": "summary"}

    def engine(pictures: Sequence[ImageSource], policy: ResizePolicy, **more: Any) -> Callable[[], float]:
        def run() -> float:
            timer = StageTimer()
            for record in extract(pictures, model, policy, ExtractOptions(**options, **more), timer):
                assert record.ok, record.reason
            return float(timer.record(args.batch)["batch_fill"])

        return run

    def plain(batches: Sequence[Tensor]) -> Callable[[], float]:
        def run() -> float:
            run_batches(model, batches, device)
            return sum(map(len, batches)) / (len(batches) * args.batch)

        return run

    square, shortest = (ResizePolicy.parse(size, multiple=16) for size in ([args.size] * 2, [args.size]))
    of_one_size = decoded(sources, model, square)
    pixels = [to_uint8_tensor(s.image) for s in of_one_size]  # type: ignore[attr-defined]
    ready = [torch.stack(pixels[i : i + args.batch]) for i in range(0, len(pixels), args.batch)]
    contenders = {
        MODEL: plain(ready),
        ENGINE: engine(of_one_size, square),
        "engine, decoding files": engine(sources, square),
        "engine, decoding drafts": engine(sources, square, decode="draft"),
    }
    results = compare(f"{args.size} x {args.size}", contenders, len(sources), args.rounds, args.device)

    of_many_sizes = decoded(sources, model, shortest)
    mixed = [to_uint8_tensor(s.image) for s in of_many_sizes]  # type: ignore[attr-defined]
    nearest = ResizePolicy("nearest", multiple=16)
    contenders = {
        ORIGINAL: plain(grouped_as_published(mixed, args.batch)),
        **{
            f"engine, look-ahead of {n} batches": engine(of_many_sizes, nearest, look_ahead=n * args.batch)
            for n in LOOK_AHEADS
        },
    }
    question = f"shortest side {args.size}, {len({p.shape for p in mixed})} shapes"
    results += compare(question, contenders, len(sources), args.rounds, args.device)
    return results + decoding(sources, model, {"centre crop": square, "shortest side": shortest})


def decoding(sources: Sequence[ImageSource], model: Any, policies: dict[str, ResizePolicy]) -> list[Result]:
    """Time of one thread to decode and resize a picture."""
    results = []
    for question, policy in policies.items():
        base = 0.0
        for mode, resizer in itertools.product(("full", "draft"), ("pillow", "torch")):
            snap = model.get_nearest_supported_resolution
            how = DecodeOptions(policy, snap, MAX_PIXELS, WHITE, mode, resizer)  # type: ignore[arg-type]
            start = time.perf_counter()
            for i, source in enumerate(sources):
                load_picture(i, source, how)
            each = (time.perf_counter() - start) / len(sources)
            base = base or each
            ratio = base / each
            contender = f"decode {mode}, resize with {resizer}"
            results.append(
                Result(f"decoding, {question}", contender, 1 / each, ratio, (ratio, ratio), 1, decode_ms=1e3 * each)
            )
            print(row(results[-1]), flush=True)
    return results


def batch_fill(pictures: str, split: str | None, side: int) -> dict[str, Any]:
    """How full batches get with the shortest side at a size, for our grouping and the published one."""
    policy = ResizePolicy.parse([side], multiple=16)
    shapes = []
    for source in itertools.islice(open_images(pictures, split), FILL_COUNT):
        image = source.decode(max_pixels=MAX_PIXELS, background=WHITE)
        shapes.append(policy.target_size(image.height, image.width))
    rows: dict[str, dict[int, float]] = defaultdict(dict)
    for batch in FILL_BATCHES:
        published = sum(len(set(shapes[i : i + batch])) for i in range(0, len(shapes), batch))
        rows[ORIGINAL][batch] = len(shapes) / (published * batch)
        for batches in LOOK_AHEADS:
            ours = list(batches_by_shape(shapes, lambda shape: shape, batch, batches * batch))
            rows[f"engine, look-ahead of {batches} batches"][batch] = len(shapes) / (len(ours) * batch)
    return {"side": side, "pictures": len(shapes), "shapes": len(set(shapes)), "rows": rows}


# ---- memory ----


class Tiny(nn.Module):
    """A backbone that costs nothing: what grows is the engine."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 64)

    def forward(self, images: Tensor, feature_fmt: str = "NLC") -> RadioOutput:
        return RadioOutput(self.layer(images.mean((2, 3))), images)

    def get_nearest_supported_resolution(self, height: int, width: int) -> tuple[int, int]:
        return height, width


def write_tiny_pictures(folder: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    contents = []
    for _ in range(100):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(buffer, "JPEG")
        contents.append(buffer.getvalue())
    for shard in range(count // SHARD_OF_TINY):
        with tarfile.open(folder / f"tiny-{shard:04d}.tar", "w") as tar:
            for i in range(SHARD_OF_TINY):
                for ending, content in (("jpg", contents[i % 100]), ("cls", str(i % 100).encode())):
                    member = tarfile.TarInfo(f"{shard * SHARD_OF_TINY + i:08d}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def embed_tiny(folder: str, count: int) -> None:
    """In a process of its own: embed pictures and print the peak memory in MiB."""
    torch.set_num_threads(1)
    shards = [f"{folder}/tiny-{shard:04d}.tar" for shard in range(count // SHARD_OF_TINY)]
    with tempfile.TemporaryDirectory() as out:
        options = ExtractOptions(batch_size=32, workers=2, keep="summary")
        result = embed(open_images(shards), Tiny().eval(), ResizePolicy("nearest"), out, options, EmbedOptions())
    assert result["ok"] == count
    status = Path("/proc/self/status").read_text(encoding="ascii")
    peak_kib = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    print(json.dumps({"pictures": count, "peak_mib": peak_kib / 1024, "images_per_s": result["images_per_s"]}))


def measure_memory() -> list[dict[str, float]]:
    results = []
    with tempfile.TemporaryDirectory() as folder:
        write_tiny_pictures(Path(folder), max(MEMORY_COUNTS))
        for count in MEMORY_COUNTS:
            command = [sys.executable, __file__, "--child", folder, str(count)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            results.append(json.loads(done.stdout.splitlines()[-1]))
            print(results[-1], flush=True)
    return results


# ---- report ----

HEADER = (
    "| | contender | images/s | ratio (quartiles) | rounds | batch fill | decoding, ms |\n"
    "| --- | --- | ---: | ---: | ---: | ---: | ---: |"
)


def row(r: Result) -> str:
    quartiles = f" ({r.ratio_quartiles[0]:.3f}-{r.ratio_quartiles[1]:.3f})" if r.rounds > 1 else ""
    fill = "" if r.batch_fill is None else f"{r.batch_fill:.0%}"
    decode = "" if r.decode_ms is None else f"{r.decode_ms:.2f}"
    return (
        f"| {r.question} | {r.contender} | {r.images_per_s:.4g} | {r.ratio:.3f}{quartiles} | {r.rounds} | {fill} | "
        f"{decode} |"
    )


def machine(device: str) -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {
        "cpu": cpu,
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "amradio": amradio.__version__},
    }


def markdown(report: dict[str, Any]) -> str:
    m = report["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in m["versions"].items())
    lines = ["# Feature engine", "", f"- Machine: {m['gpu'] or m['cpu']}, threads: {m['threads']}; {versions}"]
    if report["results"]:
        s = report["settings"]
        lines += [
            f"- {s['model']}, {s['count']} pictures, batches of {s['batch']}, {s['workers']} decoding threads",
            "- A ratio is the speed over that of the first contender of the same block, in the same round; above 1 is "
            "faster.",
            "",
            HEADER,
            *(row(Result(**r)) for r in report["results"]),
        ]
    if report["fill"]:
        fill = report["fill"]
        lines += [
            "",
            f"Batch fill, shortest side {fill['side']}, {fill['pictures']} pictures of {fill['shapes']} shapes:",
            "",
            "| | " + " | ".join(f"batches of {n}" for n in FILL_BATCHES) + " |",
            "| --- |" + " ---: |" * len(FILL_BATCHES),
            *(
                f"| {name} | " + " | ".join(f"{v:.0%}" for v in row.values()) + " |"
                for name, row in fill["rows"].items()
            ),
        ]
    if report["memory"]:
        first, last = report["memory"][0], report["memory"][-1]
        lines += ["", "| pictures | peak memory of `embed`, MiB | images/s |", "| ---: | ---: | ---: |"]
        lines += [f"| {r['pictures']:,} | {r['peak_mib']:.1f} | {r['images_per_s']:.0f} |" for r in report["memory"]]
        lines += ["", f"Growth: {last['peak_mib'] / first['peak_mib'] - 1:.1%}."]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("pictures", nargs="?", help="any set of photos of mixed sizes")
    parser.add_argument("--split", help="its part")
    parser.add_argument("--model", choices=GEOMETRY, default="vit-s", help="what to build")
    parser.add_argument("--size", type=int, default=224, help="side in pixels")
    parser.add_argument("--count", type=int, default=96, help="pictures at most")
    parser.add_argument("--batch", type=int, default=8, help="most pictures in a batch")
    parser.add_argument("--rounds", type=int, default=5, help="how often each contender runs")
    parser.add_argument("--workers", type=int, default=1, help="decoding threads")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of the model")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to run")
    parser.add_argument("--memory", action="store_true", help="also measure memory")
    parser.add_argument("--out", type=Path, help="JSON file to write; a Markdown file is written beside it")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return embed_tiny(args.child[0], int(args.child[1]))
    if not args.memory and args.pictures is None:
        parser.error("name a set of photos, or pass --memory")
    torch.set_num_threads(args.threads)
    if args.pictures:
        print(HEADER)
    report: dict[str, Any] = {
        "machine": machine(args.device),
        "settings": {k: getattr(args, k) for k in ("model", "size", "count", "batch", "rounds", "workers", "device")},
        "results": [asdict(r) for r in measure(args)] if args.pictures else [],
        "fill": batch_fill(args.pictures, args.split, args.size) if args.pictures else None,
        "memory": measure_memory() if args.memory else [],
    }
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        args.out.with_suffix(".md").write_text(markdown(report), encoding="utf-8")
    return None


if __name__ == "__main__":
    main()
