import os
import string
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amradio.errors import OptionError
from amradio.images import decode, expand
from amradio.images.files import FileRows, Found
from amradio.images.names import natural_key, portable
from amradio.images.sources import ImageFile

needs_links = pytest.mark.skipif(sys.platform == "win32", reason="links need privileges on Windows")


@pytest.fixture
def folder(tmp_path):
    """A folder of (empty) picture files, hidden ones, and other files."""
    names = [
        "img10.jpg",
        "img2.JPG",
        "notes.txt",
        ".hidden.png",
        "sub/a.png",
        "sub/deep/b.tiff",
        ".git/c.png",
        "Z.webp",
    ]
    for name in names:
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "photos"


def relative(sources, root):
    return [s.path.relative_to(root).as_posix() for s in sources]


def test_folder_is_searched_in_natural_order_without_hidden_and_other_files(folder):
    found = expand([folder])
    assert relative(found, folder) == ["img2.JPG", "img10.jpg", "Z.webp", "sub/a.png", "sub/deep/b.tiff"]
    assert [s.id for s in found] == ["img2.JPG", "img10.jpg", "Z.webp", "sub__a.png", "sub__deep__b.tiff"]


def test_named_files_are_always_taken_in_the_order_given(folder):
    found = expand([folder / "notes.txt", str(folder / ".hidden.png"), folder / "img10.jpg"])
    assert relative(found, folder) == ["notes.txt", ".hidden.png", "img10.jpg"]
    assert [s.id for s in found] == ["notes.txt", "_.hidden.png", "img10.jpg"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jpg", ["img10.jpg"]),
        ("img*", ["img2.JPG", "img10.jpg"]),
        ("img[0-9].*", ["img2.JPG"]),
        ("**/*.png", ["sub/a.png"]),
        ("s?b", ["sub/a.png", "sub/deep/b.tiff"]),
        ("sub/**", ["sub/a.png", "sub/deep/b.tiff"]),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="patterns ignore case on Windows")
def test_patterns(folder, pattern, expected):
    assert relative(expand([f"{folder}/{pattern}"]), folder) == expected


def test_relative_patterns_name_ids_from_their_fixed_part(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert [s.id for s in expand(["photos/sub/**/*.tiff"])] == ["deep__b.tiff"]
    assert [(s.location, s.id) for s in expand(["photos/img1?.jpg"])] == [
        (os.path.join("photos", "img10.jpg"), "img10.jpg")
    ]


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path):
    (tmp_path / "a[1].jpg").touch()
    (tmp_path / "a1.jpg").touch()
    assert relative(expand([tmp_path / "a[1].jpg"]), tmp_path) == ["a[1].jpg"]


def test_files_reached_twice_are_taken_once_at_the_first_place(folder, monkeypatch):
    monkeypatch.chdir(folder)
    found = expand(["img10.jpg", folder, "sub/../img2.JPG", folder / "sub"])
    assert [s.id for s in found] == ["img10.jpg", "img2.JPG", "Z.webp", "sub__a.png", "sub__deep__b.tiff"]


@needs_links
def test_links_in_circles_and_to_the_same_file(folder):
    (folder / "sub" / "up").symlink_to(folder, target_is_directory=True)
    (folder / "sub" / "deep" / "self").symlink_to(folder / "sub" / "deep", target_is_directory=True)
    (folder / "same.jpg").symlink_to(folder / "img10.jpg")
    (folder / "zz-broken.jpg").symlink_to(folder / "gone.jpg")
    found = expand([folder])
    assert relative(found, folder) == [
        "img2.JPG",
        "img10.jpg",
        "Z.webp",
        "zz-broken.jpg",  # so that it is reported, not lost
        "sub/a.png",
        "sub/deep/b.tiff",
    ]
    assert "a.png" in {s.path.name for s in expand([f"{folder}/**/*.png"])}


def test_missing_paths_are_all_named(folder):
    with pytest.raises(
        OptionError, match=r"No such file or folder, nor a pattern that matches any: gone\.jpg, x\*\.jpg\."
    ):
        expand(["gone.jpg", folder, "x*.jpg"])
    with pytest.raises(OptionError, match=r": a0, a1, a2, a3, a4 and 3 more\."):
        expand([f"a{i}" for i in range(8)])


def test_other_mistakes(tmp_path):
    with pytest.raises(
        OptionError, match=r"The folder .* has no pictures in it, nor in its sub-folders\. Looked for .*\.avif"
    ):
        expand([tmp_path])
    with pytest.raises(OptionError, match=r"No pictures were named"):
        expand([])
    with pytest.raises(OptionError, match=r"Expected a list of paths, got one path: \['x\.jpg'\]"):
        expand("x.jpg")


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="needs permissions that bind")
def test_a_folder_that_cannot_be_read(folder):
    (folder / "sub").chmod(0)
    try:
        with pytest.raises(OptionError, match=r"The folder .*sub cannot be read: Permission denied"):
            expand([folder])
    finally:
        (folder / "sub").chmod(0o755)


def test_equal_ids_all_get_a_digest_that_does_not_depend_on_the_order(tmp_path):
    for name in ("x/1.jpg", "y/1.jpg", "y/2.jpg", "y/a b.jpg", "y/a_b.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    ids = {s.path: s.id for s in expand([tmp_path / "x", tmp_path / "y"])}
    assert len(set(ids.values())) == 5
    assert ids[tmp_path / "x/1.jpg"].startswith("1.jpg-")
    assert ids[tmp_path / "y/1.jpg"].startswith("1.jpg-")
    assert ids[tmp_path / "y/2.jpg"] == "2.jpg"
    assert ids == {s.path: s.id for s in expand([tmp_path / "y", tmp_path / "x"])}


@given(st.lists(st.text(min_size=1, max_size=300).filter(lambda t: "\0" not in t), min_size=1, max_size=8, unique=True))
def test_ids_are_unique_portable_file_names(names):
    rows = FileRows(Found(f"/root{i}", name, f"/root{i}/{name}") for i, name in enumerate(names))
    ids = [rows.source(i).id for i in range(len(names))]
    assert len({i.casefold() for i in ids}) == len(names)
    for i in ids:
        assert 0 < len(i.encode()) <= 180
        assert not i.startswith((".", "-"))
        assert not set(i) & set('<>:"/\\|?*\0\n\t ')
        assert i.split(".")[0].casefold() not in {"con", "nul", "aux", "prn", "com1", "lpt9"}


@pytest.mark.parametrize(("name", "expected"), [("nul.jpg", "_nul.jpg"), ("COM1", "_COM1"), ("-rf.png", "_-rf.png")])
def test_awkward_names(name, expected):
    assert portable(name) == expected


def test_unicode_names_stay_readable():
    assert portable("Käse/猫.jpg") == "Käse__猫.jpg"


@given(st.lists(st.text(string.ascii_letters + string.digits, max_size=8)))
def test_natural_order_is_a_total_order(names):
    backwards = names[::-1]
    assert sorted(names, key=natural_key) == sorted(backwards, key=natural_key)


def test_natural_order():
    assert sorted(["a10", "a2", "B1", "a02", "1"], key=natural_key) == ["1", "a02", "a2", "a10", "B1"]


def test_a_source_decodes_itself(tmp_path):
    from PIL import Image

    Image.new("RGB", (3, 2), (1, 2, 3)).save(tmp_path / "a.png")
    source = expand([tmp_path / "a.png"])[0]
    assert source == ImageFile(tmp_path / "a.png", "a.png")
    assert source.decode(max_pixels=6, background=(0, 0, 0)).tobytes() == decode(tmp_path / "a.png").tobytes()
