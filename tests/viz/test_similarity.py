"""Similarity maps and correspondences against loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from amradio.errors import OptionError
from amradio.viz import Match, correspondences, draw_correspondences, mark, patch_of, shares, similarity_map
from amradio.viz.similarity import centre_of


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_similarity_by_hand() -> None:
    features, queries = torch.randn(3, 4, 6), torch.randn(2, 6)
    each = np.array([[[cosine(f, q) for q in queries.numpy()] for f in row] for row in features.numpy()])
    np.testing.assert_allclose(similarity_map(features, queries[0]), each[..., 0], atol=1e-6)
    np.testing.assert_allclose(similarity_map(features, queries), each.max(-1), atol=1e-6)
    np.testing.assert_allclose(similarity_map(features, queries, "mean"), each.mean(-1), atol=1e-6)
    assert similarity_map(features, features[1, 2])[1, 2] == pytest.approx(1)
    assert not similarity_map(torch.zeros(2, 2, 6), queries).any()


def test_shares() -> None:
    found = shares(torch.tensor([[0.3, 0.1], [0.2, 0.2]]), 0.1)
    np.testing.assert_allclose(found, [[1 / (1 + np.exp(-2)), 1 / (1 + np.exp(2))], [0.5, 0.5]], rtol=1e-5)
    with pytest.raises(OptionError, match="above 0, got -1"):
        shares(torch.zeros(2), -1)


def slow_matches(a: np.ndarray, b: np.ndarray, count: int, mutual: bool, spacing: float) -> list[Match]:
    rows_a, rows_b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    table = [[cosine(x, y) for y in rows_b] for x in rows_a]
    found = []
    for i, row in enumerate(table):
        j = max(range(len(row)), key=lambda j: row[j])
        back = max(range(len(table)), key=lambda k: table[k][j])
        if not mutual or back == i:
            found.append(Match(divmod(i, a.shape[1]), divmod(j, b.shape[1]), row[j]))
    taken: list[Match] = []
    for match in sorted(found, key=lambda m: -m.similarity):
        if all(np.hypot(match.a[0] - m.a[0], match.a[1] - m.a[1]) > spacing for m in taken) and len(taken) < count:
            taken.append(match)
    return taken


@settings(max_examples=25, deadline=None)
@given(
    st.tuples(*[st.integers(1, 5)] * 4), st.integers(1, 12), st.booleans(), st.sampled_from([0.0, 1.0, 2.3]),
    st.integers(0, 1000),
)  # fmt: skip
def test_correspondences_equal_the_definition(
    sides: tuple[int, int, int, int], count: int, mutual: bool, spacing: float, seed: int
) -> None:
    random = np.random.default_rng(seed)
    a, b = random.normal(size=(*sides[:2], 4)), random.normal(size=(*sides[2:], 4))
    expected = slow_matches(a, b, count, mutual, spacing)
    found = correspondences(
        torch.from_numpy(a).float(), torch.from_numpy(b).float(), count, mutual=mutual, spacing=spacing
    )
    assert [(m.a, m.b) for m in found] == [(m.a, m.b) for m in expected]
    np.testing.assert_allclose([m.similarity for m in found], [m.similarity for m in expected], atol=1e-5)


def test_a_photo_and_its_mirror_image_match_crosswise() -> None:
    features = torch.randn(4, 6, 8)
    found = correspondences(features, features.flip(1), 100)
    assert {(m.a, m.b) for m in found} == {((i, j), (i, 5 - j)) for i in range(4) for j in range(6)}


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(9, 60), st.integers(9, 60), st.data())
def test_centres_lie_on_their_patches(h: int, w: int, height: int, width: int, data: st.DataObject) -> None:
    patch = data.draw(st.integers(0, h - 1)), data.draw(st.integers(0, w - 1))
    assert patch_of(centre_of(patch, (h, w), (height, width)), (height, width), (h, w)) == patch


def test_patches_of_pixels() -> None:
    assert patch_of((0, 0), (30, 40), (3, 4)) == (0, 0)
    assert patch_of((39.9, 29.9), (30, 40), (3, 4)) == (2, 3)
    assert patch_of((10, 9.9), (30, 40), (3, 4)) == (0, 1)
    with pytest.raises(OptionError, match=r"\(40, 3\) is not on the photo, which is 40 pixels wide and 30 high"):
        patch_of((40, 3), (30, 40), (3, 4))


def test_lines_join_the_patches() -> None:
    a, b = Image.new("RGB", (80, 40)), Image.new("RGB", (40, 40))
    page = draw_correspondences(a, b, [Match((1, 3), (0, 0), 0.9)], ((2, 4), (2, 2)), gap=10)
    assert page.size == (130, 40)
    pixels = np.asarray(page)
    for x, y in ((70, 30), (100, 10), (85, 20)):  # both ends, and the middle
        assert pixels[y, x].any()
    assert not pixels[35, :40].any()


def test_marks_show_on_black_and_on_white() -> None:
    for colour in ("black", "white"):
        before = Image.new("RGB", (64, 64), colour)
        after = np.asarray(mark(before, [(32, 32)])).astype(int)
        assert np.abs(after - np.asarray(before)).max() > 200
        assert (after[32, 32] == np.asarray(before)[32, 32]).all()  # what is marked stays visible


def test_refusals() -> None:
    features = torch.randn(2, 2, 4)
    with pytest.raises(OptionError, match=r"width 4 cannot be compared with a query of shape \[5\]"):
        similarity_map(features, torch.randn(5))
    with pytest.raises(OptionError, match="not finite"):
        similarity_map(features * torch.inf, torch.randn(4))
    with pytest.raises(OptionError, match="width 4 and 5 cannot be matched"):
        correspondences(features, torch.randn(2, 2, 5), 3)
    with pytest.raises(OptionError, match="count must be at least 1, got 0"):
        correspondences(features, features, 0)
