from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from amradio.models.configs import Resolution
from amradio.models.output import RadioOutput


class TinyBackbone(nn.Module):
    """Patches of 4 pixels; the summary is a fixed random function of the patches' mean colours."""

    patch_size = min_resolution_step = 4
    embed_dim, summary_dim = 3, 16
    preferred_resolution = Resolution(16, 16)

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(3, 16, bias=False)
        weight = torch.randn(16, 3, generator=torch.Generator().manual_seed(1))
        self.projection.weight = nn.Parameter(weight, requires_grad=False)
        self.sizes: set[tuple[int, int]] = set()
        self.eval()

    def get_nearest_supported_resolution(self, height: int, width: int) -> Resolution:
        return Resolution(*(max(round(s / 4) * 4, 4) for s in (height, width)))

    def forward(self, images: Tensor, feature_fmt: str = "NLC") -> RadioOutput:
        self.sizes.add(tuple(images.shape[-2:]))
        maps = torch.nn.functional.avg_pool2d(images, 4)  # [B, 3, h, w]
        summary = self.projection(images.mean((2, 3)) - 0.5)  # [B, 16]
        return RadioOutput(summary, maps if feature_fmt == "NCHW" else maps.flatten(2).mT)


@pytest.fixture
def backbone() -> TinyBackbone:
    return TinyBackbone()


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make a folder of class folders: colours scatter around one of each class, so that classes overlap a little."""

    def make(name: str, per_class: int, classes: int = 6, seed: int = 0, broken: int = 0) -> Path:
        rng = np.random.default_rng(seed)
        centres = np.random.default_rng(99).uniform(40, 215, (classes, 3))
        folder = tmp_path_factory.mktemp(name)
        for c in range(classes):
            (folder / f"class{c}").mkdir()
            for i in range(per_class):
                colour = np.clip(centres[c] + rng.normal(0, 35, 3), 0, 255)
                pixels = np.clip(colour + rng.normal(0, 8, (20, 28, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"class{c}" / f"{i}.png")
        for i in range(broken):
            (folder / "class0" / f"broken{i}.png").write_bytes(b"not a picture at all")
        return folder

    return make


@pytest.fixture(scope="session")
def folders(pictures: Callable[..., Path]) -> SimpleNamespace:
    """A train set of 120 and an evaluation set of 48 pictures in 6 classes."""
    return SimpleNamespace(train=pictures("train", 20), eval=pictures("eval", 8, seed=1))


@pytest.fixture
def sets(folders: SimpleNamespace) -> SimpleNamespace:
    from amradio.images import open_images

    return SimpleNamespace(train=open_images(str(folders.train)), eval=open_images(str(folders.eval)))


@pytest.fixture
def reference(backbone: TinyBackbone) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """Summaries and labels of a set, computed picture by picture."""
    from amradio.images import ResizePolicy, to_tensor
    from amradio.images.decode import MAX_PIXELS

    def compute(images, size: tuple[int, int] = (16, 16)) -> tuple[np.ndarray, np.ndarray]:
        policy = ResizePolicy.parse(size, multiple=4)
        rows = []
        for i in range(len(images)):
            picture = images[i].decode(max_pixels=MAX_PIXELS, background=(255, 255, 255))
            with torch.no_grad():
                rows.append(backbone(to_tensor(policy.apply(picture))[None]).summary[0].numpy())
        return np.stack(rows), np.array(images.labels)

    return compute
