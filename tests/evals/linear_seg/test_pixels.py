"""Windows, padding, several views, and random crops, against what they must do pixel by pixel."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from amradio.evals.linear_seg.augment import augmented, recoloured, scaled
from amradio.evals.linear_seg.config import Augmentation
from amradio.evals.linear_seg.inference import pixel_scores, segment, sliding_scores, windows

COLOURS = np.array([(250, 10, 10), (10, 250, 10), (10, 10, 250), (120, 120, 120)], dtype=np.uint8)


@given(length=st.integers(1, 400), side=st.integers(1, 120), share=st.floats(0.05, 1))
def test_windows_cover_everything_and_stay_inside(length: int, side: int, share: float) -> None:
    stride = max(int(side * share), 1)
    places = windows(length, side, stride)
    assert places == sorted(set(places))
    assert places[0] == 0
    assert all(b - a <= stride for a, b in itertools.pairwise(places))
    if length > side:
        assert places[-1] == length - side
        assert len(places) == max(length - side + stride - 1, 0) // stride + 1  # as mmsegmentation counts them
    else:
        assert places == [0]


def test_sliding_windows_are_averaged() -> None:
    image = torch.rand(3, 23, 31, generator=torch.Generator().manual_seed(0))

    def score(images: Tensor) -> Tensor:  # depends on where in the window a pixel is
        ramp = torch.linspace(0, 1, images.shape[-1])
        return torch.stack([images.mean(1), images[:, 0] * ramp], 1)

    total, count = torch.zeros(2, 23, 31), torch.zeros(23, 31)
    for top in (0, 6, 11):
        for left in (0, 6, 12, 18, 19):
            total[:, top : top + 12, left : left + 12] += score(image[None, :, top : top + 12, left : left + 12])[0]
            count[top : top + 12, left : left + 12] += 1
    torch.testing.assert_close(sliding_scores(image, 12, 6, score, batch_size=4), total / count)
    torch.testing.assert_close(sliding_scores(image, 40, 20, score), score(image[None])[0])


def test_what_is_added_at_the_border_is_cut_off_again() -> None:
    images = torch.rand(2, 3, 10, 13)
    seen: list[Tensor] = []

    def scores(x: Tensor) -> Tensor:
        seen.append(x)
        return F.avg_pool2d(x, 4)

    found = pixel_scores(images, scores, 4, (0.1, 0.2, 0.3))
    assert found.shape == (2, 3, 10, 13)
    assert seen[0].shape == (2, 3, 12, 16)
    assert torch.equal(seen[0][..., :10, :13], images)
    assert torch.equal(seen[0][0, :, 11, 15], torch.tensor([0.1, 0.2, 0.3]))
    wanted = F.interpolate(F.avg_pool2d(seen[0], 4), (12, 16), mode="bilinear")[..., :10, :13]
    assert torch.equal(found, wanted)


def test_several_views_vote_with_their_probabilities() -> None:
    generator = torch.Generator().manual_seed(1)
    views = [torch.rand(3, 8, 8, generator=generator), torch.rand(3, 16, 16, generator=generator)]

    def score(x: Tensor) -> Tensor:
        return 5 * x - torch.linspace(0, 1, x.shape[-1])

    shares = torch.zeros(3, 8, 8)
    for view in views:
        for flipped in (False, True):
            found = score(view.flip(2)).flip(2) if flipped else score(view)
            shares += F.interpolate(found[None], (8, 8), mode="bilinear")[0].softmax(0)
    assert torch.equal(segment(views, score, (8, 8), flip=True), shares.argmax(0).to(torch.uint8))
    assert torch.equal(segment(views[:1], score, (8, 8), flip=False), score(views[0]).argmax(0).to(torch.uint8))


@pytest.mark.parametrize(
    ("size", "longest", "wanted"),
    [((480, 640), 4.0, (512, 683)), ((100, 900), 4.0, (228, 2048)), ((100, 900), None, (512, 4608))],
)
def test_scaled(size: tuple[int, int], longest: float | None, wanted: tuple[int, int]) -> None:
    assert scaled(size, 512, longest) == wanted


@pytest.mark.parametrize("seed", range(6))
def test_picture_and_mask_stay_together(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.integers(0, 4, (5, 7)).repeat(16, 0).repeat(16, 1).astype(np.uint8)
    options = Augmentation(scale=(0.4, 2.0), colours=False)
    pixels, truth = augmented(Image.fromarray(COLOURS[mask]), mask, 48, options, (1, 2, 3), rng)
    assert pixels.shape == (48, 48, 3)
    beyond = truth == 255
    assert (pixels[beyond] == (1, 2, 3)).all()
    nearest = np.abs(pixels[:, :, None].astype(int) - COLOURS.astype(int)).sum(-1).argmin(-1)
    assert (nearest == truth)[~beyond].mean() > 0.85  # all but borders between colours, which are blended


def test_crops_avoid_a_single_class() -> None:
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 40:] = 1
    options = Augmentation(scale=(1.0, 1.0), colours=False)
    picture = Image.fromarray(COLOURS[mask])
    alone = dataclasses.replace(options, max_class_share=1.1)

    def shares(options: Augmentation) -> list[float]:
        found = [augmented(picture, mask, 32, options, (0, 0, 0), np.random.default_rng(s))[1] for s in range(40)]
        return [max(np.bincount(t.ravel(), minlength=2)) / t.size for t in found]

    # A picture of the wanted size has one crop only; enlarged ones have many.
    big = dataclasses.replace(options, scale=(2.0, 2.0))
    assert max(shares(big)) < 0.75 <= max(shares(dataclasses.replace(alone, scale=(2.0, 2.0))))


def test_colours_are_varied_within_bounds_and_by_the_seed_alone() -> None:
    pixels = np.full((4, 4, 3), (120, 60, 200), np.uint8)
    found = [recoloured(pixels, np.random.default_rng(s)) for s in range(200)]
    again = [recoloured(pixels, np.random.default_rng(s)) for s in range(200)]
    assert all(np.array_equal(a, b) for a, b in zip(found, again, strict=True))
    assert sum(np.array_equal(f, pixels) for f in found) in range(3, 30)  # nothing happens in one of 16
    brightness = np.array([f.max() for f in found])  # the value of HSV: of brightness and contrast alone
    assert brightness.min() >= (200 - 32) * 0.5 - 2
    assert len(np.unique(brightness)) > 50
