"""The layouts of COCO: things and stuff by super-category, from panoptic, stuff and instance annotations."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from amradio.errors import DatasetError
from amradio.images.segmentation.instances import read_instances
from amradio.images.segmentation.layout import (
    Contents,
    Part,
    Request,
    choose_split,
    files_by_key,
    find_part,
    matches,
    missing_parts,
    need_part,
    renamed,
)
from amradio.images.segmentation.masks import VOID, LabelTable, MaskFiles, MaskGroup
from amradio.images.segmentation.panoptic import read_panoptic
from amradio.images.segmentation.storage import Storage
from amradio.images.splits import find_split

_PICTURES = Part("pictures", ("images/*20??", "*20??", "coco/images/*20??"))
_ANNOTATIONS = ("annotations", "annotations/annotations")
_UNSCORED_STUFF = "other"


def _under_annotations(what: str, *places: str) -> Part:
    return Part(what, tuple(f"{root}/{place}" for place in places for root in _ANNOTATIONS))


@dataclass(frozen=True)
class CocoThingLayout:
    """Panoptic annotations of COCO: the super-categories of things are the classes, all else is void.

    Masks are the published panoptic PNG files, or PNG files with the category of each pixel. The variant ``hbird``
    takes ids that are no category for void.
    """

    name: str = "coco-thing"
    parts: tuple[Part, ...] = (
        _PICTURES,
        _under_annotations("categories", "panoptic_annotations/panoptic_*.json", "panoptic_*.json"),
        _under_annotations("masks", "train20??", "val20??", "panoptic_annotations/*20??", "panoptic_*20??"),
    )

    def missing(self, store: Storage) -> list[Part]:
        """See `Layout`."""
        return missing_parts(store, self.parts)

    def lacking(self, store: Storage) -> list[Part]:
        """See `Layout`."""
        return _lacking(self.splits(store))

    def splits(self, store: Storage) -> list[str]:
        """See `Layout`."""
        return [split for split in _picture_folders(store) if self._masks(store, split)]

    def open(self, store: Storage, request: Request) -> Contents:
        """See `Layout`."""
        need_part(store, self.parts[0], self.name)
        split = _choose(store, self.splits(store), request.split)
        folder = self._masks(store, split)[0]
        panoptic = folder.rpartition("/")[2].startswith("panoptic_")
        file = need_part(store, _segments(split) if panoptic else self.parts[1], self.name)
        record = _read(store, file)
        categories = _categories(record, file)
        things = {int(c["id"]): str(c["supercategory"]) for c in categories if c.get("isthing") == 1}
        labels, names = _numbered(things)
        labels.update({int(c["id"]): VOID for c in categories if int(c["id"]) not in labels})
        files = files_by_key(store, folder)
        masks: MaskGroup
        if panoptic:
            masks = read_panoptic(record, store, folder, files, labels)
        else:
            void = range(256) if request.variant == "hbird" else (0, VOID)
            table = LabelTable({**dict.fromkeys(void, VOID), **labels}, "the ids of categories, 0 and 255")
            masks = MaskFiles(store, files, table, f"{folder}/{{}}.png")
        return Contents(_pictures(store, split), masks, request.listed, renamed(names, request, self.name))

    def _masks(self, store: Storage, split: str) -> list[str]:
        places = (
            split,
            f"panoptic_annotations/semantic_segm*_{split}",
            f"panoptic_annotations/panoptic_{split}",
            f"panoptic_{split}",
        )
        return [m for p in places for root in _ANNOTATIONS for m in matches(store, f"{root}/{p}")]


@dataclass(frozen=True)
class CocoStuffLayout:
    """Stuff annotations of COCO: the super-categories of stuff are the classes; things and "other" are void."""

    name: str = "coco-stuff"
    parts: tuple[Part, ...] = (
        _PICTURES,
        _under_annotations("categories", "stuff_annotations/stuff_*.json", "stuff_*.json"),
        _under_annotations("masks", "stuff_annotations/stuff_*_pixelmaps", "stuff_*_pixelmaps"),
    )

    def missing(self, store: Storage) -> list[Part]:
        """See `Layout`."""
        return missing_parts(store, self.parts)

    def lacking(self, store: Storage) -> list[Part]:
        """See `Layout`."""
        return _lacking(self.splits(store))

    def splits(self, store: Storage) -> list[str]:
        """See `Layout`."""
        return [split for split in _picture_folders(store) if find_part(store, self._masks(split))]

    def open(self, store: Storage, request: Request) -> Contents:
        """See `Layout`."""
        need_part(store, self.parts[0], self.name)
        split = _choose(store, self.splits(store), request.split)
        file = need_part(store, self.parts[1], self.name)
        categories = {int(c["id"]): str(c["supercategory"]) for c in _categories(_read(store, file), file)}
        labels, names = _numbered({i: s for i, s in categories.items() if s != _UNSCORED_STUFF})
        void = dict.fromkeys((0, *(i for i in categories if i not in labels)), VOID)
        table = LabelTable({**void, **labels}, "the ids of stuff categories, and 0 (things)")
        folder = need_part(store, self._masks(split), self.name)
        masks = MaskFiles(store, files_by_key(store, folder), table, f"{folder}/{{}}.png")
        return Contents(_pictures(store, split), masks, request.listed, renamed(names, request, self.name))

    def _masks(self, split: str) -> Part:
        name = f"stuff_{split}_pixelmaps"
        return _under_annotations("masks", f"stuff_annotations/{name}", name)


@dataclass(frozen=True)
class CocoInstancesLayout:
    """Instance annotations of COCO, drawn: super-categories are the classes, and what is no instance is void."""

    name: str = "coco-instances"
    parts: tuple[Part, ...] = (_PICTURES, _under_annotations("annotations", "instances_*.json"))

    def missing(self, store: Storage) -> list[Part]:
        """See `Layout`."""
        return missing_parts(store, self.parts)

    def lacking(self, store: Storage) -> list[Part]:
        """See `Layout`."""
        return _lacking(self.splits(store))

    def splits(self, store: Storage) -> list[str]:
        """See `Layout`."""
        return [split for split in _picture_folders(store) if find_part(store, self._annotations(split))]

    def open(self, store: Storage, request: Request) -> Contents:
        """See `Layout`."""
        need_part(store, self.parts[0], self.name)
        split, file, record = self.annotations(store, request.split)
        labels, names = _numbered({int(c["id"]): str(c["supercategory"]) for c in _categories(record, file)})
        masks = read_instances(record, labels, f"{store.location}/{file}")
        return Contents(_pictures(store, split), masks, request.listed, renamed(names, request, self.name))

    def annotations(self, store: Storage, split: str | None) -> tuple[str, str, Mapping[str, Any]]:
        """Read the annotations of a split as they are.

        Returns:
            The split's full name, the name of the file, and its content.

        Raises:
            DatasetError: There is no such split, or its file is missing or not understood.
        """
        split = _choose(store, self.splits(store), split)
        file = need_part(store, self._annotations(split), self.name)
        return split, file, _read(store, file)

    def _annotations(self, split: str) -> Part:
        return _under_annotations("annotations", f"instances_{split}.json")


def _segments(split: str) -> Part:
    name = f"panoptic_{split}.json"
    return _under_annotations("segments", f"panoptic_annotations/{name}", name)


def _picture_folders(store: Storage) -> dict[str, str]:
    """Folders of pictures by name, such as ``train2017``, which is the split's."""
    folders: dict[str, str] = {}
    for pattern in _PICTURES.places:
        for folder in matches(store, pattern):
            if store.is_folder(folder):
                folders.setdefault(folder.rpartition("/")[2], folder)
    return folders


