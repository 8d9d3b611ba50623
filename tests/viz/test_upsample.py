"""Upsampling against torch, and guided upsampling against loops over pixels and cells."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import amradio.viz.upsample as module
from amradio.errors import OptionError
from amradio.viz.upsample import upsample


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def slow_guided(maps: np.ndarray, guide: np.ndarray) -> np.ndarray:
    """Joint bilateral upsampling as it is defined, for sides that cells divide."""
    (h, w, channels), (height, width) = maps.shape, guide.shape[:2]
    sh, sw = height // h, width // w
    cells = guide.reshape(h, sh, w, sw, 3).mean((1, 3))
    found = np.zeros((height, width, channels))
    for row in range(height):
        for column in range(width):
            y, x = (row + 0.5) / sh - 0.5, (column + 0.5) / sw - 0.5
            total = 0.0
            for i in range(math.floor(y) - module.REACH + 1, math.floor(y) + module.REACH + 1):
                for j in range(math.floor(x) - module.REACH + 1, math.floor(x) + module.REACH + 1):
                    if not (0 <= i < h and 0 <= j < w):
                        continue
                    space = ((y - i) ** 2 + (x - j) ** 2) / (2 * module.SIGMA_SPACE**2)
                    colour = ((guide[row, column] - cells[i, j]) ** 2).sum() / (2 * module.SIGMA_COLOUR**2)
                    weight = math.exp(-space - colour)
                    total += weight
                    found[row, column] += weight * maps[i, j]
            found[row, column] /= total
    return found


@pytest.mark.parametrize(("grid", "cell"), [((3, 4), (4, 4)), ((1, 5), (6, 2)), ((1, 1), (3, 5)), ((5, 2), (1, 3))])
def test_guided_equals_the_definition(
    grid: tuple[int, int], cell: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (grid[0] * cell[0], grid[1] * cell[1])
    guide = Image.fromarray((np.asarray(photo(*size)) // 4 + 96).astype(np.uint8))  # weights that float64 can hold
    maps = torch.randn(*grid, 3)
    expected = slow_guided(maps.double().numpy(), np.asarray(guide) / 255)
    np.testing.assert_allclose(upsample(maps, size, "guided", guide), expected, atol=1e-4)
    monkeypatch.setattr(module, "_PIXELS_AT_ONCE", 2 * size[1])  # the same in chunks of two rows
    np.testing.assert_allclose(upsample(maps, size, "guided", guide), expected, atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 17), st.integers(1, 17), st.integers(0, 100))
def test_guided_stays_in_the_range_of_the_map(h: int, w: int, height: int, width: int, seed: int) -> None:
    maps = torch.randn(h, w, 2, generator=torch.Generator().manual_seed(seed))
    found = upsample(maps, (height, width), "guided", photo(height, width, seed))
    assert found.shape == (height, width, 2)
    assert found.isfinite().all()
    assert (found <= maps.amax((0, 1)) + 1e-5).all()
    assert (found >= maps.amin((0, 1)) - 1e-5).all()


def test_guided_stops_at_an_edge_where_bilinear_does_not() -> None:
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:, 10:] = 255  # an edge inside the cells of the second column
    maps = torch.zeros(4, 4, 1)
    maps[:, 2:] = 1.0
    maps[:, 1] = 0.75  # as features do, cells on the edge mix
    guided = upsample(maps, (32, 32), "guided", Image.fromarray(pixels))[..., 0]
    blurred = upsample(maps, (32, 32), "bilinear")[..., 0]
    assert (guided[:, 11] - guided[:, 8]).min() > 2 * (blurred[:, 11] - blurred[:, 8]).max()


@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
def test_interpolation_is_that_of_torch(method: str) -> None:
    maps = torch.randn(3, 5, 2)
    expected = F.interpolate(maps.permute(2, 0, 1)[None], (11, 8), mode=method, align_corners=False)[0]
    torch.testing.assert_close(upsample(maps, (11, 8), method), expected.permute(1, 2, 0))


def test_nearest_repeats_cells() -> None:
    maps = torch.randn(3, 5, 2)
    torch.testing.assert_close(upsample(maps, (6, 15), "nearest"), maps.repeat_interleave(2, 0).repeat_interleave(3, 1))
    torch.testing.assert_close(upsample(maps, (3, 5), "nearest"), maps)


def test_refusals() -> None:
    maps = torch.zeros(2, 2, 1)
    with pytest.raises(
        OptionError, match=r"Unknown upsampling 'lanczos'\. Known are: nearest, bilinear, bicubic, guided"
    ):
        upsample(maps, (4, 4), "lanczos")
    with pytest.raises(OptionError, match="none is given: pass it as `guide`"):
        upsample(maps, (4, 4), "guided")
    with pytest.raises(OptionError, match="The guide is 4 x 5 pixels"):
        upsample(maps, (4, 4), "guided", photo(4, 5))
