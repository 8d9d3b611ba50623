"""Photos on the page: decoded from bytes under limits, kept small, and never from a place that the page names."""

from __future__ import annotations

import base64
import importlib.util
import io
import unicodedata
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from amradio.app.limits import Limits
from amradio.errors import ImageError

if TYPE_CHECKING:
    from PIL.Image import Image

SAMPLES = ("chelsea.png", "coffee.png", "astronaut.png", "rocket.jpg", "motorcycle_left.png", "motorcycle_right.png")
"""Photos of scikit-image, which its package carries."""

_SAMPLE_NAMES = {"chelsea.png": "cat.png"}
_SCENES = 6
_SHOWN_SIDE = 512
_NAME_LENGTH = 60


@dataclass(frozen=True, eq=False)
class Photo:
    """A photo of a session.

    Attributes:
        key: Its number in the session, never used twice.
        name: For people.
        picture: RGB, upright, at most `Limits.kept_side` pixels long.
    """

    key: int
    name: str
    picture: Image

    @cached_property
    def shown(self) -> Image:
        """At the size in which it is shown."""
        return fitted(self.picture, _SHOWN_SIDE)

    @cached_property
    def url(self) -> str:
        """What is shown, as a data URL."""
        return data_url(self.shown)

    @cached_property
    def thumbnail_url(self) -> str:
        """A small one, as a data URL."""
        return data_url(fitted(self.picture, 160))

    @property
    def stem(self) -> str:
        """The name without its ending, for files made from the photo."""
        return PurePath(self.name).stem or "photo"


def read_photo(content: bytes, name: str, limits: Limits) -> Image:
    """Decode an uploaded file.

    Args:
        content: Of the file.
        name: For messages.
        limits: Bounds the pixels.

    Returns:
        RGB, upright, at most `Limits.kept_side` pixels long.

    Raises:
        ImageError: It is no picture, too large or broken; the message is for people.
    """
    from amradio.images import decode

    if len(content) > limits.file_bytes:
        raise ImageError(
            f"{name} has {len(content) / 2**20:.0f} MB; files may have up to {limits.file_bytes / 2**20:.0f} MB."
        )
    try:
        picture = decode(content, max_pixels=limits.file_pixels, name=name)
    except ImageError as error:
        raise ImageError(str(error).removeprefix("Cannot decode ")) from error
    return fitted(picture, limits.kept_side)


def sample_photos() -> list[tuple[str, Image]]:
    """Photos to begin with: those of scikit-image if it is installed, otherwise made-up scenes.

    Returns:
        Names and pictures.
    """
    from amradio.images import decode
    from amradio.images.scenes import SHAPES, scene

    found = importlib.util.find_spec("skimage")
    if found is not None and found.submodule_search_locations:
        data = Path(found.submodule_search_locations[0], "data")
        paths = [data / name for name in SAMPLES if (data / name).is_file()]
        if paths:
            return [(_SAMPLE_NAMES.get(path.name, path.name), decode(path)) for path in paths]
    return [
        (f"{SHAPES[i % len(SHAPES)]}-{i + 1}.png", scene(i % len(SHAPES), seed=i, side=448)[0]) for i in range(_SCENES)
    ]


def clean_name(name: str) -> str:
    """A file's name for people: no folders, nothing that cannot be seen, not too long."""
    last = name.replace("\\", "/").rsplit("/", 1)[-1]
    seen = "".join(c for c in last if unicodedata.category(c)[0] != "C").strip()
    if len(seen) > _NAME_LENGTH:
        stem, ending = PurePath(seen).stem, PurePath(seen).suffix[:8]
        seen = stem[: _NAME_LENGTH - len(ending) - 1] + "…" + ending
    return seen or "photo"


def fitted(picture: Image, side: int) -> Image:
    """The picture itself, or a smaller one whose longest side is `side` pixels."""
    from PIL.Image import Resampling

    scale = side / max(picture.size)
    if scale >= 1:
        return picture
    size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
    return picture.resize(size, Resampling.LANCZOS, reducing_gap=3.0)


def encoded(picture: Image, kind: str = "JPEG") -> bytes:
    """A picture as a file: JPEG, or PNG, which loses nothing."""
    data = io.BytesIO()
    if kind == "JPEG":
        picture.save(data, "JPEG", quality=88)
    else:
        picture.save(data, "PNG")
    return data.getvalue()


def data_url(picture: Image, kind: str = "JPEG") -> str:
    """A picture as a URL that holds it; see `encoded`."""
    return f"data:image/{kind.lower()};base64,{base64.b64encode(encoded(picture, kind)).decode('ascii')}"
