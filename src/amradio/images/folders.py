"""Folders of pictures: one folder for each class, or all together."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator

import numpy as np

from amradio.images.dataset import ImageSet
from amradio.images.files import FileRows, Found, Listing, is_picture, list_folder, no_pictures, walk


def open_picture_folder(folder: str, listing: Listing, name: str, split: str | None = None) -> ImageSet:
    """Open a folder of pictures.

    If it has no pictures of its own and at least two sub-folders have some, each sub-folder is a class: labels count
    the sub-folders in the order of their names' characters, as torchvision's ``ImageFolder`` does. An empty sub-folder
    keeps its number, so that two splits agree on the labels though one lacks a class; one with nothing but other files
    says that sub-folders are no classes here. Otherwise the folder is searched recursively, and there are no labels.

    Args:
        folder: Where the pictures are.
        listing: Of the folder.
        name: What the set is called.
        split: Which part this folder is, for the record.

    Raises:
        OptionError: There are no pictures, or the folder cannot be read.
    """
    if len(listing.folders) > 1 and not any(map(is_picture, listing.files)):
        classes = sorted(listing.folders)
        labels = array("q")
        rows = FileRows(_classes(folder, classes, labels), unique=False)
        filled = set(labels)
        others = [c for i, c in enumerate(classes) if i not in filled and any(list_folder(os.path.join(folder, c)))]
        if len(filled) > 1 and not others:
            return ImageSet(rows, name=name, split=split, labels=np.array(labels), class_names=classes)
    rows = FileRows(walk(folder, folder, listing=listing))
    if not len(rows):
        raise no_pictures(folder)
    return ImageSet(rows, name=name, split=split)


def _classes(folder: str, classes: list[str], labels: array[int]) -> Iterator[Found]:
    for label, name in enumerate(classes):
        for found in walk(os.path.join(folder, name), folder, f"{name}/"):
            labels.append(label)
            yield found
