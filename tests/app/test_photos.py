from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from amradio.app.gallery import Upload, add_samples, add_uploads, dismiss, forgotten, remove_all, remove_photo
from amradio.app.limits import Limits
from amradio.app.photos import clean_name, fitted, read_photo, sample_photos
from amradio.app.sessions import Query, Sessions
from amradio.errors import ImageError, OptionError

Picture = Callable[..., bytes]


def stored(folder: Path, name: str, content: bytes) -> Upload:
    """A file where Gradio puts it."""
    place = folder / f"hash-of-{name}"
    place.mkdir(parents=True)
    (place / name).write_bytes(content)
    return Upload(str(place / name), name)


def test_uploads_become_photos_and_leave_the_disk(visit, tmp_path: Path, picture: Picture, bomb: bytes) -> None:
    uploads = [
        stored(tmp_path, "one.png", picture((64, 48))),
        stored(tmp_path, "broken.jpg", b"\xff\xd8\xff\xe0 no photo"),
        stored(tmp_path, "bomb.png", bomb),
        stored(tmp_path, "text.png", b"hello"),
        stored(tmp_path, "large.bmp", b"BM" + bytes(2**20)),
        stored(tmp_path, "two.png", picture((2000, 10))),
    ]
    asked = visit()
    strip = add_uploads(asked, uploads)
    assert [p.name for p in asked.session.photos.values()] == ["one.png", "two.png"]
    assert asked.session.photos[2].picture.size == (1024, 5)
    assert strip.count('data-remove="') == 2
    assert "2 of 6" in strip
    assert list(tmp_path.iterdir()) == []
    assert [n.split(" ")[2].rstrip(":") for n in asked.session.notes] == [
        "broken.jpg",
        "bomb.png",
        "text.png",
        "large.bmp",
    ]
    assert "30000 x 30000" in asked.session.notes[1] or "900,000,000" in asked.session.notes[1]
    assert str(tmp_path) not in strip + "".join(asked.session.notes)
    assert asked.session.notes[3] == "Left out: large.bmp has 1 MB; files may have up to 1 MB."
    assert asked.progress[-1] == (1.0, "Reading the photos")


def test_more_photos_than_fit(visit, tmp_path: Path, picture: Picture) -> None:
    asked = visit()
    add_uploads(asked, [stored(tmp_path, f"{i}.png", picture(seed=i)) for i in range(20)])
    assert len(asked.session.photos) == 6
    assert asked.session.notes == ["14 photos were left out: a page holds 6. Remove some first."]
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OptionError, match="There are 6 photos already"):
        asked.session.add("x", Image.new("RGB", (4, 4)))


def test_many_broken_files_are_said_in_few_words(visit, tmp_path: Path) -> None:
    asked = visit()
    add_uploads(asked, [stored(tmp_path, f"{i}.png", b"broken") for i in range(6)])
    assert asked.session.notes[5:] == ["1 more files could not be used."]


def test_an_upload_that_is_gone(visit, tmp_path: Path) -> None:
    asked = visit()
    add_uploads(asked, [Upload(str(tmp_path / "gone" / "a.png"), "a.png")])
    assert asked.session.notes == ["Left out: a.png: the file is empty (0 bytes)."]
    dismissed = dismiss(visit())
    assert (dismissed, visit().session.notes) == ("", [])
    assert add_uploads(visit(), None) == ""


def test_the_same_photo_twice(visit, tmp_path: Path, picture: Picture) -> None:
    one = stored(tmp_path, "x.png", picture())
    asked = visit()
    assert asked.house.uploads.begin(1, tmp_path, 10**6)
    asked.house.uploads.end(0, [one.path, one.path])
    add_uploads(asked, [one, one])
    assert [p.name for p in asked.session.photos.values()] == ["x.png", "x.png"]
    assert asked.session.notes == []
    assert list(tmp_path.iterdir()) == []


def test_notes_stay_until_the_next_photos(visit, tmp_path: Path, picture: Picture) -> None:
    strip = add_uploads(visit(), [stored(tmp_path, "<b>.png", b"broken")])
    assert "Left out: &lt;b&gt;.png" in strip
    assert "data-dismiss" in strip
    assert "data-dismiss" not in add_uploads(visit(), [stored(tmp_path, "fine.png", picture())])
    assert forgotten(visit()).count("were forgotten") == 0  # the photos are here
    remove_all(visit())
    assert "its photos were forgotten. Add them again." in forgotten(visit())


