"""What a layout is: how the pictures, masks, lists and classes of a data set lie in folders."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple, Protocol

from amradio.errors import DatasetError
from amradio.images.segmentation.dataset import check_class_names
from amradio.images.segmentation.masks import VOID, MaskGroup
from amradio.images.segmentation.names import NameList, read_names
from amradio.images.segmentation.storage import Storage, below
from amradio.images.splits import find_split, no_such_split, several_splits

Variant = Literal["clean", "hbird"]
"""Whose reading of a data set: what is right, or what the published HummingBird evaluation does."""

LIST_FOLDERS = ("sets", "ImageSets/Segmentation")
"""Where the lists ``SPLIT.txt`` of a data set's parts are looked for."""

CLASS_FILE = "classes.txt"
"""What names the classes of a data set, one a line, from id 0."""


@dataclass(frozen=True)
class Part:
    """Something that a layout consists of.

    Attributes:
        what: It is.
        places: Names of files or folders, one of which must be there. ``*`` stands for any characters but a slash, and
            ``?`` for one.
    """

    what: str
    places: tuple[str, ...]


class Request(NamedTuple):
    """What is asked of a data set.

    Attributes:
        split: Which part of it; None for all, where it has no parts.
        listed: Names of the wanted pictures, in order; None for what the split means.
        class_names: In place of those that belong to the data set.
        variant: See `Variant`.
    """

    split: str | None = None
    listed: NameList | None = None
    class_names: tuple[str, ...] | None = None
    variant: Variant = "clean"


class Contents(NamedTuple):
    """What a data set has for one request, before pictures and masks are matched.

    Attributes:
        pictures: Names of files by key.
        masks: By the same keys.
        listed: Names of the wanted pictures; None for all.
        class_names: Of the ids from 0.
        ignore_index: See `SegmentationSet`.
    """

    pictures: dict[str, str]
    masks: MaskGroup
    listed: NameList | None
    class_names: tuple[str, ...]
    ignore_index: int = VOID


class Layout(Protocol):
    """How a data set lies in folders. Layouts hold nothing; a `Storage` is given to each call."""

    @property
    def name(self) -> str:
        """By which it is chosen."""
        ...

    @property
    def parts(self) -> tuple[Part, ...]:
        """What it consists of."""
        ...

    def missing(self, store: Storage) -> list[Part]:
        """What must be there and is not; nothing if this is the layout of a data set."""
        ...

    def lacking(self, store: Storage) -> list[Part]:
        """What the published data set has beyond that, and this one has not."""
        ...

    def splits(self, store: Storage) -> list[str]:
        """The parts of the data set; none if it is not divided."""
        ...

    def open(self, store: Storage, request: Request) -> Contents:
        """Find pictures, masks and classes.

        Raises:
            DatasetError: There is no such split, or something is missing or not understood.
        """
        ...


def matches(store: Storage, pattern: str) -> list[str]:
    """Names of files and folders that a pattern such as ``annotations/*_*2017.json`` means."""
    *folders, last = pattern.split("/")
    bases = [""]
    for segment in folders:
        bases = [name for base in bases for name in _children(store, base, segment) if store.is_folder(name)]
    return [name for base in bases for name in _children(store, base, last)]


def _children(store: Storage, folder: str, pattern: str) -> list[str]:
    """What in a folder has a name that a pattern means; large folders are not listed if it is a plain name."""
    if "*" in pattern or "?" in pattern:
        names = store.folders(folder) + store.files(folder)
        return [below(folder, name) for name in names if fnmatchcase(name, pattern)]
    name = below(folder, pattern)
    return [name] if store.is_folder(name) or store.is_file(name) else []


def find_part(store: Storage, part: Part) -> str | None:
    """The first place where a part is; None if it is missing."""
    return next((found[0] for place in part.places if (found := matches(store, place))), None)


def missing_parts(store: Storage, parts: Iterable[Part]) -> list[Part]:
    """The parts that are nowhere."""
    return [part for part in parts if find_part(store, part) is None]


def need_part(store: Storage, part: Part, layout: str) -> str:
    """The first place where a part is.

    Raises:
        DatasetError: It is missing.
    """
    if (place := find_part(store, part)) is None:
        raise DatasetError(
            f"{store.location} has no {part.what}. In the layout {layout} that is {' or '.join(part.places)}."
        )
    return place


