"""Choosing from a set of pictures with masks: orders, shares, fingerprints."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from amradio.errors import OptionError
from amradio.images import ImageSet
from amradio.images.segmentation import SegmentationSet, open_segmentation
from amradio.images.segmentation.dataset import PairRows
from amradio.images.segmentation.masks import LabelTable, MaskFiles
from amradio.images.segmentation.storage import FolderStorage

Write = Callable[..., Path]


def made_up(names: list[str]) -> SegmentationSet:
    """A set whose files do not exist."""
    store = FolderStorage("nowhere")
    masks = MaskFiles(store, {n: f"{n}.png" for n in names}, LabelTable.identity(2), "{}.png")
    rows = PairRows(store, names, [f"{n}.jpg" for n in names], masks)
    return SegmentationSet(rows, name="made up", layout="folder", split=None, class_names=("a", "b"))


@given(st.integers(1, 400), st.integers(0, 2**32))
def test_subsets_of_a_seed_are_nested(count: int, seed: int) -> None:
    pairs = made_up([f"{i:05}" for i in range(count)])
    drawn = [pairs.subset(size, seed).names for size in ("1/128", "1/64", "1/8", "1/2", "1/1")]
    for smaller, larger in itertools.pairwise(drawn):
        assert set(smaller) <= set(larger)
    assert [len(d) for d in drawn] == [max(1, int(count / n + 0.5)) for n in (128, 64, 8, 2, 1)]
    assert all(list(d) == sorted(d) for d in drawn)
    assert drawn[-1] == pairs.names


@given(st.integers(0, 2**32), st.randoms(use_true_random=False))
def test_subsets_do_not_depend_on_the_order_of_the_list(seed: int, shuffle: object) -> None:
    names = [f"p{i}" for i in range(30)]
    shuffled = list(names)
    shuffle.shuffle(shuffled)
    drawn = made_up(shuffled).subset(7, seed).names
    assert set(drawn) == set(made_up(names).subset(7, seed).names)
    assert list(drawn) == [n for n in shuffled if n in drawn]


def test_published_sizes() -> None:
    trainaug = made_up([f"{i:05}" for i in range(10_582)])
    assert [len(trainaug.subset(size, 42)) for size in ("1/128", "1/64", "1/8")] == [83, 165, 1323]
    assert trainaug.subset("1/128", 42).names[:3] == ("00422", "00646", "00740")  # the same on every machine
    assert trainaug.subset("1/128", 42).names != trainaug.subset("1/128", 400).names
    assert len(trainaug.subset("83", 42)) == len(trainaug.subset(83, 42)) == 83


@pytest.mark.parametrize("size", ["1/0", "0/8", "9/8", "1:8", "", "0", 0, -1, True, "0.5"])
def test_sizes_that_are_refused(size: str | int) -> None:
    with pytest.raises(OptionError, match=r"cannot be drawn\. Give a number of pictures, or a share: '1/8', '1/64'"):
        made_up(["a", "b"]).subset(size, 0)


def test_more_than_there_are() -> None:
    with pytest.raises(OptionError, match=r"3 pictures were asked for, and made up has 2\."):
        made_up(["a", "b"]).subset(3, 0)


def test_selections(write_folder: Write, plain: dict[str, bytes]) -> None:
    pairs = open_segmentation(write_folder(plain))
    assert pairs.select([-1, 0]).names == ("b/1", "9")
    assert pairs.select(np.array([2])).select([0, 0]).names == ("a/1", "a/1")
    assert pairs.head(2).names == ("9", "10")
    assert len(pairs.head(99)) == 5
    assert len(pairs.head(-1)) == 0
    assert sorted(pairs.shuffled(3).names) == sorted(pairs.names)
    assert pairs.shuffled(3).names == pairs.shuffled(3).names
    assert [s.id for s in pairs.select([1])] == ["10"]
    with pytest.raises(OptionError, match="Index 5 is outside the 5 pictures"):
        pairs.select([5])
    with pytest.raises(OptionError, match="by whole numbers"):
        pairs.select([0.5])
    with pytest.raises(IndexError):
        pairs[5]


def test_pictures_alone(write_folder: Write, plain: dict[str, bytes]) -> None:
    pairs = open_segmentation(write_folder(plain)).select([3, 1])
    images = pairs.images
    assert isinstance(images, ImageSet)
    assert [source.id for source in images] == list(pairs.ids) == ["a__2", "10"]
    assert images.labels is None
    assert len(images.fingerprint) == 64


def test_fingerprints(write_folder: Write, plain: dict[str, bytes], png: Callable[..., bytes]) -> None:
    path = write_folder(plain)
    pairs = open_segmentation(path)
    same = open_segmentation(path).fingerprint
    assert pairs.fingerprint == same
    others = [
        pairs.head(3),
        pairs.shuffled(1),
        open_segmentation(path, classes=["a", "b", "c"]),
        open_segmentation(path, classes=["sky", "road", "façade", "more"]),
    ]
    (path / "masks/9.png").write_bytes(png(np.zeros((16, 18))))
    others.append(open_segmentation(path))
    assert len({same, *(o.fingerprint for o in others)}) == 6
