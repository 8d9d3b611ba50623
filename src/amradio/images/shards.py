"""Pictures in tar shards, named as the WebDataset library does: ``KEY.jpg`` beside ``KEY.cls`` or ``KEY.json``."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import NamedTuple

import numpy as np

from amradio.errors import DatasetError, ImageError
from amradio.images.dataset import ImageSet
from amradio.images.files import file_stamp
from amradio.images.labels import Labels, find_class_file, label_in
from amradio.images.names import Digests, Names, folded, portable, unique_stems, with_digest
from amradio.images.sources import PICTURE_SUFFIXES, EncodedImage
from amradio.images.tarfiles import Member, OpenFiles, members, read_member


def open_shards(paths: Sequence[str], name: str, split: str | None = None) -> ImageSet:
    """Open pictures in tar files.

    A key is the path of a member up to the first dot of its file name. A member with nothing but a picture's ending
    behind its key is the picture; where a key has none, every member that ends as pictures do is one. The label is the
    content of ``KEY.cls``, a number or a name, or under one of `amradio.images.labels.LABEL_KEYS` in ``KEY.json``.
    Class names come from a file beside the shards (see `amradio.images.labels.find_class_file`).

    Args:
        paths: Of the shards, whose order is kept.
        name: What the set is called.
        split: Which part this is, for the record.

    Raises:
        DatasetError: A shard cannot be used, or labels are not understood, or there are no pictures.
    """
    classes = find_class_file(os.path.dirname(paths[0]), _stem(paths[0]))
    labels = Labels(name, classes)
    rows = ShardRows(paths, labels)
    if not len(rows):
        raise DatasetError(f"No pictures are in {paths[0]}{f' and {len(paths) - 1} more' if len(paths) > 1 else ''}.")
    numbers, class_names = labels.finish()
    return ImageSet(rows, name=name, split=split, labels=numbers, class_names=class_names)


class ShardRows:
    """Pictures in tar files (see `amradio.images.dataset.Rows`).

    Args:
        paths: Of the shards.
        labels: Gets the label of each picture, None where there is none.

    Raises:
        DatasetError: A shard cannot be used.
    """

    def __init__(self, paths: Sequence[str], labels: Labels) -> None:
        self._paths = list(paths)
        self._prefixes = unique_stems(self._paths)
        self._names, self._files = Names(), OpenFiles()
        shard_of, offsets, sizes = array("i"), array("q"), array("q")
        for shard, path in enumerate(self._paths):
            first = len(self._names)
            late: dict[str, int | str] = {}
            for sample in _samples(path, self._files):
                if sample.label is not None and not sample.pictures:
                    late[sample.key] = sample.label
                for picture in sample.pictures:
                    self._names.append(picture.name)
                    shard_of.append(shard)
                    offsets.append(picture.offset)
                    sizes.append(picture.size)
                    labels.append(sample.label)
            if late:  # members of a key need not stand together, as in an archive of a folder in no order
                for row in range(first, len(self._names)):
                    if labels.is_missing(row) and (label := late.get(_key(self._names[row]))) is not None:
                        labels.replace(row, label)
        self._shard_of = np.frombuffer(shard_of, dtype=np.intc)
        self._offsets = np.frombuffer(offsets, dtype=np.int64)
        self._sizes = np.frombuffer(sizes, dtype=np.int64)
        self._key_is_shared = _are_shared(portable(_key(name)) for name in self._names)
        self._place_is_shared = np.zeros(len(self), dtype=bool)
        shared = np.flatnonzero(self._key_is_shared)
        self._place_is_shared[shared] = _are_shared(self._place(int(row)) for row in shared)

    def __len__(self) -> int:
        return len(self._names)

    def source(self, row: int) -> EncodedImage:
        """Make the source of one picture; its id is its key, after the shard's name where keys repeat."""
        path, name = self._paths[self._shard_of[row]], self._names[row]
        read = partial(read_member, self._files, path, name, int(self._offsets[row]), int(self._sizes[row]))
        return EncodedImage(read, self._id(row), f"{path}/{name}")

    def stamps(self, rows: np.ndarray) -> Iterator[bytes]:
        """Sizes and times of change of the shards; shard, offset, size and name of members."""
        for shard in np.unique(self._shard_of[rows]).tolist():
            yield self._prefixes[shard].encode("utf-8", "surrogatepass")
            yield file_stamp(self._paths[shard])
        yield self._shard_of[rows].astype("<i4").tobytes()
        yield self._offsets[rows].astype("<i8").tobytes()
        yield self._sizes[rows].astype("<i8").tobytes()
        for row in rows.tolist():
            yield self._names.encoded(row)

    def _id(self, row: int) -> str:
        if not self._key_is_shared[row]:
            return portable(_key(self._names[row]))
        place = self._place(row)
        return with_digest(place, str(self._offsets[row])) if self._place_is_shared[row] else place

    def _place(self, row: int) -> str:
        return portable(f"{self._prefixes[self._shard_of[row]]}/{self._names[row]}")


class _Sample(NamedTuple):
    """What belongs to one key."""

    key: str
    pictures: list[Member]
    label: int | str | None


def _samples(path: str, files: OpenFiles) -> Iterator[_Sample]:
    visible = (m for m in members(path) if not os.path.basename(m.name).startswith("."))
    for key, group in groupby(visible, key=lambda m: _key(m.name)):
        found = list(group)
        label = next((v for v in (_label(path, m, key, files) for m in found) if v is not None), None)
        pictures = [m for m in found if _ending(m, key) in PICTURE_SUFFIXES]
        if len(pictures) > 1 and label is not None:
            raise DatasetError(
                f"{path} has several pictures under the labelled key {key}: {', '.join(m.name for m in pictures)}. "
                f"Name what is not the picture otherwise, such as {key}.mask.png."
            )
        yield _Sample(key, pictures or [m for m in found if _suffix(m.name) in PICTURE_SUFFIXES], label)


def _label(path: str, member: Member, key: str, files: OpenFiles) -> int | str | None:
    ending, where = _ending(member, key), f"{member.name} in {path}"
    if ending not in (".cls", ".json"):
        return None
    try:
        text = (member.small or read_member(files, path, member.name, member.offset, member.size)).decode("utf-8")
        record = {"label": text} if ending == ".cls" else json.loads(text)
    except (ImageError, ValueError) as error:
        raise DatasetError(f"{where} is no label that can be read: {error}") from error
    return label_in(record, where) if isinstance(record, dict) else None


def _key(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{file.partition('.')[0]}"


def _ending(member: Member, key: str) -> str:
    return member.name[len(key) :].lower()


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _are_shared(ids: Iterable[str]) -> np.ndarray:
    """Which ids occur more than once; bool [N]."""
    digests = Digests()
    for i in ids:
        digests.append(folded(i))
    return digests.repeated()[1]


def _stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]
