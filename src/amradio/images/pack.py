"""Pictures made smaller and put into tar shards of bounded size: to carry them to another machine and train there."""

from __future__ import annotations

import io
import re
import tarfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from amradio.errors import DatasetError, ImageError, OptionError
from amradio.images.dataset import ImageSet
from amradio.images.decode import MAX_PIXELS, WHITE
from amradio.images.sources import ImageSource

MIB = 2**20
_KEY_CHARACTERS = 64
_BLOCK = 512  # of a tar file: a member has a header of one, and its content fills up whole ones
_END = 22 * _BLOCK  # of a tar file, at most: two empty blocks, and then up to a multiple of 20


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """How pictures are packed.

    Attributes:
        short_side: What a larger picture's short side becomes, in pixels, aspect kept; smaller ones keep their size.
        quality: Of JPEG, 1 to 100.
        shard_bytes: Bound of a shard.
        workers: Threads.

    Raises:
        OptionError: A number is out of range.
    """

    short_side: int = 256
    quality: int = 90
    shard_bytes: int = 16 * MIB
    workers: int = 4

    def __post_init__(self) -> None:
        if self.short_side < 1 or not 1 <= self.quality <= 100 or self.workers < 1 or self.shard_bytes < MIB // 4:
            raise OptionError(
                "Packing needs a short side and workers of at least 1, a quality from 1 to 100, and shards of at least "
                f"{MIB // 4:,} bytes, got {self.short_side}, {self.workers}, {self.quality} and {self.shard_bytes:,}."
            )


@dataclass(frozen=True, kw_only=True)
class Packed:
    """What was packed.

    Attributes:
        shards: Paths, in order.
        count: Pictures in them.
        size: Bytes of all shards.
        failures: Where pictures that could not be read are, and why.
    """

    shards: tuple[Path, ...]
    count: int
    size: int
    failures: tuple[tuple[str, str], ...]


def pack_images(
    images: ImageSet,
    folder: Path,
    options: PackOptions | None = None,
    on_picture: Callable[[], object] = lambda: None,
) -> Packed:
    """Write pictures as JPEG into ``shard-000000.tar``, ... with their labels.

    `amradio.images.open_images` reads the folder. The same pictures and options give the same files, byte for byte,
    with the same versions of the libraries. Class names go into ``classes.txt``.

    Args:
        images: The pictures.
        folder: Made where it is missing.
        options: How.
        on_picture: Called for each picture.

    Returns:
        What was written, and which pictures could not be read and were left out.

    Raises:
        OptionError: The folder has shards already, or a picture does not fit into a shard.
        DatasetError: No picture could be read.
    """
    options = options or PackOptions()
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("shard-*.tar")):
        raise OptionError(f"{folder} has shards already; choose another folder, or delete them.")
    failures: list[tuple[str, str]] = []
    count = 0
    with _Shards(folder, options.shard_bytes) as shards:
        for index, made in enumerate(_made(images, options)):
            on_picture()
            try:
                content = made.result()
            except ImageError as e:
                failures.append((images[index].location, str(e)))
                continue
            label = None if images.labels is None or images.labels[index] < 0 else int(images.labels[index])
            shards.add(_key(index, images[index]), content, label)
            count += 1
        if not count:
            first = f" The first one, {failures[0][0]}: {failures[0][1]}" if failures else ""
            raise DatasetError(f"None of the {len(images)} pictures of {images.name} could be read.{first}")
    if images.class_names is not None:
        (folder / "classes.txt").write_text("".join(f"{name}\n" for name in images.class_names), encoding="utf-8")
    paths = tuple(shards.paths)
    return Packed(shards=paths, count=count, size=sum(p.stat().st_size for p in paths), failures=tuple(failures))


class _Shards:
    """Tar files that are written one after the other; each appears under its name once it is complete."""

    def __init__(self, folder: Path, bound: int) -> None:
        self._folder, self._bound = folder, bound
        self.paths: list[Path] = []
        self._tar: tarfile.TarFile | None = None
        self._size = 0

    def __enter__(self) -> _Shards:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._finish()
        elif self._tar is not None:
            self._tar.close()
            self._part.unlink()

    def add(self, key: str, content: bytes, label: int | None) -> None:
        """Add a picture, and beside it its label."""
        members = {f"{key}.jpg": content} | ({} if label is None else {f"{key}.cls": str(label).encode()})
        size = sum(_BLOCK + -(-len(m) // _BLOCK) * _BLOCK for m in members.values())
        if size + _END > self._bound:
            raise OptionError(
                f"The picture {key} has {len(content):,} bytes and does not fit into a shard of {self._bound:,}. "
                "Choose larger shards, a smaller short side or a lower quality."
            )
        if self._tar is not None and self._size + size + _END > self._bound:
            self._finish()
        if self._tar is None:
            self._tar = tarfile.TarFile(self._part, "w", format=tarfile.USTAR_FORMAT)
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            self._tar.addfile(info, io.BytesIO(data))
        self._size += size

    @property
    def _path(self) -> Path:
        return self._folder / f"shard-{len(self.paths):06d}.tar"

    @property
    def _part(self) -> Path:
        return self._path.with_suffix(".tar.part")

    def _finish(self) -> None:
        if self._tar is None:
            return
        self._tar.close()
        self._part.replace(self._path)
        self.paths.append(self._path)
        self._tar, self._size = None, 0


def _made(images: ImageSet, options: PackOptions) -> Iterator[Future[bytes]]:
    """The pictures as JPEG, in order, some of them ahead of their use."""
    with ThreadPoolExecutor(options.workers, thread_name_prefix="amradio-pack") as pool:
        pending: deque[Future[bytes]] = deque()
        for source in images:
            pending.append(pool.submit(_encoded, source, options))
            if len(pending) > 2 * options.workers:
                yield pending.popleft()
        yield from pending


def _encoded(source: ImageSource, options: PackOptions) -> bytes:
    from PIL.Image import Resampling

    side = options.short_side
    image = source.decode(max_pixels=MAX_PIXELS, background=WHITE, at_least=(side, side))
    short = min(image.size)
    if short > side:
        size = (max(round(image.width * side / short), side), max(round(image.height * side / short), side))
        image = image.resize(size, Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=options.quality)
    return buffer.getvalue()


def _key(index: int, source: ImageSource) -> str:
    """A unique name without dots, at which keys of a shard would end, that still tells which picture it is."""
    return f"{index:08d}-{re.sub(r'[^A-Za-z0-9_-]+', '_', source.id)[-_KEY_CHARACTERS:]}"
