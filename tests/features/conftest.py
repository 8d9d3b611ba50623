from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import amradio
from amradio.images import expand, open_images
from amradio.models.output import RadioOutput

PROGRAMS = Path(__file__).parent / "programs.py"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(amradio.__file__).parent.parent), "OMP_NUM_THREADS": "1"}


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


@pytest.fixture
def labelled(photos):
    """The same, with two classes that take turns; in a list file, so that the order is that of the sizes."""

    def make(sizes, broken=()):
        images = photos(sizes, broken)
        listing = images[0].path.parent.parent / "pictures.txt"
        listing.write_text("".join(f"{images[i].path}\t{i % 2}\n" for i in range(len(images))))
        return open_images(str(listing))

    return make


@pytest.fixture
def start():
    """Start `programs.py` in a process, or in several under torchrun."""

    def run(*words, processes=1, **environment):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [sys.executable, *(launcher if processes > 1 else []), str(PROGRAMS), *map(str, words)]
        return subprocess.Popen(command, env=ENVIRONMENT | environment, stderr=subprocess.PIPE, text=True)

    return run


@pytest.fixture
def program(start):
    """Run `programs.py` to its end and return the exit code."""

    def run(*words, check=True, **options):
        with start(*words, **options) as process:
            _, errors = process.communicate(timeout=120)
        assert not check or process.returncode == 0, errors[-3000:]
        return process.returncode

    return run
