"""Files with captions: three kinds, and what is said about files of another."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from amradio.errors import DatasetError
from amradio.evals.captions import load_captions

COCO = {
    "images": [{"id": 7, "file_name": "b.png"}, {"id": 3, "file_name": "a.png"}, {"id": 9, "file_name": "mute.png"}],
    "annotations": [
        {"image_id": 3, "caption": "first of a "},
        {"image_id": 7, "caption": "first of b"},
        {"image_id": 3, "caption": "second of a"},
    ],
}
KARPATHY = {
    "dataset": "flickr8k",
    "images": [
        {"filename": "a.png", "split": "train", "sentences": [{"raw": "no"}]},
        {"filename": "b.png", "split": "test", "sentences": [{"raw": "one"}, {"raw": "two"}]},
        {"filepath": "sub", "filename": "c.png", "split": "test", "sentences": [{"raw": "three"}]},
    ],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "b.png", "sub/c.png"):
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / name)
    return tmp_path


def write(folder: Path, name: str, content) -> Path:
    text = "\n".join(map(json.dumps, content)) if name.endswith(".jsonl") else json.dumps(content)
    (folder / name).write_text(text)
    return folder / name


def test_lines(folder: Path) -> None:
    lines = [
        {"path": "b.png", "captions": ["one", " two "]},
        {"path": "a.png", "captions": ["three", ""]},
        {"path": "b.png", "captions": ["four"]},
    ]
    found = load_captions(write(folder, "c.jsonl", lines))
    assert found.captions == ("one", "two", "four", "three")
    assert found.image_of.tolist() == [0, 0, 0, 1]
    assert [s.location for s in found.images] == [str(folder / "b.png"), str(folder / "a.png")]
    assert found.images.name == str(folder / "c.jsonl")


def test_coco(folder: Path) -> None:
    (folder / "annotations").mkdir()
    found = load_captions(write(folder / "annotations", "captions.json", COCO), folder)
    assert found.captions == ("first of b", "first of a", "second of a")
    assert found.image_of.tolist() == [0, 1, 1]
    assert len(found.images) == 2


def test_karpathy(folder: Path) -> None:
    path = write(folder, "dataset.json", KARPATHY)
    found = load_captions(path)
    assert (found.captions, found.images.split) == (("one", "two", "three"), "test")
    assert found.images[1].location == str(folder / "sub" / "c.png")
    assert load_captions(path, split="train").captions == ("no",)


def test_parts(folder: Path) -> None:
    found = load_captions(write(folder, "dataset.json", KARPATHY))
    turned = found.select([1, 0])
    assert (turned.captions, turned.image_of.tolist()) == (("three", "one", "two"), [0, 1, 1])
    assert turned.images[0].id == found.images[1].id
    assert found.first(1).captions == ("one", "three")
    assert found.first(1).image_of.tolist() == [0, 1]
    assert len({found.fingerprint, turned.fingerprint, found.first(1).fingerprint}) == 3


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.jsonl", '{"path": "a.png"}', "c.jsonl cannot be used as a list of captions: there is no 'captions'. Known"),
        ("c.jsonl", '{"path": "a.png", "captions": "one"}', "the captions of 'a.png' are no list"),
        ("c.jsonl", "[", "cannot be used as a list of captions: "),
        ("c.json", "{}", "there is no 'images'"),
        ("c.json", "3", "cannot be used as a list of captions: "),
        ("c.json", json.dumps({"images": [], "annotations": []}), "c.json has no picture with captions.$"),
        ("c.json", json.dumps(KARPATHY | {"images": []}), "c.json has no picture with captions in its split 'test'"),
        (
            "c.jsonl",
            '{"path": "x.png", "captions": ["x"]}',
            "names 1 pictures with .* is there, such as .*x.png. Say wh",
        ),
    ],
)
def test_files_of_another_kind(folder: Path, name: str, text: str, message: str) -> None:
    (folder / name).write_text(text)
    with pytest.raises(DatasetError, match=message):
        load_captions(folder / name)


def test_a_split_where_there_is_none(folder: Path) -> None:
    with pytest.raises(DatasetError, match="it has no splits, and 'test' was asked for"):
        load_captions(write(folder, "c.json", COCO), split="test")


def test_no_file(folder: Path) -> None:
    with pytest.raises(DatasetError, match=r"The captions .*nothing.json cannot be read: "):
        load_captions(folder / "nothing.json")
