from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from amradio.evals.augment import SCALE, AugmentedView, _operations, augmented, random_part
from amradio.images.sources import ImageFile


def photo(width: int = 60, height: int = 40) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))


def test_views_are_of_one_size_and_follow_their_seed(tmp_path) -> None:
    photo().save(tmp_path / "a.png")
    source = ImageFile(tmp_path / "a.png", "a")

    def view(*seed: int) -> np.ndarray:
        found = AugmentedView(source, (24, 32), seed)
        assert found.location == source.location
        return np.asarray(found.decode(max_pixels=10**6, background=(255, 255, 255)))

    assert view(0, 0, 0).shape == (24, 32, 3)
    assert (view(0, 0, 0) == view(0, 0, 0)).all()
    others = [view(0, 0, 1), view(0, 1, 0), view(1, 0, 0)]
    assert all((view(0, 0, 0) != other).any() for other in others)
    assert AugmentedView(source, (24, 32), (0, 0, 7)).id == "a-view7"


def test_there_are_ten_operations_and_all_keep_the_size() -> None:
    assert len(_operations()) == 10
    for operation in _operations().values():
        for magnitude in (-0.3, 0.3):
            out = operation(photo(), magnitude)
            assert (out.size, out.mode) == ((60, 40), "RGB")


def test_large_pictures_are_made_smaller_first() -> None:
    out = augmented(photo(900, 600), (16, 16), np.random.default_rng(0))
    assert out.size == (16, 16)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 10**6))
def test_parts_lie_inside(width: int, height: int, seed: int) -> None:
    left, top, w, h = random_part(width, height, np.random.default_rng(seed))
    assert 0 <= left <= left + w <= width
    assert 0 <= top <= top + h <= height
    assert min(w, h) >= 1


def test_areas_of_parts_are_spread_over_the_range() -> None:
    rng = np.random.default_rng(0)
    areas = [w * h / 10**6 for _, _, w, h in (random_part(1000, 1000, rng) for _ in range(400))]
    assert min(areas) == pytest.approx(SCALE[0], abs=0.02)
    assert max(areas) > 0.85
