"""Time exported models beside the eager one that they were made from, in the same process and the same rounds.

    python benchmarks/export_forward.py --out benchmarks/results/export_forward_cpu.json

Contenders: amradio in eager mode; ONNX Runtime in fp32 and with int8 weights; AOTInductor, where there is a C++
compiler. Each file is made once for all sizes (E-RADIO: once for each), and compared with the model before anything is
timed. In each round every contender runs once, in turn, so that what slows the machine down slows all of them; a ratio
is the median over rounds of (eager / theirs): above 1, the exported one is faster.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import amradio
from amradio.backbones.aoti import load_aoti
from amradio.backbones.exported import ExportedBackbone
from amradio.backbones.onnx import load_onnx
from amradio.errors import MissingDependencyError
from amradio.export import Agreement, ExportOptions, compare, export_aoti, export_onnx
from amradio.models.configs import RadioConfig, ViTConfig
from amradio.models.eradio import ERADIO_VARIANTS
from amradio.models.radio import RadioModel

EAGER = "eager"
CONTENDERS = ("onnx fp32", "onnx int8", "aoti fp32")
MIN_ROUNDS = 5
PACKAGED = "amradio-tiny"
CONFIGS = {
    "vit-b": RadioConfig(  # c-radio_v3-b
        backbone=ViTConfig(
            embed_dim=768,
            depth=12,
            num_heads=12,
            mlp_hidden_dim=3072,
            position_grid=(128, 128),
            num_cls_tokens=4,
            num_registers=4,
            layer_scale=1e-5,
        ),
        summary_idxs=(0, 1, 2),
    ),
    "eradio": RadioConfig(backbone=ERADIO_VARIANTS["eradio"]),  # eradio_v2
}


@dataclass(frozen=True)
class Result:
    """What one contender did at one size.

    Attributes:
        model: A key of `CONFIGS`, or the packaged model.
        size: (height, width) of the images.
        contender: ``eager`` or one of `CONTENDERS`.
        difference: Largest difference of its features from the eager ones, over the largest value.
        cosine: Smallest cosine of its features and the eager ones.
        images_per_s: By the clock that was chosen.
        rounds: How often it ran.
        ratio: Median over rounds of eager time over its time.
        ratio_quartiles: First and third quartile of the same.
    """

    model: str
    size: tuple[int, int]
    contender: str
    difference: float
    cosine: float
    images_per_s: float
    rounds: int
    ratio: float
    ratio_quartiles: tuple[float, float]


def build(name: str) -> RadioModel:
    """The packaged model, or random weights with statistics that let every part matter."""
    if name == PACKAGED:
        return amradio.load(name).requires_grad_(False)
    torch.manual_seed(0)
    model = RadioModel(CONFIGS[name]).eval().requires_grad_(False)
    for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "gamma" in key or key.endswith(("bn.weight", "norm.weight", "running_var")):
            nn.init.uniform_(tensor, 0.5, 1.0)
        elif key.endswith("running_mean"):
            nn.init.normal_(tensor, std=0.1)
    return model


def export(model: RadioModel, contender: str, folder: Path, size: tuple[int, int] | None) -> ExportedBackbone:
    kind, precision = contender.split()
    options = ExportOptions(size=size, precision=precision)
    if kind == "onnx":
        return load_onnx(str(export_onnx(model, folder / f"{precision}.onnx", options)), providers="cpu")
    return load_aoti(str(export_aoti(model, folder / "model.pt2", options)), trust_remote_code=True)


def measure(
    name: str, model: RadioModel, files: dict[str, ExportedBackbone], size: tuple[int, int], args: argparse.Namespace
) -> list[Result]:
    images = torch.rand(args.batch, 3, *size, generator=torch.Generator().manual_seed(0))
    agreements = {contender: compare(model, file, [size]) for contender, file in files.items()}
    for contender, agreement in agreements.items():
        agreement.require(contender.split()[1], contender)
    with torch.inference_mode():
        seconds = timed_rounds({EAGER: model, **files}, images, args)
    results = []
    for contender, times in seconds.items():
        ratios = [eager / theirs for theirs, eager in zip(times, seconds[EAGER], strict=True)]
        q1, median, q3 = statistics.quantiles(ratios, n=4, method="inclusive")
        agreement = agreements.get(contender, Agreement(sizes=(), difference={}, cosine={}))
        results.append(
            Result(
                model=name,
                size=size,
                contender=contender,
                difference=agreement.difference.get("backbone features", 0.0),
                cosine=agreement.cosine.get("backbone features", 1.0),
                images_per_s=args.batch / statistics.median(times),
                rounds=len(times),
                ratio=median,
                ratio_quartiles=(q1, q3),
            )
        )
    return results


def timed_rounds(
    forwards: dict[str, Callable[[Tensor], Any]], images: Tensor, args: argparse.Namespace
) -> dict[str, list[float]]:
    """Seconds per contender and round; the order turns with every round."""
    now = {"wall": time.perf_counter, "cpu": time.process_time}[args.clock]
    for forward in forwards.values():
        forward(images)
    seconds: dict[str, list[float]] = {name: [] for name in forwards}
    names, began = list(forwards), now()
    for i in range(args.repeats):
        if i >= MIN_ROUNDS and now() - began > args.seconds:
            break
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = now()
            forwards[name](images)
            seconds[name].append(now() - start)
    return seconds


def versions() -> dict[str, str]:
    import onnx
    import onnxruntime
    import onnxscript

    found = {module.__name__: module.__version__ for module in (torch, onnx, onnxruntime, onnxscript, amradio)}
    return {"python": platform.python_version(), **found}


def markdown(report: dict[str, Any]) -> str:
    lines = [
        "# Exported models beside eager ones",
        "",
        f"- Machine: {report['machine']}, threads: {report['threads']}",
        f"- Versions: {', '.join(f'{k} {v}' for k, v in report['versions'].items())}",
        f"- Clock: {report['clock']} time; batch {report['batch']}",
        *(f"- Left out: {line}" for line in report["left_out"]),
        "",
        "| model | size | contender | images/s | eager / theirs (quartiles) | rounds | difference | smallest cosine |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in report["results"]:
        low, high = r["ratio_quartiles"]
        ratio = "1" if r["contender"] == EAGER else f"{r['ratio']:.3f} ({low:.3f}-{high:.3f})"
        lines.append(
            f"| {r['model']} | {r['size'][0]}x{r['size'][1]} | {r['contender']} | {r['images_per_s']:.3g} | {ratio} | "
            f"{r['rounds']} | {r['difference']:.1e} | {r['cosine']:.6f} |"
        )
    return "\n".join(lines) + "\n"


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor()


def save(report: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(report), encoding="utf-8")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[PACKAGED, "vit-b", "eradio"], choices=[PACKAGED, *CONFIGS])
    parser.add_argument("--sizes", nargs="+", type=int, default=[224, 384, 512], help="sides of square images")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=31, help="most rounds")
    parser.add_argument("--seconds", type=float, default=60, help="for the rounds of one size")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="cpu")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    report: dict[str, Any] = {
        "machine": f"{cpu_name()}, {platform.system()} {platform.machine()}",
        "threads": args.threads,
        "versions": versions(),
        "clock": args.clock,
        "batch": args.batch,
        "left_out": [],
        "results": [],
    }
    for name in args.models:
        model = build(name)
        sizes = [(side, side) for side in args.sizes]
        one_each = name == "eradio"
        for group in [[size] for size in sizes] if one_each else [sizes]:
            with tempfile.TemporaryDirectory() as folder:
                files: dict[str, ExportedBackbone] = {}
                for contender in args.contenders:
                    try:
                        files[contender] = export(model, contender, Path(folder), group[0] if one_each else None)
                    except MissingDependencyError as e:
                        report["left_out"].append(f"{contender}: {e}")
                for size in group:
                    results = measure(name, model, files, size, args)
                    report["results"] += [asdict(r) for r in results]
                    for r in results:
                        print(f"{name} {size[0]}: {r.contender}: {r.ratio:.3f} {r.ratio_quartiles}", flush=True)
                    if args.out:
                        save(report, args.out)


if __name__ == "__main__":
    main()
