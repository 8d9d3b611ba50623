"""An evaluation that one process and several must agree on: ``torchrun two_processes.py FOLDER`` writes its results."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from amradio.models.configs import Resolution
from amradio.models.output import RadioOutput


class Colours(torch.nn.Module):
    """The mean colour and the brightest colour of each patch."""

    patch_size = min_resolution_step = 4
    embed_dim = summary_dim = 6
    preferred_resolution = Resolution(16, 24)

    def __init__(self) -> None:
        super().__init__()
        self.pictures = 0
        self.eval()

    def get_nearest_supported_resolution(self, height: int, width: int) -> Resolution:
        return Resolution(*(max(round(s / 4) * 4, 4) for s in (height, width)))

    def forward(self, images: torch.Tensor, feature_fmt: str = "NLC") -> RadioOutput:
        self.pictures += len(images)
        b, _, height, width = images.shape
        cells = images.view(b, 3, height // 4, 4, width // 4, 4)
        maps = torch.cat([cells.mean((3, 5)), cells.amax((3, 5))], 1)
        return RadioOutput(maps.mean((2, 3)), maps if feature_fmt == "NCHW" else maps.flatten(2).mT)


def measure(folder: Path, group: Any) -> dict[str, Any]:
    """All protocols, with sheets and a saved memory."""
    from amradio.evals.in_context import (
        InContextConfig,
        SheetOptions,
        get_protocol,
        in_context_policy,
        load_memory,
        run_in_context,
    )
    from amradio.evals.runner import Setup
    from amradio.features import ExtractOptions
    from amradio.images.segmentation import open_segmentation

    train, val = (open_segmentation(folder / name) for name in ("train", "val"))
    found: dict[str, Any] = {}
    for name, sizes in (("clean", (56, None)), ("hbird-2.0", (60,)), ("fungi-paper", (60,))):
        backbone = Colours()
        config = InContextConfig(
            protocol=get_protocol(name),
            k=5,
            memory_sizes=sizes,
            augmentation_epochs=2,
            stream_batch=None if name == "clean" else 3,
        )
        setup = Setup(in_context_policy(backbone), ExtractOptions(batch_size=2), group)
        sheets: list[str] = []
        path = folder / f"{name}-{0 if group is None else group.world_size}.safetensors"
        reports = run_in_context(
            backbone, train, val, config, setup, memory_out=path, sheets=SheetOptions(3),
            on_sheet=lambda sheet: sheets.append(sheet.id),  # noqa: B023
        )  # fmt: skip
        if group is not None:
            group.barrier()
        bank = load_memory(path)
        found[name] = {
            "metrics": [{k: m.value for k, m in r.metrics.items()} for r in reports],
            "confusion": [r.details["confusion"] for r in reports],
            "failures": [{role: d["failures"] for role, d in r.dataset.items()} for r in reports],
            "memory": [bank.pictures.tolist(), bank.item.tolist(), bank.patch.tolist(), bank.rank.tolist()],
            "features": bank.features.double().sum().item(),
        }
        found[f"{name} parts"] = {"pictures": backbone.pictures, "sheets": sheets}
    return found


def main(folder: Path) -> None:
    from amradio.distributed import init_group

    torch.set_num_threads(1)
    with init_group("cpu") as group:
        assert group is not None
        (folder / f"rank{group.rank}.json").write_text(json.dumps(measure(folder, group)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
