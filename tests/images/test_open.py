import os
import sys
from pathlib import Path

import numpy as np
import pytest

from amradio.errors import DatasetError
from amradio.images import expand, open_images

PICTURES = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}


def image_folder(root):
    """The samples of torchvision's ImageFolder: sorted folders are classes, every picture below one is in it."""
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    return classes, {
        (os.path.join(at, name), label)
        for label, c in enumerate(classes)
        for at, _, names in os.walk(os.path.join(root, c), followlinks=True)
        for name in names
        if os.path.splitext(name)[1].lower() in PICTURES
    }


def samples(images):
    return {(s.location, int(label)) for s, label in zip(images, images.labels, strict=True)}


def test_folders_of_classes_are_labelled_as_torchvision_does(tree):
    folder = tree(["n10/x.png", "n2/a10.png", "n2/a2.png", "B/deep/er/1.PNG", "B/2.webp", "a/1.jpg"])
    (folder / "a" / "notes.txt").touch()
    images = open_images(folder)
    classes, expected = image_folder(folder)
    assert images.class_names == tuple(classes) == ("B", "a", "n10", "n2")
    assert samples(images) == expected
    assert images.labels.dtype == np.int64
    assert [s.id for s in images][-2:] == ["n2__a2.png", "n2__a10.png"]
    assert (images.name, images.split) == (str(folder), None)


def test_a_class_without_pictures_keeps_its_number(tree):
    folder = tree(["a/1.png", "c/1.png"])
    (folder / "b").mkdir()
    images = open_images(folder)
    assert images.class_names == ("a", "b", "c")
    assert images.labels.tolist() == [0, 2]


def test_sub_folders_are_no_classes_where_one_has_only_other_files(tree):
    folder = tree(["images/1.png", "masks/1.png"])
    (folder / "annotations").mkdir()
    assert open_images(folder).class_names == ("annotations", "images", "masks")
    (folder / "annotations" / "a.json").touch()
    assert open_images(folder).labels is None
    assert len(open_images(folder)) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="links need privileges on Windows")
def test_a_picture_linked_into_two_classes_counts_in_both(tree):
    folder = tree(["a/1.png", "b/1.png"])
    (folder / "b" / "2.png").symlink_to(folder / "a" / "1.png")
    images = open_images(folder)
    assert samples(images) == image_folder(folder)[1]
    assert len(images) == 3


@pytest.mark.parametrize("paths", [["1.png", "2.png"], ["top.png", "a/1.png", "b/1.png"], ["a/1.png", "a/2.png"]])
def test_other_folders_have_no_labels(tree, paths):
    folder = tree(paths)
    images = open_images(str(folder))
    assert images.labels is None
    assert images.class_names is None
    assert [s.id for s in images] == [s.id for s in expand([folder])]


def test_splits_are_folders(tree, colour):
    folder = tree(["train/a/1.png", "train/b/1.png", "val/a/1.png", "val/b/1.png", "val/b/2.png"])
    for name in ("val", "validation", "valid"):
        images = open_images(folder, name)
        assert [colour(s) for s in images] == [2, 3, 4]
        assert images.labels.tolist() == [0, 1, 1]
        assert images.class_names == ("a", "b")
        assert images.split == name
    with pytest.raises(DatasetError, match=r"photos has the splits train, val\. Say which one is meant\."):
        open_images(folder)
    with pytest.raises(DatasetError, match=r"photos has no split 'test'\. Its splits are train, val\."):
        open_images(folder, "test")
    with pytest.raises(DatasetError, match=r"has no split 'val'\. It has no splits: leave the split out\."):
        open_images(folder / "train", "val")


def test_an_exact_name_goes_before_another_spelling(tree, colour):
    folder = tree(["val/1.png", "validation/1.png"])
    assert colour(open_images(folder, "validation")[0]) == 1
    assert colour(open_images(folder, "val")[0]) == 0


def test_patterns_and_several_paths(tree):
    folder = tree(["a/1.png", "a/2.jpg", "b/3.png", "b/10.png"])
    images = open_images(f"{folder}/**/*.png")
    assert [s.id for s in images] == ["a__1.png", "b__3.png", "b__10.png"]
    assert images.labels is None
    both = open_images([folder / "b", folder / "a/1.png"])
    assert [s.id for s in both] == ["3.png", "10.png", "1.png"]
    assert [s.id for s in open_images(f"{folder}/{{b,a}}/*.png")] == ["3.png", "10.png", "1.png"]
    assert [s.id for s in open_images(folder / "b/10.png")] == ["10.png"]
    with pytest.raises(DatasetError, match=r"has no split 'train'"):
        open_images(f"{folder}/**/*.png", "train")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.txt", "# pictures\na/1.png\tcat\n\nb/2.png\tdog\nc/3.png\tcat\n"),
        ("list.txt", "a/1.png,cat\nb/2.png, dog\nc/3.png,cat\n"),
        ("list.csv", "path,label\na/1.png,cat\nb/2.png,dog\nc/3.png,cat\n"),
        ("list.csv", "\ufefflabel,file_name\ncat,a/1.png\ndog,b/2.png\ncat,c/3.png\n"),
        ("list.tsv", "path\tclass\na/1.png\tcat\nb/2.png\tdog\nc/3.png\tcat\n"),
        (
            "list.jsonl",
            '{"path": "a/1.png", "label": "cat"}\n\n{"path": "b/2.png", "label": "dog"}\n'
            '{"image": "c/3.png", "cls": "cat"}\n',
        ),
    ],
)
def test_lists(tree, monkeypatch, colour, name, text):
    folder = tree(["a/1.png", "b/2.png", "c/3.png"])
    (folder / name).write_text(text, encoding="utf-8")
    images = open_images(folder / name)
    assert [colour(s) for s in images] == [0, 1, 2]
    assert images.labels.tolist() == [0, 1, 0]
    assert images.class_names == ("cat", "dog")
    assert [s.id for s in images] == ["a__1.png", "b__2.png", "c__3.png"]
    monkeypatch.chdir(folder)
    assert [s.location for s in open_images(name)] == [os.path.join("a", "1.png"), "b/2.png", "c/3.png"]


