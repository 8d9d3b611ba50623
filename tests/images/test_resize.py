import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from amradio.errors import OptionError, ResolutionError
from amradio.images import ResizePolicy, scaled_size

ROWS = json.loads((Path(__file__).parents[1] / "goldens/radio/cases/resize_sizes.json").read_text(encoding="utf-8"))
SIDES = st.integers(1, 5000)


def test_golden_sizes():
    assert len(ROWS) > 100
    for row in ROWS:
        got = scaled_size(*row["input"], row["size"], row["multiple"], inside=row["max_dim"])
        assert list(got) == row["output"], row


def test_golden_sizes_through_a_policy():
    for row in (r for r in ROWS if len(r["size"]) == 1):
        policy = ResizePolicy.parse(row["size"], "longest" if row["max_dim"] else "shortest", row["multiple"])
        # The published tool gives very thin pictures a side of 0.
        assert policy.target_size(*row["input"]) == tuple(max(s, row["multiple"]) for s in row["output"])


@given(st.sampled_from(["shortest", "longest"]), SIDES, SIDES, st.integers(1, 800), st.integers(1, 64))
def test_laws_of_aspect_keeping_modes(mode, height, width, size, multiple):
    policy = ResizePolicy(mode, (size,), multiple, max_pixels=2**62)
    h, w = policy.target_size(height, width)
    assert h % multiple == w % multiple == 0
    assert min(h, w) >= multiple
    scale = size / (min(height, width) if mode == "shortest" else max(height, width))
    for got, source in ((h, height), (w, width)):
        assert abs(got - source * scale) <= multiple / 2 + 1e-6 or got == multiple
    assert policy.target_size(width, height) == (w, h)


@given(st.sampled_from(["crop", "exact"]), SIDES, SIDES, st.integers(1, 800), st.integers(1, 800), st.integers(1, 64))
def test_laws_of_fixed_modes(mode, height, width, h, w, multiple):
    got = ResizePolicy(mode, (h, w), multiple).target_size(height, width)
    assert got == tuple(max(round(s / multiple) * multiple, multiple) for s in (h, w))


@given(SIDES, SIDES, st.integers(1, 64))
def test_laws_of_the_nearest_size(height, width, multiple):
    policy = ResizePolicy("nearest", multiple=multiple)
    h, w = policy.target_size(height, width)
    assert h % multiple == w % multiple == 0
    assert all(abs(g - s) <= multiple / 2 or g == multiple for g, s in ((h, height), (w, width)))
    assert policy.target_size(h, w) == (h, w)


@given(SIDES, SIDES, st.integers(1, 600), st.integers(1, 600))
def test_covering_and_fitting(height, width, h, w):
    cover, fit = (scaled_size(height, width, (h, w), inside=inside) for inside in (False, True))
    assert cover[0] >= h
    assert cover[1] >= w
    assert fit[0] <= h
    assert fit[1] <= w
    assert cover[0] == h or cover[1] == w
    assert fit[0] == h or fit[1] == w


def test_half_way_cases_go_to_the_even_multiple():
    assert ResizePolicy("exact", (24, 40), 16).target_size(1, 1) == (32, 32)  # 1.5 -> 2, 2.5 -> 2
    assert ResizePolicy("exact", (8, 56), 16).target_size(1, 1) == (16, 64)  # 0.5 -> 0, kept at one; 3.5 -> 4


def test_parse():
    parse = ResizePolicy.parse
    assert parse(None, multiple=16) == ResizePolicy("nearest", (), 16)
    assert parse([]) == ResizePolicy("nearest")
    assert parse([378]) == ResizePolicy("shortest", (378,))
    assert parse([378, 252], multiple=14) == ResizePolicy("crop", (378, 252), 14)
    assert parse([378], "crop") == ResizePolicy("crop", (378, 378))
    assert parse([378], "exact") == ResizePolicy("exact", (378, 378))
    assert parse([378], "longest") == ResizePolicy("longest", (378,))


@pytest.mark.parametrize(
    ("resolution", "mode", "message"),
    [
        ([1, 2, 3], None, r"A resolution is one number, or height and width, got \[1, 2, 3\]\."),
        ([1, 2], "shortest", r"Resize mode 'shortest' takes one number, got \[1, 2\]\."),
        (None, "crop", r"Resize mode 'crop' takes two numbers, height and width, got \[\]\."),
        ([5], "nearest", r"Resize mode 'nearest' takes no resolution, got \[5\]\."),
        ([0], None, r"must be at least 1, got \[0\], 1 and"),
        ([5], "squash", r"Unknown resize mode 'squash'\. Known modes: shortest, longest, crop, exact, nearest\."),
    ],
)
def test_wrong_options(resolution, mode, message):
    with pytest.raises(OptionError, match=message):
        ResizePolicy.parse(resolution, mode)


def test_a_strip_is_not_blown_up():
    with pytest.raises(
        ResolutionError,
        match=r"1 x 50000 \(height x width\) would become 224 x 11200000 under the policy 'shortest side 224', more "
        r"than 33,554,432 pixels\. Choose a smaller resolution, or the mode 'longest'",
    ):
        ResizePolicy("shortest", (224,)).target_size(1, 50_000)


