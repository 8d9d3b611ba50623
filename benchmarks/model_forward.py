"""Time amradio's forward pass beside every other implementation of RADIO, with the same weights, in the same run.

    python benchmarks/model_forward.py --official ~/RADIO --out benchmarks/results/model_forward_cpu.json

Contenders: amradio; the official code, from a checkout that you make yourself (it is not ours to distribute); timm and
`transformers`, where they are installed. What is missing is said and left out. All load one set of random weights of
published geometry, and their outputs are compared before anything is timed. In each round every contender runs once, in
turn, so that what slows the machine down slows all of them; a ratio is the median over rounds of (theirs / ours).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import re
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import amradio
from amradio.models.configs import RadioConfig, ViTConfig
from amradio.models.eradio import ERADIO_VARIANTS

CONFIGS = {
    "vit-b": RadioConfig(  # c-radio_v3-b, with layer scale; radio_v2.5-b is the same without
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
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}  # largest difference from ours, over the largest value
CHANGING_SIZES = [
    *[(128, 128), (128, 192), (224, 160), (160, 224), (192, 192), (224, 224)],
    *[(128, 256), (256, 128), (256, 256), (192, 320), (320, 192), (288, 224)],
]
SMALL_WINDOW = 2  # in patches; every one of these sizes is a multiple of it
FRESH_PAGES_FROM_BYTES = 65536
MIN_ROUNDS = 5

Forward = Callable[[Tensor], tuple[Tensor | None, Tensor]]  # images [B, 3, H, W] -> summary or None, features [B, L, D]


class MissingError(Exception):
    """A contender cannot take part; the text says why."""


# ---- contenders ----


@dataclass(frozen=True)
class Setting:
    """One thing to measure.

    Attributes:
        model: A key of `CONFIGS`.
        dtype: A key of `DTYPES`.
        window: ViTDet window in patches, 0 for none.
        sizes: The (height, width) of the images of one round.
        batch: Images of each size.
        device: ``cpu`` or ``cuda``.
    """

    model: str
    dtype: str
    window: int
    sizes: tuple[tuple[int, int], ...]
    batch: int
    device: str

    @property
    def label(self) -> str:
        h, w = self.sizes[0]
        return f"{h}x{w}" if len(self.sizes) == 1 else f"{len(self.sizes)} sizes"

    def images(self) -> list[Tensor]:
        random = torch.Generator().manual_seed(0)
        return [torch.rand(self.batch, 3, *size, generator=random).to(self.device) for size in self.sizes]


@dataclass(frozen=True)
class Files:
    """Where the weights of one model in one dtype lie, in every layout that can hold them."""

    folder: Path
    official_code: Path | None

    @property
    def native(self) -> Path:
        return self.folder / "model.safetensors"

    @property
    def official(self) -> Path:
        return self.folder / "model.pth.tar"

    @property
    def timm(self) -> Path:
        return self.folder / "timm.safetensors"

    @property
    def transformers(self) -> Path:
        return self.folder / "transformers"


def write_weights(name: str, dtype: str, files: Files) -> None:
    """Random weights with statistics that let every part of the network matter to the output."""
    torch.manual_seed(0)
    model = amradio.RadioModel(CONFIGS[name]).eval()
    for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "gamma" in key or key.endswith(("bn.weight", "norm.weight", "running_var")):
            nn.init.uniform_(tensor, 0.5, 1.0)
        elif key.endswith("running_mean"):
            nn.init.normal_(tensor, std=0.1)
    model.to(DTYPES[dtype])
    amradio.save(model, files.native)
    amradio.save(model, files.official, layout="official")
    if isinstance(model.config.backbone, ViTConfig):
        amradio.save(model, files.timm, layout="timm", backbone_only=True)
        amradio.save(model, files.transformers, layout="transformers", backbone_only=True)


def load_amradio(files: Files, s: Setting, **options: Any) -> Forward:
    return amradio.load(files.native, vitdet_window_size=s.window or None, device=s.device, **options)  # type: ignore[return-value]


def load_amradio_aligned(files: Files, s: Setting) -> Forward:
    """The reference for timm, which resizes the positions of this geometry as was done before July 2025."""
    return load_amradio(files, s, position_interpolation="align_corners")


def load_official(files: Files, s: Setting) -> Forward:
    if files.official_code is None:
        raise MissingError("no --official checkout given")
    if importlib.util.find_spec("timm") is None:
        raise MissingError("the official code needs timm")
    path = str(files.official_code)
    if path not in sys.path:
        sys.path.insert(0, path)
    spec = importlib.util.spec_from_file_location("official_hubconf", files.official_code / "hubconf.py")
    assert spec is not None
    assert spec.loader is not None
    hub = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hub)
    return hub.radio_model(str(files.official), vitdet_window_size=s.window or None).eval().to(s.device)  # type: ignore[no-any-return]


def load_timm(files: Files, s: Setting, name: str = "vit_base_patch16_radio_v3", **options: Any) -> Forward:
    require_plain_vit(s, "timm")
    import timm

    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(files.timm)}, **options)
    model = model.to(s.device, DTYPES[s.dtype]).eval()
    condition = amradio.load(files.native, device=s.device).make_preprocessor_external()  # timm leaves this to the user

    def forward(images: Tensor) -> tuple[None, Tensor]:
        tokens = model.forward_features(condition(images))
        patches = tokens["patches"] if isinstance(tokens, dict) else tokens[:, model.num_prefix_tokens :]
        return None, patches

    return forward


def load_timm_classic(files: Files, s: Setting) -> Forward:
    if len(s.sizes) > 1:
        raise MissingError("timm's vit_* classes fix the image size at load")
    return load_timm(files, s, img_size=s.sizes[0])


def load_timm_naflex(files: Files, s: Setting) -> Forward:
    return load_timm(files, s, name="naflexvit_base_patch16_radio_v3")


def load_transformers(files: Files, s: Setting) -> Forward:
    require_plain_vit(s, "transformers")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.RadioModel.from_pretrained(files.transformers, dtype=DTYPES[s.dtype]).eval().to(s.device)

    def forward(images: Tensor) -> tuple[Tensor, Tensor]:
        # It conditions in the dtype of what it is given; its own documentation casts the images.
        out = model(images.to(DTYPES[s.dtype]))
        return out.summary, out.features

    return forward


def require_plain_vit(s: Setting, library: str) -> None:
    if s.model == "eradio":
        raise MissingError(f"{library} has no E-RADIO")
    if s.window:
        raise MissingError(f"{library} has no ViTDet windows")
    if importlib.util.find_spec(library) is None:
        raise MissingError(f"{library} is not installed")


OURS = "amradio"
CONTENDERS: dict[str, Callable[[Files, Setting], Forward]] = {
    OURS: load_amradio,
    "official": load_official,
    "timm vit": load_timm_classic,
    "timm naflexvit": load_timm_naflex,
    "transformers": load_transformers,
}
REFERENCES = {"timm vit": load_amradio_aligned, "timm naflexvit": load_amradio_aligned}


# ---- measuring ----


@dataclass(frozen=True)
class Result:
    """What one contender did in one setting.

    Attributes:
        contender: A key of `CONTENDERS`.
        difference: Largest difference of its features from ours, over the largest value.
        images_per_s: By the clock that was chosen.
        rounds: How often it ran.
        ratio: Median over rounds of its time over ours; above 1, ours is faster.
        ratio_quartiles: First and third quartile of the same.
        peak_mib: Memory that a forward pass needs at most, beside weights and images.
    """

    contender: str
    difference: float
    images_per_s: float
    rounds: int
    ratio: float
    ratio_quartiles: tuple[float, float]
    peak_mib: float | None


def measure(files: Files, s: Setting, args: argparse.Namespace) -> tuple[list[Result], list[str]]:
    """Results of all contenders that can take part, and why the others cannot."""
    forwards: dict[str, Forward] = {}
    missing = []
    for name, load in CONTENDERS.items():
        try:
            forwards[name] = load(files, s)
        except (MissingError, ImportError) as e:
            missing.append(f"{name}: {e}")
    images = s.images()
    with torch.inference_mode():
        differences = differences_from_ours(forwards, files, s, images)
        seconds = timed_rounds(forwards, images, args)
    ours, results = seconds[OURS], []
    for name, times in seconds.items():
        ratios = [theirs / mine for theirs, mine in zip(times, ours, strict=True)]
        q1, median, q3 = statistics.quantiles(ratios, n=4, method="inclusive")
        rate = len(s.sizes) * s.batch / statistics.median(times)
        peak = peak_mib(name, files, s) if args.memory and len(s.sizes) == 1 else None
        results.append(Result(name, differences[name], rate, len(times), median, (q1, q3), peak))
    return results, missing


def differences_from_ours(
    forwards: dict[str, Forward], files: Files, s: Setting, images: list[Tensor]
) -> dict[str, float]:
    """Compare all contenders with ours on all sizes, and refuse to time what computes something else."""
    ours = [forwards[OURS](x) for x in images]
    references = {load_amradio: ours}
    found = dict.fromkeys(forwards, 0.0)
    for name in forwards.keys() - {OURS}:
        load = REFERENCES.get(name, load_amradio)
        if load not in references:
            reference = load(files, s)
            references[load] = [reference(x) for x in images]
        for x, expected in zip(images, references[load], strict=True):
            for a, b in zip(forwards[name](x), expected, strict=True):
                if a is not None and b is not None:
                    found[name] = max(found[name], ((a - b).abs().max() / b.abs().max()).item())
        if not found[name] <= TOLERANCE[s.dtype]:
            raise SystemExit(f"{name} and {OURS} differ by {found[name]:.2g} of the largest value in {s}.")
    return found


def timed_rounds(
    forwards: dict[str, Forward], images: list[Tensor], args: argparse.Namespace
) -> dict[str, list[float]]:
    """Seconds for all images, per contender and round; the order turns with every round."""
    now = {"wall": time.perf_counter, "cpu": time.process_time}[args.clock]
    wait = torch.cuda.synchronize if images[0].is_cuda else lambda: None
    seconds: dict[str, list[float]] = {name: [] for name in forwards}
    names, began = list(forwards), now()
    for i in range(args.repeats):
        if i >= MIN_ROUNDS and now() - began > args.seconds:
            break
        for name in names[i % len(names) :] + names[: i % len(names)]:
            wait()
            start = now()
            for x in images:
                forwards[name](x)
            wait()
            seconds[name].append(now() - start)
    return seconds


def peak_mib(name: str, files: Files, s: Setting) -> float:
    """Peak memory of one round, in a process of its own: what a contender leaves behind must not help the next one."""
    context = multiprocessing.get_context("spawn")
    with environment(MALLOC_MMAP_THRESHOLD_=str(FRESH_PAGES_FROM_BYTES)), context.Pool(1) as pool:
        return pool.apply(_peak_mib, (name, files, s, torch.get_num_threads()))


def _peak_mib(name: str, files: Files, s: Setting, threads: int) -> float:
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    forward = CONTENDERS[name](files, s)
    images = s.images()
    with torch.inference_mode():
        for x in images:  # so that libraries have initialised themselves, and kept values are kept
            forward(x)
        start = _reset_peak(s.device)
        for x in images:
            forward(x)
    return (_peak_bytes(s.device) - start) / 2**20


def _reset_peak(device: str) -> int:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    # Large blocks come fresh from the system and go back at once (see the malloc threshold), so the peak of the
    # resident set is the peak of live memory.
    Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def _peak_bytes(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    before = {k: os.environ.get(k) for k in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for k, v in before.items():
            os.environ.pop(k) if v is None else os.environ.__setitem__(k, v)


# ---- compiling ----


@dataclass(frozen=True)
class Compiled:
    """What `torch.compile` makes of a contender that sees one size after another.

    Attributes:
        contender: A key of `CONTENDERS`.
        graphs: Graphs traced. Code is generated for each on top of the time given here.
        sizes: Sizes until dynamo's limit of recompilations was hit, after which it runs the model uncompiled; all
            sizes if it never was.
        seconds: Time of the first pass over the sizes, tracing included.
    """

    contender: str
    graphs: int
    sizes: int
    seconds: float


def trace(name: str, forward: Forward, images: list[Tensor]) -> Compiled:
    from torch._dynamo import config, exc, reset
    from torch._dynamo.utils import counters

    reset()
    counters.clear()
    compiled = torch.compile(forward, backend="eager")
    seen, began = 0, time.process_time()
    with torch.inference_mode(), config.patch(fail_on_recompile_limit_hit=True):
        for x in images:
            try:
                compiled(x)
            except exc.FailOnRecompileLimitHit:
                break
            seen += 1
    return Compiled(name, counters["stats"]["unique_graphs"], seen, time.process_time() - began)


def traced(files: Files, s: Setting) -> list[Compiled]:
    """What becomes of each contender that can take part."""
    found = []
    for name, load in CONTENDERS.items():
        with contextlib.suppress(MissingError, ImportError):
            found.append(trace(name, load(files, s), s.images()))
    return found


# ---- reporting ----


def machine(device: str) -> dict[str, Any]:
    names = ("amradio", "torch", "timm", "transformers", "einops", "numpy")
    versions = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    versions.setdefault("amradio", amradio.__version__)
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "bf16_instructions": _has_bf16(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "versions": versions,
    }


def _cpu_info() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def _cpu_name() -> str:
    found = re.search(r"^model name\s*: (.*)$", _cpu_info(), re.MULTILINE)
    return found[1] if found else platform.processor()


def _has_bf16() -> bool:
    return bool(re.search(r"\b(avx512_bf16|amx_bf16)\b", _cpu_info()))


HEADER = (
    "| model | dtype | ViTDet | size | contender | images/s | theirs / ours (quartiles) | rounds | peak MiB "
    "| difference |\n"
    "| --- | --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: |"
)


def row(s: Setting, r: Result) -> str:
    ratio = "1" if r.contender == OURS else f"{r.ratio:.3f} ({r.ratio_quartiles[0]:.3f}-{r.ratio_quartiles[1]:.3f})"
    peak = "" if r.peak_mib is None else f"{r.peak_mib:.0f}"
    cells = [s.model, s.dtype, s.window or "off", s.label, r.contender, f"{r.images_per_s:.3g}", ratio, r.rounds, peak]
    return f"| {' | '.join(map(str, cells))} | {r.difference:.1e} |"


COMPILED_HEADER = (
    "| model | ViTDet | contender | graphs | sizes before giving up | seconds of the first pass |\n"
    "| --- | --- | --- | ---: | ---: | ---: |"
)


def compiled_row(s: Setting, c: Compiled) -> str:
    sizes = "-" if c.sizes == len(s.sizes) else c.sizes
    return f"| {s.model} | {s.window or 'off'} | {c.contender} | {c.graphs} | {sizes} | {c.seconds:.1f} |"


def markdown(report: dict[str, Any]) -> str:
    m = report["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in m["versions"].items())
    facts = [
        f"- Machine: {m['gpu'] or m['cpu']}, {m['system']}, threads: {m['threads']}, "
        f"{m['cpu_capability']}, bf16 instructions: {'yes' if m['bf16_instructions'] else 'no'}",
        f"- Versions: {versions}",
        f"- Clock: {report['clock']} time; batch {report['batch']}",
        f"- {len(CHANGING_SIZES)} sizes: {', '.join(f'{h}x{w}' for h, w in CHANGING_SIZES)}, one after another",
    ]
    rows = [row(Setting(**one["setting"]), Result(**r)) for one in report["measured"] for r in one["results"]]
    if report["compiled"]:
        rows += ["", f"`torch.compile` over the {len(CHANGING_SIZES)} sizes, tracing only:", "", COMPILED_HEADER]
        rows += [
            compiled_row(Setting(**one["setting"]), Compiled(**c)) for one in report["compiled"] for c in one["results"]
        ]
    left_out = [f"- {line}" for line in report["left_out"]]
    return "\n".join(["# Forward pass", "", *facts, "", HEADER, *rows, "", "Left out:", "", *left_out, ""])


def _order(one: dict[str, Any]) -> tuple[Any, ...]:
    s = one["setting"]
    return s["model"] != "vit-b", s["dtype"] != "fp32", s["window"], len(s["sizes"]), s["sizes"]


def save(report: dict[str, Any], path: Path) -> None:
    """Write what there is so far, beside what the file holds of other settings: long runs may come in pieces."""
    report = json.loads(json.dumps(report, default=asdict))
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        if any(before[k] != report[k] for k in ("machine", "clock", "batch")):
            raise SystemExit(f"{path} was measured on another machine or in another way; name another file.")
        for kind in ("measured", "compiled"):
            again = [one["setting"] for one in report[kind]]
            report[kind] += [one for one in before.get(kind, []) if one["setting"] not in again]
            report[kind].sort(key=_order)
        report["left_out"] += [line for line in before["left_out"] if line not in report["left_out"]]
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(report), encoding="utf-8")


# ---- command line ----


def settings(args: argparse.Namespace, model: str, dtype: str) -> list[Setting]:
    """All that is measured of one model in one dtype. With windows, sizes are rounded to what windows fit in."""
    found: dict[Setting, None] = {}
    for window in args.vitdet:
        if window and model == "eradio":
            continue
        step = 16 * (window or 2)
        for size in args.sizes:
            side = max(round(size / step) * step, step)
            found[Setting(model, dtype, window, ((side, side),), args.batch, args.device)] = None
    if args.changing:
        found[Setting(model, dtype, 0, tuple(CHANGING_SIZES), args.batch, args.device)] = None
    return list(found)


def compile_settings(args: argparse.Namespace, model: str, dtype: str) -> list[Setting]:
    if not args.compile or dtype != args.dtypes[0]:
        return []
    windows = [0] if model == "eradio" else [0, SMALL_WINDOW]
    return [Setting(model, dtype, window, tuple(CHANGING_SIZES), args.batch, args.device) for window in windows]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--official", type=Path, help="a checkout of the official repository")
    parser.add_argument("--models", nargs="+", choices=CONFIGS, default=list(CONFIGS), help="what to build")
    parser.add_argument("--sizes", nargs="*", type=int, default=[224, 512, 1024], help="sides of square images")
    parser.add_argument("--vitdet", nargs="+", type=int, default=[0, 16], help="window sides in patches, 0 for none")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"], help="parameter dtypes")
    parser.add_argument("--changing", action=argparse.BooleanOptionalAction, default=True, help="also 12 mixed sizes")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="also count graphs")
    parser.add_argument("--batch", type=int, default=1, help="images of one size at a time")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to run")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: this process's own time, for a shared machine"
    )
    parser.add_argument("--repeats", type=int, default=7, help="rounds at most")
    parser.add_argument("--seconds", type=float, default=120, help=f"no more rounds after this, but {MIN_ROUNDS}")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory")
    parser.add_argument("--out", type=Path, help="JSON file to write or add to; a Markdown file is written beside it")
    args = parser.parse_args()
    if args.device == "cuda" and args.clock == "cpu":
        parser.error("--clock cpu says nothing about a GPU")
    if args.device == "cpu" and args.memory and not Path("/proc/self/clear_refs").exists():
        parser.error("peak memory on a CPU is measured on Linux only: pass --no-memory")
    return args


def main() -> None:
    args = parse()
    warnings.simplefilter("ignore")  # the official code warns about tensors that no model reads
    torch.set_num_threads(args.threads)
    report: dict[str, Any] = {
        "machine": machine(args.device),
        "clock": args.clock,
        "batch": args.batch,
        "left_out": [],
        "measured": [],
        "compiled": [],
    }
    print(HEADER)
    with tempfile.TemporaryDirectory() as folder:
        for model in args.models:
            for dtype in args.dtypes:
                files = Files(Path(folder) / model / dtype, args.official)
                files.folder.mkdir(parents=True)
                write_weights(model, dtype, files)
                for s in settings(args, model, dtype):
                    results, missing = measure(files, s, args)
                    print(*(row(s, r) for r in results), sep="\n", flush=True)
                    report["measured"].append({"setting": s, "results": results})
                    report["left_out"] += [line for line in missing if line not in report["left_out"]]
                    if args.out:
                        save(report, args.out)
                for s in compile_settings(args, model, dtype):
                    traces = traced(files, s)
                    print(*(compiled_row(s, c) for c in traces), sep="\n", flush=True)
                    report["compiled"].append({"setting": s, "results": traces})
                    if args.out:
                        save(report, args.out)
    for line in report["left_out"]:
        print(f"left out: {line}")


if __name__ == "__main__":
    main()
