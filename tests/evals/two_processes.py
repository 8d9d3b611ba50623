"""Evaluations that one process and several must agree on: ``torchrun two_processes.py FOLDER`` writes what it measures.

The tests also take the backbones from here.
"""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from amradio.models.configs import Resolution
from amradio.models.output import RadioOutput


class TinyTextBackbone(nn.Module):
    """Patches of 4 pixels; the summary is the mean colour. Texts are embedded as sums over fixed vectors of words."""

    patch_size = min_resolution_step = 4
    embed_dim, summary_dim = 5, 3
    preferred_resolution = Resolution(16, 16)

    def __init__(self, vocabulary: dict[str, Sequence[float]] | None = None, scale: float | None = 2.0) -> None:
        super().__init__()
        self.vocabulary = vocabulary or {}
        self.text = SimpleNamespace(logit_scale=scale, logit_bias=None)
        self.batches: list[int] = []
        self.pictures = 0
        self.eval()

    def get_nearest_supported_resolution(self, height: int, width: int) -> Resolution:
        return Resolution(*(max(round(s / 4) * 4, 4) for s in (height, width)))

    def forward(self, images: Tensor, feature_fmt: str = "NLC") -> RadioOutput:
        self.pictures += len(images)
        colours = F.avg_pool2d(images, 4)  # [B, 3, h, w]
        h, w = colours.shape[2:]
        xy = torch.stack(torch.meshgrid(torch.arange(h) / h, torch.arange(w) / w, indexing="ij"))  # [2, h, w]
        maps = torch.cat([colours, xy.expand(len(images), -1, -1, -1)], 1)
        return RadioOutput(images.mean((2, 3)) - 0.5, maps if feature_fmt == "NCHW" else maps.flatten(2).mT)

    def tokenizer(self, texts: list[str]) -> Tensor:
        self.batches.append(len(texts))
        return torch.stack([sum(map(self._word, text.split()), torch.zeros(3)) for text in texts])

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        return F.normalize(tokens, dim=1) if normalize else tokens

    def _word(self, word: str) -> Tensor:
        word = word.strip(".,")
        if word in self.vocabulary:
            return torch.tensor(self.vocabulary[word])
        return torch.randn(3, generator=torch.Generator().manual_seed(zlib.crc32(word.encode()))) * 0.1


def measure(folder: Path, group: Any, on_backbone: Callable[[TinyTextBackbone], None] = lambda _: None) -> dict:
    """Run every evaluation that is shared out in its own way; broken pictures are among the others."""
    from amradio.evals.captions import load_captions
    from amradio.evals.position import PositionConfig, run_position
    from amradio.evals.retrieval import run_retrieval
    from amradio.evals.runner import Setup, policy_for
    from amradio.evals.zero_shot import ZeroShotConfig, run_zero_shot
    from amradio.features import ExtractOptions
    from amradio.images import open_images

    backbone = TinyTextBackbone({f"class{c}": [c - 2.5, c % 2 - 0.5, 0.3 * c - 1] for c in range(6)})
    setup = Setup(policy_for(backbone), ExtractOptions(batch_size=4), group)
    train, evaluation = (open_images(str(folder / name)) for name in ("train", "eval"))
    runs = {
        "zero-shot": run_zero_shot(
            backbone, evaluation, ZeroShotConfig(templates="simple"), setup, text_batch_size=9, use_cache=False
        ),
        "retrieval": run_retrieval(backbone, load_captions(folder / "captions.jsonl"), setup=setup, text_batch_size=4),
        "ridge": run_position(backbone, train, evaluation, PositionConfig(solver="ridge"), setup),
    }
    for name, cache_bytes in (("adam", 0), ("adam, kept", 2**30)):
        config = PositionConfig(epochs=2, batch_size=5)
        runs[name] = run_position(backbone, train, evaluation, config, setup, cache_bytes=cache_bytes)
    on_backbone(backbone)
    return {
        name: {
            "metrics": {k: m.value for k, m in r.metrics.items()},
            "failures": {role: [f["path"] for f in d["failures"]] for role, d in r.dataset.items()},
            "counts": {role: d["count"] for role, d in r.dataset.items()},
            "per_class": r.per_class,
            "confusion": r.details.get("confusion"),
            "probability": r.details.get("mean_probability_of_true_class"),
        }
        for name, r in runs.items()
    }


def main(folder: Path) -> None:
    from amradio.distributed import init_group

    torch.set_num_threads(1)
    with init_group("cpu") as group:
        assert group is not None
        pictures: list[int] = []
        result = measure(folder, group, lambda backbone: pictures.append(backbone.pictures))
        (folder / f"rank{group.rank}.json").write_text(json.dumps({"result": result, "pictures": pictures[0]}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
