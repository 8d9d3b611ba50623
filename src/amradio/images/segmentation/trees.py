"""Layouts of data sets that have one index mask in a PNG file for each picture."""

from __future__ import annotations

from dataclasses import dataclass

from amradio.errors import DatasetError
from amradio.images.segmentation.classes import ADE20K, CITYSCAPES, CITYSCAPES_TRAIN_IDS, VOC
from amradio.images.segmentation.layout import (
    CLASS_FILE,
    LIST_FOLDERS,
    Contents,
    Part,
    Request,
    by_file_name,
    choose_split,
    class_names_in,
    files_by_key,
    listed_names,
    matches,
    missing_parts,
    need_part,
    renamed,
    split_lists,
)
from amradio.images.segmentation.masks import VOID, LabelTable, MaskFiles
from amradio.images.segmentation.names import NameList, resolve
from amradio.images.segmentation.storage import Storage, below
from amradio.images.splits import SPLIT_NAMES, find_split, no_such_split, same_split, several_splits


@dataclass(frozen=True)
class VocLayout:
    """Pascal VOC, and what is laid out like it.

    Masks of trainaug are in ``SegmentationClassAug``, all others in ``SegmentationClass``, each split's in one folder:
    the other is taken if only it has them all. Without ``classes.txt``, the 21 classes of Pascal VOC.
    """

    name: str = "voc"
    parts: tuple[Part, ...] = (
        Part("pictures", ("JPEGImages", "images")),
        Part("masks", ("SegmentationClass", "SegmentationClassAug")),
    )
    published: tuple[Part, ...] = (
        Part("masks of train and val", ("SegmentationClass",)),
        Part("masks of trainaug", ("SegmentationClassAug",)),
        Part("names in train", tuple(f"{folder}/train.txt" for folder in LIST_FOLDERS)),
        Part("names in trainaug", tuple(f"{folder}/trainaug.txt" for folder in LIST_FOLDERS)),
        Part("names in val", tuple(f"{folder}/val.txt" for folder in LIST_FOLDERS)),
    )

    def missing(self, store: Storage) -> list[Part]:
        """See `Layout`."""
        return missing_parts(store, self.parts)

    def lacking(self, store: Storage) -> list[Part]:
        """See `Layout`; a data set with classes of its own is not Pascal VOC."""
        return [] if store.is_file(CLASS_FILE) else missing_parts(store, self.published)

    def splits(self, store: Storage) -> list[str]:
        """See `Layout`."""
        return list(split_lists(store))

    def open(self, store: Storage, request: Request) -> Contents:
        """See `Layout`."""
        pictures = files_by_key(store, need_part(store, self.parts[0], self.name))
        need_part(store, self.parts[1], self.name)
        listed = listed_names(store, request)
        names = class_names_in(store, request) or VOC
        table = LabelTable.identity(len(names))
        folder, files = self._masks(store, pictures, listed, request.split)
        return Contents(pictures, MaskFiles(store, files, table, f"{folder}/{{}}.png"), listed, names)

    def _masks(
        self, store: Storage, pictures: dict[str, str], listed: NameList | None, split: str | None
    ) -> tuple[str, dict[str, str]]:
        """The folder that has the masks of the wanted pictures, and its files."""
        wanted = set(pictures if listed is None else resolve(listed, pictures).keys)
        folders = [f for f in self.parts[1].places if matches(store, f)]
        if "aug" in (split or "").lower() or (listed is not None and "aug" in listed.location.rpartition("/")[2]):
            folders.reverse()
        first: tuple[str, dict[str, str]] | None = None
        for folder in folders:
            found = folder, files_by_key(store, folder)
            if wanted <= found[1].keys():
                return found
            first = first or found
        return first or (self.parts[1].places[0], {})


@dataclass(frozen=True)
class Ade20kLayout:
    """ADE20K as in the scene parsing challenge: 0 in a mask is void, 1 to 150 are the classes.

    The variant ``hbird`` counts 0 as a class that can be predicted, and leaves its pixels out of scores.
    """

    name: str = "ade20k"
    parts: tuple[Part, ...] = (
        Part("pictures", ("images/training", "images/validation")),
        Part("masks", ("annotations/training", "annotations/validation")),
    )
    published: tuple[Part, ...] = (
        Part("pictures of training", ("images/training",)),
        Part("masks of training", ("annotations/training",)),
        Part("pictures of validation", ("images/validation",)),
        Part("masks of validation", ("annotations/validation",)),
    )

    def missing(self, store: Storage) -> list[Part]:
        """See `Layout`."""
        return missing_parts(store, self.parts)

    def lacking(self, store: Storage) -> list[Part]:
        """See `Layout`."""
        return missing_parts(store, self.published)

    def splits(self, store: Storage) -> list[str]:
        """See `Layout`."""
        return [s for s in store.folders("images") if s in store.folders("annotations")]

    def open(self, store: Storage, request: Request) -> Contents:
        """See `Layout`."""
        split = choose_split(store, self.splits(store), request.split)
        pictures = files_by_key(store, f"images/{split}")
        if request.variant == "hbird":
            names, ignore = ("unlabelled", *ADE20K), 0
            table = LabelTable({i: i for i in range(len(names))}, "0 (unlabelled) to 150")
        else:
            names, ignore = ADE20K, VOID
            table = LabelTable({0: VOID, **{i + 1: i for i in range(len(names))}}, "0 (void) to 150")
        folder = f"annotations/{split}"
        masks = MaskFiles(store, files_by_key(store, folder), table, f"{folder}/{{}}.png")
        return Contents(pictures, masks, request.listed, renamed(names, request, self.name), ignore)


