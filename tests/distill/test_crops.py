"""Views: pure functions of their key, the same crop at every size; mosaics and back."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from amradio.distill.crops import Crop, CropOptions, View, cut_mosaic, draw_view, epoch_order, make_mosaic
from amradio.errors import ConfigError, OptionError

ORDER = [5, 6, 9, 3, 2, 1, 0, 8, 4, 7]
CROP = [0.7689563307795984, 0.9337447128666517, 0.08235609908581576, 0.32651342876752787]
ALL = CropOptions(brightness=0.4, contrast=0.4, saturation=0.4, mixup=0.5)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth, without symmetry."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 300), seed=st.integers(0, 2**63), epoch=st.integers(0, 10**6))
def test_an_epoch_is_a_permutation_and_pure(count: int, seed: int, epoch: int) -> None:
    order = epoch_order(count, seed, epoch)
    assert sorted(order.tolist()) == list(range(count))
    assert np.array_equal(order, epoch_order(count, seed, epoch))


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**63), epoch=st.integers(0, 10**6), index=st.integers(0, 99))
def test_views_are_pure_and_within_bounds(seed: int, epoch: int, index: int) -> None:
    view = draw_view(ALL, seed, epoch, index, 100)
    np.random.default_rng().random()
    assert view == draw_view(ALL, seed, epoch, index, 100)
    assert view.indices[0] == index
    assert len(set(view.indices)) == len(view.crops)
    assert all(0 <= i < 100 for i in view.indices)
    for crop in view.crops:
        assert 0.2 <= crop.area <= 1
        assert 3 / 4 - 1e-12 <= crop.ratio <= 4 / 3 + 1e-12
    assert all(0.6 <= f <= 1.4 for f in (view.brightness, view.contrast, view.saturation))


def test_views_are_the_same_in_another_process() -> None:
    what = "draw_view(CropOptions(mixup=1.0), 5, 6, 7, 8), epoch_order(9, 5, 6)"
    code = f"from amradio.distill.crops import *; print({what})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == f"{draw_view(CropOptions(mixup=1.0), 5, 6, 7, 8)} {epoch_order(9, 5, 6)}"


def test_the_stream_never_changes() -> None:
    """A run that goes on under another version must go on with the same pictures."""
    assert epoch_order(10, 1, 2).tolist() == ORDER
    view = draw_view(CropOptions(), 1, 2, 3, 10)
    assert [view.crops[0].area, view.crops[0].ratio, view.crops[0].x, view.crops[0].y] == pytest.approx(CROP, rel=1e-12)


def test_draws_are_spread_as_asked() -> None:
    views = [draw_view(ALL, 0, 0, i, 3000) for i in range(3000)]
    crops = [view.crops[0] for view in views]
    assert np.mean([c.flip for c in crops]) == pytest.approx(0.5, abs=0.04)
    assert np.mean([c.area for c in crops]) == pytest.approx(0.6, abs=0.02)
    assert np.mean([np.log(c.ratio) for c in crops]) == pytest.approx(0, abs=0.02)
    mixed = [view for view in views if len(view.crops) == 2]
    assert len(mixed) / 3000 == pytest.approx(0.5, abs=0.04)
    assert np.mean([view.share for view in mixed]) == pytest.approx(0.5, abs=0.04)
    assert len({view.indices[1] for view in mixed}) > 1000
    plain = draw_view(CropOptions(), 0, 0, 0, 10)
    assert (plain.share, plain.brightness, plain.contrast, plain.saturation) == (1, 1, 1, 1)
    assert draw_view(ALL, 0, 0, 0, 1).indices == (0,)  # alone, there is nothing to mix with


@settings(max_examples=150, deadline=None)
@given(
    width=st.integers(1, 4000),
    height=st.integers(1, 4000),
    area=st.floats(0.01, 1),
    ratio=st.floats(0.2, 5),
    x=st.floats(0, 1),
    y=st.floats(0, 1),
)
def test_boxes_fit_keep_the_ratio_and_the_promised_side(
    width: int, height: int, area: float, ratio: float, x: float, y: float
) -> None:
    crop = Crop(0, area, ratio, x, y, False)
    left, top, right, bottom = crop.box(width, height)
    slack = 1e-9 * max(width, height)
    assert -slack <= left <= right <= width + slack
    assert -slack <= top <= bottom <= height + slack
    assert (right - left) / (bottom - top) == pytest.approx(ratio, rel=1e-6)
    assert min(right - left, bottom - top) >= crop.smallest_side * min(width, height) * (1 - 1e-6)
    whole = 1 - 1e-9
    if area * width * height * max(ratio, 1 / ratio) <= min(width, height) ** 2 * whole:
        assert (right - left) * (bottom - top) == pytest.approx(area * width * height, rel=1e-6)


def test_rendering_equals_pillow() -> None:
    image = picture(90, 70)
    crop = Crop(0, 0.4, 1.1, 0.3, 0.8, False)
    expected = image.resize((32, 24), Image.Resampling.BICUBIC, box=crop.box(90, 70))
    found = View((crop,)).render([image], (24, 32))
    assert found.dtype == torch.uint8
    assert found.shape == (3, 24, 32)
    assert found.is_contiguous()
    assert np.array_equal(found.permute(1, 2, 0).numpy(), np.asarray(expected))
    flipped = View((Crop(0, 0.4, 1.1, 0.3, 0.8, True),)).render([image], (24, 32))
    assert torch.equal(flipped, found.flip(-1))


def test_all_sizes_show_the_same_crop() -> None:
    view = draw_view(ALL, 0, 0, 4, 9)
    images = [picture(300, 200, i) for i in view.indices]
    small, large = (view.render(images, (s, s)).float()[None] for s in (48, 192))
    pooled = torch.nn.functional.interpolate(large, (48, 48), mode="bicubic", antialias=True)
    assert float((pooled - small).abs().mean()) < 1.5


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shift", [(0, 8), (8, 0), (-8, 16), (16, -24), (-8, -8)])
@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_shifted_windows_agree_where_they_overlap(flip: bool, shift: tuple[int, int], place: float) -> None:
    view = View((Crop(0, 0.5, 1.0, place, place, flip),), 1.0, 1.2, 0.8, 0.9)
    image = picture(200, 200)
    student = view.render([image], (64, 64)).int()
    teacher = view.render([image], (64, 64), shift).int()
    rows, columns = shift
    ours = student[:, max(rows, 0) : 64 + min(rows, 0), max(columns, 0) : 64 + min(columns, 0)]
    theirs = teacher[:, max(-rows, 0) : 64 - max(rows, 0), max(-columns, 0) : 64 - max(columns, 0)]
    difference = (ours - theirs).abs()
    # At the picture's own edge the filter sees replicated pixels instead of none.
    inner = difference[:, 2:-2, 2:-2]
    assert int(inner.max()) <= 1
    assert int(difference.max()) <= 16
    if place == 0.5:
        assert float((student - teacher).abs().float().mean()) > 1  # it did move


def test_beyond_the_picture_its_edge_goes_on() -> None:
    image = Image.new("RGB", (40, 40), (10, 200, 30))
    out = View((Crop(0, 1.0, 1.0, 0, 0, False),)).render([image], (16, 16), (-10, 12))
    assert torch.equal(out, torch.tensor([10, 200, 30], dtype=torch.uint8)[:, None, None].expand(3, 16, 16))


def test_mixtures_and_colours_are_what_they_say() -> None:
    a, b = Image.new("RGB", (8, 8), (200, 100, 0)), Image.new("RGB", (6, 9), (0, 100, 100))
    crops = (Crop(0, 1, 1, 0, 0, False), Crop(1, 1, 1, 0, 0, False))

    def colour(view: View, *pictures: Image.Image) -> list[int]:
        return view.render(pictures, (4, 4))[:, 1, 2].tolist()

    assert colour(View(crops, 0.25), a, b) == [50, 100, 75]
    assert colour(View(crops[:1], brightness=0.5), a) == [100, 50, 0]
    assert colour(View(crops[:1], brightness=1.4), a) == [255, 140, 0]
    assert colour(View(crops[:1], contrast=0.5), a) == [164, 114, 64]
    grey = 0.299 * 200 + 0.587 * 100
    assert colour(View(crops[:1], saturation=0.0), a) == [round(grey)] * 3
    with pytest.raises(OptionError, match="shows 2 pictures, got 1"):
        colour(View(crops, 0.25), a)


@settings(max_examples=40, deadline=None)
@given(k=st.integers(1, 4), groups=st.integers(1, 3), h=st.integers(1, 5), w=st.integers(1, 5))
def test_mosaics_are_cut_back_exactly(k: int, groups: int, h: int, w: int) -> None:
    images = torch.randint(0, 256, (groups * k * k, 3, h, w), dtype=torch.uint8)
    mosaic = make_mosaic(images, k)
    assert mosaic.shape == (groups, 3, k * h, k * w)
    assert torch.equal(cut_mosaic(mosaic, k), images)
    for i in range(groups * k * k):  # row by row
        row, column = divmod(i % (k * k), k)
        tile = mosaic[i // (k * k), :, row * h : (row + 1) * h, column * w : (column + 1) * w]
        assert torch.equal(tile, images[i])


def test_mosaics_that_cannot_be() -> None:
    with pytest.raises(OptionError, match="takes a multiple of 4 pictures, got 6"):
        make_mosaic(torch.zeros(6, 3, 2, 2), 2)
    with pytest.raises(OptionError, match="7 x 8 positions cannot be cut into 2 x 2"):
        cut_mosaic(torch.zeros(1, 3, 7, 8), 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": (0.0, 1.0)}, "scale"),
        ({"scale": (0.5, 0.2)}, "scale"),
        ({"ratio": (2.0, 1.0)}, "ratio"),
        ({"flip": 1.5}, "flip"),
        ({"mixup": -0.1}, "mixup"),
        ({"contrast": 2.0}, "contrast"),
    ],
)
def test_impossible_options_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CropOptions(**options)
