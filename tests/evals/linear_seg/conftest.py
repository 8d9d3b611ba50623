"""A backbone that sees colours, and pictures whose classes are colours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from amradio.images.segmentation import SegmentationSet, open_segmentation
from amradio.models.configs import Resolution
from amradio.models.output import RadioOutput

COLOURS = np.array([(200, 60, 60), (60, 200, 60), (60, 60, 200)], dtype=np.uint8)
VOID = 255


class ColourBackbone(nn.Module):
    """Patches of 4 pixels; features are the mean colour and its products. It counts the pictures that it sees."""

    patch_size = min_resolution_step = 4
    embed_dim, summary_dim = 6, 3
    preferred_resolution = Resolution(16, 16)

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self.eval()

    def get_nearest_supported_resolution(self, height: int, width: int) -> Resolution:
        return Resolution(*(max(round(s / 4) * 4, 4) for s in (height, width)))

    def forward(self, images: Tensor, feature_fmt: str = "NLC") -> RadioOutput:
        assert images.shape[-1] % 4 == images.shape[-2] % 4 == 0
        self.seen += len(images)
        colours = F.avg_pool2d(images, 4)  # [B, 3, h, w]
        maps = torch.cat([colours, colours * colours.roll(1, 1)], 1)  # [B, 6, h, w]
        shapes = {"NCHW": maps, "NHWC": maps.permute(0, 2, 3, 1), "NLC": maps.flatten(2).mT}
        return RadioOutput(images.mean((2, 3)), shapes[feature_fmt])


def write_set(folder: Path, count: int, seed: int, side: tuple[int, int] = (24, 32)) -> Path:
    """Pictures of blocks of noisy colours, with a strip of void at the left."""
    rng = np.random.default_rng(seed)
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for i in range(count):
        mask = rng.integers(0, 3, (side[0] // 8, side[1] // 8)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
        pixels = np.clip(COLOURS[mask] + rng.normal(0, 20, (*side, 3)), 0, 255).astype(np.uint8)
        mask[:, :2] = VOID
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{i}.png")
    (folder / "classes.txt").write_text("red\ngreen\nblue\n")
    return folder


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def backbone() -> ColourBackbone:
    return ColourBackbone()


@pytest.fixture
def make_set(tmp_path: Path) -> Callable[..., SegmentationSet]:
    """``make_set("train", count, seed)``."""
    return lambda name, count, seed, **kwargs: open_segmentation(write_set(tmp_path / name, count, seed, **kwargs))
