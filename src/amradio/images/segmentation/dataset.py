"""A set of pictures with masks, of any size: names are kept, pixels are not."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from amradio.errors import DatasetError, OptionError
from amradio.images.dataset import ImageSet, digest_of, permutation, positions
from amradio.images.decode import MAX_PIXELS, WHITE, upright_size
from amradio.images.names import Digests, folded, natural_key, portable, with_digest
from amradio.images.segmentation.masks import VOID, MaskGroup, MaskSource
from amradio.images.segmentation.storage import Storage
from amradio.images.sources import ImageSource

if TYPE_CHECKING:
    from PIL.Image import Image

_FRACTION = re.compile(r"(\d+)/(\d+)")


@dataclass(frozen=True)
class SegmentationSample:
    """A picture and its mask.

    Attributes:
        id: Of the picture: unique in its set, stable between runs, and a file name on every system.
        image: Where the picture comes from.
        mask: Where the mask comes from.
    """

    id: str
    image: ImageSource
    mask: MaskSource

    def load(
        self, *, max_pixels: int = MAX_PIXELS, background: tuple[int, int, int] = WHITE
    ) -> tuple[Image, np.ndarray]:
        """Read both.

        Args:
            max_pixels: See `amradio.images.decode`.
            background: See `amradio.images.decode`.

        Returns:
            The picture, upright and in RGB, and the mask: uint8 [H, W] of the same height and width, with class ids
            from 0 and `VOID`.

        Raises:
            ImageError: The picture cannot be decoded.
            MaskError: The mask cannot be used (see `MaskSource.read`).
        """
        image = self.image.decode(max_pixels=max_pixels, background=background)
        return image, self.mask.read(upright_size(image))


class PairRows:
    """Pictures and masks of one part of a data set (see also `amradio.images.dataset.Rows`).

    Args:
        store: Where the pictures are.
        keys: By which a picture and its mask are matched, in order.
        pictures: Names of the pictures' files.
        masks: Has one for each key.
    """

    def __init__(self, store: Storage, keys: Sequence[str], pictures: Sequence[str], masks: MaskGroup) -> None:
        self.keys = tuple(keys)
        self._store, self._pictures, self._masks = store, tuple(pictures), masks
        fit = [portable(k) for k in self.keys]
        digests = Digests()
        for name in fit:
            digests.append(folded(name))
        shared = digests.repeated()[1] if fit else np.zeros(0, dtype=bool)
        self.ids = tuple(with_digest(f, k) if s else f for f, k, s in zip(fit, self.keys, shared, strict=True))

    def __len__(self) -> int:
        return len(self.keys)

    def source(self, row: int) -> ImageSource:
        """Make the source of one picture."""
        return self._store.image(self._pictures[row], self.ids[row])

    def mask(self, row: int) -> MaskSource:
        """Make the source of one mask."""
        return self._masks.source(self.keys[row])

    def meaning(self) -> bytes:
        """See `MaskGroup`."""
        return self._masks.meaning()

    def stamps(self, rows: np.ndarray) -> Iterator[bytes]:
        """Names, sizes and times of change of pictures and masks."""
        for row in rows.tolist():
            yield self.keys[row].encode("utf-8", "surrogatepass")
            yield self._store.stamp(self._pictures[row])
            yield self._masks.stamp(self.keys[row])


class SegmentationSet:
    """Pictures with masks in a fixed order. Immutable; `select` and the like give new sets.

    Sets are opened by `amradio.images.segmentation.open_segmentation`.

    Args:
        rows: Where pictures and masks are.
        name: What the set is called in reports: what was opened.
        layout: How it lies on disk.
        split: Which part of it, if it has parts.
        class_names: Of the ids from 0.
        ignore_index: See below.
        indices: Which rows, in which order; None means all.

    Attributes:
        name: See above.
        layout: See above.
        split: See above.
        class_names: See above; C of them.
        ignore_index: An id that scores leave out. `VOID`, unless a published protocol counts a class and does not score
            it (see `open_segmentation`).
    """

    def __init__(
        self,
        rows: PairRows,
        *,
        name: str,
        layout: str,
        split: str | None,
        class_names: Iterable[str],
        ignore_index: int = VOID,
        indices: np.ndarray | None = None,
    ) -> None:
        self._rows, self._indices = rows, indices
        self._fingerprint: str | None = None
        self.name, self.layout, self.split = name, layout, split
        self.class_names = tuple(class_names)
        self.ignore_index = ignore_index

    def __len__(self) -> int:
        return len(self._rows) if self._indices is None else len(self._indices)

    def __getitem__(self, index: int) -> SegmentationSample:
        """One picture and its mask; negative indices count from the end."""
        position = range(len(self))[index]  # raises IndexError
        row = position if self._indices is None else int(self._indices[position])
        return SegmentationSample(self._rows.ids[row], self._rows.source(row), self._rows.mask(row))

    def __iter__(self) -> Iterator[SegmentationSample]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        split = f", split {self.split!r}" if self.split else ""
        return (
            f"<SegmentationSet {self.name!r}{split}: {len(self):,} pictures with masks, {len(self.class_names)} "
            f"classes, layout {self.layout}>"
        )

    @property
    def ids(self) -> tuple[str, ...]:
        """Of all pictures, in order."""
        rows = range(len(self)) if self._indices is None else self._indices.tolist()
        return tuple(self._rows.ids[row] for row in rows)

    @property
    def names(self) -> tuple[str, ...]:
        """Of all pictures, in order, as list files name them (see `open_segmentation`)."""
        rows = range(len(self)) if self._indices is None else self._indices.tolist()
        return tuple(self._rows.keys[row] for row in rows)

    @property
    def images(self) -> ImageSet:
        """The pictures alone, in the same order."""
        return ImageSet(self._rows, name=self.name, split=self.split, indices=self._indices)

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of names, classes, order, and what tells that a content changed.

        Contents are told by sizes and times of change, not read. The place of the files does not count.
        """
        if self._fingerprint is None:
            self._fingerprint = digest_of(self._fingerprint_parts())
        return self._fingerprint

    def select(self, indices: Iterable[int]) -> SegmentationSet:
        """Take some pictures, in the order given; one may be taken several times.

        Args:
            indices: Positions in this set; negative ones count from the end.

        Raises:
            OptionError: An index is out of range.
        """
        chosen = positions(indices, len(self), self.name)
        return SegmentationSet(
            self._rows,
            name=self.name,
            layout=self.layout,
            split=self.split,
            class_names=self.class_names,
            ignore_index=self.ignore_index,
            indices=chosen if self._indices is None else self._indices[chosen],
        )

    def shuffled(self, seed: int) -> SegmentationSet:
        """Put the pictures into an order that depends on the seed and their number only."""
        return self.select(permutation(len(self), seed))

    def head(self, count: int) -> SegmentationSet:
        """Take the first pictures; all if there are fewer."""
        return self.select(np.arange(min(max(count, 0), len(self))))

    def subset(self, size: str | int, seed: int) -> SegmentationSet:
        """Draw pictures at random, for data-efficient protocols; they stay in the order of this set.

        Draws of one seed are nested: the pictures of a smaller size are among those of a larger one. Which are drawn
        depends on the names of the pictures, and not on their order in this set.

        Args:
            size: A number of pictures, or a share such as ``"1/8"``, ``"1/64"`` or ``"1/128"``, which is rounded to the
                nearest number, and to at least one: 1/128 of the 10,582 pictures of Pascal VOC's trainaug are 83.
            seed: Of the draw.

        Raises:
            OptionError: The size is none of these, or larger than the set.
        """
        count = self._count(size)
        names = self.names
        by_name = np.array(sorted(range(len(names)), key=lambda i: natural_key(names[i])), dtype=np.int64)
        return self.select(np.sort(by_name[permutation(len(self), seed)[:count]]))

    def _count(self, size: str | int) -> int:
        count = size
        if isinstance(size, str):
            if size.isdecimal():
                count = int(size)
            elif (share := _FRACTION.fullmatch(size)) and 0 < int(share[1]) <= int(share[2]):
                count = max(1, (2 * len(self) * int(share[1]) + int(share[2])) // (2 * int(share[2])))
        if isinstance(count, (str, bool)) or count < 1:
            raise OptionError(
                f"A subset of {size!r} pictures cannot be drawn. Give a number of pictures, or a share: '1/8', '1/64' "
                "or '1/128'."
            )
        if count > len(self):
            raise OptionError(f"{count:,} pictures were asked for, and {self.name} has {len(self):,}.")
        return int(count)

    def _fingerprint_parts(self) -> Iterator[bytes]:
        yield "\0".join(self.class_names).encode("utf-8", "surrogatepass")
        yield self.ignore_index.to_bytes(2, "little")
        yield self._rows.meaning()
        yield from self._rows.stamps(np.arange(len(self)) if self._indices is None else self._indices)


def check_class_names(names: Sequence[str], where: str) -> tuple[str, ...]:
    """Check that classes can be told apart in a mask.

    Raises:
        DatasetError: There are none, or too many.
    """
    if not 1 <= len(names) <= VOID:
        raise DatasetError(f"{where} names {len(names)} classes. There must be 1 to {VOID}, as {VOID} means void.")
    return tuple(names)
