"""The instances of COCO one by one: a box, a region and a category each, by picture."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from amradio.errors import DatasetError
from amradio.images.segmentation.coco import CocoInstancesLayout
from amradio.images.segmentation.dataset import SegmentationSet
from amradio.images.segmentation.open import open_segmentation
from amradio.images.segmentation.polygons import fill_polygon, fill_runs, unpack_runs
from amradio.images.segmentation.recognise import locate
from amradio.images.segmentation.storage import open_storage

_LAYOUT = CocoInstancesLayout()


@dataclass(frozen=True)
class Instance:
    """One annotated object.

    Attributes:
        id: Of the annotation.
        category: Number of its class in `CocoInstances.category_names`.
        box: (x0, y0, x1, y1) in pixels of the picture, as annotated: not rounded.
        area: As annotated, in pixels: that of the region, by which COCO calls objects small, medium or large.
        is_crowd: Whether the region is a group that was not taken apart.
        region: As in the file: polygons, or run lengths.
    """

    id: int
    category: int
    box: tuple[float, float, float, float]
    area: float
    is_crowd: bool
    region: Sequence[Sequence[float]] | Mapping[str, Any]

    def mask(self, height: int, width: int) -> np.ndarray:
        """Draw the region; see `draw_region`."""
        return draw_region(self.region, height, width)


@dataclass(frozen=True)
class CocoInstances:
    """Pictures of COCO with their instances.

    Attributes:
        pictures: In the order in which they are evaluated.
        category_names: By the numbers of `Instance.category`; C of them.
        instances: Of each picture, by its name (`SegmentationSet.names`); none for a picture without objects.
    """

    pictures: SegmentationSet
    category_names: tuple[str, ...]
    instances: Mapping[str, tuple[Instance, ...]]

    def __len__(self) -> int:
        return len(self.pictures)

    def head(self, count: int, seed: int | None = None) -> CocoInstances:
        """Take some pictures: the first ones, or so many drawn at random by a seed."""
        pictures = self.pictures if seed is None else self.pictures.shuffled(seed)
        return CocoInstances(pictures.head(count), self.category_names, self.instances)


def open_coco_instances(
    spec: str | os.PathLike[str], split: str | None = None, *, list_file: str | os.PathLike[str] | None = None
) -> CocoInstances:
    """Open pictures with instance annotations in the layout of COCO (``val2017``, ``annotations/instances_*.json``).

    Args:
        spec: Folder or uncompressed tar archive; see `open_segmentation`.
        split: ``val`` or ``val2017``; needed where there are several.
        list_file: Which pictures to take; see `open_segmentation`.

    Raises:
        DatasetError: There is no such data set or split, or its annotations are not understood.
    """
    pictures = open_segmentation(spec, split, layout=_LAYOUT.name, list_file=list_file)
    store = locate(open_storage(spec), _LAYOUT.name).store
    _, file, record = _LAYOUT.annotations(store, split)
    try:
        names, instances = _by_picture(record)
    except (KeyError, TypeError, ValueError) as error:
        raise DatasetError(
            f"{store.location}/{file} is no file of COCO instance annotations: {type(error).__name__}: {error}."
        ) from error
    return CocoInstances(pictures, names, instances)


def draw_region(region: Sequence[Sequence[float]] | Mapping[str, Any], height: int, width: int) -> np.ndarray:
    """Draw a region of COCO's annotations.

    Args:
        region: Polygons, of which the union is meant, or run lengths, plain or packed.
        height: Of the picture.
        width: Of the picture.

    Returns:
        bool [height, width]: the pixels whose centres are inside. COCO's own tools decide at the edge by drawing on a
        grid five times as fine; areas agree in the mean.

    Raises:
        ValueError: The region is damaged, or of a picture of another size.
    """
    if isinstance(region, Mapping):
        size = [int(side) for side in region.get("size", (height, width))]
        if size != [height, width]:
            raise ValueError(f"a region is drawn for a picture of height and width {size}")
        counts = region["counts"]
        return fill_runs(unpack_runs(counts) if isinstance(counts, str) else list(counts), height, width)
    mask = np.zeros((height, width), dtype=bool)
    for polygon in region:
        inside, (top, left) = fill_polygon(np.asarray(polygon, dtype=np.float32).reshape(-1, 2), height, width)
        mask[top : top + inside.shape[0], left : left + inside.shape[1]] |= inside
    return mask


def _by_picture(record: Mapping[str, Any]) -> tuple[tuple[str, ...], dict[str, tuple[Instance, ...]]]:
    categories = sorted(record["categories"], key=lambda c: int(c["id"]))
    number = {int(c["id"]): i for i, c in enumerate(categories)}
    keys = {int(image["id"]): str(image["file_name"]).rpartition(".")[0] for image in record["images"]}
    found: dict[str, list[Instance]] = {key: [] for key in keys.values()}
    for a in record["annotations"]:
        if int(a["image_id"]) in keys:
            found[keys[int(a["image_id"])]].append(_instance(a, number))
    return tuple(str(c["name"]) for c in categories), {key: tuple(items) for key, items in found.items()}


def _instance(annotation: Mapping[str, Any], number: Mapping[int, int]) -> Instance:
    x, y, width, height = (float(v) for v in annotation["bbox"])
    return Instance(
        id=int(annotation["id"]),
        category=number[int(annotation["category_id"])],
        box=(x, y, x + width, y + height),
        area=float(annotation["area"]),
        is_crowd=bool(annotation.get("iscrowd", 0)),
        region=annotation["segmentation"],
    )
