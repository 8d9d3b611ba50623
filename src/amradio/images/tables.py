"""What Parquet files and Hugging Face datasets have in common: which columns, which labels, how pictures are stored."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from amradio.errors import DatasetError, ImageError

IMAGE_COLUMNS = ("image", "img", "picture", "jpg", "png", "image_bytes")
"""Names that a column of pictures goes by, in the order in which they are looked for."""

LABEL_COLUMNS = ("label", "labels", "fine_label", "cls", "class", "class_id", "category", "target")
"""Names that a column of labels goes by, in the order in which they are looked for."""


def choose_column(
    asked: str | None, preferred: Sequence[str], usual: Sequence[str], columns: Sequence[str], where: str, what: str
) -> str | None:
    """Choose a column: the one asked for, else one whose type says what it is, else one with a usual name.

    Args:
        asked: What the user said.
        preferred: Columns whose type says that they are what is looked for.
        usual: Names to look for.
        columns: All columns that could be meant.
        where: What messages call the table.
        what: What messages call the column.

    Returns:
        The name of the column, or None.

    Raises:
        DatasetError: The column asked for is not there.
    """
    if asked is not None:
        if asked not in columns:
            raise DatasetError(f"{where} has no {what} column {asked!r}. Its columns are {', '.join(columns)}.")
        return asked
    for names in (preferred, columns):
        by_lower = {n.lower(): n for n in names}
        named = [by_lower[u] for u in usual if u in by_lower]
        if named:
            return named[0]
        if names is preferred and names:
            return names[0]
    return None


def stored_bytes(value: Any, folder: str, where: str) -> bytes:
    """The content of a picture's file from a cell: bytes, or an object with bytes or with a path.

    Args:
        value: Of the cell.
        folder: What paths are relative to.
        where: What messages call the cell.

    Raises:
        ImageError: The cell holds no picture.
    """
    if isinstance(value, bytes):
        return value
    if isinstance(value, Mapping):
        if value.get("bytes") is not None:
            return bytes(value["bytes"])
        path = value.get("path")
        if path:
            try:
                return Path(folder, path).read_bytes()
            except OSError as error:
                raise ImageError(
                    f"Cannot decode {where}: it refers to the file {os.path.join(folder, path)}, which cannot be read "
                    f"({error.strerror})."
                ) from error
    raise ImageError(f"Cannot decode {where}: there is no picture in it.")
