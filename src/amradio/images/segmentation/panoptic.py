"""The published panoptic masks of COCO: colours number the segments, and a JSON file says what each segment is."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from amradio.errors import DatasetError
from amradio.images.segmentation.masks import VOID, MaskError, check_size, content_of, read_colours
from amradio.images.segmentation.storage import Storage, below


@dataclass(frozen=True, eq=False)
class PanopticMask:
    """A panoptic mask (see `MaskSource`).

    Attributes:
        store: Where the file is.
        name: Of the file.
        segments: int64 [N], numbers of the picture's segments, rising.
        labels: uint8 [N], class of each.
    """

    store: Storage
    name: str
    segments: np.ndarray
    labels: np.ndarray

    @property
    def location(self) -> str:
        """The path, or the archive and the member."""
        return f"{self.store.location}/{self.name}"

    def read(self, size: tuple[int, int] | None = None) -> np.ndarray:
        """See `MaskSource`."""
        colours = read_colours(content_of(self.store, self.name), self.location).astype(np.int64)  # [H, W, 3]
        check_size(colours.shape[:2], size, self.location)
        numbers = colours @ np.array([1, 256, 65536])  # [H, W]
        present, position = np.unique(numbers, return_inverse=True)
        known = np.isin(present, self.segments) | (present == 0)
        if not known.all():
            raise MaskError(
                f"The mask {self.location} has {np.count_nonzero(~known)} segments, such as {present[~known][0]}, that "
                "its file of annotations does not have. Are both of the same split?",
                "unknown-id",
            )
        place = np.searchsorted(self.segments, present).clip(max=max(len(self.segments) - 1, 0))
        classes = np.full(len(present), VOID, dtype=np.uint8)
        classes[present != 0] = self.labels[place[present != 0]]
        mask: np.ndarray = classes[position.reshape(numbers.shape)]
        return mask


class PanopticMasks:
    """The panoptic masks of one split (see `MaskGroup`).

    Args:
        store: Where the files are.
        folder: In which they are.
        names: Of the files that are there, by key.
        annotations: As in the file of annotations.
        labels: The class, or `VOID`, of each category.
    """

    def __init__(
        self,
        store: Storage,
        folder: str,
        names: Mapping[str, str],
        annotations: Collection[Mapping[str, Any]],
        labels: Mapping[int, int],
    ) -> None:
        self._store, self._folder, self._names = store, folder, dict(names)
        self._ranges: dict[str, tuple[int, int]] = {}
        segments, classes = array("q"), bytearray()
        for annotation in annotations:
            of_picture = sorted((int(s["id"]), labels[s["category_id"]]) for s in annotation["segments_info"])
            key = str(annotation["file_name"]).rpartition(".")[0]
            self._ranges[key] = (len(segments), len(segments) + len(of_picture))
            segments.extend(number for number, _ in of_picture)
            classes.extend(label for _, label in of_picture)
        self._segments, self._labels = np.array(segments, dtype=np.int64), np.array(classes, dtype=np.uint8)
        self._keys = [key for key in self._names if key in self._ranges]

    def keys(self) -> Collection[str]:
        """See `MaskGroup`."""
        return self._keys

    def place(self, key: str) -> str:
        """See `MaskGroup`."""
        return below(self._folder, f"{key}.png")

    def source(self, key: str) -> PanopticMask:
        """See `MaskGroup`."""
        part = slice(*self._ranges[key])
        return PanopticMask(self._store, self._names[key], self._segments[part], self._labels[part])

    def stamp(self, key: str) -> bytes:
        """See `MaskGroup`."""
        part = slice(*self._ranges[key])
        segments = self._segments[part].astype("<i8").tobytes() + self._labels[part].tobytes()
        return self._store.stamp(self._names[key]) + segments

    def meaning(self) -> bytes:
        """See `MaskGroup`; stamps say it all."""
        return b""


def read_panoptic(
    record: Mapping[str, Any], store: Storage, folder: str, names: Mapping[str, str], labels: Mapping[int, int]
) -> PanopticMasks:
    """Read panoptic annotations.

    Args:
        record: Content of the file of annotations.
        store: Where the masks are.
        folder: In which they are.
        names: Of the files that are there, by key.
        labels: The class, or `VOID`, of each category.

    Raises:
        DatasetError: The annotations are something else.
    """
    try:
        return PanopticMasks(store, folder, names, record["annotations"], labels)
    except (KeyError, TypeError, ValueError) as error:
        raise DatasetError(
            f"The annotations of {store.location}/{folder} are no panoptic annotations of COCO: "
            f"{type(error).__name__}: {error}."
        ) from error
