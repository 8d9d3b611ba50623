"""Labels of pictures as numbers, and the names of classes."""

from __future__ import annotations

import json
import os
import re
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from amradio.errors import DatasetError
from amradio.images.dataset import UNLABELLED

LABEL_KEYS = ("label", "cls", "class", "labels", "class_id", "target")
"""Names that a label goes by, in the order in which they are looked for."""


class ClassFile(NamedTuple):
    """The names of classes that a file lists.

    Attributes:
        names: For each label from 0.
        synonyms: Other texts for labels, such as WordNet numbers.
        path: Of the file.
    """

    names: tuple[str, ...]
    synonyms: dict[str, int]
    path: str


class Labels:
    """Collects labels one by one; each is a number, a name, or missing.

    Args:
        where: What messages call the source of the labels.
        classes: Which names there are; without it, the names that occur are numbered in sorted order.
    """

    def __init__(self, where: str, classes: ClassFile | None = None) -> None:
        self._where = where
        self._classes = classes
        self._values = array("q")
        self._by_name: dict[str, int] = {}
        self._number: int | None = None

    def append(self, label: int | str | None) -> None:
        """Add the label of the next picture; a text of digits is a number.

        Raises:
            DatasetError: Some labels are numbers and some are names.
        """
        self._values.append(self._code(label))

    def replace(self, index: int, label: int | str) -> None:
        """Set the label of an earlier picture."""
        self._values[index] = self._code(label)

    def is_missing(self, index: int) -> bool:
        """Whether an earlier picture has no label."""
        return self._values[index] == UNLABELLED

    def __len__(self) -> int:
        return len(self._values)

    def finish(self) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
        """Number the names.

        Returns:
            int64 [N] with -1 for missing labels, and the name of each label from 0; None and None if all are missing.

        Raises:
            DatasetError: A name is not among the known classes, or a number has no name.
        """
        values = np.array(self._values, dtype=np.int64)
        if not len(values) or values.max() == UNLABELLED:
            return None, None
        if not self._by_name:
            if self._classes is not None and values.max() >= len(self._classes.names):
                raise DatasetError(
                    f"{self._where} has the label {values.max()}, and {self._classes.path} names only "
                    f"{len(self._classes.names)} classes. Is it the class file of these pictures?"
                )
            return values, None if self._classes is None else self._classes.names
        names = tuple(sorted(self._by_name)) if self._classes is None else self._classes.names
        position = {n: i for i, n in enumerate(names)} if self._classes is None else self._classes.synonyms
        unknown = [n for n in self._by_name if n not in position]
        if unknown and self._classes is not None:
            raise DatasetError(
                f"{self._where} has {len(unknown)} class names that are not in {self._classes.path}, such as "
                f"{unknown[0]!r}. Is it the class file of these pictures?"
            )
        renumbered = np.array([*(position[n] for n in self._by_name), UNLABELLED], dtype=np.int64)
        return renumbered[values], names  # -1 takes the last, which is -1

    def _code(self, label: int | str | None) -> int:
        if label is None:
            return UNLABELLED
        if isinstance(label, str) and re.fullmatch(r"\s*-?[0-9]+\s*", label):
            label = int(label)
        if isinstance(label, int):
            if label < UNLABELLED:
                raise DatasetError(
                    f"{self._where} has the label {label}. Labels are numbers from 0; -1 says that there is none."
                )
            if label != UNLABELLED:
                self._number = label
                self._refuse_mixture()
            return label
        name = label.strip()
        if not name:
            return UNLABELLED
        code = self._by_name.setdefault(name, len(self._by_name))
        self._refuse_mixture()
        return code

    def _refuse_mixture(self) -> None:
        if self._number is not None and self._by_name:
            raise DatasetError(
                f"{self._where} has labels that are numbers ({self._number}) and labels that are names "
                f"({next(iter(self._by_name))!r}). Give all of one kind."
            )


