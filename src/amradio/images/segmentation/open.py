"""Sets of pictures with masks by one path."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import get_args

from amradio.errors import OptionError
from amradio.images.labels import read_class_file
from amradio.images.segmentation.dataset import PairRows, SegmentationSet, check_class_names
from amradio.images.segmentation.layout import Contents, Request, Variant
from amradio.images.segmentation.names import NameList, read_list_file, read_names
from amradio.images.segmentation.pairing import Pairing, pair, refuse_orphans
from amradio.images.segmentation.recognise import Place, locate
from amradio.images.segmentation.storage import Storage, open_storage


def open_segmentation(
    spec: str | os.PathLike[str],
    split: str | None = None,
    *,
    layout: str | None = None,
    classes: Sequence[str] | str | os.PathLike[str] | None = None,
    list_file: str | os.PathLike[str] | None = None,
    variant: Variant = "clean",
) -> SegmentationSet:
    """Open pictures with masks.

    ==================  ================================================================================================
    ``voc``             ``JPEGImages`` or ``images``, ``SegmentationClass`` and ``SegmentationClassAug``, lists in
                        ``ImageSets/Segmentation`` or ``sets``; 21 classes, or those of ``classes.txt``
    ``ade20k``          ``images/training``, ``annotations/training``, and the same with ``validation``; 150 classes
    ``cityscapes``      ``leftImg8bit/SPLIT/CITY``, ``gtFine/SPLIT/CITY`` with ``_labelIds.png``; 19 classes
    ``coco-thing``      panoptic annotations of COCO; the 12 super-categories of things
    ``coco-stuff``      stuff annotations of COCO; the 15 super-categories of stuff
    ``coco-instances``  instance annotations of COCO, drawn; the super-categories of things
    ``folder``          ``images`` and ``masks`` with files of the same names, and ``classes.txt``
    ==================  ================================================================================================

    The data set lies in a folder or in an uncompressed tar archive, at its root or up to two folders further down.
    Every wanted picture must have a mask; without a list of what is wanted, every mask must have a picture too. Masks
    are opened when they are read, and checked then.

    Args:
        spec: The folder or archive.
        split: Which part. Needed where there are several.
        layout: See above; None finds out.
        classes: Names in place of those of the data set: a list, or a file (see `amradio.images.labels`).
        list_file: Which pictures to take, in order: a file with one name a line, on disk or in the data set. The split
            still says where the pictures are, in layouts that keep splits apart.
        variant: ``hbird`` reads a data set as the published HummingBird evaluation does: ADE20K has 151 classes, of
            which 0 is not scored, and unknown ids in the masks of ``coco-thing`` are void.

    Raises:
        DatasetError: There is no such data set or split, or its files do not match; the message says what was found.
        OptionError: There is no such layout or variant.
    """
    place = locate(open_storage(spec), layout)
    request = make_request(place.store, split, classes=classes, list_file=list_file, variant=variant)
    contents = place.layout.open(place.store, request)
    pairing = pair(contents)
    where = os.fspath(spec)
    refuse_orphans(pairing, contents, f"{where} (split {split})" if split else where)
    return as_set(place, contents, pairing, where, split)


def segmentation_splits(spec: str | os.PathLike[str], layout: str | None = None) -> tuple[str, ...]:
    """Say which parts a data set has, without opening them; none if it is not divided.

    Args:
        spec: See `open_segmentation`.
        layout: See `open_segmentation`.

    Raises:
        DatasetError: There is no such data set.
        OptionError: There is no such layout.
    """
    place = locate(open_storage(spec), layout)
    return tuple(place.layout.splits(place.store))


def make_request(
    store: Storage,
    split: str | None,
    *,
    classes: Sequence[str] | str | os.PathLike[str] | None,
    list_file: str | os.PathLike[str] | None,
    variant: Variant,
) -> Request:
    """Read the files that a request names; see `open_segmentation`."""
    if variant not in get_args(Variant):
        raise OptionError(f"There is no variant {variant!r} of a data set: {' or '.join(get_args(Variant))}.")
    names = None
    if classes is not None:
        names = read_class_file(classes).names if isinstance(classes, (str, os.PathLike)) else tuple(classes)
        check_class_names(names, "The list of classes")
    return Request(split, None if list_file is None else _read_list(store, list_file), names, variant)


def as_set(place: Place, contents: Contents, pairing: Pairing, name: str, split: str | None) -> SegmentationSet:
    """Make a set of what has found its counterpart."""
    rows = PairRows(place.store, pairing.keys, [contents.pictures[k] for k in pairing.keys], contents.masks)
    return SegmentationSet(
        rows,
        name=name,
        layout=place.layout.name,
        split=split,
        class_names=contents.class_names,
        ignore_index=contents.ignore_index,
    )


def _read_list(store: Storage, path: str | os.PathLike[str]) -> NameList:
    """Read a list on disk, or else in the data set."""
    name = os.fspath(path)
    if not os.path.exists(os.path.expanduser(name)) and store.is_file(name):
        return read_names(store.read(name), f"{store.location}/{name}")
    return read_list_file(name)
