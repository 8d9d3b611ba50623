"""Masks as files that hold a class id for each pixel: reading, checking, and mapping to the ids of a protocol."""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from PIL import ImageFile, PngImagePlugin

from amradio.errors import DatasetError
from amradio.images.decode import MAX_PIXELS
from amradio.images.segmentation.storage import Storage

VOID = 255
"""The id, in every mask that is read, of pixels that belong to no class and count neither in memories nor in scores."""

MaskProblem = Literal["unreadable-mask", "not-an-index-mask", "unknown-id", "wrong-size"]

_PNG = b"\x89PNG\r\n\x1a\n"
_SHOWN_IDS = 8
_NARROW_GREY = {"L;2": 85, "L;4": 17}
"""What Pillow multiplies grey samples of 2 and 4 bits by, to fill 0..255."""


class MaskError(DatasetError):
    """A mask cannot be used.

    Args:
        message: What happened, and what to do.
        problem: Which kind of problem it is.
    """

    def __init__(self, message: str, problem: MaskProblem) -> None:
        super().__init__(message)
        self.problem = problem

    def __reduce__(self) -> tuple[type[MaskError], tuple[str, MaskProblem]]:
        return type(self), (str(self), self.problem)


class MaskSource(Protocol):
    """Where the mask of one picture comes from."""

    @property
    def location(self) -> str:
        """For people: a path, or an archive and a member."""
        ...

    def read(self, size: tuple[int, int] | None = None) -> np.ndarray:
        """Read the mask.

        Args:
            size: (height, width) of its picture, which the mask must have too; None leaves that unchecked.

        Returns:
            uint8 [H, W]: class ids from 0, and `VOID`; writable, and not shared.

        Raises:
            MaskError: It is missing, broken, no index mask or of another size, or has ids that are no class.
        """
        ...


class MaskGroup(Protocol):
    """The masks of one part of a data set, by the keys of their pictures."""

    def keys(self) -> Collection[str]:
        """Of which pictures there are masks."""
        ...

    def place(self, key: str) -> str:
        """Where a mask is or should be, from the root of the data set."""
        ...

    def source(self, key: str) -> MaskSource:
        """The source of one mask."""
        ...

    def stamp(self, key: str) -> bytes:
        """What identifies a mask and tells that it has changed, without reading it."""
        ...

    def meaning(self) -> bytes:
        """What tells how that which files hold becomes classes."""
        ...


class LabelTable:
    """Which class each id in a mask file means.

    Args:
        labels: Class, or `VOID`, of each id that may occur.
        known: These ids in words, for messages.
    """

    def __init__(self, labels: Mapping[int, int], known: str) -> None:
        self._labels, self._is_known = np.zeros(1 << 16, dtype=np.uint8), np.zeros(1 << 16, dtype=bool)
        self._labels[list(labels)] = list(labels.values())
        self._is_known[list(labels)] = True
        self._known = known

    @classmethod
    def identity(cls, count: int) -> LabelTable:
        """Ids are classes from 0, and 255 is void."""
        return cls({**{i: i for i in range(count)}, VOID: VOID}, f"0 to {count - 1} and {VOID} (void)")

    def apply(self, ids: np.ndarray, location: str) -> np.ndarray:
        """Map the ids of a mask.

        Args:
            ids: uint8 or uint16 [H, W].
            location: Of the mask, for messages.

        Returns:
            uint8 [H, W].

        Raises:
            MaskError: There are unknown ids.
        """
        counts = np.bincount(ids.reshape(-1))  # faster than looking up each pixel
        unknown = np.flatnonzero((counts > 0) & ~self._is_known[: len(counts)])
        if unknown.size:
            raise self._unknown(unknown, counts[unknown], location)
        labels: np.ndarray = self._labels[ids]
        return labels

    def stamp(self) -> bytes:
        """What tells this table from others."""
        return self._labels.tobytes() + self._is_known.tobytes()

    def _unknown(self, ids: np.ndarray, counts: np.ndarray, location: str) -> MaskError:
        shown = ", ".join(f"{i} ({n:,} pixels)" for i, n in zip(ids[:_SHOWN_IDS], counts, strict=False))
        more = f" and {ids.size - _SHOWN_IDS} more" if ids.size > _SHOWN_IDS else ""
        return MaskError(
            f"The mask {location} has ids that are no class: {shown}{more}. Known are {self._known}. Is it the mask "
            "of another data set, or the list of classes too short?",
            "unknown-id",
        )


