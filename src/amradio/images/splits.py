"""The parts of a set of pictures: folders and files that are called train, val, test."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence

from amradio.errors import DatasetError

_SAME = ({"train", "training"}, {"val", "valid", "validation"}, {"test", "testing"})
SPLIT_NAMES = frozenset().union(*_SAME)
"""Names by which a folder or a file is known to be one part of a set."""

_IN_A_FILE_NAME = re.compile(rf"(?:^|[-_.])({'|'.join(sorted(SPLIT_NAMES, key=len, reverse=True))})(?=[-_.0-9]|$)")


def same_split(a: str, b: str) -> bool:
    """Whether two names mean the same part: ``val`` and ``validation`` do."""
    return a == b or any({a.lower(), b.lower()} <= names for names in _SAME)


def find_split(names: Iterable[str], split: str) -> str | None:
    """The name that means a split, the very same before another spelling; None if there is none."""
    candidates = [n for n in names if same_split(n, split)]
    return split if split in candidates else next(iter(candidates), None)


def split_in_file_name(path: str) -> str | None:
    """The part that a shard belongs to by its name: ``validation`` for ``validation-00000-of-00004.parquet``."""
    found = _IN_A_FILE_NAME.findall(os.path.basename(path).rpartition(".")[0].lower())
    return found[-1] if found else None


def shards_of_split(paths: Sequence[str], split: str | None, where: str) -> list[str]:
    """Choose the shards of one split.

    Args:
        paths: All shards.
        split: Which split; None means all, which must be of one split then.
        where: What messages call the place.

    Returns:
        The shards of the split, in the order given.

    Raises:
        DatasetError: There is no such split, or there are several and none is asked for.
    """
    by_split: dict[str, list[str]] = {}
    for path in paths:
        by_split.setdefault(split_in_file_name(path) or "", []).append(path)
    if split is None:
        if len(by_split) > 1:
            raise several_splits(where, by_split)
        return list(paths)
    name = find_split(filter(None, by_split), split)
    if name is None:
        raise no_such_split(where, split, filter(None, by_split))
    return by_split[name]


def several_splits(where: str, names: Iterable[str]) -> DatasetError:
    """The error for a set with parts of which none was chosen."""
    return DatasetError(f"{where} has the splits {_listed(names)}. Say which one is meant.")


def no_such_split(where: str, split: str, names: Iterable[str]) -> DatasetError:
    """The error for a part that is not there."""
    listed = _listed(names)
    there = f"Its splits are {listed}." if listed else "It has no splits: leave the split out."
    return DatasetError(f"{where} has no split {split!r}. {there}")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(name or "(the rest)" for name in names))
