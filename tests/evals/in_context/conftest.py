"""Backbones and sets of pictures with masks for tests of in-context segmentation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from amradio.evals.in_context.protocol import HBIRD_STD, IMAGENET_MEAN
from amradio.images.segmentation import SegmentationSet, open_segmentation
from amradio.models.configs import Resolution
from amradio.models.output import RadioOutput


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """Toy models take longer on several threads than on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def unconditioned() -> Callable[[Tensor], Tensor]:
    """Undo the normalisation of a golden input: [B, 3, H, W] in [0, 1]."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, HBIRD_STD))
    return lambda images: images * std + mean


class ColourBackbone(nn.Module):
    """Features of a patch are its mean colour, its deviations, and a constant; wider than tall is fine."""

    patch_size = min_resolution_step = 4
    embed_dim, summary_dim = 7, 7
    preferred_resolution = Resolution(16, 24)

    def __init__(self) -> None:
        super().__init__()
        self.pictures = 0
        self.eval()

    def get_nearest_supported_resolution(self, height: int, width: int) -> Resolution:
        return Resolution(*(max(round(s / 4) * 4, 4) for s in (height, width)))

    def forward(self, images: Tensor, feature_fmt: str = "NLC") -> RadioOutput:
        self.pictures += len(images)
        b, _, height, width = images.shape
        cells = images.view(b, 3, height // 4, 4, width // 4, 4)
        maps = torch.cat([cells.mean((3, 5)), cells.std((3, 5)), torch.full_like(cells[:, :1, :, 0, :, 0], 0.1)], 1)
        tokens = maps.flatten(2).mT
        return RadioOutput(tokens.mean(1), maps if feature_fmt == "NCHW" else tokens)


@pytest.fixture
def backbone() -> ColourBackbone:
    """A backbone that knows colours."""
    return ColourBackbone()


def write_set(
    root: Path,
    masks: Sequence[np.ndarray],
    classes: Sequence[str] = ("dark", "red", "blue"),
    seed: int = 0,
) -> Path:
    """Pictures whose colours say their classes, in the layout ``folder``."""
    colours = np.array([[40, 40, 40], [200, 60, 50], [60, 70, 200], [80, 190, 70]])
    rng = np.random.default_rng(seed)
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    (root / "classes.txt").write_text("\n".join(classes) + "\n", encoding="utf-8")
    for i, mask in enumerate(masks):
        shown = np.where(mask == 255, 3, mask)
        pixels = np.clip(colours[shown] + rng.normal(0, 20, (*mask.shape, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"p{i:02d}.png")
        Image.fromarray(mask.astype(np.uint8)).save(root / "masks" / f"p{i:02d}.png")
    return root


def random_masks(count: int, seed: int, size: tuple[int, int] = (20, 28), void: float = 0.1) -> list[np.ndarray]:
    """Masks of blocks of 3 classes and some void."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        blocks = rng.integers(0, 3, (-(-size[0] // 5), -(-size[1] // 7)))
        blocks = np.where(rng.random(blocks.shape) < void, 255, blocks)
        found.append(np.kron(blocks, np.ones((5, 7), int))[: size[0], : size[1]].astype(np.uint8))
    return found


@pytest.fixture
def make_set(tmp_path: Path) -> Callable[..., SegmentationSet]:
    """``make_set("train", masks)``: pictures with these masks, written and opened."""

    def make(name: str, masks: Sequence[np.ndarray], seed: int = 0, **options: Any) -> SegmentationSet:
        return open_segmentation(write_set(tmp_path / name, masks, seed=seed, **options))

    return make


@pytest.fixture
def sets(make_set: Any) -> tuple[SegmentationSet, SegmentationSet]:
    """Seven pictures to learn from and three to segment."""
    return make_set("train", random_masks(7, 1), 1), make_set("val", random_masks(3, 2), 2)


@pytest.fixture
def masks() -> Callable[..., list[np.ndarray]]:
    """`random_masks`."""
    return random_masks


@pytest.fixture
def replaced() -> Callable[..., Any]:
    """`dataclasses.replace`."""
    return dataclasses.replace
