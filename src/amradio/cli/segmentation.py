"""What commands that evaluate segmentations share: two parts of labelled pictures."""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from amradio.cli.evaluation import EvalCommand
from amradio.errors import OptionError

if TYPE_CHECKING:
    from amradio.images.segmentation import SegmentationSet

_TRAIN_SPLITS = ("trainaug", "train", "training", "train2017")
_VAL_SPLITS = ("val", "validation", "val2017", "test")


@dataclass(frozen=True, kw_only=True)
class SegmentationOptions(EvalCommand, ABC):
    """Which labelled pictures are learnt from, and which are segmented. A base class: each field is an option."""

    data: Path | None = None
    """Pictures with masks, in parts: the training part is learnt from, the validation part is segmented."""
    train: Path | None = None
    """Pictures to learn from, instead of --data."""
    val: Path | None = None
    """Pictures to segment, instead of --data."""
    train_split: str | None = None
    """Part that is learnt from; default trainaug or train, where there are several."""
    val_split: str | None = None
    """Part that is segmented; default val, where there are several."""
    layout: Literal["auto", "voc", "ade20k", "cityscapes", "coco-thing", "coco-stuff", "coco-instances", "folder"] = (
        "auto"
    )
    """How the data lie there; auto finds out."""
    classes: Path | None = None
    """File that names the classes, one a line, in place of the data set's own."""
    train_list: Path | None = None
    """Learn from the pictures that this file names, one a line."""
    val_list: Path | None = None
    """Segment the pictures that this file names, one a line."""
    num_train_samples: str | None = None
    """Data-efficient: draw so many pictures to learn from, or a share such as 1/8, 1/64 or 1/128, by --seed."""
    label_column: tyro.conf.Suppress[str | None] = None
    image_column: tyro.conf.Suppress[str | None] = None

    def open(self) -> dict[str, SegmentationSet]:
        """The pictures to learn from, and those to segment."""
        if (self.data is None) == (self.train is None) or (self.train is None) != (self.val is None):
            raise OptionError("Name one data set with several parts (--data DIR), or two (--train DIR --val DIR).")
        self.check()
        train = self._open(self.data or self.train, self.train_split, _TRAIN_SPLITS, self.train_list)
        val = self._open(self.data or self.val, self.val_split, _VAL_SPLITS, self.val_list)
        if self.num_train_samples is not None:
            train = train.subset(self.num_train_samples, self.seed)
        if self.limit is not None:
            train, val = (images.shuffled(self.seed).head(self.limit) for images in (train, val))
        return {"train": train, "eval": val}

    def check(self) -> None:
        """Refuse options that do not fit together before anything is read."""

    @property
    def variant(self) -> Literal["clean", "hbird"]:
        """How masks are read: right, or as open-hummingbird-eval does."""
        return "clean"

    def _open(
        self, path: Path | None, split: str | None, usual: Sequence[str], list_file: Path | None
    ) -> SegmentationSet:
        from amradio.images.segmentation import open_segmentation, segmentation_splits

        assert path is not None
        layout = None if self.layout == "auto" else self.layout
        if split is None:
            known = segmentation_splits(path, layout)
            split = next((name for name in usual if name in known), None)
        return open_segmentation(
            path,
            split,
            layout=layout,
            classes=self.classes,
            list_file=list_file,
            variant=self.variant,
        )
