r"""Count what in-context segmentation cannot leave out, time it alone, and put our time beside it.

    python benchmarks/in_context_floor.py --data camvid --out benchmarks/results/in_context_floor_cpu.json

The setting is that of `benchmarks/in_context.py` (150 + 50 pictures, 224 px, all patches in the memory, exact search)
but for the network, which both sides there share: a patch projection stands in for it, of the width and patch size of a
ViT-S/14. The floor is made of bare calls to Pillow and torch on the same pictures and sizes: decoding and resizing,
matrix products whose results are thrown away, upsampling with argmax and one histogram. Times are processor time of one
thread; each round measures all of it in turn.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn import functional as F

import amradio
from amradio.evals.in_context import InContextConfig, get_protocol, in_context_policy, run_in_context
from amradio.evals.runner import Setup
from amradio.features import ExtractOptions
from amradio.images.segmentation import open_segmentation
from amradio.search import top_k

WIDTH, PATCH, SIDE, TRAIN, VAL, BLOCK = 384, 14, 224, 150, 50, 4096


class Patches(torch.nn.Module):
    """Features that cost next to nothing: a random projection of each patch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.projection = torch.nn.Conv2d(3, WIDTH, PATCH, PATCH).requires_grad_(False)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Summaries [B, D] and a map [B, D, h, w]."""
        maps = self.projection(images)
        return maps.mean((2, 3)), maps


def timed(work: Callable[[], object]) -> float:
    """Processor time of this process, all of its threads."""
    start = time.process_time()
    work()
    return time.process_time() - start


def decode(photos: Sequence[Path], masks: Sequence[Path]) -> None:
    """Read, resize to the evaluated size and make a tensor, as any protocol must."""
    for photo, mask in zip(photos, masks, strict=True):
        with Image.open(photo) as opened:
            image = opened.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        with Image.open(mask) as opened:
            opened.resize((SIDE, SIDE), Image.Resampling.NEAREST).tobytes()
        torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(SIDE, SIDE, 3).float().div_(255)


def products(queries: torch.Tensor, rows: torch.Tensor) -> None:
    """All similarities, thrown away."""
    out = torch.empty(BLOCK, BLOCK)
    for query in queries.split(BLOCK):
        for row in rows.split(BLOCK):
            torch.mm(query, row.T, out=out[: len(query), : len(row)] if len(query) == BLOCK == len(row) else None)


def score(votes: torch.Tensor, truth: torch.Tensor) -> None:
    """Upsample votes [V, C, h, w], take the best class, count pairs with [V, H, W]."""
    classes = votes.shape[1]
    for vote, wanted in zip(votes, truth, strict=True):
        best = F.interpolate(vote[None], (SIDE, SIDE), mode="bilinear")[0].argmax(0)
        torch.bincount((wanted * classes + best).flatten(), minlength=classes**2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="data set in the layout of Pascal VOC")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True, help="a .json file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    train, val = (
        open_segmentation(args.data, "train", variant="hbird"),
        open_segmentation(args.data, "val", variant="hbird"),
    )
    train, val = train.select(range(TRAIN)), val.select(range(VAL))
    grid, classes = SIDE // PATCH, len(train.class_names)
    queries, rows = VAL * grid**2, TRAIN * grid**2
    photos = [Path(images.images[i].location) for images in (train, val) for i in range(len(images))]
    masks = [next((Path(args.data) / "SegmentationClass").glob(f"{photo.stem}.*")) for photo in photos]
    generator = torch.Generator().manual_seed(0)
    asked = F.normalize(torch.randn(queries, WIDTH, generator=generator), dim=1)
    memory = F.normalize(torch.randn(rows, WIDTH, generator=generator), dim=1)
    votes = torch.rand(VAL, classes, grid, grid, generator=generator)
    truth = torch.randint(classes, (VAL, SIDE, SIDE), generator=generator)
    backbone: Any = amradio.load_backbone(Patches().eval(), patch_size=PATCH)
    config = InContextConfig(protocol=get_protocol("hbird-2.0"), seed=42, stream_batch=16)
    setup = Setup(in_context_policy(backbone, (SIDE,)), ExtractOptions(batch_size=16, workers=1))
    work: dict[str, Callable[[], object]] = {
        "decoding and resizing": lambda: decode(photos, masks),
        "matrix products": lambda: products(asked, memory),
        "upsampling, argmax, counting": lambda: score(votes, truth),
        "search by top_k": lambda: top_k(asked, memory, 30),
        "network": lambda: [backbone(torch.zeros(16, 3, SIDE, SIDE)) for _ in range((TRAIN + VAL) // 16)],
        "ours": lambda: run_in_context(backbone, train, val, config, setup),
    }
    rounds = [{name: timed(one) for name, one in work.items()} for _ in range(args.rounds)]
    seconds = {name: statistics.median(r[name] for r in rounds) for name in work}
    floor = sum(seconds[name] for name in list(work)[:3])
    counted = {
        "queries": queries,
        "rows": rows,
        "search_gflop": 2e-9 * queries * rows * WIDTH,
        "search_gib_of_scores": 4 * queries * rows / 2**30,
        "memory_mib": 4 * rows * WIDTH / 2**20,
        "decoded_megapixels": sum(Image.open(photo).size[0] * Image.open(photo).size[1] for photo in photos) / 1e6,
        "scoring_gflop": 1e-9 * VAL * SIDE**2 * classes * 7,  # four products and three sums for each value
    }
    result = {
        "machine": f"{platform.machine()}, python {platform.python_version()}, torch {torch.__version__}",
        "rounds": args.rounds,
        "counted": counted,
        "cpu_s": seconds,
        "floor_s": floor,
        "ours_without_network_s": seconds["ours"] - seconds["network"],
        "ours_over_floor": (seconds["ours"] - seconds["network"]) / floor,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
