"""Views against torchvision's rules restated, and random crops against what is known of them."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from amradio.errors import OptionError
from amradio.fungi.hashing import image_keys, picture_seed, uniform
from amradio.fungi.pca import Pca, can_reduce
from amradio.fungi.views import Crop, crop_views, random_crop, resize_view, window_views


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 1000))
def test_crops_lie_inside(height: int, width: int, seed: int) -> None:
    crop = random_crop(height, width, (0.05, 0.25), random.Random(seed))
    assert 0 <= crop.top <= height - crop.height
    assert 0 <= crop.left <= width - crop.width
    assert crop.height >= 1
    assert crop.width >= 1


def test_areas_and_aspects_are_as_asked() -> None:
    rng = random.Random(0)
    crops = [random_crop(1000, 1000, (0.05, 0.25), rng) for _ in range(4000)]
    areas = np.array([c.height * c.width / 1e6 for c in crops])
    aspects = np.log([c.width / c.height for c in crops])
    assert 0.049 < areas.min() < 0.055
    assert 0.245 < areas.max() < 0.251
    assert areas.mean() == pytest.approx(0.15, abs=0.005)
    assert aspects.mean() == pytest.approx(0, abs=0.01)
    assert np.abs(aspects).max() == pytest.approx(np.log(4 / 3), abs=0.01)


def test_a_strip_gives_its_centre() -> None:
    assert random_crop(10, 1000, (0.9, 1.0), random.Random(0)) == Crop(0, 493, 10, 13)
    assert random_crop(1000, 10, (0.9, 1.0), random.Random(0)) == Crop(493, 0, 13, 10)


def test_a_whole_picture_at_its_own_size_is_itself() -> None:
    picture = torch.randint(0, 256, (3, 12, 12), dtype=torch.uint8)
    views = crop_views(picture, [(0, 0, 12, 12)], 12, "bicubic")
    assert torch.equal(views[0], picture.float() / 255)
    assert torch.equal(resize_view(picture, 12, 12)[0], picture.float() / 255)


def test_the_centre_is_cut_out() -> None:
    picture = torch.randint(0, 256, (3, 11, 11), dtype=torch.uint8)
    assert torch.equal(resize_view(picture, 11, 6)[0], picture[:, 2:8, 2:8].float() / 255)
    with pytest.raises(OptionError, match="A centre of 12 pixels cannot be cut out of 11"):
        resize_view(picture, 11, 12)


@pytest.mark.parametrize(("scale", "count"), [(1, 4), (4, 25), (6, 49)])
def test_windows_in_order(scale: int, count: int) -> None:
    picture = torch.randint(0, 256, (3, 224, 224), dtype=torch.uint8)
    views = window_views(picture, stride_scale=scale)
    assert views.shape == (count, 3, 224, 224)
    stride, side = 112 // scale, round(count**0.5)
    for i in (0, 1, side, count - 1):
        top, left = (i // side) * stride, (i % side) * stride
        window = picture[None, :, top : top + 112, left : left + 112].float() / 255
        expected = F.interpolate(window, size=(224, 224), mode="bicubic", antialias=True)[0]
        torch.testing.assert_close(views[i], expected)
    assert views.max() > 1  # the overshoot stays


def test_windows_without_pixels() -> None:
    for options in ({"stride_scale": 300}, {"num_patches": 0}, {"stride_scale": 0}):
        with pytest.raises(OptionError, match=r"Windows of 224 pixels / sqrt\(\d+\) with a stride of 1/\d+"):
            window_views(torch.zeros(3, 8, 8, dtype=torch.uint8), **options)


def test_pictures_are_bytes() -> None:
    with pytest.raises(OptionError, match=r"A picture is uint8 \[3, H, W\], got torch.float32 \[3, 8, 8\]"):
        crop_views(torch.zeros(3, 8, 8), [(0, 0, 8, 8)], 8, "bilinear")


def test_pillow_does_the_resizing() -> None:
    picture = torch.randint(0, 256, (3, 30, 20), dtype=torch.uint8)
    image = Image.fromarray(picture.permute(1, 2, 0).numpy())
    expected = np.asarray(image.crop((4, 2, 16, 22)).resize((9, 20), Image.Resampling.BILINEAR))
    expected = np.asarray(Image.fromarray(expected).resize((9, 9), Image.Resampling.BILINEAR))
    found = crop_views(picture, [(2, 4, 20, 12)], 9, "bilinear")[0]
    assert np.array_equal((found * 255).round().permute(1, 2, 0).numpy(), expected)


# ---- numbers that belong to a picture ----


def test_keys_follow_content_place_seed_and_epoch() -> None:
    images = torch.randint(0, 256, (4, 3, 8, 8)).float() / 255
    keys = image_keys(images)
    assert len(set(keys.tolist())) == 4
    assert torch.equal(image_keys(images.flip(0)), keys.flip(0))
    assert torch.equal(image_keys(images.half()), keys)
    assert not torch.equal(image_keys(images, seed=1), keys)
    assert not torch.equal(image_keys(images, epoch=1), keys)
    swapped = images.clone()
    swapped[:, :, 0, :2] = images[:, :, 0, :2].flip(-1)
    assert (image_keys(swapped) != keys).all()


def test_numbers_are_uniform_and_independent() -> None:
    keys = image_keys(torch.rand(200, 3, 4, 4))
    numbers = uniform(keys, 500)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert numbers.mean() == pytest.approx(0.5, abs=0.005)
    assert numbers.var() == pytest.approx(1 / 12, abs=0.002)
    counts = torch.histc(numbers, 20, 0, 1)
    assert ((counts - 5000).abs() < 5 * 5000**0.5).all()
    assert torch.corrcoef(numbers)[0, 1:].abs().max() < 0.2
    assert torch.equal(uniform(keys, 100), numbers[:, :100])


def test_the_generator_is_splitmix64() -> None:
    """The published first outputs for the state 0."""
    first = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    found = uniform(torch.zeros(1, dtype=torch.int64), 3)[0].tolist()
    assert found == [(x >> 40) / 2**24 for x in first]


def test_seeds_of_pictures() -> None:
    picture = torch.randint(0, 256, (3, 4, 6), dtype=torch.uint8)
    assert picture_seed(picture, 1, "a") == picture_seed(picture.clone(), 1, "a")
    others = [picture_seed(picture, 2, "a"), picture_seed(picture, 1, "b"), picture_seed(picture.mT, 1, "a")]
    assert picture_seed(picture, 1, "a") not in others
    assert 0 <= picture_seed(picture, 1, "a") < 2**63


# ---- principal components ----


@given(st.integers(2, 12), st.integers(1, 12), st.integers(0, 2**31))
def test_pca_equals_a_singular_value_decomposition(rows: int, width: int, seed: int) -> None:
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    dim = min(rows, width)
    pca = Pca.fit(x, dim)
    singular = torch.linalg.svdvals((x - x.mean(0)).double())
    torch.testing.assert_close(pca.explained_variance.double(), singular[:dim] ** 2 / (rows - 1), atol=1e-5, rtol=1e-4)
    y = pca.transform(x)
    torch.testing.assert_close(y.T @ y / (rows - 1), pca.explained_variance.diag(), atol=1e-4, rtol=1e-3)
    assert (pca.components.gather(1, pca.components.abs().argmax(1, keepdim=True)) > 0).all()


def test_what_pca_refuses() -> None:
    with pytest.raises(OptionError, match=r"PCA to 4 components needs at least 4 rows of at least 4 features, got \[3"):
        Pca.fit(torch.randn(3, 9), 4)
    with pytest.raises(OptionError, match="some features are NaN or infinite"):
        Pca.fit(torch.full((3, 3), torch.inf), 1)
    assert can_reduce(10, 8, 7)
    assert not can_reduce(10, 8, 8)
    assert not can_reduce(7, 8, 7)
