r"""Time dense FUNGI beside the code that its published numbers come from, with the same weights, in the same run.

    git clone https://github.com/WalterSimoncini/no-train-all-gain
    git clone https://github.com/facebookresearch/dino
    python benchmarks/fungi_dense.py --official no-train-all-gain --dino dino \
        --out benchmarks/results/fungi_dense_cpu.json

Of the official script the function that makes features runs as it is; its ScaNN index is replaced by an exact one, on
both sides the same, as ScaNN does not give the same neighbours twice. It runs on the backbone that it loads, DINO's
own, and a second time on our trunk, so that it can be seen what is due to attention; and with its loss repaired to a
matrix product, so that it can be seen what is due to the loss. All compute the same features, which is checked first.
Contenders take turns; a ratio is the median over rounds of (theirs / ours). The peak of memory is that of a process of
its own, beyond what it held when everything was loaded. The floor is the forward pass that nobody can leave out.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import types
from argparse import Namespace
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amradio.fungi import DenseConfig, DenseFungiBackbone, SupportIndex
from amradio.fungi.heads import Head
from amradio.fungi.losses import info_nce
from amradio.fungi.projections import SignProjection, make_projection
from amradio.models.configs import RadioConfig, ViTConfig
from amradio.models.radio import RadioModel
from amradio.search import Neighbours

GEOMETRY = {"vit-t": (192, 3), "vit-s": (384, 6), "vit-b": (768, 12)}  # width, heads; 12 blocks of 16-pixel patches
NEGATIVES, KEEP, NEIGHBOURS, LATENT = 2, 0.5, 5, 96
GRID = 14
OFFICIAL, TRUNK, REPAIRED, OURS = "official", "official on our trunk", "official, loss repaired", "ours"
CHEAP = ("rank-one-4", "tensor-sketch")
NETWORK_STAGES = ("forward", "loss", "projection")


@dataclass(frozen=True)
class Setting:
    """What to measure."""

    model: str
    size: int
    batch: int
    memory: int
    device: str
    official: str | None
    dino: str | None


@dataclass
class Result:
    """What one contender did; seconds for one batch, in each round."""

    name: str
    seconds: list[float]
    stages: dict[str, float]
    extra_peak_mib: float | None = None
    ratio: float | None = None
    max_difference: float | None = None


Features = Callable[[], Tensor]  # patch features [B, L, 2 E] of the images, from a fixed state of the random numbers


def build_model(s: Setting) -> RadioModel:
    width, heads = GEOMETRY[s.model]
    torch.manual_seed(0)
    trunk = ViTConfig(
        embed_dim=width,
        depth=12,
        num_heads=heads,
        mlp_hidden_dim=4 * width,
        final_norm=True,
        position="resize",
        position_grid=(GRID, GRID),
        position_offset=0.1,
        patch_bias=True,
    )
    model = RadioModel(RadioConfig(backbone=trunk)).eval().requires_grad_(False)
    for name, p in model.named_parameters():  # so that tokens differ as they do in trained networks
        if name.endswith("weight") and p.ndim == 2:
            nn.init.normal_(p, std=1.5 * p.shape[1] ** -0.5 if "blocks" in name else 0.05)
    return model.to(s.device)


def images_of(s: Setting) -> Tensor:
    random = torch.Generator().manual_seed(1)
    coarse = torch.rand(s.batch, 3, s.size // 8, s.size // 8, generator=random)
    return F.interpolate(coarse, scale_factor=8, mode="bicubic").clamp(0, 1).to(s.device)


def support_of(s: Setting, width: int) -> Tensor:
    return F.normalize(torch.randn(s.memory, width, generator=torch.Generator().manual_seed(2)), dim=1).to(s.device)


def nearest(queries: Tensor, rows: Tensor, k: int) -> Neighbours:
    """The stand-in for ScaNN, the same on both sides."""
    parts = [(q @ rows.T).topk(k, dim=1) for q in queries.split(1024)]
    return Neighbours(torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts]))


# ---- ours ----


class Ours:
    """Our features in the official settings, with the time of each stage."""

    def __init__(self, s: Setting, projection: str = "sign", loss_dtype: str = "float32") -> None:
        self.model, self.images = build_model(s), images_of(s)
        width = self.model.embed_dim
        rows = support_of(s, width)
        config = DenseConfig.of_protocol(
            "fungi-paper", latent_dim=LATENT, negatives_per_token=NEGATIVES, keep=KEEP, loss_dtype=loss_dtype
        )
        shape = DenseFungiBackbone(self.model, DenseConfig(projection="tensor-sketch"))._split.shape
        made = (
            SignProjection.random(shape, width, torch.Generator().manual_seed(3))
            if projection == "sign"
            else make_projection(projection, shape, width, 3)
        )
        self.backbone = DenseFungiBackbone(
            self.model,
            config,
            support=SupportIndex(rows, lambda q, k: nearest(q, rows, k), NEIGHBOURS),
            head=head_of(width),
            projection=made,
        )

    def __call__(self) -> Tensor:
        return self.backbone(self.images, uniforms=self.uniforms()).features

    def uniforms(self) -> Tensor:
        torch.manual_seed(4)
        count = (self.images.shape[-1] // 16) ** 2 + 1
        return torch.stack([torch.rand(count * NEGATIVES) for _ in self.images])

    def stages(self) -> dict[str, float]:
        """Seconds of the forward pass, of all that follows but the projection, and of the projection."""
        forward = timed(lambda: self.backbone._split(self.images), self.images.device)
        uniforms = self.uniforms()
        self.backbone.gradients(self.images, uniforms)
        start = now(self.images.device)
        found = self.backbone.gradients(self.images, uniforms)
        loss = now(self.images.device) - start - forward
        projection = timed(lambda: self.backbone.project(found), self.images.device)
        return dict(zip(NETWORK_STAGES, (forward, loss, projection), strict=True))


def head_of(width: int) -> Head:
    return Head.random(width, LATENT, torch.Generator().manual_seed(5))


# ---- the official code ----


class DinoShape(nn.Module):
    """Our trunk with the methods of DINO's."""

    def __init__(self, model: RadioModel) -> None:
        super().__init__()
        self.trunk: Any = model.model

    @property
    def blocks(self) -> nn.ModuleList:
        return self.trunk.blocks  # type: ignore[no-any-return]

    def forward(self, images: Tensor) -> Tensor:
        return self.get_intermediate_layers(images)[0][:, 0]

    def get_intermediate_layers(self, images: Tensor) -> list[Tensor]:
        return [torch.cat(self.trunk(images), dim=1)]


