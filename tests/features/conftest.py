from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from amradio.images import expand
from amradio.models.output import RadioOutput


class FakeModel:
    """Patches of 4 pixels; the summary is the mean colour, the features are each patch's: easy to check."""

    patch = 4

    def __init__(self) -> None:
        self.batches: list[tuple[int, ...]] = []
        self.threads: set[str] = set()
        self.max_pixels: int | None = None  # of a batch, above which "memory" runs out
        self.with_adaptor = False

    def __call__(self, images: Tensor, feature_fmt: str = "NLC"):
        assert feature_fmt == "NCHW"
        self.batches.append(tuple(images.shape))
        self.threads.add(threading.current_thread().name)
        if self.max_pixels is not None and images.shape[0] * images.shape[2] * images.shape[3] > self.max_pixels:
            raise torch.OutOfMemoryError("fake device out of memory")
        out = RadioOutput(images.mean((2, 3)), torch.nn.functional.avg_pool2d(images, self.patch))
        if self.with_adaptor:
            return {"backbone": out, "clip": RadioOutput(out.summary * 2, out.features * 2)}
        return out

    def get_nearest_supported_resolution(self, height: int, width: int) -> tuple[int, int]:
        return tuple(max(round(s / self.patch) * self.patch, self.patch) for s in (height, width))


@pytest.fixture
def model() -> FakeModel:
    return FakeModel()


@pytest.fixture
def photos(tmp_path):
    """Make a folder of pictures of given (height, width), each of one colour told by its position."""

    def make(sizes, broken=()):
        folder = tmp_path / "photos"
        folder.mkdir()
        for i, (height, width) in enumerate(sizes):
            path = folder / f"{i}.png"
            if i in broken:
                path.write_bytes(b"not a picture at all")
            else:
                colour = (i % 256, (i * 7) % 256, 255 - i % 256)
                Image.fromarray(np.full((height, width, 3), colour, np.uint8)).save(path)
        return expand([folder])

    return make
