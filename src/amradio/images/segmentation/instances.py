"""Masks drawn from the instance annotations of COCO: the things in a picture, by super-category."""

from __future__ import annotations

import json
from array import array
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from amradio.errors import DatasetError
from amradio.images.segmentation.masks import VOID, MaskError, check_budget, check_size
from amradio.images.segmentation.polygons import fill_polygon, fill_runs, unpack_runs


class InstanceTable:
    """The annotations of many pictures in little memory: all corners in one array, and run lengths as they are.

    Args:
        annotations: As in the file.
        labels: The class of each category.
        sizes: (height, width) of each picture, by its number.
    """

    def __init__(
        self, annotations: Sequence[Mapping[str, Any]], labels: Mapping[int, int], sizes: Mapping[int, tuple[int, int]]
    ) -> None:
        self.sizes = dict(sizes)
        self._regions: dict[int, tuple[int, int]] = {}
        self._labels, self._ends, self._corners = bytearray(), array("q", [0]), array("f")
        self._ends_of_instance = array("q", [0])
        self._runs: dict[int, Mapping[str, Any]] = {}
        # Crowds first and then the largest ones, so that what stands in front, mostly smaller, stays visible.
        order = sorted(
            (a for a in annotations if a["image_id"] in self.sizes),
            key=lambda a: (a["image_id"], not a.get("iscrowd", 0), -a["area"], a["id"]),
        )
        for annotation in order:
            row, image = len(self._labels), annotation["image_id"]
            self._regions[image] = (self._regions.get(image, (row, row))[0], row + 1)
            self._labels.append(labels[annotation["category_id"]])
            region = annotation["segmentation"]
            if isinstance(region, Mapping):
                self._runs[row] = region
            else:
                for polygon in region:
                    self._corners.extend(polygon)
                    self._ends.append(len(self._corners))
            self._ends_of_instance.append(len(self._ends) - 1)

    def draw(self, image: int) -> np.ndarray:
        """Draw the instances of a picture.

        Returns:
            uint8 [H, W]: classes, and `VOID` where there is no instance.

        Raises:
            ValueError: A region is damaged.
        """
        height, width = self.sizes[image]
        mask = np.full((height, width), VOID, dtype=np.uint8)
        for row in range(*self._regions.get(image, (0, 0))):
            label = self._labels[row]
            if row in self._runs:
                mask[self._run_region(row, height, width)] = label
            for polygon in range(self._ends_of_instance[row], self._ends_of_instance[row + 1]):
                corners = np.array(self._corners[self._ends[polygon] : self._ends[polygon + 1]])
                inside, (top, left) = fill_polygon(corners.reshape(-1, 2), height, width)
                mask[top : top + inside.shape[0], left : left + inside.shape[1]][inside] = label
        return mask

    def stamp(self, image: int) -> bytes:
        """All that is drawn."""
        first, last = self._regions.get(image, (0, 0))
        polygons = slice(self._ends_of_instance[first], self._ends_of_instance[last] + 1)
        ends = self._ends[polygons]
        runs = [self._runs[row] for row in range(first, last) if row in self._runs]
        return b"".join(
            [
                np.array(self.sizes[image], dtype="<i8").tobytes(),
                bytes(self._labels[first:last]),
                np.array(ends, dtype="<i8").tobytes(),
                np.array(self._corners[ends[0] : ends[-1]], dtype="<f4").tobytes(),
                json.dumps(runs, sort_keys=True).encode(),
            ]
        )

    def _run_region(self, row: int, height: int, width: int) -> np.ndarray:
        region = self._runs[row]
        counts = region["counts"]
        if list(region.get("size", (height, width))) != [height, width]:
            raise ValueError(f"a region is drawn for a picture of height and width {region['size']}")
        return fill_runs(unpack_runs(counts) if isinstance(counts, str) else list(counts), height, width)


@dataclass(frozen=True, eq=False)
class DrawnMask:
    """A mask drawn from annotations (see `MaskSource`).

    Attributes:
        table: Has the annotations.
        image: Number of the picture.
        location: The file of the annotations, and the picture.
    """

    table: InstanceTable
    image: int
    location: str

    def read(self, size: tuple[int, int] | None = None) -> np.ndarray:
        """See `MaskSource`."""
        shape = self.table.sizes[self.image]
        check_size(shape, size, self.location)
        check_budget(*shape, self.location)
        try:
            return self.table.draw(self.image)
        except (KeyError, TypeError, ValueError) as error:
            raise MaskError(f"The annotations {self.location} are damaged: {error}.", "unreadable-mask") from error


@dataclass(frozen=True, eq=False)
class DrawnMasks:
    """Masks drawn from one file of annotations (see `MaskGroup`).

    Attributes:
        table: Has the annotations.
        images: Numbers of the pictures, by key.
        location: Of the file.
    """

    table: InstanceTable
    images: Mapping[str, int]
    location: str

    def keys(self) -> Collection[str]:
        """See `MaskGroup`."""
        return self.images.keys()

    def place(self, key: str) -> str:
        """See `MaskGroup`."""
        return f"{key} in {self.location}"

    def source(self, key: str) -> DrawnMask:
        """See `MaskGroup`."""
        return DrawnMask(self.table, self.images[key], f"of {key} in {self.location}")

    def stamp(self, key: str) -> bytes:
        """See `MaskGroup`."""
        return self.table.stamp(self.images[key])

    def meaning(self) -> bytes:
        """See `MaskGroup`; stamps say it all."""
        return b""


def read_instances(record: Mapping[str, Any], labels: Mapping[int, int], location: str) -> DrawnMasks:
    """Read instance annotations.

    Args:
        record: Content of the file.
        labels: The class of each category.
        location: Of the file.

    Raises:
        DatasetError: The record is something else.
    """
    try:
        sizes = {image["id"]: (int(image["height"]), int(image["width"])) for image in record["images"]}
        images = {str(image["file_name"]).rpartition(".")[0]: int(image["id"]) for image in record["images"]}
        return DrawnMasks(InstanceTable(record["annotations"], labels, sizes), images, location)
    except (KeyError, TypeError, ValueError) as error:
        raise DatasetError(
            f"{location} is no file of COCO instance annotations: {type(error).__name__}: {error}."
        ) from error
