"""Frames through several views, each frame read once."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from amradio.backbones.callables import CallableBackbone
from amradio.errors import OptionError
from amradio.features import feature_map
from amradio.features.frames import View, frame_maps
from amradio.images import ResizePolicy
from amradio.images.video import Frame


def backbone(scale: float = 1.0) -> CallableBackbone:
    toy = CallableBackbone(lambda images: scale * torch.nn.functional.avg_pool2d(images, 8), patch_size=8, name="toy")
    return toy.eval()


def frames(count: int, read: list[int] | None = None) -> Iterator[Frame]:
    rng = np.random.default_rng(0)
    for i in range(count):
        if read is not None:
            read.append(i)
        yield Frame(i, Fraction(i, 10), Image.fromarray(rng.integers(0, 256, (40, 56, 3), dtype=np.uint8)))


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_equal_each_view_by_itself(batch_size: int) -> None:
    views = [View(backbone(), ResizePolicy("shortest", (16,), 8)), View(backbone(2), ResizePolicy("crop", (32, 32), 8))]
    found = list(frame_maps(views, frames(7), batch_size=batch_size))
    assert [frame.index for frame, _ in found] == list(range(7))
    for frame, maps in found:
        for view, one in zip(views, maps, strict=True):
            expected = feature_map(view.backbone, frame.image, view.policy)
            torch.testing.assert_close(one.features, expected.features)
            assert one.photo.tobytes() == expected.photo.tobytes()


def test_frames_are_read_a_batch_at_a_time() -> None:
    read: list[int] = []
    found = frame_maps([View(backbone(), ResizePolicy("nearest", (), 8))] * 3, frames(100, read), batch_size=4)
    for _ in range(5):
        next(found)
    assert read == list(range(8))


def test_refusals() -> None:
    with pytest.raises(OptionError, match="at least one view and a batch of at least 1, got 0, 8"):
        frame_maps([], frames(1))
    with pytest.raises(OptionError, match="got 1, 0"):
        frame_maps([View(backbone(), ResizePolicy("nearest"))], frames(1), batch_size=0)
