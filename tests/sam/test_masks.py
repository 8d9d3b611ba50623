"""Boxes, run lengths and regions, against slow references and against the tools of `transformers`."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from amradio.images.segmentation.polygons import unpack_runs
from amradio.sam import rle
from amradio.sam.boxes import box_iou, mask_boxes, nms
from amradio.sam.regions import find_regions, without_small_regions

MASKS = arrays.arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12)))


def slow_iou(a: list[float], b: list[float]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def slow_nms(boxes: list[list[float]], scores: list[float], limit: float) -> list[int]:
    kept: list[int] = []
    for i in sorted(range(len(boxes)), key=lambda i: (-scores[i], i)):
        if all(slow_iou(boxes[i], boxes[k]) <= limit for k in kept):
            kept.append(i)
    return kept


@given(st.integers(0, 40), st.integers(0, 10**6), st.sampled_from([0.0, 0.3, 0.7, 1.0]))
def test_suppression(count: int, seed: int, limit: float) -> None:
    rng = np.random.default_rng(seed)
    corners = np.sort(rng.integers(0, 12, (count, 2, 2)), axis=1)
    corners[:, 1] += 1  # none is empty
    boxes, scores = corners.reshape(count, 4).tolist(), rng.integers(0, 5, count).tolist()
    found = nms(torch.tensor(boxes).view(-1, 4), torch.tensor(scores), limit)
    assert found.tolist() == slow_nms(boxes, scores, limit)


def test_overlap_of_boxes() -> None:
    found = box_iou(torch.tensor([0.0, 0, 2, 2]), torch.tensor([[1.0, 1, 3, 3], [0, 0, 2, 2], [5, 5, 6, 6]]))
    torch.testing.assert_close(found, torch.tensor([1 / 7, 1.0, 0.0]))


@given(MASKS)
def test_boxes_around_masks(mask: np.ndarray) -> None:
    (found,) = mask_boxes(torch.from_numpy(mask)[None]).tolist()
    rows, columns = np.nonzero(mask)
    assert found == ([columns.min(), rows.min(), columns.max(), rows.max()] if len(rows) else [0, 0, 0, 0])


@given(MASKS)
def test_run_lengths(mask: np.ndarray) -> None:
    (found,) = rle.encode(torch.from_numpy(mask)[None])
    counts = found["counts"]
    assert isinstance(counts, list)
    # COCO's order: down the columns, beginning with pixels outside.
    flat = mask.T.reshape(-1).tolist()
    assert [bool(i % 2) for i, n in enumerate(counts) for _ in range(n)] == flat
    assert all(n > 0 for n in counts[1:])
    assert found["size"] == list(mask.shape)
    assert rle.area(found) == mask.sum()
    np.testing.assert_array_equal(rle.decode(found), mask)
    np.testing.assert_array_equal(rle.decode(rle.packed(found)), mask)
    assert rle.area(rle.packed(found)) == mask.sum()
    assert json.loads(json.dumps(found)) == found


@given(st.lists(st.integers(0, 10**9), max_size=12))
def test_packed_run_lengths(counts: list[int]) -> None:
    assert unpack_runs(rle.pack_runs(counts)) == counts


def test_run_lengths_as_the_tools_of_coco_pack_them() -> None:
    # From pycocotools.mask.encode, of masks [4, 5] and [7, 9].
    assert rle.pack_runs([6, 2, 3, 1, 8]) == "623O5"
    assert rle.pack_runs([0, 63]) == "0o1"


def test_run_lengths_of_transformers() -> None:
    processing = pytest.importorskip("transformers.models.sam.image_processing_pil_sam")
    masks = torch.rand(9, 7, 11, generator=torch.Generator().manual_seed(0)) < torch.linspace(0, 1, 9)[:, None, None]
    assert rle.encode(masks) == processing._mask_to_rle(masks)
    assert torch.equal(mask_boxes(masks), processing._batched_mask_to_box(masks))


def slow_regions(mask: np.ndarray) -> list[set[tuple[int, int]]]:
    """Connected regions over edges and corners, by flood filling."""
    left = {(int(r), int(c)) for r, c in zip(*np.nonzero(mask), strict=True)}
    regions = []
    while left:
        region, queue = set(), [left.pop()]
        while queue:
            r, c = queue.pop()
            region.add((r, c))
            near = {(r + i, c + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
            left -= near
            queue += near
        regions.append(region)
    return regions


def slow_tidy(mask: np.ndarray, least: int) -> np.ndarray:
    mask = mask.copy()
    for region in slow_regions(~mask):
        if len(region) < least:
            for at in region:
                mask[at] = True
    regions = slow_regions(mask)
    if regions and all(len(r) < least for r in regions):
        return mask  # compared apart: which of several largest ones stays is a matter of order
    for region in regions:
        if len(region) < least:
            for at in region:
                mask[at] = False
    return mask


@given(MASKS)
def test_regions(mask: np.ndarray) -> None:
    runs = find_regions(mask)
    pixels: dict[int, set[tuple[int, int]]] = {}
    for row, start, end, region in zip(*runs, strict=True):
        pixels.setdefault(int(region), set()).update((int(row), int(c)) for c in range(start, end))
    expected = slow_regions(mask)
    assert sorted(map(sorted, pixels.values())) == sorted(map(sorted, expected))
    assert runs.sizes.tolist() == [len(pixels[i]) for i in range(len(pixels))]


@given(MASKS, st.integers(1, 20))
def test_small_holes_and_islands(mask: np.ndarray, least: int) -> None:
    before = mask.copy()
    found = without_small_regions(mask, least)
    np.testing.assert_array_equal(mask, before)
    expected = slow_tidy(mask, least)
    regions = slow_regions(expected)
    if regions and all(len(r) < least for r in regions):
        (kept,) = slow_regions(found)
        assert kept in regions
        assert len(kept) == max(map(len, regions))
    else:
        np.testing.assert_array_equal(found, expected)
    assert (found is mask) == bool((found == before).all())


def test_a_long_snake_is_one_region() -> None:
    mask = np.zeros((199, 200), dtype=bool)
    mask[::2] = True
    mask[1::4, -1] = mask[3::4, 0] = True
    assert find_regions(mask).sizes.tolist() == [int(mask.sum())]
