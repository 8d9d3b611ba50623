"""Where single pictures come from: files, parts of archives, rows of tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from PIL.Image import Image

PICTURE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".dib"}
    | {".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".avif"}
)
"""File name endings, in lower case, that count as pictures inside a folder or an archive."""


class ImageSource(Protocol):
    """Where one picture comes from. Members of archives and rows of data sets can be sources beside files."""

    @property
    def id(self) -> str:
        """Unique in its list, stable between runs, and a file name on every system."""
        ...

    @property
    def location(self) -> str:
        """For people: a path, or an archive and a member."""
        ...

    def decode(
        self, *, max_pixels: int, background: tuple[int, int, int], at_least: tuple[int, int] | None = None
    ) -> Image:
        """Decode the picture as `amradio.images.decode` does.

        Raises:
            ImageError: It cannot be decoded.
        """
        ...


@dataclass(frozen=True)
class ImageFile:
    """A picture in a file.

    Attributes:
        path: Of the file, as it was named or found.
        id: See `ImageSource`.
    """

    path: Path
    id: str

    @property
    def location(self) -> str:
        """The path."""
        return str(self.path)

    def decode(
        self, *, max_pixels: int, background: tuple[int, int, int], at_least: tuple[int, int] | None = None
    ) -> Image:
        """Decode the file.

        Raises:
            ImageError: It cannot be decoded.
        """
        from amradio.images.decode import decode

        return decode(self.path, max_pixels=max_pixels, background=background, at_least=at_least)


@dataclass(frozen=True)
class EncodedImage:
    """A picture whose file content is inside something else: an archive, a table.

    Attributes:
        read: Gives the content of the picture's file; raises `ImageError` if it cannot.
        id: See `ImageSource`.
        location: See `ImageSource`.
    """

    read: Callable[[], bytes]
    id: str
    location: str

    def decode(
        self, *, max_pixels: int, background: tuple[int, int, int], at_least: tuple[int, int] | None = None
    ) -> Image:
        """Read the content and decode it.

        Raises:
            ImageError: It cannot be read or decoded.
        """
        from amradio.images.decode import decode

        content = self.read()
        return decode(content, max_pixels=max_pixels, background=background, at_least=at_least, name=self.location)
