"""Resizing pictures and masks alike, and the bounds of what is drawn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from amradio.evals.in_context.transforms import (
    Change,
    apply_jitter,
    draw_change,
    resize_exactly,
    resize_mask,
    resize_picture,
)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 60), st.integers(1, 60))
def test_masks_are_resized_as_torch_does(height: int, width: int, h: int, w: int) -> None:
    mask = np.random.default_rng(0).integers(0, 256, (height, width)).astype(np.uint8)
    for nearest, mode in (("corner", "nearest"), ("centre", "nearest-exact")):
        expected = F.interpolate(torch.from_numpy(mask)[None, None].float(), (h, w), mode=mode)[0, 0]
        assert np.array_equal(resize_mask(mask, (h, w), None, nearest), expected.numpy().astype(np.uint8))


def test_a_crop_is_a_cut_and_then_a_resize() -> None:
    rng = np.random.default_rng(0)
    pixels, mask = rng.integers(0, 256, (40, 50, 3)).astype(np.uint8), rng.integers(0, 5, (40, 50)).astype(np.uint8)
    crop, part = (5, 7, 20, 31), (slice(5, 25), slice(7, 38))
    picture, cut = Image.fromarray(pixels), Image.fromarray(pixels[part])
    assert torch.equal(resize_picture(picture, (16, 24), crop), resize_picture(cut, (16, 24)))
    assert torch.equal(resize_exactly(picture, (16, 24), crop), resize_exactly(cut, (16, 24), None))
    assert np.array_equal(resize_mask(mask, (16, 24), crop), resize_mask(mask[part], (16, 24)))
    rough, fine = resize_picture(picture, (16, 24), crop) / 255, resize_exactly(picture, (16, 24), crop)
    assert (rough - fine).abs().max() < 2.1 / 255  # Pillow rounds after each direction


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 400), st.integers(2, 400), st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**31))
def test_crops_lie_inside(height: int, width: int, h: int, w: int, seed: int) -> None:
    change = draw_change((height, width), (h * 16, w * 16), torch.Generator().manual_seed(seed))
    assert change.crop is not None
    top, left, rows, columns = change.crop
    assert 0 <= top <= top + rows <= height
    assert 0 <= left <= left + columns <= width
    assert all(f is None or 0.9 <= f <= 1.1 for f in change.jitter[:3])
    assert change.jitter[3] is None or -0.1 <= change.jitter[3] <= 0.1


def test_crops_of_squares_have_the_published_statistics() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [draw_change((375, 500), (64, 64), generator) for _ in range(2000)]
    areas = np.array([c.crop[2] * c.crop[3] / (375 * 500) for c in drawn if c.crop is not None])
    assert areas.mean() == pytest.approx(0.71, abs=0.02)  # of 500 x 375 pictures: 0.71
    share = np.mean([[f is None for f in c.jitter] for c in drawn], axis=0)
    assert share == pytest.approx([0.5] * 4, abs=0.05)


def test_no_change_changes_nothing() -> None:
    picture = Image.effect_noise((20, 16), 80).convert("RGB")
    assert apply_jitter(picture, Change()) is picture
    brighter = np.asarray(apply_jitter(picture, Change((1.1, None, None, None)))).astype(int)
    assert (brighter >= np.asarray(picture)).all()
    turned = apply_jitter(Image.new("RGB", (4, 4), (255, 0, 0)), Change((None, None, None, 1 / 3)))
    assert turned.getpixel((0, 0))[1] > 250  # red turned by a third of the circle is green