def test_text():
    assert str(ResizePolicy.parse([378, 252], multiple=14)) == "centre crop 378 x 252, to multiples of 14"
    assert str(ResizePolicy("nearest")) == "own size"


def photo(height: int, width: int) -> Image.Image:
    """Smooth, so that resampling filters agree."""
    y, x = np.mgrid[0:height, 0:width] / 20.0
    planes = [np.sin(y) + np.cos(x * 0.7), np.cos(y * 0.5 + x), np.sin(x - y)]
    return Image.fromarray(((np.stack(planes, -1) / 4 + 0.5) * 255).astype(np.uint8))


@pytest.mark.parametrize("policy", [ResizePolicy("shortest", (64,), 16), ResizePolicy("exact", (48, 112))])
@pytest.mark.parametrize("size", [(120, 200), (40, 30)])
def test_pixels_match_torchs_antialiased_bicubic(policy, size):
    image = photo(*size)
    got = policy.apply(image)
    target = policy.target_size(*size)
    assert (got.height, got.width) == target
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    expected = F.interpolate(x, target, mode="bicubic", antialias=True)[0].permute(1, 2, 0).clamp(0, 255)
    # torch and Pillow use different bicubic coefficients when enlarging (-0.75 and -0.5)
    np.testing.assert_allclose(np.asarray(got, np.float32), expected, atol=2.5)


@pytest.mark.parametrize("size", [(100, 161), (161, 100), (33, 47), (64, 64)])
def test_crop_takes_the_centre_undistorted_and_unpadded(size):
    height, width = size
    y, x = np.mgrid[0:height, 0:width]
    gradient = np.stack([x / width, y / height, np.full(size, 0.5)], -1)
    got = np.asarray(ResizePolicy("crop", (40, 30)).apply(Image.fromarray((gradient * 255).round().astype(np.uint8))))
    assert got.shape == (40, 30, 3)
    scale = min(height / 40, width / 30)
    expected_x = ((np.arange(30) + 0.5 - 15) * scale + width / 2 - 0.5) / width
    expected_y = ((np.arange(40) + 0.5 - 20) * scale + height / 2 - 0.5) / height
    np.testing.assert_allclose(got[5:-5, 5:-5, 0] / 255, np.tile(expected_x[5:-5], (30, 1)), atol=0.01)
    np.testing.assert_allclose(got[5:-5, 5:-5, 1] / 255, np.tile(expected_y[5:-5, None], (1, 20)), atol=0.01)


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.integers(1, 40))
def test_crop_always_gives_the_size(height, width, h, w):
    assert ResizePolicy("crop", (h, w)).apply(Image.new("RGB", (width, height))).size == (w, h)


def test_right_size_is_left_alone_and_a_given_size_wins():
    image = photo(32, 48)
    assert ResizePolicy("nearest", multiple=16).apply(image) is image
    assert ResizePolicy("nearest", multiple=16).apply(image, (64, 64)).size == (64, 64)


@pytest.mark.parametrize("mode", ["shortest", "longest", "crop", "exact", "nearest"])
@given(st.integers(16, 3000), st.integers(16, 3000), st.integers(16, 500), st.integers(1, 16))
def test_the_covering_size_is_never_smaller_than_the_result(mode, height, width, size, multiple):
    """Of a picture that has the covering size in both directions, nothing is scaled up."""
    policy = ResizePolicy.parse(None if mode == "nearest" else [size], mode, multiple)
    if mode == "nearest":
        assert policy.covering_size(2.0) is None
        return
    covering = policy.covering_size(2.0)
    if height >= covering[0] and width >= covering[1]:
        target = policy.target_size(height, width)
        assert target[0] <= height
        assert target[1] <= width


def smooth(height, width):
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (max(height // 4, 2), max(width // 4, 2), 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("policy", [ResizePolicy("shortest", (64,), 16), ResizePolicy("exact", (48, 80))])
@pytest.mark.parametrize("size", [(200, 300), (97, 50), (31, 33)])
def test_torch_resizes_as_pillow_does_up_to_rounding(policy, size):
    image = smooth(*size)
    reference, fast = policy.pixels(image), policy.pixels(image, resizer="torch")
    assert fast.dtype == torch.uint8
    assert fast.shape == (3, *policy.target_size(*size))
    assert fast.is_contiguous()
    np.testing.assert_array_equal(reference.permute(1, 2, 0).numpy(), np.asarray(policy.apply(image)))
    difference = (reference.int() - fast.int()).abs()
    assert difference.max() <= 6
    assert difference.float().mean() < 0.3


@pytest.mark.parametrize("size", [(64, 48), (32, 32), (40, 90)])
def test_centre_crops_under_both_resizers(size):
    image, (h, w) = smooth(303, 450), size
    found = ResizePolicy("crop", size).pixels(image, resizer="torch")
    scale = min(303 / h, 450 / w)
    top, left = (303 - h * scale) / 2, (450 - w * scale) / 2
    box = tuple(round(side) for side in (left, top, 450 - left, 303 - top))  # whole source pixels
    expected = np.array(image.crop(box).resize((w, h), Image.Resampling.BICUBIC))
    assert (found.permute(1, 2, 0).int() - torch.from_numpy(expected).int()).abs().max() <= 5
