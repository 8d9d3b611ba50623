"""Sets of pictures by one string: folders, patterns, list files, tar shards, Parquet tables, Hugging Face datasets."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from amradio.errors import DatasetError, OptionError
from amradio.hub import HubOptions
from amradio.images.braces import expand_braces
from amradio.images.dataset import ImageSet
from amradio.images.files import Listing, expand, list_folder
from amradio.images.folders import open_picture_folder
from amradio.images.hf import SAVED_MARKS, open_saved
from amradio.images.hub import open_hub
from amradio.images.lists import LIST_SUFFIXES, open_list
from amradio.images.names import natural_key
from amradio.images.parquet import open_parquet
from amradio.images.shards import open_shards
from amradio.images.sources import PICTURE_SUFFIXES
from amradio.images.splits import SPLIT_NAMES, find_split, no_such_split, several_splits, shards_of_split

_COMPRESSED_TAR = re.compile(r"\.(tgz|tbz2?|txz|tar\.\w+)$", re.IGNORECASE)
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


def open_images(
    spec: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    split: str | None = None,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    label_column: str | None = None,
    image_column: str | None = None,
) -> ImageSet:
    """Open a set of pictures.

    ============================================  ==================================================================
    ``photos/``                                   one folder for each class, or pictures at any depth without labels
    ``imagenet/`` with ``split="val"``            the folder ``val`` in it (``validation`` is the same)
    ``photos/**/*.png``                           a pattern
    ``list.txt``, ``.csv``, ``.tsv``, ``.jsonl``  a list of paths, with labels or without
    ``shard-{0000..0007}.tar``, ``shards/``       tar shards in WebDataset naming; also one tar or a pattern
    ``table.parquet``, ``tables/``                Parquet with encoded pictures; also a pattern
    ``saved/``                                    a Hugging Face dataset written by ``save_to_disk``
    ``imagenet-1k``, ``owner/name``               a Hugging Face dataset on the Hub; ``owner/name:config`` names one of
                                                  its configurations
    ============================================  ==================================================================

    What exists as a file or folder is taken for that, whatever it is called.

    Args:
        spec: See above. Several paths are one set: tar shards, Parquet files, or pictures, folders and patterns.
        split: Which part. Needed where there are several.
        cache_dir: Where a dataset from the Hub is kept.
        token: Access token for the Hub.
        revision: Branch, tag or commit of a dataset on the Hub.
        local_files_only: Do not download.
        label_column: Where labels are, in lists and tables; default the usual names.
        image_column: Where paths or pictures are, in lists and tables; default the usual names.

    Returns:
        At least one picture.

    Raises:
        DatasetError: There is no such set or split, or it cannot be read; the message says what was found.
        MissingDependencyError: A Hugging Face dataset needs the extra ``amradio[datasets]``.
    """
    paths = [spec] if isinstance(spec, (str, os.PathLike)) else list(spec)
    words = [os.path.expanduser(os.fspath(p)) for p in paths]
    if not words or not all(words):
        raise DatasetError("No pictures were named. Give a folder, a pattern, a list file, shards or a dataset.")
    context = _Context(
        ", ".join(os.fspath(p) for p in paths),
        split,
        label_column,
        image_column,
        HubOptions(token=token, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only),
    )
    try:
        return _open_one(words[0], context) if len(words) == 1 else _open_several(words, context)
    except OptionError as error:
        raise DatasetError(str(error)) from error


@dataclass(frozen=True)
class _Context:
    """What was asked for, beside the path that is being looked at."""

    name: str
    split: str | None
    label_column: str | None
    image_column: str | None
    hub: HubOptions


def _open_one(path: str, context: _Context) -> ImageSet:
    if os.path.isdir(path):
        return _open_folder(path, context, context.split)
    if os.path.lexists(path):
        return _open_files([path], context)
    words = expand_braces(path)
    if len(words) > 1 or glob.has_magic(path):
        return _open_several(words, context)
    if _HUB_ID.fullmatch(path) and not _looks_like_a_file(path):
        return open_hub(path, context.name, context.split, context.hub, context.image_column, context.label_column)
    raise DatasetError(f"There is no file or folder {path}.")


def _open_several(words: list[str], context: _Context) -> ImageSet:
    """Open what several paths and patterns mean together."""
    if all(_is_table_or_archive(w) for w in words):
        return _open_files(_existing(words), context)
    _no_splits(", ".join(words), context)
    return ImageSet(expand(words).rows, name=context.name)


def _open_files(paths: list[str], context: _Context) -> ImageSet:
    """Open tar shards, Parquet files, one list, or pictures."""
    endings = {os.path.splitext(p)[1].lower() for p in paths}
    compressed = [p for p in paths if _COMPRESSED_TAR.search(p)]
    if compressed:
        raise DatasetError(
            f"The archive {compressed[0]} is compressed, so that its pictures cannot be read in any order. Unpack it "
            "to a plain tar file; pictures are compressed already."
        )
    if endings in ({".tar"}, {".parquet"}):
        chosen = shards_of_split(paths, context.split, context.name)
        if endings == {".tar"}:
            return open_shards(chosen, context.name, context.split)
        return open_parquet(chosen, context.name, context.split, context.image_column, context.label_column)
    if len(paths) == 1 and endings <= LIST_SUFFIXES:
        return open_list(
            paths[0],
            context.name,
            context.split,
            path_column=context.image_column,
            label_column=context.label_column,
        )
    if any(_is_table_or_archive(p) for p in paths):
        raise DatasetError(f"{context.name} mixes tar shards, Parquet files and other files. Open them one by one.")
    _no_splits(context.name, context)
    return ImageSet(expand(paths).rows, name=context.name)


def _open_folder(folder: str, context: _Context, split: str | None) -> ImageSet:
    """Open a folder by what is in it; `split` is what is still to be found, None if the folder is that split."""
    if any(os.path.isfile(os.path.join(folder, mark)) for mark in SAVED_MARKS):
        return open_saved(folder, context.name, split, context.image_column, context.label_column)
    listing = list_folder(folder)
    if split is not None and (part := find_split(listing.folders, split)) is not None:
        return _open_folder(os.path.join(folder, part), context, None)
    for ending in (".tar", ".parquet"):
        shards = [os.path.join(folder, f) for f in listing.files if f.lower().endswith(ending)]
        if shards:
            _refuse_other_pictures(folder, listing, shards)
            return _open_files(shards, context if split else replace(context, split=None)).with_split(context.split)
    splits = [f for f in listing.folders if f.lower() in SPLIT_NAMES]
    if split is not None:
        raise no_such_split(f"The folder {folder}", split, splits)
    if splits and len(splits) == len(listing.folders):
        raise several_splits(f"The folder {folder}", splits)
    return open_picture_folder(folder, listing, context.name, context.split)


def _refuse_other_pictures(folder: str, listing: Listing, shards: list[str]) -> None:
    """Refuse a folder in which either the archives or the pictures beside them would be left out."""
    others = [f for f in listing.files if _is_picture(f)]
    others += [f"{f}/" for f in listing.folders if any(map(_is_picture, list_folder(os.path.join(folder, f)).files))]
    if others:
        raise DatasetError(
            f"The folder {folder} has {len(shards)} archives or tables ({os.path.basename(shards[0])}) and beside them "
            f"{len(others)} pictures or folders ({others[0]}). Name the archives, or move them elsewhere."
        )


def _is_picture(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in PICTURE_SUFFIXES


def _existing(words: list[str]) -> list[str]:
    """Files that names and patterns mean, in natural order for each pattern."""
    paths = []
    for word in words:
        found = [word] if os.path.exists(word) else sorted(glob.glob(word, recursive=True), key=natural_key)
        if not found:
            raise DatasetError(f"There is no file {word}.")
        paths += found
    return paths


def _is_table_or_archive(path: str) -> bool:
    return path.lower().endswith((".tar", ".parquet")) or _COMPRESSED_TAR.search(path) is not None


def _looks_like_a_file(path: str) -> bool:
    """Names with such endings are no dataset on the Hub, so a typing error in one is not looked for there."""
    ending = os.path.splitext(path)[1].lower()
    return path.startswith(".") or ending in LIST_SUFFIXES | PICTURE_SUFFIXES or _is_table_or_archive(path)


def _no_splits(where: str, context: _Context) -> None:
    if context.split is not None:
        raise no_such_split(where, context.split, [])
