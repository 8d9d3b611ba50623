"""What is to be found for which query: pictures of its class, or a list as ROxford and RParis have it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

from amradio.errors import DatasetError, OptionError
from amradio.evals.runner import labels_of

if TYPE_CHECKING:
    from amradio.images.dataset import ImageSet


@dataclass(frozen=True)
class Judgement:
    """What is right for each query, under one name: positions in the database.

    Attributes:
        name: Such as ``medium``; empty where there is only one.
        positives: For each query what is to be found.
        junk: For each query what is neither right nor wrong.
    """

    name: str
    positives: Sequence[Sequence[int]]
    junk: Sequence[Sequence[int]]


@dataclass(frozen=True)
class RetrievalTask:
    """Pictures to search for, pictures to search among, and what is right.

    Attributes:
        database: To search among.
        queries: To search for.
        judgements: One, or several that are all scored.
        about: Where the judgements come from, in words.
    """

    database: ImageSet
    queries: ImageSet
    judgements: tuple[Judgement, ...]
    about: str


def labelled_task(database: ImageSet, queries: ImageSet | None = None) -> RetrievalTask:
    """Pictures of the query's class are right; the query itself, where it is in the database, is junk.

    Args:
        database: With labels.
        queries: With labels of the same classes; None: the database's own pictures, each among all others.

    Raises:
        DatasetError: Labels are missing, or the classes have other names.
    """
    asked = database if queries is None else queries
    if asked.class_names != database.class_names:
        raise DatasetError(
            f"The classes of {asked.name} and {database.name} do not have the same names, so it is not known which "
            "pictures belong together."
        )
    labels = labels_of(database)
    of_class = {int(c): np.flatnonzero(labels == c).tolist() for c in np.unique(labels)}
    places: dict[str, list[int]] = {}
    for i, source in enumerate(database):
        places.setdefault(os.path.abspath(source.location), []).append(i)
    positives = [of_class.get(int(c), []) for c in labels_of(asked)]
    junk = [places.get(os.path.abspath(source.location), []) for source in asked]
    about = "pictures of the query's class are right, the query itself does not count"
    return RetrievalTask(database, asked, (Judgement("", positives, junk),), about)


def read_ground_truth(path: Path, database: ImageSet, queries: ImageSet) -> RetrievalTask:
    """Read what is right in the form of the revisited Oxford and Paris sets, as JSON.

    Args:
        path: Of a JSON object: ``imlist`` and ``qimlist``, names of pictures, with or without ending; ``gnd``, for each
            query ``easy``, ``hard`` and ``junk``: positions in ``imlist``.
        database: Has the pictures of ``imlist``, in any order, and perhaps others, which are left out.
        queries: Has those of ``qimlist``, likewise.

    Returns:
        The task, judged as Medium and as Hard.

    Raises:
        OptionError: The file cannot be read, or is something else.
        DatasetError: Pictures are missing.
    """
    about = _parsed(path)
    names, asked, gnd = about["imlist"], about["qimlist"], about["gnd"]
    easy, hard, junk = ([[int(i) for i in one[kind]] for one in gnd] for kind in ("easy", "hard", "junk"))
    both, all_junk = (
        [[*a, *b] for a, b in zip(first, second, strict=True)] for first, second in ((easy, hard), (easy, junk))
    )
    positions = {i for lists in (easy, hard, junk) for one in lists for i in one}
    if len(gnd) != len(asked) or any(not 0 <= i < len(names) for i in positions):
        raise OptionError(
            f"{path} contradicts itself: {len(asked)} names of queries and {len(gnd)} answers, {len(names)} names in "
            f"the database and positions from {min(positions, default=0)} to {max(positions, default=0)}."
        )
    judgements = (Judgement("medium", both, junk), Judgement("hard", hard, all_junk))
    return RetrievalTask(_named(database, names, path), _named(queries, asked, path), judgements, f"by {path.name}")


def _parsed(path: Path) -> Mapping[str, Any]:
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        whole = all(isinstance(about[name], list) for name in ("imlist", "qimlist", "gnd"))
        whole = whole and all(isinstance(one[kind], list) for one in about["gnd"] for kind in ("easy", "hard", "junk"))
    except OSError as error:
        raise OptionError(f"The ground truth {path} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise OptionError(
            f"{path} is no ground truth: it must be a JSON object with imlist, qimlist and gnd (for each query easy, "
            f"hard and junk); {type(error).__name__}: {error}. The published files are pickles, which may run code; "
            "convert one that you trust to JSON."
        ) from error
    if not whole:
        raise OptionError(f"{path} is no ground truth: imlist, qimlist, gnd, easy, hard and junk must be lists.")
    parsed: Mapping[str, Any] = about
    return parsed


def _named(images: ImageSet, names: Sequence[str], path: Path) -> ImageSet:
    """The pictures of a list of names, in its order."""
    found: dict[str, list[int]] = {}
    for i, source in enumerate(images):
        name = PurePath(source.location).name
        for key in {name, PurePath(name).stem}:
            found.setdefault(key, []).append(i)
    wrong = [name for name in names if len(found.get(PurePath(str(name)).name, ())) != 1]
    if wrong:
        count = len(found.get(PurePath(str(wrong[0])).name, ()))
        raise DatasetError(
            f"{len(wrong)} of the {len(names)} pictures that {path.name} lists are not exactly once in {images.name}, "
            f"first {wrong[0]} ({count} times)."
        )
    return images.select([found[PurePath(str(name)).name][0] for name in names])