def test_lists_with_numbers_class_files_missing_labels_and_absolute_paths(tree, tmp_path):
    folder = tree(["1.png", "2.png"])
    (folder / "list.txt").write_text(f"{folder / '1.png'}\t7\n2.png\ngone, with comma.png\n")
    images = open_images(folder / "list.txt")
    assert images.labels.tolist() == [7, -1, -1]
    assert images.class_names is None
    assert images[0].location == str(folder / "1.png")
    assert images[2].location == str(folder / "gone, with comma.png")  # listed, so that it is reported
    (folder / "classes.txt").write_text("".join(f"class {i}\n" for i in range(9)))
    assert open_images(folder / "list.txt").class_names[7] == "class 7"
    (folder / "classes.txt").write_text("only\n")
    with pytest.raises(DatasetError, match=r"has the label 7, and .*classes\.txt names only 1 classes"):
        open_images(folder / "list.txt")
    (folder / "plain.txt").write_text("1.png\n2.png\n")
    assert open_images(folder / "plain.txt").labels is None


def test_lists_with_splits_and_named_columns(tree):
    folder = tree(["1.png", "2.png", "3.png"])
    (folder / "list.csv").write_text("pic,kind,split\n1.png,5,train\n2.png,6,val\n3.png,7,train\n")
    how = {"image_column": "pic", "label_column": "kind"}
    assert open_images(folder / "list.csv", "train", **how).labels.tolist() == [5, 7]
    assert open_images(folder / "list.csv", "validation", **how).labels.tolist() == [6]
    with pytest.raises(DatasetError, match=r"list\.csv has the splits train, val\. Say which one"):
        open_images(folder / "list.csv", **how)
    with pytest.raises(DatasetError, match=r"has no split 'test'\. Its splits are train, val\."):
        open_images(folder / "list.csv", "test", **how)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("l.txt", "", r"l\.txt names no pictures"),
        ("l.txt", "1.png\t3\n2.png\tcat\n", r"labels that are numbers \(3\) and labels that are names \('cat'\)"),
        ("l.txt", "1.png\t-7\n", r"has the label -7\. Labels are numbers from 0"),
        (
            "l.csv",
            "name,label\n1.png,2\n",
            r"l\.csv has no path\. Its columns are name, label; expected path,",
        ),
        ("l.jsonl", '{"path": "1.png"}\n{broken\n', r"Line 2 of .*l\.jsonl is not JSON"),
        ("l.jsonl", "[1]\n", r"Line 1 of .*l\.jsonl is not a JSON object"),
        (
            "l.jsonl",
            '{"path": "1.png", "label": 1.5}\n',
            r"label 1\.5, which is neither a whole number nor a name",
        ),
    ],
)
def test_lists_with_mistakes(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(DatasetError, match=message):
        open_images(tmp_path / name)


def test_a_column_that_is_not_there(tmp_path):
    (tmp_path / "l.csv").write_text("path,label\n1.png,2\n")
    with pytest.raises(DatasetError, match=r"has no column 'kind'\. Its columns are path, label\."):
        open_images(tmp_path / "l.csv", label_column="kind")


def test_a_list_that_is_not_text(tmp_path):
    (tmp_path / "l.txt").write_bytes(b"\xff\xfe\x00pictures")
    with pytest.raises(DatasetError, match=r"The list .*l\.txt cannot be read: 'utf-8' codec"):
        open_images(tmp_path / "l.txt")


def test_what_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DatasetError, match=r"There is no file or folder photos/missing/x\.png\."):
        open_images("photos/missing/x.png")
    with pytest.raises(DatasetError, match=r"There is no file or folder list\.csv\."):
        open_images("list.csv")
    with pytest.raises(DatasetError, match=r"nor a pattern that matches any: no\*\.png"):
        open_images("no*.png")
    with pytest.raises(DatasetError, match=r"There is no file s-0\.tar\."):
        open_images("s-{0..1}.tar")
    with pytest.raises(DatasetError, match=r"No pictures were named\. Give a folder"):
        open_images([])
    with pytest.raises(DatasetError, match=r"No pictures were named"):
        open_images("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match=r"The folder empty has no pictures in it, nor in its sub-folders"):
        open_images("empty")


def test_home_folders(tree, monkeypatch):
    folder = tree(["1.png"])
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.setenv("USERPROFILE", str(folder.parent))
    assert Path(open_images("~/photos")[0].location) == folder / "1.png"


@pytest.mark.parametrize("beside", ["cat.jpg", "class0/cat.jpg"])
def test_an_archive_beside_pictures_hides_none(tmp_path, beside):
    (tmp_path / beside).parent.mkdir(exist_ok=True)
    (tmp_path / beside).write_bytes(b"")
    (tmp_path / "backup.tar").write_bytes(b"\0" * 10240)
    with pytest.raises(DatasetError, match=r"has 1 archives or tables \(backup.tar\) and beside them 1 pictures"):
        open_images(tmp_path)
