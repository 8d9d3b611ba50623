"""Runs of the engine that need processes of their own: started by tests, also under torchrun.

python programs.py collect SOURCE OUT         tables of each process, as OUT/RANK.pt: all rows, its own, of a small set
python programs.py embed SOURCE OUT [fail]    a folder of embeddings; with `fail` the second process breaks down
python programs.py both SOURCE OUT            the two, into OUT/tables and OUT/embeddings
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from amradio.distributed import Group, init_group
from amradio.features import EmbedOptions, ExtractOptions, collect, embed
from amradio.images import ImageSet, ResizePolicy, open_images
from amradio.models.output import RadioOutput

SHARD_SIZE = 8
SECONDS_A_BATCH = float(os.environ.get("SECONDS_A_BATCH", "0"))


class Patches(torch.nn.Module):
    """A small convolution with fixed weights; as slow as it is told to be."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 5, 4, 4)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, generator=generator)
        self.eval()

    def forward(self, images: torch.Tensor, feature_fmt: str = "NLC") -> RadioOutput:
        time.sleep(SECONDS_A_BATCH)
        maps = self.layer(images)
        return RadioOutput(maps.mean((2, 3)), maps)

    def get_nearest_supported_resolution(self, height: int, width: int) -> tuple[int, int]:
        return max(round(height / 4) * 4, 4), max(round(width / 4) * 4, 4)


POLICY = ResizePolicy("nearest")
OPTIONS = ExtractOptions(batch_size=4, workers=2)


def run_collect(images: ImageSet, out: Path, group: Group | None) -> None:
    def table(some: ImageSet, gather: bool) -> Any:
        found = collect(some, Patches(), POLICY, OPTIONS, group=group, gather=gather, shard_size=SHARD_SIZE)
        failures = [(f.position, f.id, f.location, f.reason) for f in found.failures]
        return found.positions, found.labels, found.summaries, failures, found.timing

    tables = [table(images, True), table(images, False), table(images.head(SHARD_SIZE - 3), False)]
    out.mkdir(parents=True, exist_ok=True)
    torch.save(tables, out / f"{0 if group is None else group.rank}.pt")


def run_embed(images: ImageSet, out: Path, group: Group | None, *, fail: bool) -> None:
    model = Patches()
    if fail and group is not None and group.rank == 1:
        model.layer = None
    progress: list[int] = []
    options = EmbedOptions(shard_size=SHARD_SIZE)
    result = embed(images, model, POLICY, out, OPTIONS, options, group=group, on_progress=progress.append)
    assert sum(progress) == len(images) == result["images"]
    assert min(progress) > 0


def main(task: str, source: str, out: str, *flags: str) -> None:
    torch.set_num_threads(1)
    images, folder = open_images(source), Path(out)
    with init_group("cpu") as group:
        if task in ("collect", "both"):
            run_collect(images, folder / "tables" if task == "both" else folder, group)
        if task in ("embed", "both"):
            run_embed(images, folder / "embeddings" if task == "both" else folder, group, fail="fail" in flags)


if __name__ == "__main__":
    main(*sys.argv[1:])
