from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from amradio.app import collection as collections
from amradio.app import find
from amradio.app.collection import Collection, open_collection
from amradio.app.visit import House
from amradio.backbones.load import load
from amradio.errors import DatasetError, OptionError
from amradio.search.regions import best_positions

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def small() -> Any:
    return load("amradio-tiny", ["minilm"]).requires_grad_(False)


@pytest.fixture
def folder(tmp_path: Path, sample_files: list[Path]) -> Path:
    place = tmp_path / "pictures"
    place.mkdir()
    for path in sample_files:
        shutil.copy(path, place)
    return place


def test_embeddings_are_kept_and_renewed(folder: Path, tmp_path: Path, small: Any) -> None:
    calls: list[int] = []

    def start(count: int, place: str) -> Any:
        assert place.startswith(str(tmp_path / "cache"))
        return calls.append

    def opened() -> tuple[Collection, list[str]]:
        calls.clear()
        found, said = open_collection(str(folder), "amradio-tiny", small, CPU, tmp_path / "cache", on_start=start)
        return found, list(said)

    first, said = opened()
    assert (len(first), said, sum(calls)) == (4, [], 4)
    stamps = {p: p.stat().st_mtime_ns for p in first.embeddings.folder.glob("*.safetensors")}
    again, _ = opened()
    assert {p: p.stat().st_mtime_ns for p in again.embeddings.folder.glob("*.safetensors")} == stamps
    (folder / "broken.jpg").write_bytes(b"no picture")
    (folder / "cat.jpg").unlink()
    changed, said = opened()
    assert len(changed) == 3
    assert said == ["1 of 4 pictures could not be read and are left out."]
    assert changed.embeddings.folder == first.embeddings.folder
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_nothing_that_can_be_read(tmp_path: Path, small: Any) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(DatasetError):
        open_collection(str(tmp_path / "a"), "amradio-tiny", small, CPU, tmp_path / "cache")
    (tmp_path / "a" / "a.jpg").write_bytes(b"no picture")
    with pytest.raises(OptionError, match="None of the 1 pictures"):
        open_collection(str(tmp_path / "a"), "amradio-tiny", small, CPU, tmp_path / "cache")


def test_only_stale_embeddings_are_overwritten(folder: Path, tmp_path: Path, small: Any) -> None:
    cache = tmp_path / "cache"
    found, _ = open_collection(str(folder), "amradio-tiny", small, CPU, cache)
    place = found.embeddings.folder
    manifest = next(place.glob("*.json"))
    kept = manifest.read_text()
    manifest.write_text(re.sub(r'"format_version": \d+', '"format_version": 999', kept))
    renewed, _ = open_collection(str(folder), "amradio-tiny", small, CPU, cache)
    assert len(renewed) == 4
    manifest.write_text('{"somebody": "else"}')
    shards = {p: p.stat().st_mtime_ns for p in place.iterdir()}
    with pytest.raises(OptionError, match="not a manifest of embeddings"):
        open_collection(str(folder), "amradio-tiny", small, CPU, cache)
    assert {p: p.stat().st_mtime_ns for p in place.iterdir()} == shards


def test_a_large_collection_has_no_regions(
    folder: Path, tmp_path: Path, small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collections, "MAPS_LIMIT_BYTES", 1000)
    found, said = open_collection(str(folder), "amradio-tiny", small, CPU, tmp_path / "cache")
    assert list(said) == ["4 pictures are too many to remember their parts: regions cannot be looked for."]
    assert not found.has_regions
    with pytest.raises(OptionError, match="only whole pictures were remembered"):
        found.by_region(torch.ones(256), "backbone", 3, best_positions)


def test_what_is_found_is_the_nearest(collection: Collection) -> None:
    rows = F.normalize(collection.embeddings.summaries()[:].float(), dim=1)
    for row in range(len(collection)):
        hits = collection.by_summary(rows[row] * 5, "backbone", 10)
        assert [hit.row for hit in hits] == (rows @ rows[row]).argsort(descending=True).tolist()
        assert hits[0].row == row
        assert hits[0].score == pytest.approx(1, abs=1e-3)
    features = collection.embeddings.features(2).float()  # [D, h, w]
    hits = collection.by_region(features[:, 4, 7], "backbone", 2, best_positions)
    assert len(hits) == 2
    assert hits[0].row == 2
    _, h, w = features.shape
    assert hits[0].place == pytest.approx((7.5 / w, 4.5 / h))


def test_search_in_the_collection(visit, house: House, collection: Collection, sample_files: list[Path]) -> None:
    from PIL import Image

    def asked(**event: Any) -> Any:
        made = visit(**event)
        object.__setattr__(made, "house", House(house.model, house.sessions, house.limits, collection))
        return made

    find.ask_words(asked(), "cat")
    page = find.show_found(asked(), find.COLLECTION, 224)
    scores = [float(v) for v in re.findall(r'class="note">([^<]+)', page)]
    assert len(scores) == 4
    assert scores == sorted(scores, reverse=True)
    assert find.show_found(asked(), find.COLLECTION, 224) == page
    asked().session.add("query.jpg", Image.open(sample_files[1]).convert("RGB"))
    find.ask_part(asked(photo=1, left=0.0, top=0.0, right=0.0, bottom=0.0))
    page = find.show_found(asked(), find.COLLECTION, 224)
    assert page.split('class="title">')[1].startswith("coffee.jpg")
    find.ask_part(asked(photo=1, left=0.2, top=0.2, right=0.6, bottom=0.7))
    page = find.show_found(asked(), find.COLLECTION, 224)
    assert page.count('class="mark"') == 4
    assert str(sample_files[0].parent) not in page


def test_a_picture_that_is_gone_is_left_out(folder: Path, tmp_path: Path, small: Any, visit, house: House) -> None:
    found, _ = open_collection(str(folder), "amradio-tiny", small, CPU, tmp_path / "cache")
    (folder / "rocket.jpg").unlink()
    asked = visit()
    object.__setattr__(asked, "house", House(house.model, house.sessions, house.limits, found))
    find.ask_words(asked, "cat")
    page = find.show_found(asked, find.COLLECTION, 224)
    assert page.count('class="card"') == 3