def dino_network(s: Setting, model: RadioModel) -> nn.Module:
    """DINO's own network with our weights."""
    assert s.dino is not None
    sys.path.insert(0, s.dino)
    import vision_transformer

    width, heads = GEOMETRY[s.model]
    network = vision_transformer.VisionTransformer(
        img_size=[GRID * 16],
        patch_size=16,
        embed_dim=width,
        depth=12,
        num_heads=heads,
        mlp_ratio=4,
        qkv_bias=True,
        norm_layer=lambda dim: nn.LayerNorm(dim, eps=1e-6),
    )
    state = {k.removeprefix("model."): v for k, v in model.state_dict().items() if k.startswith("model.")}
    generator = {k: state.pop(k) for k in list(state) if k.startswith("patch_generator.")}
    state["cls_token"] = generator["patch_generator.cls_token.token"][None]
    positions = generator["patch_generator.pos_embed"]
    state["pos_embed"] = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)
    state["patch_embed.proj.weight"] = generator["patch_generator.embedder.weight"].view(width, 3, 16, 16)
    state["patch_embed.proj.bias"] = generator["patch_generator.embedder.bias"]
    network.load_state_dict(state)
    return network.eval()


def official_features(s: Setting, *, own_network: bool, repaired: bool) -> Features:
    """The function inside of the official script, taken out where it is handed to the evaluation."""
    assert s.official is not None
    model, images = build_model(s), images_of(s)
    width = model.embed_dim
    network = (dino_network(s, model) if own_network else DinoShape(model)).requires_grad_(True).to(s.device)
    rows = support_of(s, width)
    shape = DenseFungiBackbone(model, DenseConfig(projection="tensor-sketch"))._split.shape
    signs = SignProjection.random(shape, width, torch.Generator().manual_seed(3)).signs.flatten(1).float()
    caught: dict[str, Any] = {}

    def evaluation(network: nn.Module, *, ftr_extr_fn: Any, **_: Any) -> float:
        caught.update(network=network, features=ftr_extr_fn)
        return 0.0

    class Searcher:
        def search_batched(self, queries: Any) -> Any:
            found = nearest(torch.from_numpy(queries).to(s.device), rows, NEIGHBOURS)
            return found.indices.cpu().numpy(), found.scores.cpu().numpy()

    scann = types.ModuleType("scann")
    scann.scann_ops_pybind = Namespace(load_searcher=lambda _: Searcher())  # type: ignore[attr-defined]
    hbird = types.ModuleType("src.hbird_eval")
    hbird.hbird_evaluation = evaluation  # type: ignore[attr-defined]
    with replaced_modules({"scann": scann, "src.hbird_eval": hbird}), tempfile.TemporaryDirectory() as folder:
        sys.path.insert(0, str(Path(s.official) / "fungi-hummingbird"))
        import eval_gradients

        sys.path.pop(0)
        torch.save({"scaling": width**-0.5, "projection": signs}, Path(folder) / "projection.pth")
        torch.save(rows.cpu(), Path(folder) / "memory.pth")
        eval_gradients.torch.hub.load = lambda *_, **__: network
        if repaired:
            eval_gradients.info_nce_loss = repaired_loss
        defaults = dict.fromkeys(
            ("patch_size", "batch_size", "augmentation_epochs", "num_neighbors", "num_leaves", "num_leaves_to_search")
        )
        eval_gradients.main(
            Namespace(
                **defaults,
                model="",
                input_size=s.size,
                latent_dim=LATENT,
                projection_matrix=f"{folder}/projection.pth",
                gradients_layer="backbone.blocks.11.attn.proj",
                use_fp16=False,
                memory_bank=f"{folder}/memory.pth",
                scann_index="",
                num_negative_neighbors=NEGATIVES,
                negative_batch_percent=KEEP,
                anisotropic_quantization_threshold=None,
                num_reordering_candidates=None,
                dimensions_per_block=None,
                data_dir="",
                memory_size=None,
                num_train_samples=None,
                temperature=None,
            )
        )
    head = head_of(width)
    with torch.no_grad():
        caught["network"].fc.weight.copy_(head.weight)
        caught["network"].fc.bias.copy_(head.bias)
        conditioned = model.input_conditioner(images)

    def features() -> Tensor:
        torch.manual_seed(4)
        found: Tensor = caught["features"](caught["network"], conditioned)[0]
        return found.detach()

    return features


