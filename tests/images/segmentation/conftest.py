"""Tiny data sets in every layout, as folders and as archives."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

HEIGHT, WIDTH = 6, 8


def png(pixels: np.ndarray, mode: str = "L") -> bytes:
    image = Image.fromarray(pixels.astype(np.uint8))
    if mode == "P":
        image.putpalette(bytes(range(255, -1, -1)) * 3)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def photo(value: int = 0, size: tuple[int, int] = (HEIGHT, WIDTH), fmt: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size[::-1], (value % 256, 40, 90)).save(file, fmt)
    return file.getvalue()


def mask(*ids: int, size: tuple[int, int] = (HEIGHT, WIDTH)) -> np.ndarray:
    """The ids in turns, pixel by pixel."""
    return np.resize(np.array(ids), size)


@pytest.fixture(name="png")
def _png() -> Callable[..., bytes]:
    return png


@pytest.fixture(name="photo")
def _photo() -> Callable[..., bytes]:
    return photo


@pytest.fixture(name="mask")
def _mask() -> Callable[..., np.ndarray]:
    return mask


@pytest.fixture(params=["folder", "tar"])
def write(request: pytest.FixtureRequest, tmp_path: Path, write_tar: Any) -> Callable[..., Path]:
    """Writes a data set from the contents of its files, as a folder or as an archive; returns its path."""

    def make(files: Mapping[str, bytes], name: str = "data") -> Path:
        if request.param == "tar":
            return Path(write_tar(f"{name}.tar", list(files.items())))
        for path, content in files.items():
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).write_bytes(content)
        return tmp_path / name

    return make


@pytest.fixture
def write_folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes a data set as a folder."""

    def make(files: Mapping[str, bytes], name: str = "data") -> Path:
        for path, content in files.items():
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).write_bytes(content)
        return tmp_path / name

    return make


@pytest.fixture
def voc() -> dict[str, bytes]:
    """Pascal VOC: two pictures in train, two more in trainaug, one in val."""
    files: dict[str, bytes] = {}
    for i, name in enumerate(["2007_000001", "2007_000002", "2008_000003", "2008_000004", "2009_000005"]):
        files[f"JPEGImages/{name}.jpg"] = photo(i)
        files[f"SegmentationClassAug/{name}.png"] = png(mask(i, 20))
        if i in (0, 1, 4):
            files[f"SegmentationClass/{name}.png"] = png(mask(i, 255), "P")
    files["ImageSets/Segmentation/train.txt"] = b"2007_000001\n2007_000002\n"
    files["ImageSets/Segmentation/trainaug.txt"] = b"2008_000004\n2007_000001\n2007_000002\n2008_000003\n"
    files["ImageSets/Segmentation/val.txt"] = b"2009_000005\n"
    return files


@pytest.fixture
def ade20k() -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for split, count in (("training", 3), ("validation", 2)):
        for i in range(count):
            name = f"ADE_{split[:5]}_{i:08}"
            files[f"ADEChallengeData2016/images/{split}/{name}.jpg"] = photo(i)
            files[f"ADEChallengeData2016/annotations/{split}/{name}.png"] = png(mask(0, 1, 150))
    return files


@pytest.fixture
def cityscapes() -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for split, city in (("train", "aachen"), ("train", "bochum"), ("val", "frankfurt"), ("test", "berlin")):
        stem = f"{split}/{city}/{city}_000000_000019"
        files[f"leftImg8bit/{stem}_leftImg8bit.png"] = photo(fmt="PNG")
        files[f"gtFine/{stem}_gtFine_labelIds.png"] = png(mask(*range(34)))
        files[f"gtFine/{stem}_gtFine_color.png"] = photo(fmt="PNG")
        files[f"gtFine/{stem}_gtFine_polygons.json"] = b"{}"
    return files


THINGS = [
    {"id": 1, "name": "person", "supercategory": "person", "isthing": 1},
    {"id": 2, "name": "bicycle", "supercategory": "vehicle", "isthing": 1},
    {"id": 3, "name": "car", "supercategory": "vehicle", "isthing": 1},
    {"id": 17, "name": "cat", "supercategory": "animal", "isthing": 1},
    {"id": 200, "name": "rug-merged", "supercategory": "floor", "isthing": 0},
]