def test_samples_are_taken_once(visit) -> None:
    first = add_samples(visit())
    count = len(visit().session.photos)
    assert 1 < count <= 6
    assert add_samples(visit()) == first
    assert len(visit().session.photos) == count


def test_without_scikit_image_samples_are_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    names = [name for name, _ in sample_photos()]
    assert names == ["disc-1.png", "square-2.png", "triangle-3.png", "cross-4.png", "disc-5.png", "square-6.png"]


def test_photos_are_removed(with_photos) -> None:
    session = with_photos().session
    session.strokes[2] = ()
    session.chosen["search"] = 2
    session.query, session.spot = Query(photo=2), (2, 0.5, 0.5)
    assert remove_photo(with_photos(photo=2)).count("<img") == 2
    assert (list(session.photos), session.strokes, session.chosen) == ([1, 3], {}, {})
    assert (session.query, session.spot) == (None, None)
    session.query, session.spot = Query(photo=1, box=(0, 0, 1, 1)), (1, 0.5, 0.5)
    session.remove(3)
    assert (session.query, session.spot) == (Query(photo=1, box=(0, 0, 1, 1)), (1, 0.5, 0.5))
    session.add("scene.png", Image.new("RGB", (8, 8)))
    for wrong in (2, "1", None, True, [1]):
        if wrong is True:
            continue
        with pytest.raises(OptionError, match="no longer there"):
            remove_photo(with_photos(photo=wrong))
    assert remove_all(with_photos()) == ""
    assert not session.photos


def test_keys_are_never_used_again(with_photos) -> None:
    session = with_photos().session
    session.clear()
    assert session.add("new.png", Image.new("RGB", (8, 8))).key == 4


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        ("/etc/passwd", "passwd"),
        ("C:\\photos\\cat.jpg", "cat.jpg"),
        ("a\u202eb\n.png", "ab.png"),
        ("", "photo"),
        ("../..", ".."),
        ("x" * 100 + ".jpeg", "x" * 54 + "…" + ".jpeg"),
    ],
)
def test_names_are_cleaned(name: str, clean: str) -> None:
    assert clean_name(name) == clean
    assert len(clean_name(name)) <= 60


def test_photos_are_fitted(picture: Picture) -> None:
    assert fitted(Image.new("RGB", (10, 4)), 20).size == (10, 4)
    assert fitted(Image.new("RGB", (1000, 1)), 100).size == (100, 1)
    with pytest.raises(ImageError, match=r"^a\.png: .*broken, cut short"):
        read_photo(picture()[:-30], "a.png", Limits())


def test_sessions_give_way() -> None:
    dropped: list[str] = []
    sessions = Sessions(Limits(sessions=2), dropped.append)
    first = sessions.get("a")
    first.add("x", Image.new("RGB", (4, 4)))
    sessions.get("b")
    assert sessions.get("a") is first
    sessions.get("c")
    assert dropped == ["b"]
    assert len(sessions) == 2
    sessions.drop("a")
    sessions.drop("a")
    assert dropped == ["b", "a"]
    assert not first.photos


def test_a_page_learns_that_its_session_is_gone() -> None:
    sessions = Sessions(Limits())
    first = sessions.get("a")
    stamp, epoch = first.stamp, first.epoch
    assert sessions.get("a", stamp) is first
    assert not first.was_lost
    first.wipe()
    assert first.epoch != epoch
    assert first.stamp != stamp
    assert first.is_of(stamp)
    sessions.drop("a")
    second = sessions.get("a", stamp)
    assert second.was_lost
    assert not second.is_of(stamp)
    assert second.epoch not in (epoch, first.epoch)
    assert not sessions.get("b", "").was_lost


def test_idle_sessions_are_forgotten() -> None:
    dropped: list[str] = []
    sessions = Sessions(Limits(idle_s=0.0), dropped.append)
    sessions.get("a").used -= 1
    sessions.get("b")
    assert dropped == ["a"]