def repaired_loss(comparison_batch_features: Tensor, positive_features: Tensor) -> Tensor:
    return info_nce(positive_features[None], comparison_batch_features[None], denominator="raw")[0]


@contextmanager
def replaced_modules(modules: dict[str, Any]) -> Any:
    for name, module in modules.items():
        sys.modules[name] = module
    try:
        yield
    finally:
        for name in [*modules, "eval_gradients"]:
            sys.modules.pop(name, None)


# ---- measuring ----


def contenders(s: Setting) -> dict[str, Callable[[], Features]]:
    found: dict[str, Callable[[], Features]] = {OURS: lambda: Ours(s)}
    if s.official:
        if s.dino:
            found[OFFICIAL] = lambda: official_features(s, own_network=True, repaired=False)
        found[TRUNK] = lambda: official_features(s, own_network=False, repaired=False)
        found[REPAIRED] = lambda: official_features(s, own_network=bool(s.dino), repaired=True)
    return found | {f"{OURS}, {p}": lambda p=p: Ours(s, p) for p in CHEAP}


def now(device: Any) -> float:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(run: Callable[[], Any], device: Any, times: int = 3) -> float:
    run()
    found = []
    for _ in range(times):
        start = now(device)
        run()
        found.append(now(device) - start)
    return min(found)


def measure(s: Setting, rounds: int, threads: int) -> list[Result]:
    built = {name: make() for name, make in contenders(s).items()}
    results = {name: Result(name, [], run.stages() if isinstance(run, Ours) else {}) for name, run in built.items()}
    features = {name: run() for name, run in built.items()}
    rough = Ours(s, loss_dtype="float16")()
    for name in (n for n in features if n not in (f"{OURS}, {p}" for p in CHEAP)):
        reference = rough if name in (OFFICIAL, TRUNK) else features[OURS]
        results[name].max_difference = float((features[name] - reference).abs().max())
    for _ in range(rounds):
        for name, run in built.items():
            start = now(s.device)
            run()
            results[name].seconds.append(now(s.device) - start)
    for name, result in results.items():
        ours = results[OURS].seconds
        result.ratio = statistics.median(t / o for t, o in zip(result.seconds, ours, strict=True))
        result.extra_peak_mib = peak_of(s, name, threads)
    return list(results.values())


def peak_of(s: Setting, name: str, threads: int) -> float:
    """The peak of a process of its own, beyond what it held before."""
    arguments = json.dumps({"setting": asdict(s), "name": name, "threads": threads})
    done = subprocess.run(
        [sys.executable, __file__, "--peak-of", arguments], capture_output=True, text=True, check=True
    )
    return float(done.stdout.splitlines()[-1])


def print_peak(arguments: str) -> None:
    given = json.loads(arguments)
    torch.set_num_threads(given["threads"])
    s = Setting(**given["setting"])
    run = contenders(s)[given["name"]]()
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
    lines = [
        "| | s per batch | theirs / ours | extra peak, MiB | max difference | stages, s |",
        "|---|---|---|---|---|---|",
    ]
    for r in results:
        stages = ", ".join(f"{name} {seconds:.3f}" for name, seconds in r.stages.items())
        difference = "" if r.max_difference is None or r.name == OURS else f"{r.max_difference:.1e}"
        lines.append(
            f"| {r.name} | {statistics.median(r.seconds):.3f} | {r.ratio:.2f} | {r.extra_peak_mib:.0f} | "
            f"{difference} | {stages} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", help="checkout of WalterSimoncini/no-train-all-gain")
    parser.add_argument("--dino", help="checkout of facebookresearch/dino")
    parser.add_argument("--model", choices=GEOMETRY, default="vit-s")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--memory", type=int, default=10_240, help="rows of the support index")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_of:
        print_peak(options.peak_of)
        return
    torch.set_num_threads(options.threads)
    s = Setting(
        options.model, options.size, options.batch, options.memory, options.device, options.official, options.dino
    )
    results = measure(s, options.rounds, options.threads)
    print(table(results))
    if options.out:
        record = {
            "setting": {**asdict(s), "official": bool(s.official), "dino": bool(s.dino)},
            "threads": options.threads,
            "torch": torch.__version__,
            "machine": platform.processor() or platform.machine(),
            "results": [asdict(r) for r in results],
        }
        options.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        options.out.with_suffix(".md").write_text(table(results) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
