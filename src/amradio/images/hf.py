"""Pictures in Hugging Face datasets, through the library ``datasets``: saved to disk, or loaded from the Hub."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from amradio.errors import DatasetError, ImageError, MissingDependencyError
from amradio.hub import HubOptions
from amradio.images.dataset import ImageSet
from amradio.images.labels import Labels
from amradio.images.names import portable
from amradio.images.sources import EncodedImage
from amradio.images.splits import find_split, no_such_split, several_splits
from amradio.images.tables import IMAGE_COLUMNS, LABEL_COLUMNS, choose_column, stored_bytes

SAVED_MARKS = ("dataset_dict.json", "state.json")
"""Files by which a folder is known to be written by ``save_to_disk``."""


def open_saved(
    folder: str, name: str, split: str | None, image_column: str | None = None, label_column: str | None = None
) -> ImageSet:
    """Open a dataset that ``save_to_disk`` wrote, with splits or without.

    Args:
        folder: Where it is.
        name: What the set is called.
        split: Which split; may be left out if there is only one.
        image_column: Default the column of type Image.
        label_column: Default the column of type ClassLabel, then a usual name.

    Raises:
        DatasetError: It cannot be read, or has no such split or columns.
        MissingDependencyError: The library is not installed.
    """
    datasets = _datasets(folder)
    try:
        loaded = datasets.load_from_disk(folder)
    except Exception as error:  # whatever the library's parsing of the files runs into
        raise DatasetError(f"The dataset in {folder} cannot be read: {type(error).__name__}: {error}") from error
    if isinstance(loaded, datasets.DatasetDict):
        split = _choose_split(list(loaded), split, f"The dataset in {folder}")
        loaded = loaded[split]
    elif split is not None and find_split([str(loaded.split)], split) is None:
        raise no_such_split(f"The dataset in {folder}", split, [str(loaded.split)] if loaded.split else [])
    return _image_set(datasets, loaded, name, split, image_column, label_column)


def open_with_datasets(
    repo: str,
    config: str,
    name: str,
    split: str | None,
    options: HubOptions,
    image_column: str | None = None,
    label_column: str | None = None,
) -> ImageSet:
    """Load a dataset from the Hub with the library, which converts it into its cache.

    Args:
        repo: On the Hub.
        config: One of its configurations; empty for its default.
        name: What the set is called.
        split: Which split; may be left out if there is only one.
        options: How to reach the Hub.
        image_column: See `open_saved`.
        label_column: See `open_saved`.

    Raises:
        DatasetError: The library cannot load it, or it has no such split or columns.
        MissingDependencyError: The library is not installed.
    """
    datasets = _datasets(repo)
    how = {
        "revision": options.revision,
        "token": options.token,
        "cache_dir": None if options.cache_dir is None else str(options.cache_root / "datasets"),
        "download_config": datasets.DownloadConfig(local_files_only=options.offline_reason is not None),
    }
    try:
        builder = datasets.load_dataset_builder(repo, config or None, **how)
        splits = list(builder.info.splits or builder.config.data_files or ())
        chosen = _choose_split(splits, split, f"The dataset {repo}")
        loaded = datasets.load_dataset(repo, config or None, split=chosen, **how)
    except DatasetError:
        raise
    except Exception as error:  # the library raises RuntimeError, ValueError, FileNotFoundError and its own
        raise DatasetError(
            f"The dataset {repo} has no Parquet files, and the library datasets cannot load it either "
            f"({type(error).__name__}: {error}). Download its files, and give their folder."
        ) from error
    return _image_set(datasets, loaded, name, chosen, image_column, label_column)


class DatasetRows:
    """Pictures in a dataset of the library ``datasets`` (see `amradio.images.dataset.Rows`).

    Args:
        dataset: With a column of undecoded pictures.
        column: Its name.
        prefix: Begins the ids.
        where: What messages call the dataset.
        fingerprint: The library's own, of the contents.
    """

    def __init__(self, dataset: Any, column: str, prefix: str, where: str, fingerprint: str) -> None:
        self._dataset = dataset
        self._column = column
        self._prefix = prefix
        self._where = where
        self._fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self._dataset)

    def source(self, row: int) -> EncodedImage:
        """Make the source of one picture; its id is the number of its row."""
        where = f"{self._where}, row {row}"
        return EncodedImage(partial(self._read, row, where), portable(f"{self._prefix}{row:08d}"), where)

    def stamps(self, rows: np.ndarray) -> Iterator[bytes]:
        """The library's fingerprint, the column, and the numbers of the rows."""
        yield f"{self._fingerprint}\0{self._column}\0{self._prefix}".encode()
        yield rows.astype("<i8").tobytes()

    def _read(self, row: int, where: str) -> bytes:
        try:
            cell = self._dataset[row][self._column]
        except (OSError, ValueError) as error:
            raise ImageError(f"Cannot decode {where}: {error}") from error
        return stored_bytes(cell, "", where)


def _datasets(what: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError(
            f"Reading {what} needs the library datasets: pip install 'amradio[datasets]'."
        ) from error
    return datasets


def _choose_split(splits: list[str], split: str | None, where: str) -> str:
    if split is None:
        if len(splits) != 1:
            raise several_splits(where, splits)
        return splits[0]
    found = find_split(splits, split)
    if found is None:
        raise no_such_split(where, split, splits)
    return found


def _image_set(
    datasets: Any, dataset: Any, name: str, split: str | None, image_column: str | None, label_column: str | None
) -> ImageSet:
    where = name if split is None else f"{name}, split {split}"
    if not len(dataset):
        raise DatasetError(f"{where} has no rows.")
    features, fingerprint = dataset.features, str(dataset._fingerprint)
    by_type = [c for c, f in features.items() if isinstance(f, datasets.Image)]
    image = choose_column(image_column, by_type, IMAGE_COLUMNS, list(features), where, "image")
    if image is None:
        kinds = ", ".join(f"{c} ({f})" for c, f in features.items())
        raise DatasetError(f"{where} has no column that is known to hold pictures. Its columns: {kinds}. Name one.")
    numbers, class_names = _labels(datasets, dataset, where, label_column)
    columns = dataset.select_columns([image])
    if image in by_type:
        columns = columns.cast_column(image, datasets.Image(decode=False))  # amradio decodes, with its own checks
    rows = DatasetRows(columns, image, "" if split is None else f"{split}-", where, fingerprint)
    return ImageSet(rows, name=name, split=split, labels=numbers, class_names=class_names)


def _labels(
    datasets: Any, dataset: Any, where: str, label_column: str | None
) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    features = dataset.features
    by_type = [c for c, f in features.items() if isinstance(f, datasets.ClassLabel)]
    suitable = [
        c
        for c, f in features.items()
        if str(getattr(f, "dtype", "")).startswith(("int", "uint", "string", "large_string"))
    ]
    label = choose_column(label_column, by_type, LABEL_COLUMNS, suitable, where, "label")
    if label is None:
        return None, None
    labels = Labels(f"The column {label} of {where}")
    for batch in dataset.select_columns([label]).with_format("arrow").iter(batch_size=10_000):
        for value in batch.column(0).to_pylist():
            labels.append(value)
    numbers, class_names = labels.finish()
    described = tuple(features[label].names) if label in by_type else None
    return numbers, None if numbers is None else described or class_names
