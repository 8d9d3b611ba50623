"""Regions of instance annotations against slow references."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from amradio.images.segmentation.polygons import fill_polygon, fill_runs, unpack_runs

HEIGHT, WIDTH = 7, 9


def is_inside(x: float, y: float, points: np.ndarray) -> bool:
    """Whether a ray to the right crosses the outline an odd number of times."""
    odd = False
    for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0), strict=True):
        if (y0 > y) != (y1 > y) and x0 + (y - y0) / (y1 - y0) * (x1 - x0) > x:
            odd = not odd
    return odd


def drawn(points: np.ndarray) -> np.ndarray:
    inside, (top, left) = fill_polygon(points, HEIGHT, WIDTH)
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
    return mask


# Odd multiples of 1/64 at corners keep outlines off the centres of pixels, where rounding decides.
COORDINATE = st.integers(-300, 900).map(lambda n: n / 64 + 1 / 128)


@given(st.lists(st.tuples(COORDINATE, COORDINATE), min_size=1, max_size=8))
def test_polygons_are_filled_like_ray_casting(corners: list[tuple[float, float]]) -> None:
    points = np.array(corners)
    expected = [[is_inside(c + 0.5, r + 0.5, points) for c in range(WIDTH)] for r in range(HEIGHT)]
    differing = drawn(points) != np.array(expected)
    # A crossing may fall onto a centre all the same; there the two may differ by rounding.
    for row, column in np.argwhere(differing):
        assert _nearest_crossing(column + 0.5, row + 0.5, points) < 1e-9


def _nearest_crossing(x: float, y: float, points: np.ndarray) -> float:
    distances = [np.inf]
    for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0), strict=True):
        if (y0 > y) != (y1 > y):
            distances.append(abs(x0 + (y - y0) / (y1 - y0) * (x1 - x0) - x))
    return min(distances)


def test_rectangles_cover_their_pixels() -> None:
    mask = drawn(np.array([[2.0, 1.0], [6.0, 1.0], [6.0, 4.0], [2.0, 4.0]]))
    expected = np.zeros((HEIGHT, WIDTH), dtype=bool)
    expected[1:4, 2:6] = True
    np.testing.assert_array_equal(mask, expected)


def test_neighbours_share_no_pixel_and_leave_none_out() -> None:
    left = drawn(np.array([[0.0, 0.0], [4.3, 0.0], [2.1, 7.0], [0.0, 7.0]]))
    right = drawn(np.array([[4.3, 0.0], [9.0, 0.0], [9.0, 7.0], [2.1, 7.0]]))
    assert (left ^ right).all()


def test_polygons_outside_the_picture() -> None:
    assert drawn(np.array([[-9.0, -9.0], [30.0, -9.0], [30.0, 30.0], [-9.0, 30.0]])).all()
    assert not drawn(np.array([[20.0, 1.0], [30.0, 1.0], [30.0, 5.0]])).any()


def packed(counts: list[int]) -> str:
    """The packed form, written down from its description."""
    text = ""
    for i, count in enumerate(counts):
        value = count - counts[i - 2] if i > 2 else count
        while True:
            bits, value = value & 31, value >> 5
            more = not ((value == -1 and bits & 16) or (value == 0 and not bits & 16))
            text += chr(48 + bits + 32 * more)
            if not more:
                break
    return text


@given(st.lists(st.integers(0, 300_000), max_size=12))
def test_packed_runs(counts: list[int]) -> None:
    assert unpack_runs(packed(counts)) == counts


def test_known_packed_runs() -> None:
    assert packed([6, 1, 40, 4, 5, 4, 5, 4, 21]) == "61X13mN000`0"  # of the format's own documentation
    with pytest.raises(ValueError, match="are cut short"):
        unpack_runs("X")
    with pytest.raises(ValueError, match="'!' is no character"):
        unpack_runs("6!")


@given(st.integers(0, 2**63 - 1))
def test_runs_go_down_columns(bits: int) -> None:
    region = np.array([bits >> i & 1 for i in range(HEIGHT * WIDTH)], dtype=bool).reshape(HEIGHT, WIDTH)
    counts, current = [0], False
    for pixel in region.T.reshape(-1).tolist():
        if pixel != current:
            counts.append(0)
            current = pixel
        counts[-1] += 1
    np.testing.assert_array_equal(fill_runs(counts, HEIGHT, WIDTH), region)


@pytest.mark.parametrize("counts", [[], [3], [60, 4], [70, -7]])
def test_runs_must_cover_the_picture(counts: list[int]) -> None:
    with pytest.raises(ValueError, match=r"the run lengths cover -?\d+ of 7 x 9 = 63 pixels"):
        fill_runs(counts, HEIGHT, WIDTH)
