"""A set of pictures with their labels, of any size: what is known of millions fits into memory, pixels are not kept."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np

from amradio.errors import DatasetError, OptionError
from amradio.images.sources import ImageSource

UNLABELLED = -1


class Rows(Protocol):
    """Where the pictures of a set are. One class for each kind of source: files, tar shards, tables."""

    def __len__(self) -> int: ...

    def source(self, row: int) -> ImageSource:
        """Make the source of one picture."""
        ...

    def stamps(self, rows: np.ndarray) -> Iterator[bytes]:
        """Say what identifies rows and their contents, without reading the pictures: names, sizes, times of change."""
        ...


class ImageSet:
    """Pictures in a fixed order, with labels where there are any. Immutable; `select` and the like give new sets.

    Sets are opened by `amradio.images.open_images`. Subsets share everything with the set that they come from.

    Args:
        rows: Where the pictures are.
        name: What the set is called in reports: what was opened.
        split: Which part of it, if it has parts.
        labels: Integers [N], -1 where a picture has none; None if none has one.
        class_names: The name of each label from 0.
        indices: Which rows, in which order; None means all.

    Attributes:
        rows: See above.
        name: See above.
        split: See above.
        class_names: See above; None if the labels have no names.
        labels: int64 [N], read-only, or None.

    Raises:
        DatasetError: There are not as many labels as pictures, a label is below -1, or it has no name though others
            have.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        name: str,
        split: str | None = None,
        labels: np.ndarray | None = None,
        class_names: Iterable[str] | None = None,
        indices: np.ndarray | None = None,
    ) -> None:
        self.rows = rows
        self._indices = indices
        self._fingerprint: str | None = None
        self.name = name
        self.split = split
        self.class_names = None if class_names is None else tuple(class_names)
        self.labels = None if labels is None else np.array(labels, dtype=np.int64)
        if self.labels is not None:
            self._check(self.labels)
            self.labels.flags.writeable = False

    def __len__(self) -> int:
        return len(self.rows) if self._indices is None else len(self._indices)

    def __getitem__(self, index: int) -> ImageSource:
        """The source of one picture; negative indices count from the end."""
        position = range(len(self))[index]  # raises IndexError
        return self.rows.source(position if self._indices is None else int(self._indices[position]))

    def __iter__(self) -> Iterator[ImageSource]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        split = f", split {self.split!r}" if self.split else ""
        classes = f", {len(self.class_names)} classes" if self.class_names else ""
        labels = "unlabelled" if self.labels is None else f"labelled{classes}"
        return f"<ImageSet {self.name!r}{split}: {len(self):,} pictures, {labels}>"

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of ids, labels, class names, order, and what tells that a content changed.

        Contents are told by sizes and times of change, not read. The place of the files does not count.
        """
        if self._fingerprint is None:
            self._fingerprint = digest_of(self._fingerprint_parts())
        return self._fingerprint

    def select(self, indices: Iterable[int]) -> ImageSet:
        """Take some pictures, in the order given; one may be taken several times.

        Args:
            indices: Positions in this set; negative ones count from the end.

        Raises:
            OptionError: An index is out of range.
        """
        chosen = positions(indices, len(self), self.name)
        return ImageSet(
            self.rows,
            name=self.name,
            split=self.split,
            labels=None if self.labels is None else self.labels[chosen],
            class_names=self.class_names,
            indices=chosen if self._indices is None else self._indices[chosen],
        )

    def with_split(self, split: str | None) -> ImageSet:
        """The same pictures, on record as this part of their set."""
        return ImageSet(
            self.rows,
            name=self.name,
            split=split,
            labels=self.labels,
            class_names=self.class_names,
            indices=self._indices,
        )

    def relabelled(self, labels: np.ndarray, class_names: Iterable[str] | None) -> ImageSet:
        """The same pictures with other labels.

        Args:
            labels: Integers [N].
            class_names: The name of each label from 0, or None.

        Raises:
            DatasetError: See `ImageSet`.
        """
        return ImageSet(
            self.rows,
            name=self.name,
            split=self.split,
            labels=labels,
            class_names=class_names,
            indices=self._indices,
        )

    def balanced_head(self, count: int, seed: int) -> ImageSet:
        """Take some pictures at random, as many of each class as there are, up to one.

        Args:
            count: How many in all; all if there are fewer.
            seed: Of the choice, and of their order.
        """
        shuffled = permutation(len(self), seed)
        if self.labels is None:
            return self.select(shuffled[:count])
        labels = self.labels[shuffled]
        order = np.argsort(labels, kind="stable")  # [N] classes one after the other
        _, starts, sizes = np.unique(labels[order], return_index=True, return_counts=True)
        round_of = np.empty(len(self), dtype=np.int64)  # the how-manieth of its class each picture is
        round_of[order] = np.arange(len(self)) - np.repeat(starts, sizes)
        return self.select(shuffled[np.argsort(round_of, kind="stable")[:count]])

    def shared_with(self, other: ImageSet) -> int:
        """How many of these pictures are in another set too: are in the same place."""
        own = Counter(os.path.abspath(source.location) for source in self)
        return sum(own.pop(os.path.abspath(source.location), 0) for source in other)

    def shuffled(self, seed: int) -> ImageSet:
        """Put the pictures into an order that depends on the seed and their number only."""
        return self.select(permutation(len(self), seed))

    def head(self, count: int) -> ImageSet:
        """Take the first pictures; all if there are fewer."""
        return self.select(np.arange(min(max(count, 0), len(self))))

    def per_class(self, count: int, seed: int) -> ImageSet:
        """Draw pictures of each class at random, as few-shot protocols do; they stay in the order of this set.

        Args:
            count: How many of each class.
            seed: Of the draw.

        Raises:
            DatasetError: The set has no labels, or a class has fewer pictures.
        """
        if self.labels is None:
            raise DatasetError(f"{self.name} has no labels, so none of each class can be drawn.")
        shuffled = permutation(len(self), seed)
        by_class = shuffled[np.argsort(self.labels[shuffled], kind="stable")]  # [N] classes one after the other
        classes, starts, sizes = np.unique(self.labels[by_class], return_index=True, return_counts=True)
        short = [(c, n) for c, n in zip(classes, sizes, strict=True) if c != UNLABELLED and n < count]
        if short:
            raise DatasetError(
                f"{count} pictures of each class were asked for, and {len(short)} of {len(classes)} classes of "
                f"{self.name} have fewer: {self._class_name(short[0][0])} has {short[0][1]}."
            )
        drawn = [by_class[s : s + count] for c, s in zip(classes, starts, strict=True) if c != UNLABELLED]
        return self.select(np.sort(np.concatenate(drawn)) if drawn else [])

    def _class_name(self, label: int) -> str:
        return f"class {label}" if self.class_names is None else f"{self.class_names[label]!r}"

    def _check(self, labels: np.ndarray) -> None:
        if labels.shape != (len(self),):
            raise DatasetError(f"{self.name} has {len(self):,} pictures and labels of shape {labels.shape}.")
        if labels.size and labels.min() < UNLABELLED:
            raise DatasetError(
                f"{self.name} has the label {labels.min()}. Labels are numbers from 0, and -1 where there is none."
            )
        if self.class_names is not None and labels.size and labels.max() >= len(self.class_names):
            raise DatasetError(
                f"{self.name} has the label {labels.max()}, and only {len(self.class_names)} class names, for labels "
                f"from 0 to {len(self.class_names) - 1}."
            )

    def _fingerprint_parts(self) -> Iterator[bytes]:
        yield b"" if self.labels is None else self.labels.astype("<i8").tobytes()
        yield "\0".join(self.class_names or ()).encode("utf-8", "surrogatepass")
        yield from self.rows.stamps(np.arange(len(self)) if self._indices is None else self._indices)


def positions(indices: Iterable[int], count: int, name: str) -> np.ndarray:
    """Check which pictures of a set are chosen.

    Args:
        indices: Positions in the set; negative ones count from the end.
        count: Of the pictures of the set.
        name: Of the set, for messages.

    Returns:
        int64, each from 0 to `count` - 1.

    Raises:
        OptionError: An index is out of range.
    """
    values = np.array(indices if isinstance(indices, (np.ndarray, list, tuple, range)) else list(indices))
    if values.size and values.dtype.kind not in "iu":
        raise OptionError(f"Pictures are selected by whole numbers, got {values.dtype} values.")
    chosen = values.astype(np.int64).reshape(-1)
    outside = chosen[(chosen < -count) | (chosen >= count)]
    if outside.size:
        raise OptionError(f"Index {outside[0]} is outside the {count:,} pictures of {name}.")
    return np.where(chosen < 0, chosen + count, chosen)


def digest_of(parts: Iterable[bytes]) -> str:
    """SHA-256, in hexadecimal, of several parts that cannot run into each other."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def permutation(count: int, seed: int) -> np.ndarray:
    """An order that is the same under every version of numpy, which `Generator.permutation` does not promise."""
    return np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable")
