"""How fast the training loop is beside what it cannot do without: student and teachers forward and backward alone.

    python benchmarks/distill_throughput.py --out benchmarks/results/distill_throughput_cpu.json

Both take turns in one run, some steps each: `amradio.distill.distill` as a user calls it, and bare forward and backward
passes of the same teachers and of an equal student on batches that lie ready. The loop reads pictures whose files are
plain pixels, so that decoding counts for nothing; cutting, resizing, losses, statistics of targets, the optimiser,
moving averages, checks and the log are its own cost. Teachers and student have random weights of published geometry.
On a shared machine read the processor time, in which the loading threads count in full; on a GPU read the wall time.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import amradio
from amradio.distill import DistillConfig, Progress, distill, parse_config
from amradio.distill.building import build_machine
from amradio.distill.student import Widths, radio_config
from amradio.distill.teachers import load_teachers
from amradio.models.configs import RadioConfig, ViTConfig

GEOMETRY = {"vit-ti": (192, 3), "vit-s": (384, 6), "vit-b": (768, 12), "vit-l": (1024, 16)}  # width, heads
DEPTH = {"vit-l": 24}
WARM_UP = 2  # steps before the first round
WANTED = 0.85


def geometry(name: str, **more: Any) -> dict[str, Any]:
    width, heads = GEOMETRY[name]
    return {"embed_dim": width, "depth": DEPTH.get(name, 12), "num_heads": heads, "mlp_hidden_dim": 4 * width, **more}


def teacher(name: str, seed: int) -> amradio.RadioModel:
    torch.manual_seed(seed)
    vit = ViTConfig(**geometry(name), position_grid=(64, 64), num_registers=4)
    return amradio.RadioModel(RadioConfig(backbone=vit)).eval()


def write_pictures(folder: Path, count: int, side: int) -> None:
    """Smooth pictures a little larger than training needs, as plain pixels."""
    generator = np.random.default_rng(0)
    for i in range(count):
        small = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        small.resize((side * 4 // 3, side), Image.Resampling.BICUBIC).save(folder / f"{i:05d}.bmp")


def configuration(args: argparse.Namespace, pictures: Path) -> DistillConfig:
    steps = WARM_UP + args.rounds * args.steps
    return parse_config(
        {
            "name": "throughput",
            "data": {"sources": [{"path": str(pictures)}], "workers": args.workers},
            "student": {
                "model": {"backbone": geometry(args.student, position_grid=[64, 64], num_registers=4)},
                "ema": 0.999,
            },
            "teachers": [{"name": f"{name}-{i}", "backbone": name} for i, name in enumerate(args.teachers)],
            "partitions": [{"sizes": [args.size], "batch_size": args.batch}],
            "schedule": {"steps": steps, "warmup": 1},
            "run": {"statistics": max(64, args.batch), "log_steps": 1, "precision": args.precision,
                    "tensorboard": False, "checkpoint_minutes": 1e6},
        }
    )  # fmt: skip


class Alone:
    """Forward and backward passes on a batch that lies ready."""

    def __init__(self, config: DistillConfig, models: dict[str, Any], device: torch.device) -> None:
        self.teachers = load_teachers(config.teachers, device, models)
        widths = {n: Widths(t.summary_dim, t.feature_dim) for n, t in self.teachers.items()}
        machine, _ = build_machine(config, radio_config(config, widths), widths, self.teachers, device, None)
        self.student, self.device, self.low = machine.student, device, config.run.precision == "bfloat16"
        partition = config.partitions[0]
        side = partition.sizes[0]
        self.batch = torch.randint(0, 256, (partition.batch_size, 3, side, side), dtype=torch.uint8)
        self.batch = self.batch.pin_memory() if device.type == "cuda" else self.batch

    def __call__(self, steps: int) -> None:
        for _ in range(steps):
            images = self.batch.to(self.device, non_blocking=True).float() / 255
            with torch.inference_mode():
                for t in self.teachers.values():
                    t.backbone(images, feature_fmt="NCHW")
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.low):
                said = self.student(images, tuple(self.teachers))
            total = torch.stack([p.summary.float().mean() + p.features.float().mean() for p in said.values()]).sum()
            total.backward()
            self.student.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class Turns:
    """Lets the loop and the bare passes take turns: it is called after each step of the loop."""

    def __init__(self, alone: Callable[[int], None], steps: int) -> None:
        self.alone, self.steps = alone, steps
        self.rounds: list[dict[str, float]] = []
        self.stages: list[dict[str, float]] = []
        self._since: tuple[float, float] | None = None

    def __call__(self, progress: Progress) -> None:
        if progress.step < WARM_UP or (progress.step - WARM_UP) % self.steps:
            own = {k: v for k, v in progress.numbers.items() if k.startswith("seconds/")}
            self.stages.append({name.removeprefix("seconds/"): seconds for name, seconds in own.items()})
            return
        now = self._now()
        if self._since is not None:
            self.rounds.append({"loop_wall_s": now[0] - self._since[0], "loop_cpu_s": now[1] - self._since[1]})
        start = self._now()
        self.alone(self.steps)
        end = self._now()
        if self.rounds:
            self.rounds[-1] |= {"alone_wall_s": end[0] - start[0], "alone_cpu_s": end[1] - start[1]}
        self._since = self._now()

    @staticmethod
    def _now() -> tuple[float, float]:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()


def summary(rounds: list[dict[str, float]], clock: str) -> dict[str, float]:
    ratios = [r[f"alone_{clock}_s"] / r[f"loop_{clock}_s"] for r in rounds]
    low, _, high = statistics.quantiles(ratios, n=4)
    return {"share": statistics.median(ratios), "low": low, "high": high}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(args.device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "pictures").mkdir()
        write_pictures(folder / "pictures", 4 * args.batch, args.size * 5 // 4)
        config = configuration(args, folder / "pictures")
        models = {t.name: teacher(t.backbone, i) for i, t in enumerate(config.teachers)}
        turns = Turns(Alone(config, models, device), args.steps)
        distill(config, folder / "run", device=device, backbones=models, on_progress=turns)
    images = args.batch * args.steps
    return {
        "wall": summary(turns.rounds, "wall"),
        "cpu": summary(turns.rounds, "cpu"),
        "loop_images_per_s": statistics.median(images / r["loop_wall_s"] for r in turns.rounds),
        "alone_images_per_s": statistics.median(images / r["alone_wall_s"] for r in turns.rounds),
        "stages_s_per_step": {name: statistics.median(s[name] for s in turns.stages) for name in turns.stages[0]},
        "rounds": turns.rounds,
    }


def machine(device: str) -> dict[str, Any]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {
        "cpu": cpu,
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "amradio": amradio.__version__},
    }


def markdown(report: dict[str, Any]) -> str:
    m, s, r = report["machine"], report["settings"], report["result"]
    versions = ", ".join(f"{k} {v}" for k, v in m["versions"].items())
    shares = "".join(
        f"| {title} | {r[clock]['share']:.1%} | {r[clock]['low']:.1%} to {r[clock]['high']:.1%} |\n"
        for clock, title in (("wall", "wall time"), ("cpu", "processor time"))
    )
    stages = ", ".join(f"{name} {1000 * seconds:.1f}" for name, seconds in r["stages_s_per_step"].items())
    return (
        "# Throughput of the training loop\n\n"
        f"- Machine: {m['gpu'] or m['cpu']}, threads: {m['threads']}; {versions}\n"
        f"- Student {s['student']}, teachers {', '.join(s['teachers'])}, {s['size']} px, batches of {s['batch']}, "
        f"{s['precision']}, {s['workers']} loading threads\n"
        f"- {s['rounds']} rounds of {s['steps']} steps of the loop and {s['steps']} steps of bare passes; wanted: "
        f"{WANTED:.0%}\n\n"
        "| speed of the loop over that of the bare passes | median | quartiles |\n|---|---|---|\n"
        f"{shares}\n"
        f"{r['loop_images_per_s']:.1f} images/s in the loop, {r['alone_images_per_s']:.1f} alone. Of a step of "
        f"the loop, in ms: {stages}.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--student", choices=GEOMETRY, default="vit-ti", help="what is trained")
    parser.add_argument("--teachers", nargs="+", choices=GEOMETRY, default=["vit-s", "vit-s"], help="what teaches")
    parser.add_argument("--size", type=int, default=128, help="side in pixels")
    parser.add_argument("--batch", type=int, default=8, help="pictures in a step")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32", help="of the student")
    parser.add_argument("--steps", type=int, default=8, help="steps of a turn")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each")
    parser.add_argument("--workers", type=int, default=1, help="loading threads")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of the models")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to run")
    parser.add_argument("--out", type=Path, help="JSON file to write; a Markdown file is written beside it")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    names = ("student", "teachers", "size", "batch", "precision", "steps", "rounds", "workers", "device")
    report = {
        "machine": machine(args.device),
        "settings": {name: getattr(args, name) for name in names},
        "result": measure(args),
    }
    print(markdown(report))
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        args.out.with_suffix(".md").write_text(markdown(report), encoding="utf-8")


if __name__ == "__main__":
    main()