@pytest.fixture
def coco_thing() -> dict[str, bytes]:
    """Masks with the category of each pixel."""
    files = {"annotations/panoptic_annotations/panoptic_val2017.json": json.dumps({"categories": THINGS}).encode()}
    for split in ("train", "val"):
        files[f"images/{split}2017/000000000001.jpg"] = photo()
        files[f"annotations/{split}2017/000000000001.png"] = png(mask(0, 1, 2, 3, 17, 200))
    return files


@pytest.fixture
def coco_panoptic() -> dict[str, bytes]:
    """Masks as they are published: colours number segments."""
    files: dict[str, bytes] = {}
    numbers = mask(0, 7, 70000, 300)
    colours = np.stack([numbers % 256, numbers // 256 % 256, numbers // 65536], axis=-1)
    segments = [{"id": 7, "category_id": 3}, {"id": 300, "category_id": 200}, {"id": 70000, "category_id": 17}]
    for split in ("train", "val"):
        record = {
            "categories": THINGS,
            "annotations": [{"file_name": "000000000001.png", "image_id": 1, "segments_info": segments}],
        }
        files[f"annotations/panoptic_{split}2017.json"] = json.dumps(record).encode()
        files[f"{split}2017/000000000001.jpg"] = photo()
        file = io.BytesIO()
        Image.fromarray(colours.astype(np.uint8)).save(file, "PNG")
        files[f"annotations/panoptic_{split}2017/000000000001.png"] = file.getvalue()
    return files


@pytest.fixture
def coco_stuff() -> dict[str, bytes]:
    categories = [
        {"id": 92, "name": "banner", "supercategory": "textile"},
        {"id": 94, "name": "branch", "supercategory": "plant"},
        {"id": 95, "name": "bridge", "supercategory": "building"},
        {"id": 97, "name": "bush", "supercategory": "plant"},
        {"id": 183, "name": "other", "supercategory": "other"},
    ]
    root = "annotations/stuff_annotations"
    files = {f"{root}/stuff_val2017.json": json.dumps({"categories": categories}).encode()}
    for split in ("train", "val"):
        files[f"images/{split}2017/000000000001.jpg"] = photo()
        files[f"{root}/stuff_{split}2017_pixelmaps/000000000001.png"] = png(mask(0, 92, 94, 95, 97, 183))
    return files


@pytest.fixture
def coco_instances() -> dict[str, bytes]:
    square = [1.0, 1.0, 5.0, 1.0, 5.0, 5.0, 1.0, 5.0]
    small = [2.0, 2.0, 4.0, 2.0, 4.0, 4.0, 2.0, 4.0]
    crowd = {"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT * 2, HEIGHT * (WIDTH - 2)]}
    files: dict[str, bytes] = {}
    for split in ("train", "val"):
        images = [{"id": i, "file_name": f"00000000000{i}.jpg", "height": HEIGHT, "width": WIDTH} for i in (1, 2)]
        annotations = [
            {"id": 5, "image_id": 1, "category_id": 17, "area": 4, "iscrowd": 0, "segmentation": [small]},
            {"id": 6, "image_id": 1, "category_id": 3, "area": 16, "iscrowd": 0, "segmentation": [square]},
            {"id": 7, "image_id": 1, "category_id": 1, "area": 12, "iscrowd": 1, "segmentation": crowd},
        ]
        record = {"images": images, "annotations": annotations, "categories": THINGS[:4]}
        files[f"annotations/instances_{split}2017.json"] = json.dumps(record).encode()
        for i in (1, 2):
            files[f"{split}2017/00000000000{i}.jpg"] = photo(i)
    return files


@pytest.fixture
def plain() -> dict[str, bytes]:
    """Any two trees, with sub-folders."""
    files = {"classes.txt": "sky\nroad\nfaçade\n".encode()}
    for i, name in enumerate(["a/1", "a/2", "b/1", "10", "9"]):
        files[f"images/{name}.png"] = photo(i, fmt="PNG")
        files[f"masks/{name}.png"] = png(mask(i % 3, 255))
    return files
