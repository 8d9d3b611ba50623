"""Checking a data set: what is there, what is missing, and what does not fit."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from amradio.errors import DatasetError, ImageError, OptionError
from amradio.images.dataset import permutation
from amradio.images.decode import MAX_PIXELS, WHITE, upright_size
from amradio.images.segmentation.dataset import SegmentationSample
from amradio.images.segmentation.layout import Contents, Request, Variant
from amradio.images.segmentation.masks import VOID, MaskError
from amradio.images.segmentation.open import as_set, make_request
from amradio.images.segmentation.pairing import Pairing, pair
from amradio.images.segmentation.recognise import Place, locate
from amradio.images.segmentation.storage import open_storage

ProgressBar = Callable[[int, str], AbstractContextManager[Callable[[int], object]]]
"""Gets a total and a title, and gives what advances the bar."""

_THREADS = 8


@dataclass(frozen=True)
class Problem:
    """Something that does not fit.

    Attributes:
        kind: ``unusable-split``, ``listed-without-picture``, ``picture-without-mask``, ``mask-without-picture``,
            ``unreadable-picture``, or one of `MaskProblem`.
        message: What it is, and where.
    """

    kind: str
    message: str


@dataclass(frozen=True)
class SplitReport:
    """One part of a data set.

    Attributes:
        split: Its name; None if the data set is not divided.
        pictures: How many are wanted.
        masks: How many of them have a mask.
        checked: How many of these were opened.
        class_names: Of the ids from 0.
        pixels: Of each class, in the masks that were opened.
        pictures_with: In how many of them each class occurs.
        void_pixels: Pixels of no class.
        problems: In the order in which they were found.
    """

    split: str | None
    pictures: int = 0
    masks: int = 0
    checked: int = 0
    class_names: tuple[str, ...] = ()
    pixels: tuple[int, ...] = ()
    pictures_with: tuple[int, ...] = ()
    void_pixels: int = 0
    problems: tuple[Problem, ...] = ()

    @property
    def void_share(self) -> float:
        """Share of pixels that are of no class, from 0 to 1."""
        total = sum(self.pixels) + self.void_pixels
        return self.void_pixels / total if total else 0.0

    @property
    def absent(self) -> tuple[str, ...]:
        """Classes that no mask that was opened has."""
        return tuple(n for n, count in zip(self.class_names, self.pictures_with, strict=True) if not count)


@dataclass(frozen=True)
class DataReport:
    """What was found in a data set.

    Attributes:
        path: What was looked at.
        root: Where in it the data set begins.
        layout: How it lies there.
        lacking: What the published data set has besides, in words. No problem: not all of it is always needed.
        splits: Each part.
    """

    path: str
    root: str
    layout: str
    lacking: tuple[str, ...]
    splits: tuple[SplitReport, ...]

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Of all parts."""
        return tuple(problem for split in self.splits for problem in split.problems)

    @property
    def exit_code(self) -> int:
        """0 if all is well, 3 if there are problems, 1 if nothing can be used."""
        if not self.problems:
            return 0
        return 3 if any(split.masks for split in self.splits) else 1

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON has it."""
        return {**asdict(self), "ok": not self.problems}


def check_segmentation(
    path: str | os.PathLike[str],
    layout: str | None = None,
    *,
    split: str | None = None,
    classes: Sequence[str] | str | os.PathLike[str] | None = None,
    list_file: str | os.PathLike[str] | None = None,
    variant: Variant = "clean",
    sample: int | None = 64,
    bar: ProgressBar | None = None,
) -> DataReport:
    """Check a data set of pictures with masks.

    Names are matched for all pictures; pictures and masks are opened for some of them or for all.

    Args:
        path: See `amradio.images.segmentation.open_segmentation`.
        layout: See there; None finds out.
        split: Which part; None checks all.
        classes: See there.
        list_file: See there.
        variant: See there.
        sample: How many pictures of each part are opened, spread at random; None opens all.
        bar: Shows progress.

    Returns:
        What was found, with every problem that is one of single files.

    Raises:
        DatasetError: There is no data set in any known layout; the message says what is missing.
        OptionError: There is no such layout or variant, or the sample is negative.
    """
    if sample is not None and sample < 0:
        raise OptionError(f"A sample of {sample} pictures cannot be opened. Give 0 or more, or None for all.")
    place = locate(open_storage(path), layout)
    request = make_request(place.store, split, classes=classes, list_file=list_file, variant=variant)
    splits: Sequence[str | None] = (split,) if split is not None else place.layout.splits(place.store) or (None,)
    return DataReport(
        path=os.fspath(path),
        root=place.store.location,
        layout=place.layout.name,
        lacking=tuple(f"{' or '.join(p.places)} ({p.what})" for p in place.layout.lacking(place.store)),
        splits=tuple(_check_split(place, request._replace(split=s), sample, bar) for s in splits),
    )


def _check_split(place: Place, request: Request, sample: int | None, bar: ProgressBar | None) -> SplitReport:
    try:
        contents = place.layout.open(place.store, request)
        pairing = pair(contents)
    except (DatasetError, ImageError) as error:
        return SplitReport(request.split, problems=(Problem("unusable-split", str(error)),))
    problems = _orphans(pairing, contents)
    if not pairing.keys and not problems:
        problems = [Problem("unusable-split", f"There are no pictures in {place.store.location}.")]
    pairs = as_set(place, contents, pairing, place.store.location, request.split)
    chosen = permutation(len(pairs), 0)[: len(pairs) if sample is None else sample]
    pixels, pictures_with = np.zeros(VOID + 1, dtype=np.int64), np.zeros(VOID + 1, dtype=np.int64)
    shown = nullcontext(_no_progress) if bar is None else bar(len(chosen), request.split or "all")
    with shown as advance, ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        for finding in pool.map(_check_pair, (pairs[int(i)] for i in np.sort(chosen))):
            problems += finding.problems
            pixels += finding.pixels
            pictures_with += finding.pixels > 0
            advance(1)
    count = len(contents.class_names)
    return SplitReport(
        split=request.split,
        pictures=len(pairing.keys) + len(pairing.without_mask) + len(pairing.missing),
        masks=len(pairing.keys),
        checked=len(chosen),
        class_names=contents.class_names,
        pixels=tuple(pixels[:count].tolist()),
        pictures_with=tuple(pictures_with[:count].tolist()),
        void_pixels=int(pixels[VOID]),
        problems=tuple(problems),
    )


def _orphans(pairing: Pairing, contents: Contents) -> list[Problem]:
    listed = "" if contents.listed is None else f", listed in {contents.listed.location}"
    return [
        *(Problem("listed-without-picture", f"There is no picture {name}{listed}.") for name in pairing.missing),
        *(
            Problem("picture-without-mask", f"{contents.pictures[k]} has no mask; expected {contents.masks.place(k)}.")
            for k in pairing.without_mask
        ),
        *(
            Problem("mask-without-picture", f"The mask {contents.masks.place(k)} has no picture.")
            for k in pairing.without_picture
        ),
    ]


class _Finding(NamedTuple):
    """What one picture and its mask show."""

    problems: list[Problem]
    pixels: np.ndarray  # int64 [256] of each id


def _check_pair(sample: SegmentationSample) -> _Finding:
    problems = []
    size = None
    try:
        size = upright_size(sample.image.decode(max_pixels=MAX_PIXELS, background=WHITE))
    except ImageError as error:
        problems.append(Problem("unreadable-picture", str(error)))
    try:
        mask = sample.mask.read(size)
    except MaskError as error:
        return _Finding([*problems, Problem(error.problem, str(error))], np.zeros(VOID + 1, dtype=np.int64))
    return _Finding(problems, np.bincount(mask.reshape(-1), minlength=VOID + 1))


def _no_progress(_: int) -> None:
    pass