def read_ids(content: bytes, location: str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read the ids in a PNG file, with a palette or in grey, of 1 to 16 bits.

    Args:
        content: Of the file.
        location: For messages.
        max_pixels: What its header may say, before anything is decoded.

    Returns:
        uint8 or uint16 [H, W]: palette indices, or grey values as stored.

    Raises:
        MaskError: It is no PNG file, too large or broken, or has colours in place of ids.
    """
    image = _open_png(content, location, max_pixels)
    if image.mode not in ("1", "L", "P", "I", "I;16"):
        raise _not_an_index_mask(image, location)
    scale = _NARROW_GREY.get(str(image.tile[0].args), 1) if image.tile else 1  # forgotten once pixels are loaded
    ids = _pixels(image, location)
    return ids.astype(np.uint16) if ids.dtype.itemsize > 1 else ids.astype(np.uint8) // np.uint8(scale)


def read_colours(content: bytes, location: str) -> np.ndarray:
    """Read a PNG file whose colours are numbers, as in panoptic annotations.

    Returns:
        uint8 [H, W, 3].

    Raises:
        MaskError: It is no PNG file, too large or broken, or not in RGB.
    """
    image = _open_png(content, location)
    if image.mode != "RGB":
        raise MaskError(
            f"The mask {location} has mode {image.mode!r}, and panoptic masks keep the numbers of segments in RGB.",
            "not-an-index-mask",
        )
    return _pixels(image, location)


def check_size(shape: tuple[int, ...], size: tuple[int, int] | None, location: str) -> None:
    """Check that a mask is as large as its picture.

    Args:
        shape: (height, width) of the mask.
        size: (height, width) of the picture; None for unknown.
        location: Of the mask.

    Raises:
        MaskError: It is not.
    """
    if size is not None and tuple(shape) != tuple(size):
        raise MaskError(
            f"The mask {location} is {shape[1]} x {shape[0]} pixels (width x height), and its picture is "
            f"{size[1]} x {size[0]}. They must be equal: is it the mask of another picture, or was one resized?",
            "wrong-size",
        )


def check_budget(height: int, width: int, location: str, max_pixels: int = MAX_PIXELS) -> None:
    """Check that a mask is no larger than any picture may be (or than `max_pixels`), before there is memory for it.

    Raises:
        MaskError: It is.
    """
    if not 0 < height * width <= max_pixels:
        raise MaskError(
            f"The mask {location} says that it has {width} x {height} pixels; there must be 1 to {max_pixels:,}.",
            "unreadable-mask",
        )


@dataclass(frozen=True, eq=False)
class IndexMask:
    """A mask in a PNG file (see `MaskSource`).

    Attributes:
        store: Where the file is.
        name: Of the file.
        table: What its ids mean.
    """

    store: Storage
    name: str
    table: LabelTable

    @property
    def location(self) -> str:
        """The path, or the archive and the member."""
        return f"{self.store.location}/{self.name}"

    def read(self, size: tuple[int, int] | None = None) -> np.ndarray:
        """See `MaskSource`."""
        ids = read_ids(content_of(self.store, self.name), self.location)
        check_size(ids.shape, size, self.location)
        return self.table.apply(ids, self.location)


@dataclass(frozen=True, eq=False)
class MaskFiles:
    """Masks in PNG files (see `MaskGroup`).

    Attributes:
        store: Where the files are.
        names: Of the files, by key.
        table: What their ids mean.
        pattern: The name that the mask of a picture must have, with ``{}`` for its key.
    """

    store: Storage
    names: Mapping[str, str]
    table: LabelTable
    pattern: str

    def keys(self) -> Collection[str]:
        """See `MaskGroup`."""
        return self.names.keys()

    def place(self, key: str) -> str:
        """See `MaskGroup`."""
        return self.names.get(key) or self.pattern.replace("{}", key)

    def source(self, key: str) -> IndexMask:
        """See `MaskGroup`."""
        return IndexMask(self.store, self.names[key], self.table)

    def stamp(self, key: str) -> bytes:
        """See `MaskGroup`."""
        return self.store.stamp(self.names[key])

    def meaning(self) -> bytes:
        """See `MaskGroup`."""
        return self.table.stamp()


def content_of(store: Storage, name: str) -> bytes:
    """Read a mask file.

    Raises:
        MaskError: It cannot be read.
    """
    try:
        return store.read(name)
    except ValueError as error:
        raise MaskError(str(error), "unreadable-mask") from error


def _open_png(content: bytes, location: str, max_pixels: int = MAX_PIXELS) -> PngImagePlugin.PngImageFile:
    if not content.startswith(_PNG):
        raise MaskError(
            f"The mask {location} is no PNG file (it begins with bytes {content[:8].hex(' ')}). Masks must be PNG "
            "files with a palette or in grey; formats such as JPEG change the ids.",
            "unreadable-mask",
        )
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise MaskError(
            f"Cannot read the mask {location}: PIL.ImageFile.LOAD_TRUNCATED_IMAGES is switched on by other code in "
            "this process, so that a half-read mask could not be told from a whole one; set it to False.",
            "unreadable-mask",
        )
    try:  # the plugin raises whatever its parsing runs into
        image = PngImagePlugin.PngImageFile(io.BytesIO(content))
    except Exception as error:
        raise _broken(location, error) from error
    check_budget(image.height, image.width, location, max_pixels)
    return image


def _pixels(image: PngImagePlugin.PngImageFile, location: str) -> np.ndarray:
    try:
        image.load()
        return np.array(image)  # [H, W] or [H, W, 3]
    except Exception as error:
        raise _broken(location, error) from error


def _broken(location: str, error: Exception) -> MaskError:
    return MaskError(f"The mask {location} is broken or cut short ({str(error).rstrip('.')}).", "unreadable-mask")


def _not_an_index_mask(image: PngImagePlugin.PngImageFile, location: str) -> MaskError:
    """Say what a mask with colours has in place of ids."""
    mode = image.mode
    pixels = _pixels(image, location).astype(np.uint8)  # [H, W, channels]
    colours = pixels[..., :3].reshape(-1, min(3, pixels.shape[-1]))  # [H*W, 3], or 2 channels for LA
    if mode in ("RGB", "RGBA") and (colours == colours[:, :1]).all():
        evidence = "whose three channels are equal; if they are the ids, save it as Image.open(path).convert('L')"
    else:
        count = len(np.unique(colours, axis=0))
        middle = tuple(int(v) for v in colours[len(colours) // 2])
        evidence = (
            f"with {count:,} colours such as {middle}; if each colour stands for a class, replace it by the class's "
            "number and save in mode 'L' or 'P'"
        )
    return MaskError(
        f"The mask {location} is no index mask: it is a picture of mode {mode}, {evidence}. Masks hold one number, the "
        "class, for each pixel.",
        "not-an-index-mask",
    )
