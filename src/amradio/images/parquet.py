"""Pictures in Parquet tables, as encoded files in a column."""

from __future__ import annotations

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from amradio.errors import DatasetError, ImageError
from amradio.images.dataset import ImageSet
from amradio.images.files import file_stamp
from amradio.images.labels import Labels, find_class_file
from amradio.images.names import portable, unique_stems
from amradio.images.sources import EncodedImage
from amradio.images.tables import IMAGE_COLUMNS, LABEL_COLUMNS, choose_column, stored_bytes

_CACHE_BYTES = 256 << 20


def open_parquet(
    paths: Sequence[str],
    name: str,
    split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> ImageSet:
    """Open pictures in Parquet files.

    A picture is a cell with the bytes of its file, or with an object of ``bytes`` and ``path`` as Hugging Face writes.
    Labels are numbers or names; class names come from Hugging Face's description in the file, or from a file beside it
    (see `amradio.images.labels.find_class_file`). Rows are read by row group, and the last few groups are kept, up to
    256 MB: pictures in their order are fast, pictures in random order read a group for each.

    Args:
        paths: Of the files, whose order is kept.
        name: What the set is called.
        split: Which part this is, for the record.
        image_column: Default a column of bytes with a usual name, or the only one.
        label_column: Default a column with a usual name.

    Raises:
        DatasetError: A file cannot be read, has no such columns, or has no rows.
    """
    rows = ParquetRows(paths, image_column)
    if not len(rows):
        raise DatasetError(f"{name} has no rows.")
    by_type = [c for c, feature in rows.features.items() if feature.get("_type") == "ClassLabel"]
    label = choose_column(label_column, by_type, LABEL_COLUMNS, rows.label_columns, paths[0], "label")
    if label is None:
        return ImageSet(rows, name=name, split=split)
    described = rows.features.get(label, {}).get("names")
    classes = None if described else find_class_file(os.path.dirname(paths[0]), os.path.basename(paths[0]))
    labels = Labels(f"The column {label} of {name}", classes)
    for value in rows.values(label):
        labels.append(value)
    numbers, class_names = labels.finish()
    return ImageSet(rows, name=name, split=split, labels=numbers, class_names=described or class_names)


class ParquetRows:
    """Pictures in a column of Parquet files (see `amradio.images.dataset.Rows`).

    Args:
        paths: Of the files.
        image_column: Which column; default as said at `open_parquet`.

    Attributes:
        features: What Hugging Face's description in the first file says of its columns; may be empty.
        label_columns: Columns whose type suits labels.

    Raises:
        DatasetError: A file cannot be read or has no such column.
    """

    def __init__(self, paths: Sequence[str], image_column: str | None) -> None:
        import pyarrow.types as types

        self._paths = list(paths)
        self._prefixes = unique_stems(self._paths)
        groups: list[tuple[int, int, int]] = []  # file, group in the file, rows
        for file, path in enumerate(self._paths):
            with _open(path) as table:
                schema, counts = table.schema_arrow, table.metadata
                groups += [(file, g, counts.row_group(g).num_rows) for g in range(counts.num_row_groups)]
            if file == 0:
                self.features = _features(schema.metadata or {})
                self.label_columns = [f.name for f in schema if _suits_labels(types, f.type)]
                self._column = _image_column(schema, self.features, image_column, path)
            elif self._column not in schema.names:
                raise DatasetError(
                    f"{path} has no column {self._column!r}, which {self._paths[0]} has its pictures in."
                )
        self._groups = np.array(groups, dtype=np.int64).reshape(-1, 3)  # [G, 3]
        self._ends = np.cumsum(self._groups[:, 2])  # [G] how many rows there are up to each group's end
        files = self._groups[:, 0]
        self._file_starts = np.searchsorted(files, np.arange(len(self._paths)))  # [F] first group of each file
        self._cache = _GroupCache(self._load)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def source(self, row: int) -> EncodedImage:
        """Make the source of one picture; its id is its file and the number of its row in it."""
        group = int(np.searchsorted(self._ends, row, side="right"))
        file = int(self._groups[group, 0])
        in_file = row - self._start(int(self._file_starts[file]))
        path = self._paths[file]
        where = f"{path}, row {in_file}"
        read = partial(self._read, group, row - self._start(group), os.path.dirname(path), where)
        return EncodedImage(read, portable(f"{self._prefixes[file]}/{in_file:08d}"), where)

    def stamps(self, rows: np.ndarray) -> Iterator[bytes]:
        """Names, sizes and times of change of the files; the column and the numbers of the rows."""
        groups = np.searchsorted(self._ends, rows, side="right")
        for file in np.unique(self._groups[groups, 0]).tolist():
            yield self._prefixes[file].encode("utf-8", "surrogatepass")
            yield file_stamp(self._paths[file])
        yield self._column.encode("utf-8", "surrogatepass")
        yield rows.astype("<i8").tobytes()

    def values(self, column: str) -> Iterator[Any]:
        """Read a column of labels, one row group at a time.

        Raises:
            DatasetError: A file cannot be read or has no such column.
        """
        for file, path in enumerate(self._paths):
            with _open(path) as table:
                if column not in table.schema_arrow.names:
                    raise DatasetError(f"{path} has no column {column!r}, which {self._paths[0]} has its labels in.")
                for group in self._groups[self._groups[:, 0] == file, 1].tolist():
                    yield from table.read_row_group(group, columns=[column]).column(0).to_pylist()

    def _start(self, group: int) -> int:
        return int(self._ends[group] - self._groups[group, 2])

    def _read(self, group: int, row: int, folder: str, where: str) -> bytes:
        try:
            cell = self._cache.get(group)[row].as_py()
        except (DatasetError, OSError, IndexError) as error:
            raise ImageError(f"Cannot decode {where}: {error}") from error
        return stored_bytes(cell, folder, where)

    def _load(self, group: int) -> Any:
        file, in_file, _ = self._groups[group].tolist()
        with _open(self._paths[file]) as table:
            return table.read_row_group(in_file, columns=[self._column]).column(0)


class _GroupCache:
    """Keeps the row groups that were used last, within a budget; a group is loaded by one thread for all.

    Copies in forked processes and pickled copies begin empty.
    """

    def __init__(self, load: Callable[[int], Any]) -> None:
        self._load = load
        self._reset()

    def _reset(self) -> None:
        self._lock, self._process = threading.Lock(), os.getpid()
        self._groups: OrderedDict[int, Any] = OrderedDict()

    def get(self, group: int) -> Any:
        if self._process != os.getpid():  # forked, perhaps while another thread held the lock
            self._reset()
        with self._lock:
            if group not in self._groups:
                self._groups[group] = self._load(group)
                while len(self._groups) > 1 and sum(g.nbytes for g in self._groups.values()) > _CACHE_BYTES:
                    self._groups.popitem(last=False)
            self._groups.move_to_end(group)
            return self._groups[group]

    def __getstate__(self) -> Callable[[int], Any]:
        return self._load

    def __setstate__(self, load: Callable[[int], Any]) -> None:
        self._load = load
        self._reset()


@contextmanager
def _open(path: str) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as table:
            yield table
    except (OSError, pa.ArrowException) as error:
        raise DatasetError(f"The Parquet file {path} cannot be read: {str(error).splitlines()[0]}") from error


def _features(metadata: dict[bytes, bytes]) -> dict[str, Any]:
    """Hugging Face's description of the columns."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    except (ValueError, AttributeError):  # somebody else's key of the same name
        return {}
    return {k: v for k, v in features.items() if isinstance(v, dict)} if isinstance(features, dict) else {}


def _image_column(schema: Any, features: dict[str, Any], asked: str | None, path: str) -> str:
    import pyarrow.types as types

    def suits(kind: Any) -> bool:
        if types.is_struct(kind):
            return "bytes" in {kind.field(i).name for i in range(kind.num_fields)}
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    candidates = [f.name for f in schema if suits(f.type)]
    by_type = [c for c in candidates if features.get(c, {}).get("_type") == "Image"]
    column = choose_column(asked, by_type, IMAGE_COLUMNS, candidates, path, "image")
    if column is None and len(candidates) == 1:
        return str(candidates[0])
    if column is None:
        kinds = ", ".join(f"{f.name} ({f.type})" for f in schema)
        raise DatasetError(f"{path} has no column that is known to hold pictures. Its columns: {kinds}. Name one.")
    return column


def _suits_labels(types: Any, kind: Any) -> bool:
    if types.is_dictionary(kind):
        kind = kind.value_type
    return bool(types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind))
