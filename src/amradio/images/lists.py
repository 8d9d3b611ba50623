"""List files: which pictures, and their labels, line by line."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from amradio.errors import DatasetError
from amradio.images.dataset import ImageSet
from amradio.images.files import FileRows, Found
from amradio.images.labels import LABEL_KEYS, Labels, find_class_file
from amradio.images.splits import find_split, no_such_split, several_splits

LIST_SUFFIXES = frozenset({".txt", ".csv", ".tsv", ".jsonl"})
"""Endings of files that list pictures."""

_PATH_KEYS = ("path", "file", "file_name", "filename", "image", "image_path")
_SPLIT_KEY = "split"


class _Entry(NamedTuple):
    line: int
    path: str
    label: int | str | None
    split: str | None


def open_list(
    path: str, name: str, split: str | None = None, *, path_column: str | None = None, label_column: str | None = None
) -> ImageSet:
    """Open the pictures that a file lists.

    ``.txt``: one path a line, then a tab or a comma and the label, if there is one; empty lines and lines that begin
    with ``#`` do not count. ``.csv`` and ``.tsv``: with a first line that names the columns, such as ``path,label``.
    ``.jsonl``: one JSON object a line. Where there is a column ``split``, it chooses. Paths are relative to the list.
    A file is listed even if it does not exist, so that it is reported and not lost.

    Args:
        path: Of the list.
        name: What the set is called.
        split: Which lines to take, if the list has a column ``split``.
        path_column: Which column has the paths, if its name is not among the usual ones.
        label_column: Which column has the labels, if its name is not among the usual ones.

    Raises:
        DatasetError: The list cannot be read or understood, or names no pictures.
    """
    folder = os.path.dirname(path)
    labels = Labels(path, find_class_file(folder, os.path.splitext(os.path.basename(path))[0]))
    splits: dict[str, None] = {}
    try:
        for entry in _entries(path, path_column, label_column):
            splits.setdefault(entry.split or "")
        wanted = _choose(path, splits, split)

        def found() -> Iterator[Found]:
            for entry in _entries(path, path_column, label_column):
                if (entry.split or "") == wanted:
                    labels.append(entry.label)
                    yield _found(folder, entry.path)

        rows = FileRows(found(), unique=False)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"The list {path} cannot be read: {error}.") from error
    if not len(rows):
        raise DatasetError(f"The list {path} names no pictures.")
    numbers, class_names = labels.finish()
    return ImageSet(rows, name=name, split=split, labels=numbers, class_names=class_names)


def _choose(path: str, splits: dict[str, None], split: str | None) -> str:
    if split is None:
        if len(splits) > 1:
            raise several_splits(f"The list {path}", splits)
        return next(iter(splits), "")
    chosen = find_split(filter(None, splits), split)
    if chosen is None:
        raise no_such_split(f"The list {path}", split, filter(None, splits))
    return chosen


def _found(folder: str, listed: str) -> Found:
    """A listed file, whose id is made of its path without steps upwards and without a drive."""
    if os.path.isabs(listed):
        return Found(os.path.dirname(listed), os.path.basename(listed), listed)
    return Found(folder, Path(listed).as_posix(), os.path.join(folder, listed))


def _entries(path: str, path_column: str | None, label_column: str | None) -> Iterator[_Entry]:
    suffix = os.path.splitext(path)[1].lower()
    if suffix == ".txt":
        return _text_entries(path)
    return _record_entries(
        path, _json_records(path) if suffix == ".jsonl" else _table_records(path, suffix), path_column, label_column
    )


def _text_entries(path: str) -> Iterator[_Entry]:
    with open(path, encoding="utf-8-sig") as file:
        for line, text in enumerate(file, 1):
            text = text.strip()
            if text and not text.startswith("#"):
                listed, _, label = text.partition("\t") if "\t" in text else _split_at_comma(text)
                yield _Entry(line, listed.strip(), label.strip() or None, None)


def _split_at_comma(text: str) -> tuple[str, str, str]:
    """At the last comma, unless the picture's ending comes behind it, as in ``a, b.jpg``."""
    listed, comma, label = text.rpartition(",")
    return (text, "", "") if not comma or re.search(r"\.\w{2,4}$", label) else (listed, comma, label)


def _table_records(path: str, suffix: str) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if suffix == ".tsv" else ",")
        for record in reader:
            yield reader.line_num, record


def _json_records(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(path, encoding="utf-8-sig") as file:
        for line, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except ValueError as error:
                raise DatasetError(f"Line {line} of {path} is not JSON: {error}.") from error
            if not isinstance(record, dict):
                raise DatasetError(f"Line {line} of {path} is not a JSON object.")
            yield line, record


def _record_entries(
    path: str, records: Iterator[tuple[int, dict[str, Any]]], path_column: str | None, label_column: str | None
) -> Iterator[_Entry]:
    for line, record in records:
        where = f"Line {line} of {path}"
        listed = _first(record, (path_column,) if path_column else _PATH_KEYS)
        if not isinstance(listed, str) or not listed:
            keys = path_column or ", ".join(_PATH_KEYS)
            raise DatasetError(f"{where} has no path. Its columns are {', '.join(map(str, record))}; expected {keys}.")
        label = _first(record, (label_column,) if label_column else LABEL_KEYS)
        if label_column and label_column not in record:
            raise DatasetError(
                f"{where} has no column {label_column!r}. Its columns are {', '.join(map(str, record))}."
            )
        if isinstance(label, bool) or not isinstance(label, (int, str, type(None))):
            raise DatasetError(f"{where} has the label {label!r}, which is neither a whole number nor a name.")
        split = record.get(_SPLIT_KEY)
        yield _Entry(line, listed, label, split if isinstance(split, str) else None)


def _first(record: dict[str, Any], keys: tuple[str, ...]) -> Any:
    return next((record[k] for k in keys if record.get(k) is not None), None)
