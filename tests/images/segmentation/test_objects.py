"""The instances of COCO one by one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from amradio.errors import DatasetError
from amradio.images.segmentation.objects import draw_region, open_coco_instances

SIZES = {7: (20, 30), 3: (16, 16)}  # height, width
ITEMS: list[dict[str, Any]] = [
    {"id": 5, "image_id": 7, "category_id": 9, "bbox": [2.5, 3, 4, 5], "area": 20.0, "iscrowd": 0,
     "segmentation": [[2.5, 3, 6.5, 3, 6.5, 8, 2.5, 8]]},
    {"id": 6, "image_id": 7, "category_id": 2, "bbox": [0, 0, 15, 20], "area": 300, "iscrowd": 1,
     "segmentation": {"size": [20, 30], "counts": [0, 300, 300]}},
    {"id": 8, "image_id": 99, "category_id": 2, "bbox": [0, 0, 1, 1], "area": 1, "iscrowd": 0, "segmentation": []},
]  # fmt: skip


@pytest.fixture
def coco(tmp_path: Path) -> Callable[..., Path]:
    """``coco(annotations)``: a folder in the layout of COCO."""

    def write(items: list[dict[str, Any]] = ITEMS) -> Path:
        for folder in ("val2017", "annotations"):
            (tmp_path / folder).mkdir()
        for i, (height, width) in SIZES.items():
            Image.new("RGB", (width, height)).save(tmp_path / "val2017" / f"{i:04}.png")
        record = {
            "images": [{"id": i, "file_name": f"{i:04}.png", "height": h, "width": w} for i, (h, w) in SIZES.items()],
            "categories": [
                {"id": 9, "name": "kite", "supercategory": "sports"},
                {"id": 2, "name": "bicycle", "supercategory": "vehicle"},
            ],
            "annotations": items,
        }
        (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(record))
        return tmp_path

    return write


def test_each_picture_has_its_objects(coco: Callable[..., Path]) -> None:
    found = open_coco_instances(coco(), "val")
    assert found.category_names == ("bicycle", "kite")  # in the order of their ids
    assert found.pictures.names == ("0003", "0007")
    assert found.instances["0003"] == ()
    kite, crowd = found.instances["0007"]
    assert (kite.id, kite.category, kite.box, kite.area, kite.is_crowd) == (5, 1, (2.5, 3, 6.5, 8), 20, False)
    assert (crowd.id, crowd.category, crowd.is_crowd) == (6, 0, True)
    expected = np.zeros((20, 30), dtype=bool)
    expected[3:8, 2:6] = True  # the centres of columns 2 to 5 are inside
    np.testing.assert_array_equal(kite.mask(20, 30), expected)
    np.testing.assert_array_equal(crowd.mask(20, 30), np.arange(30)[None].repeat(20, 0) < 15)
    assert len(found.head(1)) == 1
    assert set(found.head(2, seed=1).pictures.names) == {"0003", "0007"}


def test_polygons_are_united_and_holes_are_even_odd() -> None:
    two = [[0.0, 0, 4, 0, 4, 4, 0, 4], [2.0, 2, 6, 2, 6, 6, 2, 6]]
    image = Image.new("L", (16, 16))
    for polygon in two:  # Pillow draws the outline too, so the corners are moved to pixels' centres
        x0, y0, x1, y1 = polygon[0], polygon[1], polygon[4] - 1, polygon[5] - 1
        ImageDraw.Draw(image).rectangle([x0, y0, x1, y1], fill=1)
    np.testing.assert_array_equal(draw_region(two, 8, 8), np.array(image)[:8, :8] == 1)
    assert not draw_region([], 4, 4).any()


def test_packed_run_lengths() -> None:
    # From pycocotools.mask.encode, of a mask [4, 5].
    expected = np.repeat(np.arange(5) % 2 == 1, [6, 2, 3, 1, 8]).reshape(5, 4).T
    np.testing.assert_array_equal(draw_region({"size": [4, 5], "counts": "623O5"}, 4, 5), expected)
    with pytest.raises(ValueError, match=r"drawn for a picture of height and width \[4, 5\]"):
        draw_region({"size": [4, 5], "counts": "623O5"}, 5, 4)


@pytest.mark.parametrize("wrong", [{"bbox": [1, 2]}, {"category_id": 77}, {"area": None}])
def test_annotations_that_are_damaged(wrong: dict[str, Any], coco: Callable[..., Path]) -> None:
    with pytest.raises(DatasetError, match="is no file of COCO instance annotations: "):
        open_coco_instances(coco([{**ITEMS[0], **wrong}]))
