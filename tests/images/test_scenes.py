"""Made-up scenes: drawn from a seed, labelled as they look."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from amradio.images import open_images
from amradio.images.scenes import CLASSES, SHAPES, scene, write_scenes
from amradio.images.segmentation import open_segmentation


@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_a_scene_has_one_kind_of_shape(shape: int) -> None:
    picture, mask = scene(shape, 5)
    assert picture.size == mask.shape[::-1]
    assert set(np.unique(mask)) == {0, 1 + shape}
    again, _ = scene(shape, 5)
    assert np.array_equal(np.asarray(picture), np.asarray(again))
    assert not np.array_equal(np.asarray(picture), np.asarray(scene(shape, 6)[0]))


def test_shapes_have_their_areas() -> None:
    areas = [np.mean([(scene(shape, seed)[1] > 0).mean() for seed in range(30)]) for shape in range(len(SHAPES))]
    disc, square, triangle, cross = areas
    # pi, 2.56, about 1.6 and about 1.87 radii squared; overlaps and chance leave them roughly in these ratios.
    assert disc > square > cross > 0.4 * disc
    assert triangle < square


def test_sets_of_scenes(tmp_path: Path) -> None:
    write_scenes(tmp_path, {"train": 2, "val": 1}, seed=3)
    labelled = open_images(tmp_path / "kinds", "train")
    assert labelled.class_names == tuple(sorted(SHAPES))
    assert len(labelled) == 2 * len(SHAPES)
    masks = open_segmentation(tmp_path / "val")
    assert masks.class_names == CLASSES
    assert len(masks) == len(SHAPES)
    assert len({s.id for s in masks} & {s.id for s in open_segmentation(tmp_path / "train")}) == 0
