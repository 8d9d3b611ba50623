r"""Time per-image FUNGI beside fungivision, with the same weights, pictures, crops, maps and negatives in one run.

    git clone https://github.com/WalterSimoncini/fungivision   # it needs torchvision
    python benchmarks/fungi_image.py --official fungivision --out benchmarks/results/fungi_image_cpu.json

The published wrapper runs as it is, with its KL, DINO and SimCLR objectives at their published settings, on a network
that both sides share. What it draws (maps, projection, crops, negatives) is handed to ours; then features are compared,
and only then is anything timed. Contenders take turns; a ratio is the median over rounds of (theirs / ours). On a CPU
times are processor time, so that other work on the machine does not count. The floor is what both must do: one pass of
the network over the 62 views of a picture, without gradients. The peak of memory is that of a process of its own,
beyond what it held when everything was loaded.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import amradio
from amradio.fungi import FungiWrapper, ImageConfig
from amradio.fungi.heads import Head
from amradio.fungi.objectives import DinoObjective, KlObjective, SimclrObjective
from amradio.fungi.projections import SignProjection
from amradio.fungi.views import crop_views
from amradio.images.decode import to_uint8_tensor
from amradio.models.configs import RadioConfig, ViTConfig
from amradio.models.radio import RadioModel

RANDOM = "vit-s16-random"
OURS, OFFICIAL, FLOOR = "ours", "fungivision", "floor: 62 forward passes"
LAYER = "model.model.blocks.{}.attn.proj"
SIZE, VIEWS = 224, (1, 12, 49)  # of KL, DINO and SimCLR
PUBLISHED_SUPPORT = 64


@dataclass(frozen=True)
class Setting:
    """What to measure.

    Attributes:
        model: `RANDOM`, or a RADIO-like backbone of `amradio.load_backbone`.
        pictures: In a batch.
        support: Pictures whose views are SimCLR's negatives.
        encoded: So many of them are there; negatives are repeated, for encoding 64 pictures takes long on a CPU.
        device: Where.
        official: Checkout of fungivision; None: only ours.
        data: Folder of pictures; None: made-up ones.
    """

    model: str
    pictures: int
    support: int
    encoded: int
    device: str
    official: str | None
    data: str | None


@dataclass
class Result:
    """What one contender did; seconds for one picture, in each round."""

    name: str
    seconds: list[float] = field(default_factory=list)
    stages: dict[str, float] = field(default_factory=dict)
    extra_peak_mib: float | None = None
    ratio: float | None = None
    cosines: dict[str, float] = field(default_factory=dict)


def build_model(s: Setting) -> RadioModel:
    """The network of both sides, whose input is standardised already."""
    if s.model != RANDOM:
        model = amradio.load_backbone(s.model)
        if not isinstance(model, RadioModel):
            sys.exit(f"{s.model} is no RADIO-like backbone, whose blocks this benchmark knows.")
        return model.to(s.device).eval().requires_grad_(False)
    torch.manual_seed(0)
    trunk = ViTConfig(
        embed_dim=384,
        depth=12,
        num_heads=6,
        mlp_hidden_dim=1536,
        final_norm=True,
        position="resize",
        position_grid=(14, 14),
        position_offset=0.1,
        patch_bias=True,
    )
    model = RadioModel(RadioConfig(backbone=trunk)).requires_grad_(False)
    for name, p in model.named_parameters():  # so that views differ as they do in trained networks
        if name.endswith("weight") and p.ndim == 2:
            nn.init.normal_(p, std=1.5 * p.shape[1] ** -0.5 if "blocks" in name else 0.05)
    model.input_conditioner.norm_mean.copy_(torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
    model.input_conditioner.norm_std.copy_(torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))
    return model.to(s.device).eval()


def load_pictures(s: Setting) -> tuple[list[Image.Image], list[Image.Image]]:
    """Those that features are made of, and those that negatives come from."""
    count = s.pictures + s.encoded
    if s.data is not None:
        files = sorted(p for p in Path(s.data).iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
        if len(files) < count:
            sys.exit(f"{s.data} has {len(files)} pictures, and {count} are needed.")
        found = [Image.open(file).convert("RGB") for file in files[:count]]
    else:
        random = torch.Generator().manual_seed(1)
        coarse = torch.rand(count, 3, 48, 64, generator=random)
        fine = F.interpolate(coarse, scale_factor=8, mode="bicubic").clamp(0, 1).mul(255).to(torch.uint8)
        found = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in fine]  # 512 x 384
    return found[: s.pictures], found[s.pictures :]


class Summary(nn.Module):
    """A network as fungivision wants it: from standardised pictures to one vector each."""

    def __init__(self, model: RadioModel) -> None:
        super().__init__()
        model.make_preprocessor_external()
        self.model = model

    def forward(self, views: Tensor) -> Tensor:
        summary: Tensor = self.model(views).summary
        return summary


class Official:
    """The published wrapper, and what it draws."""

    def __init__(self, s: Setting) -> None:
        assert s.official is not None
        if s.official not in sys.path:
            sys.path.insert(0, s.official)
        # What torchvision needs from a CPU build of torch that its own build does not find.
        if not hasattr(torch.ops.torchvision, "nms"):
            self._library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in ("nms", "qnms"):
                self._library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        from fungivision.config.dino import DINOConfig
        from fungivision.config.kl import KLConfig
        from fungivision.config.simclr import SimCLRConfig
        from fungivision.wrapper import FUNGIWrapper

        self.pictures, support = load_pictures(s)
        self._support = [(picture, 0) for picture in support]
        model = Summary(build_model(s)).eval()
        layer = LAYER.format(len(model.model.model.blocks) - 1)
        torch.manual_seed(3)
        self.wrapper = FUNGIWrapper(
            model,
            layer,
            torch.device(s.device),
            extractor_configs=[KLConfig(), DINOConfig(), SimCLRConfig(comparison_batch_size=s.encoded)],
        )
        self._repeats = s.support // s.encoded
        self.crops: list[list[tuple[int, int, int, int]]] = []
        self._record_crops()

    @property
    def extractors(self) -> Sequence[Any]:
        """KL, DINO, SimCLR."""
        return self.wrapper.extractors  # type: ignore[no-any-return]

    def fit(self) -> None:
        """Encode the negatives."""
        self.wrapper.setup(self._support)
        simclr = self.extractors[2]
        simclr.comparison_batch = simclr.comparison_batch.repeat(self._repeats, 1)

    def __call__(self) -> Tensor:
        torch.manual_seed(4)  # of the crops
        self.crops.clear()
        features: Tensor = self.wrapper(self.pictures).detach()
        return features

    def _record_crops(self) -> None:
        transform = self.extractors[1].transform
        crops = (transform.first_global_crop, transform.second_global_crop, transform.local_crop)
        each = 2 + transform.local_crops_number

        def recorded(make: Callable[[Any], dict[str, int]]) -> Callable[[Any], dict[str, int]]:
            def params(inputs: Any) -> dict[str, int]:
                found = make(inputs)
                if not self.crops or len(self.crops[-1]) == each:
                    self.crops.append([])
                self.crops[-1].append((found["top"], found["left"], found["height"], found["width"]))
                return found

            return params

        for crop in crops:
            crop.transforms[0].make_params = recorded(crop.transforms[0].make_params)


class GivenCrops(DinoObjective):
    """DINO with crops that were drawn elsewhere."""

    def __init__(self, embed_dim: int, crops: dict[bytes, list[tuple[int, int, int, int]]]) -> None:
        super().__init__(embed_dim)
        self._crops = crops

    def views(self, picture: Tensor, seed: int) -> Tensor:
        """See `DinoObjective.views`."""
        return crop_views(picture, self._crops[picture.numpy().tobytes()], self.size, "bicubic")


class Ours:
    """Our wrapper, with the numbers of the published one if there is one."""

    def __init__(self, s: Setting, official: Official | None = None) -> None:
        self.pictures, self._support = load_pictures(s)
        self._repeats = s.support // s.encoded
        model = build_model(s)
        config = ImageConfig(preset="fungivision", include_embedding=False, view_size=SIZE)
        if official is None:
            self.wrapper = FungiWrapper(model, ("kl", "dino", "simclr"), config)
            self.objectives = list(self.wrapper.objectives.values())
            self.objectives[-1].support_size = s.encoded  # type: ignore[attr-defined]
            return
        kl, dino, simclr = official.extractors
        pictures = [to_uint8_tensor(picture).numpy().tobytes() for picture in self.pictures]
        self.objectives = [
            KlObjective(model.summary_dim),
            GivenCrops(model.summary_dim, dict(zip(pictures, official.crops, strict=True))),
            SimclrObjective(model.summary_dim, denominator="raw", support_size=s.encoded),
        ]
        self.objectives[0].head = head_of(kl.projection_head)  # type: ignore[attr-defined]
        self.objectives[1].student = head_of(dino.projection_head)  # type: ignore[attr-defined]
        self.objectives[1].teacher = head_of(dino.teacher_projection)  # type: ignore[attr-defined]
        self.objectives[2].head = head_of(simclr.projection_head)  # type: ignore[attr-defined]
        width = model.summary_dim
        signs = official.wrapper.extractors[0].projection.to("cpu", torch.int8).view(width, width, -1)
        self.wrapper = FungiWrapper(model, self.objectives, config, projection=SignProjection(signs))

    def fit(self) -> None:
        """Encode the negatives."""
        self.wrapper.fit(self._support)
        simclr: Any = self.objectives[-1]
        simclr.negatives = simclr.negatives.repeat(self._repeats, 1)

    def __call__(self) -> Tensor:
        return torch.cat(list(self.wrapper.features(self.pictures).values()), dim=-1)

    def stages(self, device: str) -> dict[str, float]:
        """Seconds for one picture: making views, network and gradients, and the projection."""
        batch = [to_uint8_tensor(picture) for picture in self.pictures]
        found = dict.fromkeys(("views", "network and gradients", "projection"), 0.0)
        for objective in self.objectives:
            start = now(device)
            views = [self.wrapper._made(objective.views, [picture], objective.name) for picture in batch]
            found["views"] += now(device) - start
            start = now(device)
            gradients = [self.wrapper.gradients(objective, v) for v in views]
            found["network and gradients"] += now(device) - start
            start = now(device)
            for g in gradients:
                self.wrapper.project(g)
            found["projection"] += now(device) - start
        return {name: seconds / len(batch) for name, seconds in found.items()}


class Floor:
    """The forward passes alone, over views that are there already."""

    def __init__(self, s: Setting) -> None:
        self._model = build_model(s)
        self._views = [torch.rand(count, 3, SIZE, SIZE, device=s.device) for count in VIEWS]
        self._pictures = s.pictures

    def __call__(self) -> Tensor:
        with torch.inference_mode():
            for _ in range(self._pictures):
                parts = [self._model(views).summary for views in self._views]
        return torch.cat(parts)


def head_of(linear: nn.Linear) -> Head:
    return Head(linear.weight.detach().cpu(), linear.bias.detach().cpu())


def now(device: str) -> float:
    """Seconds: of this process on a CPU, of the clock on a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def measure(s: Setting, rounds: int, threads: int) -> list[Result]:
    """All contenders, in turns."""
    results = {OURS: Result(OURS), FLOOR: Result(FLOOR)}
    built: dict[str, Any] = {FLOOR: Floor(s)}
    if s.official is not None:
        official = built[OFFICIAL] = Official(s)
        results[OFFICIAL] = Result(OFFICIAL)
        official.fit()
        theirs = official()
        ours = built[OURS] = Ours(s, official)
        ours.fit()
        features = ours()
        parts = [part.chunk(len(VIEWS), dim=-1) for part in (features, theirs.to(features.device))]
        for name, mine, other in zip(ours.wrapper.objectives, *parts, strict=True):
            results[OFFICIAL].cosines[name] = float(F.cosine_similarity(mine.double(), other.double()).min())
        results[OFFICIAL].cosines["all"] = float(F.cosine_similarity(features.double(), theirs.double()).min())
    else:
        ours = built[OURS] = Ours(s)
        ours.fit()
        ours()
    results[OURS].stages = ours.stages(s.device)
    built[FLOOR]()
    for _ in range(rounds):
        for name, run in built.items():
            start = now(s.device)
            run()
            results[name].seconds.append((now(s.device) - start) / s.pictures)
    for name, result in results.items():
        pairs = zip(result.seconds, results[OURS].seconds, strict=True)
        result.ratio = statistics.median(other / mine for other, mine in pairs)
        result.extra_peak_mib = peak_of(s, name, threads)
    return list(results.values())


