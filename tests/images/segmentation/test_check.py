"""Checking data sets."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from amradio.errors import DatasetError, OptionError
from amradio.images.segmentation import VOID, check_segmentation

Write = Callable[..., Path]
Files = dict[str, bytes]


def test_a_whole_data_set(write: Write, voc: Files) -> None:
    path = write(voc)
    report = check_segmentation(path)
    assert (report.layout, report.path, report.root, report.lacking) == ("voc", str(path), str(path), ())
    assert [(s.split, s.pictures, s.masks, s.checked) for s in report.splits] == [
        ("train", 2, 2, 2),
        ("trainaug", 4, 4, 4),
        ("val", 1, 1, 1),
    ]
    assert (report.problems, report.exit_code) == ((), 0)
    train = report.splits[0]
    assert train.pixels[:3] == (24, 24, 0)
    assert train.pictures_with[:3] == (1, 1, 0)
    assert (train.void_pixels, train.void_share) == (48, 0.5)
    assert train.absent == train.class_names[2:]
    assert json.loads(json.dumps(report.to_dict()))["ok"] is True


def test_every_kind_of_problem(
    write: Write, plain: Files, png: Callable[..., bytes], photo: Callable[..., bytes]
) -> None:
    for i in range(8):
        plain[f"images/p{i}.png"], plain[f"masks/p{i}.png"] = photo(i, fmt="PNG"), png(np.zeros((6, 8)))
    del plain["masks/p0.png"], plain["images/p1.png"]
    plain["masks/p2.png"] = png(np.full((6, 8), 3))
    plain["masks/p3.png"] = png(np.zeros((8, 6)))
    plain["masks/p4.png"] = photo(fmt="PNG")
    plain["masks/p5.png"] = plain["masks/p5.png"][:44]
    plain["images/p6.png"] = b"nothing"
    plain["masks/p7.png"] = png(np.full((6, 8), VOID))
    report = check_segmentation(write(plain), sample=None)
    assert sorted((p.kind, next(f"p{i}" for i in range(8) if f"p{i}." in p.message)) for p in report.problems) == [
        ("mask-without-picture", "p1"),
        ("not-an-index-mask", "p4"),
        ("picture-without-mask", "p0"),
        ("unknown-id", "p2"),
        ("unreadable-mask", "p5"),
        ("unreadable-picture", "p6"),
        ("wrong-size", "p3"),
    ]
    assert report.problems[0].message == "images/p0.png has no mask; expected masks/p0.png."
    assert report.problems[1].message == "The mask masks/p1.png has no picture."
    assert report.exit_code == 3


def test_listed_pictures_that_are_missing(write: Write, voc: Files) -> None:
    del voc["JPEGImages/2009_000005.jpg"]
    report = check_segmentation(write(voc))
    assert [(p.kind, p.message.split(",")[0]) for p in report.problems] == [
        ("listed-without-picture", "There is no picture 2009_000005")
    ]
    assert report.splits[2].pictures == 1
    assert report.exit_code == 3
    assert check_segmentation(report.path, split="val").exit_code == 1  # nothing is left
    assert check_segmentation(report.path, split="train").exit_code == 0


def test_parts_of_the_published_data_set(write: Write, voc: Files, ade20k: Files, cityscapes: Files) -> None:
    for name in [n for n in voc if "Aug" in n or "aug" in n]:
        del voc[name]
    report = check_segmentation(write(voc, "voc"))
    assert report.lacking == (
        "SegmentationClassAug (masks of trainaug)",
        "sets/trainaug.txt or ImageSets/Segmentation/trainaug.txt (names in trainaug)",
    )
    assert report.exit_code == 0
    for name in [n for n in ade20k if "training" in n]:
        del ade20k[name]
    assert check_segmentation(write(ade20k, "ade")).lacking == (
        "images/training (pictures of training)",
        "annotations/training (masks of training)",
    )
    assert check_segmentation(write(cityscapes, "city")).lacking == ()
    assert check_segmentation(write({**voc, "classes.txt": b"a\n" * 21}, "own")).lacking == ()


def test_every_layout_can_be_checked(
    write: Write, ade20k: Files, cityscapes: Files, coco_thing: Files, coco_stuff: Files, coco_instances: Files
) -> None:
    for i, files in enumerate((ade20k, cityscapes, coco_thing, coco_stuff, coco_instances)):
        report = check_segmentation(write(files, f"set{i}"))
        assert len(report.splits) == 2
        assert report.exit_code == 0, report.problems
    del coco_stuff["images/train2017/000000000001.jpg"]
    assert check_segmentation(write(coco_stuff, "half")).lacking == ("images/train2017 (pictures and masks of train)",)


def test_splits_that_cannot_be_opened(write: Write, voc: Files) -> None:
    voc["ImageSets/Segmentation/val.txt"] = b""
    report = check_segmentation(write(voc))
    assert [p.kind for p in report.problems] == ["unusable-split"]
    assert "val.txt is empty" in report.problems[0].message
    assert report.exit_code == 3
    assert report.splits[2].void_share == 0


def test_samples(write: Write, voc: Files) -> None:
    path = write(voc)
    bars: list[tuple[int, str, int]] = []

    @contextmanager
    def bar(total: int, what: str) -> Iterator[Callable[[int], None]]:
        steps: list[int] = []
        yield steps.append
        bars.append((total, what, sum(steps)))

    report = check_segmentation(path, sample=2, bar=bar)
    assert [s.checked for s in report.splits] == [2, 2, 1]
    assert bars == [(2, "train", 2), (2, "trainaug", 2), (1, "val", 1)]
    assert check_segmentation(path, sample=0).splits[0].checked == 0
    with pytest.raises(OptionError, match="A sample of -1 pictures cannot be opened"):
        check_segmentation(path, sample=-1)


def test_with_classes_and_lists(write: Write, voc: Files, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("2009_000005\n")
    report = check_segmentation(write(voc), list_file=tmp_path / "list.txt", split="val", classes=["a", "b"])
    assert [p.kind for p in report.problems] == ["unknown-id"]


def test_nothing_to_check(write: Write, plain: Files) -> None:
    path = write({"classes.txt": plain["classes.txt"], "images/notes.txt": b"", "masks/notes.txt": b""})
    report = check_segmentation(path)
    assert [p.kind for p in report.problems] == ["unusable-split"]
    assert report.exit_code == 1


def test_no_data_set(tmp_path: Path, write: Write, voc: Files) -> None:
    with pytest.raises(DatasetError, match="is no data set of pictures with masks"):
        check_segmentation(tmp_path)
    with pytest.raises(OptionError, match="There is no layout 'vok'"):
        check_segmentation(write(voc), "vok")