@dataclass(frozen=True)
class CityscapesLayout:
    """Cityscapes with fine annotations: 19 of 34 kinds are classes, the others are void."""

    name: str = "cityscapes"
    parts: tuple[Part, ...] = (Part("pictures", ("leftImg8bit/*",)), Part("masks", ("gtFine/*",)))
    published: tuple[Part, ...] = (
        Part("pictures of train", ("leftImg8bit/train",)),
        Part("masks of train", ("gtFine/train",)),
        Part("pictures of val", ("leftImg8bit/val",)),
        Part("masks of val", ("gtFine/val",)),
    )

    def missing(self, store: Storage) -> list[Part]:
        """See `Layout`."""
        return missing_parts(store, self.parts)

    def lacking(self, store: Storage) -> list[Part]:
        """See `Layout`."""
        return missing_parts(store, self.published)

    def splits(self, store: Storage) -> list[str]:
        """See `Layout`; test is none, since its masks are not published."""
        return [s for s in store.folders("leftImg8bit") if s != "test" and s in store.folders("gtFine")]

    def open(self, store: Storage, request: Request) -> Contents:
        """See `Layout`."""
        split = choose_split(store, self.splits(store), request.split)
        pictures = files_by_key(store, f"leftImg8bit/{split}", "_leftImg8bit.png")
        masks = files_by_key(store, f"gtFine/{split}", "_gtFine_labelIds.png")
        listed = request.listed
        if listed is not None:  # such lists name the files of pictures
            listed = listed._replace(names=tuple(n.replace("_leftImg8bit", "") for n in listed.names))
        names = renamed(CITYSCAPES, request, self.name)
        void = {i: VOID for i in (*range(34), VOID) if i not in CITYSCAPES_TRAIN_IDS}
        table = LabelTable({**void, **CITYSCAPES_TRAIN_IDS}, "the label ids 0 to 33 and 255")
        group = MaskFiles(
            store,
            by_file_name(masks, store.location),
            table,
            f"gtFine/{split}/*/{{}}_gtFine_labelIds.png",
        )
        return Contents(by_file_name(pictures, store.location), group, listed, names)


@dataclass(frozen=True)
class FolderLayout:
    """Any two trees of pictures and masks whose files have the same names, with ``classes.txt``.

    Splits are folders in both trees, folders that hold both trees, or lists.
    """

    name: str = "folder"
    parts: tuple[Part, ...] = (
        Part("pictures", ("images", "image", "imgs", "img", "JPEGImages", "pictures", "photos")),
        Part("masks", ("masks", "mask", "annotations", "labels", "label", "gt", "*masks", "*labels")),
    )

    def missing(self, store: Storage) -> list[Part]:
        """See `Layout`."""
        return [] if self._split_folders(store) else missing_parts(store, self.parts)

    def lacking(self, store: Storage) -> list[Part]:
        """See `Layout`; there is no published one."""
        return []

    def splits(self, store: Storage) -> list[str]:
        """See `Layout`."""
        if both := self._split_folders(store):
            return both
        return self._split_trees(store) or list(split_lists(store))

    def open(self, store: Storage, request: Request) -> Contents:
        """See `Layout`."""
        base, pictures, masks, listed = self._places(store, request)
        names = class_names_in(store, request)
        if names is None:
            raise DatasetError(
                f"{store.location} has no file classes.txt, so that the ids in the masks have no meaning. Write one "
                "class a line, from id 0, or give the classes."
            )
        table = LabelTable.identity(len(names))
        prefix = below(base, masks)
        group = MaskFiles(store, files_by_key(store, prefix), table, f"{prefix}/{{}}.png")
        return Contents(files_by_key(store, below(base, pictures)), group, listed, names)

    def _places(self, store: Storage, request: Request) -> tuple[str, str, str, NameList | None]:
        """The folder that has both trees, the trees in it, and the list of names."""
        if both := self._split_folders(store):
            base = choose_split(store, both, request.split)
            return base, *self._trees(store.at(base)), request.listed
        pictures, masks = self._trees(store)
        splits = self._split_trees(store)
        if not splits:
            return "", pictures, masks, listed_names(store, request)
        if request.split is None:
            raise several_splits(store.location, splits)
        if (of_pictures := find_split(splits, request.split)) is None:
            raise no_such_split(store.location, request.split, splits)
        of_masks = find_split(store.folders(masks), of_pictures)
        return "", f"{pictures}/{of_pictures}", f"{masks}/{of_masks}", request.listed

    def _trees(self, store: Storage) -> tuple[str, str]:
        return need_part(store, self.parts[0], self.name), need_part(store, self.parts[1], self.name)

    def _split_folders(self, store: Storage) -> list[str]:
        """Folders such as ``train`` that have pictures and masks in them."""
        named = [f for f in store.folders("") if f.lower() in SPLIT_NAMES]
        return [f for f in named if all(any(matches(store.at(f), p) for p in part.places) for part in self.parts)]

    def _split_trees(self, store: Storage) -> list[str]:
        """Folders such as ``train`` that the tree of pictures and the tree of masks have."""
        pictures, masks = self._trees(store)
        folders = [f for f in store.folders(pictures) if f.lower() in SPLIT_NAMES]
        return [f for f in folders if any(same_split(f, m) for m in store.folders(masks))]