def contender_of(s: Setting, name: str) -> Any:
    if name == FLOOR:
        return Floor(s)
    contender = Official(s) if name == OFFICIAL else Ours(s)
    contender.fit()
    return contender


def peak_of(s: Setting, name: str, threads: int) -> float:
    """The peak of a process of its own, beyond what it held before."""
    arguments = json.dumps({"setting": {**asdict(s), "encoded": 1}, "name": name, "threads": threads})
    done = subprocess.run([sys.executable, __file__, "--peak-of", arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return float(done.stdout.splitlines()[-1])


def print_peak(arguments: str) -> None:
    given = json.loads(arguments)
    torch.set_num_threads(given["threads"])
    s = Setting(**given["setting"])
    run = contender_of(s, given["name"])
    if s.device == "cuda":
        run()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        print((torch.cuda.max_memory_allocated() - before) / 2**20)
        return
    before_kib = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    run()
    print((status("VmHWM") - before_kib) / 1024)


def status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def table(results: list[Result]) -> str:
    """For people."""
    lines = [
        "| | s per picture | theirs / ours | extra peak, MiB | smallest cosine | stages, s |",
        "| --- | ---: | ---: | ---: | --- | --- |",
    ]
    for r in results:
        stages = ", ".join(f"{name} {seconds:.3f}" for name, seconds in r.stages.items())
        cosines = ", ".join(f"{name} {cosine:.8f}" for name, cosine in r.cosines.items())
        lines.append(
            f"| {r.name} | {statistics.median(r.seconds):.3f} | {r.ratio:.3f} | {r.extra_peak_mib:.0f} | {cosines} "
            f"| {stages} |"
        )
    return "\n".join(lines)


def markdown(record: dict[str, Any]) -> str:
    """All models measured so far."""
    lines = ["# Per-image FUNGI", "", f"KL, DINO and SimCLR of fungivision 0.0.2, {SIZE} px, {sum(VIEWS)} views.", ""]
    for name, one in record.items():
        s = one["setting"]
        lines += [
            f"## {name}",
            "",
            f"{s['pictures']} pictures a batch, {s['support'] * VIEWS[-1]} negatives, {one['threads']} thread(s), "
            f"{one['rounds']} rounds, {one['machine']}.",
            "",
            table([Result(**r) for r in one["results"]]),
            "",
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--official", help="checkout of WalterSimoncini/fungivision")
    parser.add_argument("--model", action="append", help=f"may be repeated; default {RANDOM}")
    parser.add_argument("--data", help="folder of pictures; default made-up ones")
    parser.add_argument("--pictures", type=int, default=2)
    parser.add_argument("--support", type=int, default=PUBLISHED_SUPPORT, help="pictures whose views are negatives")
    parser.add_argument("--encoded", type=int, default=4, help="so many of them are there, the rest are repetitions")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file; a Markdown file is written beside it")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of:
        print_peak(args.peak_of)
        return
    torch.set_num_threads(args.threads)
    cpu = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    machine = f"{cpu[1] if cpu else platform.machine()}, python {platform.python_version()}, torch {torch.__version__}"
    record: dict[str, Any] = {}
    for model in args.model or [RANDOM]:
        s = Setting(model, args.pictures, args.support, args.encoded, args.device, args.official, args.data)
        results = measure(s, args.rounds, args.threads)
        record[model] = {
            "setting": {**asdict(s), "official": bool(s.official), "data": bool(s.data)},
            "threads": args.threads,
            "rounds": args.rounds,
            "machine": machine,
            "results": [asdict(r) for r in results],
        }
        print(f"{model}\n{table(results)}", flush=True)
        if args.out:
            args.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            args.out.with_suffix(".md").write_text(markdown(record), encoding="utf-8")


if __name__ == "__main__":
    main()