def _lacking(splits: list[str]) -> list[Part]:
    """Of train and val, what has no pictures or no masks."""
    there = {split[:-4] for split in splits}
    return [
        Part(f"pictures and masks of {split}", (f"images/{split}2017",))
        for split in ("train", "val")
        if split not in there
    ]


def _pictures(store: Storage, split: str) -> dict[str, str]:
    return files_by_key(store, _picture_folders(store)[split])


def _choose(store: Storage, splits: list[str], split: str | None) -> str:
    """Choose a split by its name with or without the year."""
    short = {name[:-4]: name for name in splits}  # the latest year if there are several
    if split is not None and split not in splits and (found := find_split(short, split)) is not None:
        return short[found]
    return choose_split(store, splits, split)


def _read(store: Storage, name: str) -> Mapping[str, Any]:
    try:
        record = json.loads(store.read(name))
    except ValueError as error:
        raise DatasetError(f"{store.location}/{name} is not JSON: {error}.") from error
    if not isinstance(record, dict):
        raise DatasetError(f"{store.location}/{name} is no file of COCO annotations: it holds no object.")
    return record


def _categories(record: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    categories = record.get("categories")
    if not isinstance(categories, list) or not all(
        isinstance(c, dict) and isinstance(c.get("id"), int) and "supercategory" in c for c in categories
    ):
        raise DatasetError(f"{name} is no file of COCO annotations: it has no categories with super-categories.")
    return categories


def _numbered(supercategories: Mapping[int, str]) -> tuple[dict[int, int], tuple[str, ...]]:
    """Number the super-categories in the order of their names: the class of each category, and the names."""
    names = sorted(set(supercategories.values()))
    return {category: names.index(name) for category, name in supercategories.items()}, tuple(names)