def split_lists(store: Storage) -> dict[str, str]:
    """The lists that say which pictures belong to which split: file names by split."""
    lists: dict[str, str] = {}
    for folder in LIST_FOLDERS:
        for file in store.files(folder):
            if file.endswith(".txt"):
                lists.setdefault(file.removesuffix(".txt"), below(folder, file))
    return lists


def listed_names(store: Storage, request: Request) -> NameList | None:
    """The names of the wanted pictures, from the request itself or from a split's list.

    Returns:
        None if there are no lists and no split is asked for: all pictures are wanted.

    Raises:
        DatasetError: There is no list for the split, or there are several and none is asked for.
    """
    if request.listed is not None:
        return request.listed
    lists = split_lists(store)
    if request.split is None:
        if len(lists) > 1:
            raise several_splits(store.location, lists)
        name = next(iter(lists), None)
    else:
        name = find_split(lists, request.split)
        if name is None and not lists:
            places = " or ".join(f"{folder}/{request.split}.txt" for folder in LIST_FOLDERS)
            raise DatasetError(
                f"{store.location} has no list of the split {request.split!r}: expected {places}, with one name a "
                "line. Or give a list file, or leave the split out for all pictures."
            )
        if name is None:
            raise no_such_split(store.location, request.split, lists)
    if name is None:
        return None
    return read_names(store.read(lists[name]), f"{store.location}/{lists[name]}")


def class_names_in(store: Storage, request: Request) -> tuple[str, ...] | None:
    """The classes that the request or the file ``classes.txt`` names; None if neither does.

    Raises:
        DatasetError: The file is not understood.
    """
    if request.class_names is not None:
        return check_class_names(request.class_names, "The request")
    if not store.is_file(CLASS_FILE):
        return None
    where = f"{store.location}/{CLASS_FILE}"
    lines = [line.strip() for line in _text(store.read(CLASS_FILE), where).rstrip().split("\n")]
    if not all(lines):
        raise DatasetError(f"Line {lines.index('') + 1} of {where} is empty. Each line names a class, from id 0.")
    return check_class_names(lines, where)


def renamed(names: Sequence[str], request: Request, layout: str) -> tuple[str, ...]:
    """The classes of a layout that knows them, under the names of the request if it has any.

    Raises:
        DatasetError: The request names another number of classes.
    """
    if request.class_names is None:
        return tuple(names)
    if len(request.class_names) != len(names):
        raise DatasetError(
            f"{len(request.class_names)} classes were named, and the layout {layout} has {len(names)}: "
            f"{', '.join(names[:5])}, ..."
        )
    return request.class_names


def files_by_key(store: Storage, folder: str, ending: str | None = None) -> dict[str, str]:
    """Pictures at any depth under a folder.

    Args:
        store: Where they are.
        folder: Where to look.
        ending: Take files that end like this only, and leave it out of the key; None: what ends as pictures do.

    Returns:
        Names of files by key, which is the path from the folder without ending.

    Raises:
        DatasetError: Two files have the same key.
    """
    files: dict[str, str] = {}
    for name in store.pictures(folder):
        if ending is not None and not name.endswith(ending):
            continue
        key = name[: -len(ending)] if ending is not None else name.rpartition(".")[0]
        if key in files:
            raise DatasetError(
                f"{store.location} has two pictures of one name: {files[key]} and {below(folder, name)}. Remove one."
            )
        files[key] = below(folder, name)
    return files


def by_file_name(files: dict[str, str], where: str) -> dict[str, str]:
    """Make the last part of each key the key, for data sets whose file names are unique in all folders.

    Raises:
        DatasetError: They are not.
    """
    short: dict[str, str] = {}
    for key, name in files.items():
        last = key.rpartition("/")[2]
        if last in short:
            raise DatasetError(f"{where} has two pictures of one name: {short[last]} and {name}. Remove one.")
        short[last] = name
    return short


def choose_split(store: Storage, names: Iterable[str], split: str | None) -> str:
    """Choose one of the parts of a data set.

    Raises:
        DatasetError: There is no such part, or there are several and none is asked for.
    """
    known = list(names)
    if split is None:
        if len(known) == 1:
            return known[0]
        raise several_splits(store.location, known)
    chosen = find_split(known, split)
    if chosen is None:
        raise no_such_split(store.location, split, known)
    return chosen


def _text(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{where} is no text in UTF-8: {error}.") from error