def label_in(record: dict[str, Any], where: str) -> int | str | None:
    """Find the label in what a JSON object says about a picture.

    Raises:
        DatasetError: It is neither a whole number nor a text.
    """
    for key in LABEL_KEYS:
        value = record.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            raise DatasetError(f"{where} has the {key} {value!r}, which is neither a whole number nor a name.")
        return value
    return None


def find_class_file(folder: str, name: str | None = None) -> ClassFile | None:
    """Find the file that names the classes of a set of pictures.

    Looked for are ``classes.txt`` and ``classes.json`` in the folder, then ``X-classes.txt`` or ``.json`` where X is
    how the set's name begins, in the folder and beside it, then ``classes.txt`` and ``classes.json`` beside the folder.

    Args:
        folder: Where the pictures or archives are.
        name: Of the set; default the folder's.

    Raises:
        DatasetError: A file of such a name is there, and is no list of names.
    """
    here = os.path.abspath(folder)
    parent, own = os.path.split(here)
    plain = ("classes.txt", "classes.json")
    for place, names in (
        (here, plain),
        (here, _prefixed(here, name or own)),
        (parent, _prefixed(parent, own)),
        (parent, plain),
    ):
        for file in names:
            path = os.path.join(place, file)
            if os.path.isfile(path):
                return read_class_file(path)
    return None


def read_class_file(path: str | os.PathLike[str]) -> ClassFile:
    """Read the names of classes: one a line in a text file; in JSON a list, or an object from numbers to names.

    The entries of a JSON list may be objects with ``name`` or ``names``; their other texts, such as ``wnid``, are taken
    for labels too.

    Raises:
        DatasetError: The file is something else.
    """
    path = os.fspath(path)
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        entries = json.loads(text) if path.endswith(".json") else text.rstrip("\n").split("\n")
    except (OSError, ValueError) as error:
        raise DatasetError(f"The class file {path} cannot be read: {error}.") from error
    if isinstance(entries, dict):
        by_number = {int(k): v for k, v in entries.items() if re.fullmatch("[0-9]+", k)}
        if sorted(by_number) != list(range(len(entries))):
            raise DatasetError(f"The keys of the class file {path} are not the numbers from 0 without gaps.")
        entries = [by_number[i] for i in range(len(by_number))]
    if not isinstance(entries, list) or not entries:
        raise DatasetError(f"The class file {path} holds no list of names.")
    names, synonyms = [], {}
    for i, entry in enumerate(entries):
        texts = _texts(entry)
        if not texts:
            raise DatasetError(f"Entry {i} of the class file {path} is no name: {entry!r:.80}.")
        names.append(texts[0])
        synonyms.update({t: i for t in texts if t not in synonyms})
    return ClassFile(tuple(names), synonyms, path)


def _texts(entry: Any) -> list[str]:
    """The name of a class, then other texts for it; nothing if the entry has no name."""
    if isinstance(entry, str):
        return [entry.strip()]
    if isinstance(entry, list) and entry and all(isinstance(e, str) for e in entry):
        return [entry[-1], *entry]  # ImageNet's ["n01440764", "tench"]
    if isinstance(entry, dict):
        texts = {k: v for k, v in entry.items() if isinstance(v, str)}
        name = texts.get("name", texts.get("names"))
        return [] if name is None else [name, *texts.values()]
    return []


def _prefixed(folder: str, name: str) -> Sequence[str]:
    """Class files in a folder whose name begins as the set's does, longest beginning first."""
    try:
        files = os.listdir(folder)
    except OSError:
        return ()
    found = [(m[1], f) for f in files if (m := re.fullmatch(r"(.+)[-_.]classes\.(?:txt|json)", f))]
    fitting = [(p, f) for p, f in found if name == p or re.match(re.escape(p) + r"[-_.]", name)]
    return [f for _, f in sorted(fitting, key=lambda pf: (-len(pf[0]), pf[1]))]
