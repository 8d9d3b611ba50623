"""The layouts of COCO: super-categories, panoptic numbers, drawn instances."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from amradio.errors import DatasetError
from amradio.images.segmentation import VOID, MaskError, open_segmentation, segmentation_splits

Write = Callable[..., Path]
Files = dict[str, bytes]


def edited(files: Files, name: str, edit: Callable[[Any], None]) -> Files:
    record = json.loads(files[name])
    edit(record)
    return {**files, name: json.dumps(record).encode()}


def test_things(write: Write, coco_thing: Files) -> None:
    path = write(coco_thing)
    assert segmentation_splits(path) == ("train2017", "val2017")
    pairs = open_segmentation(path, "train")
    assert pairs.class_names == ("animal", "person", "vehicle")
    expected = np.resize(np.array([VOID, 1, 2, 2, 0, VOID]), (6, 8))
    np.testing.assert_array_equal(pairs[0].load()[1], expected)
    np.testing.assert_array_equal(open_segmentation(path, "val2017", variant="hbird")[0].load()[1], expected)


def test_ids_that_are_no_category(write: Write, coco_thing: Files, png: Callable[..., bytes]) -> None:
    coco_thing["annotations/val2017/000000000001.png"] = png(np.resize([1, 90, 230], (6, 8)))
    path = write(coco_thing)
    with pytest.raises(MaskError, match=r"no class: 90 \(16 pixels\), 230 \(16 pixels\)\. Known are the ids of categ"):
        open_segmentation(path, "val")[0].load()
    assert np.unique(open_segmentation(path, "val", variant="hbird")[0].load()[1]).tolist() == [1, VOID]


def test_things_in_the_documented_folders(write: Write, coco_thing: Files) -> None:
    moved = {}
    for name, content in coco_thing.items():
        name = name.replace("images/", "coco/images/").replace("annotations/", "annotations/annotations/", 1)
        for split in ("train2017", "val2017"):
            masks = f"panoptic_annotations/semantic_segmenations_{split}/"
            name = name.replace(f"annotations/annotations/{split}/", f"annotations/annotations/{masks}")
        moved[name] = content
    assert open_segmentation(write(moved), "val").class_names == ("animal", "person", "vehicle")


def test_panoptic_masks_as_published(write: Write, coco_panoptic: Files) -> None:
    pairs = open_segmentation(write(coco_panoptic), "train")
    assert pairs.layout == "coco-thing"
    np.testing.assert_array_equal(pairs[0].load()[1], np.resize(np.array([VOID, 2, 0, VOID]), (6, 8)))


def test_panoptic_segments_that_are_unknown(write: Write, coco_panoptic: Files) -> None:
    def drop(record: Any) -> None:
        record["annotations"][0]["segments_info"].pop()

    path = write(edited(coco_panoptic, "annotations/panoptic_val2017.json", drop))
    with pytest.raises(MaskError, match="has 1 segments, such as 70000, that its file of annotations does not have"):
        open_segmentation(path, "val")[0].load()
    assert open_segmentation(path, "val").fingerprint != open_segmentation(path, "train").fingerprint


def test_panoptic_pictures_without_any_segment(write: Write, coco_panoptic: Files) -> None:
    def clear(record: Any) -> None:
        record["annotations"][0]["segments_info"].clear()

    file = io.BytesIO()
    Image.new("RGB", (8, 6)).save(file, "PNG")
    coco_panoptic["annotations/panoptic_val2017/000000000001.png"] = file.getvalue()
    path = write(edited(coco_panoptic, "annotations/panoptic_val2017.json", clear))
    assert np.unique(open_segmentation(path, "val")[0].load()[1]).tolist() == [VOID]


def test_panoptic_annotations_that_are_something_else(write: Write, coco_panoptic: Files) -> None:
    path = write(edited(coco_panoptic, "annotations/panoptic_val2017.json", lambda r: r.pop("annotations")))
    with pytest.raises(DatasetError, match="are no panoptic annotations of COCO: KeyError: 'annotations'"):
        open_segmentation(path, "val")


def test_panoptic_masks_that_are_missing(write: Write, coco_panoptic: Files, photo: Callable[..., bytes]) -> None:
    path = write({**coco_panoptic, "val2017/000000000002.jpg": photo()})
    with pytest.raises(DatasetError, match=r"expected annotations/panoptic_val2017/000000000002\.png"):
        open_segmentation(path, "val")


def test_instances_without_a_picture(write: Write, coco_instances: Files) -> None:
    del coco_instances["val2017/000000000002.jpg"]
    with pytest.raises(DatasetError, match=r"1 mask has no picture: 000000000002 in .*instances_val2017\.json"):
        open_segmentation(write(coco_instances), "val")


def test_grey_masks_in_place_of_panoptic_ones(write: Write, coco_panoptic: Files, png: Callable[..., bytes]) -> None:
    coco_panoptic["annotations/panoptic_val2017/000000000001.png"] = png(np.zeros((6, 8)))
    with pytest.raises(MaskError, match="has mode 'L', and panoptic masks keep the numbers of segments in RGB"):
        open_segmentation(write(coco_panoptic), "val")[0].load()


def test_stuff(write: Write, coco_stuff: Files) -> None:
    pairs = open_segmentation(write(coco_stuff), "val")
    assert pairs.class_names == ("building", "plant", "textile")
    np.testing.assert_array_equal(pairs[0].load()[1], np.resize(np.array([VOID, 2, 1, 0, 1, VOID]), (6, 8)))


def test_drawn_instances(write: Write, coco_instances: Files) -> None:
    pairs = open_segmentation(write(coco_instances), "train")
    assert (pairs.class_names, len(pairs)) == (("animal", "person", "vehicle"), 2)
    expected = np.full((6, 8), VOID)
    expected[:, :2] = 1  # the crowd, behind everything
    expected[1:5, 1:5] = 2
    expected[2:4, 2:4] = 0  # the smaller one in front
    np.testing.assert_array_equal(pairs[0].load()[1], expected)
    assert np.unique(pairs[1].load()[1]).tolist() == [VOID]  # a picture without instances
    assert pairs[0].mask.location.startswith("of 000000000001 in ")


def test_drawn_masks_are_part_of_the_fingerprint(write_folder: Write, coco_instances: Files) -> None:
    def move(record: Any) -> None:
        record["annotations"][0]["segmentation"][0][0] += 0.5

    name = "annotations/instances_train2017.json"
    path = write_folder(coco_instances)
    before = open_segmentation(path, "train").fingerprint
    assert open_segmentation(path, "train").fingerprint == before
    (path / name).write_bytes(edited(coco_instances, name, move)[name])
    assert open_segmentation(path, "train").fingerprint != before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"segmentation": {"counts": [3], "size": [6, 8]}}, "the run lengths cover 3 of 6 x 8 = 48 pixels"),
        (
            {"segmentation": {"counts": [48], "size": [8, 6]}},
            r"a region is drawn for a picture of height and width \[8",
        ),
        ({"segmentation": {"counts": "0~", "size": [6, 8]}}, "'~' is no character of packed run lengths|cover"),
        ({"segmentation": {"size": [6, 8]}}, "are damaged"),
        ({"segmentation": [[1.0, 2.0, 3.0]]}, "are damaged: cannot reshape"),
    ],
)
def test_damaged_regions(write: Write, coco_instances: Files, change: dict[str, Any], message: str) -> None:
    name = "annotations/instances_val2017.json"
    path = write(edited(coco_instances, name, lambda r: r["annotations"][0].update(change)))
    with pytest.raises(MaskError, match=message):
        open_segmentation(path, "val")[0].load()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON"),
        (b"[]", "holds no object"),
        (b"{}", "it has no categories with super-categories"),
        (b'{"categories": [{"id": 1, "supercategory": "a"}]}', "no file of COCO instance annotations: KeyError: 'imag"),
    ],
)
def test_annotations_that_are_something_else(write: Write, coco_instances: Files, content: bytes, message: str) -> None:
    path = write({**coco_instances, "annotations/instances_val2017.json": content})
    with pytest.raises(DatasetError, match=message):
        open_segmentation(path, "val")


def test_pictures_of_another_size_than_annotated(
    write: Write, coco_instances: Files, photo: Callable[..., bytes]
) -> None:
    path = write({**coco_instances, "val2017/000000000001.jpg": photo(size=(8, 6))})
    with pytest.raises(MaskError, match="is 8 x 6 pixels"):
        open_segmentation(path, "val")[0].load()


def test_several_kinds_of_annotations(write: Write, coco_instances: Files, coco_stuff: Files) -> None:
    files = {**{f"images/{n}" if n.endswith("jpg") else n: c for n, c in coco_instances.items()}, **coco_stuff}
    path = write(files)
    with pytest.raises(DatasetError, match=r"several layouts: coco-stuff, coco-instances\. Say which one is meant"):
        open_segmentation(path, "val")
    assert open_segmentation(path, "val", layout="coco-instances").layout == "coco-instances"
