"""Pictures with captions: several texts that describe each picture of a set."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from amradio.errors import DatasetError
from amradio.images.dataset import ImageSet
from amradio.images.files import FileRows, Found


@dataclass(frozen=True)
class CaptionedImages:
    """Pictures and the texts that belong to them.

    Attributes:
        images: The pictures.
        captions: T texts.
        image_of: int64 [T] the position of each text's picture, rising.
    """

    images: ImageSet
    captions: tuple[str, ...]
    image_of: np.ndarray

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of the captions and of what they belong to."""
        text = json.dumps([self.captions, self.image_of.tolist()])
        return hashlib.sha256(text.encode()).hexdigest()

    def select(self, positions: Sequence[int] | np.ndarray) -> CaptionedImages:
        """Take some pictures, in the order given, with their captions."""
        chosen = np.asarray(positions, dtype=np.int64)
        by_image: list[list[str]] = [[] for _ in range(len(self.images))]
        for caption, image in zip(self.captions, self.image_of.tolist(), strict=True):
            by_image[image].append(caption)
        return _captioned(self.images.select(chosen), [by_image[i] for i in chosen.tolist()])

    def first(self, count: int) -> CaptionedImages:
        """Keep only the first captions of each picture."""
        starts = np.searchsorted(self.image_of, self.image_of)  # [T] where each one's picture begins
        kept = np.flatnonzero(np.arange(len(self.image_of)) - starts < count)
        return CaptionedImages(self.images, tuple(self.captions[i] for i in kept.tolist()), self.image_of[kept])


def load_captions(
    path: str | os.PathLike[str], images: str | os.PathLike[str] | None = None, split: str | None = None
) -> CaptionedImages:
    """Read pictures with captions.

    Args:
        path: One of

            - a ``.jsonl`` file with lines ``{"path": "a.jpg", "captions": ["...", "..."]}``;
            - the captions of COCO, ``{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}``;
            - the splits of Karpathy for COCO and Flickr30k, ``{"images": [{"filename", "split", "sentences":
              [{"raw"}]}]}``.
        images: Folder that the paths in the file count from; default the file's own.
        split: Which part of Karpathy's splits; default ``test``.

    Returns:
        The pictures that have captions, in the order of the file.

    Raises:
        DatasetError: There is no such file, it is of another kind, or none of its pictures is in the folder.
    """
    source = Path(path).expanduser()
    folder = source.parent if images is None else Path(images).expanduser()
    try:
        text = source.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"The captions {source} cannot be read: {error}.") from error
    by_path: dict[str, list[str]] = {}
    try:
        content = _parse_lines(text) if source.suffix.lower() == ".jsonl" else json.loads(text)
        if isinstance(content, Mapping) and "annotations" not in content:
            split = split or "test"
            entries = _karpathy(content["images"], split)
        else:
            _refuse_split(split)
            entries = _coco(content) if isinstance(content, Mapping) else _lines(content)
        for name, captions in entries:
            by_path.setdefault(name, []).extend(c.strip() for c in captions if c.strip())
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        what = f"there is no {error}" if isinstance(error, KeyError) else str(error)
        raise DatasetError(
            f"{source} cannot be used as a list of captions: {what}. Known kinds: lines of "
            '{"path": "a.jpg", "captions": ["..."]} in a .jsonl file, captions of COCO, splits of Karpathy.'
        ) from error
    names = [name for name, captions in by_path.items() if captions]
    paths = [folder / name for name in names]
    if not names:
        part = f" in its split {split!r}" if split else ""
        raise DatasetError(f"{source} has no picture with captions{part}.")
    if not any(p.is_file() for p in paths):
        raise DatasetError(
            f"{source} names {len(paths)} pictures with captions, and none of them is there, such as {paths[0]}. Say "
            "which folder its paths count from."
        )
    found = (Found(str(folder), Path(name).as_posix(), str(p)) for name, p in zip(names, paths, strict=True))
    rows = FileRows(found, unique=False)
    return _captioned(ImageSet(rows, name=str(source), split=split), [by_path[name] for name in names])


def _captioned(images: ImageSet, by_image: Sequence[Sequence[str]]) -> CaptionedImages:
    captions = tuple(c for own in by_image for c in own)
    return CaptionedImages(images, captions, np.repeat(np.arange(len(by_image)), [len(own) for own in by_image]))


def _parse_lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def _refuse_split(split: str | None) -> None:
    if split is not None:
        raise ValueError(f"it has no splits, and {split!r} was asked for")


def _lines(entries: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[str]]]:
    for entry in entries:
        captions = entry["captions"]
        if not isinstance(captions, list):
            raise TypeError(f"the captions of {entry['path']!r} are no list")
        yield entry["path"], captions


def _coco(content: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    names = {image["id"]: image["file_name"] for image in content["images"]}
    for name in names.values():  # so that pictures come in their own order, not in that of the captions
        yield name, []
    for annotation in content["annotations"]:
        yield names[annotation["image_id"]], [annotation["caption"]]


def _karpathy(images: Sequence[Mapping[str, Any]], split: str) -> Iterator[tuple[str, list[str]]]:
    for image in images:
        if image["split"] == split:
            path = Path(image.get("filepath", ""), image["filename"]).as_posix()
            yield path, [sentence["raw"] for sentence in image["sentences"]]
