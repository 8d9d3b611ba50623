import json

import pytest

from amradio.errors import DatasetError
from amradio.images.labels import Labels, find_class_file, read_class_file


@pytest.mark.parametrize(
    ("name", "content", "names", "synonym"),
    [
        ("classes.txt", "tench\ngreat white\n", ("tench", "great white"), ("great white", 1)),
        ("c.json", ["tench", "goldfish"], ("tench", "goldfish"), ("tench", 0)),
        ("c.json", {"1": "goldfish", "0": "tench"}, ("tench", "goldfish"), ("goldfish", 1)),
        ("c.json", {"0": ["n01", "tench"], "1": ["n02", "goldfish"]}, ("tench", "goldfish"), ("n02", 1)),
        ("c.json", [{"wnid": "n01", "names": "tench, Tinca"}], ("tench, Tinca",), ("n01", 0)),
    ],
)
def test_class_files(tmp_path, name, content, names, synonym):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    classes = read_class_file(path)
    assert classes.names == names
    assert classes.synonyms[synonym[0]] == synonym[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"The class file .*c\.json cannot be read"),
        ("3", r"holds no list of names"),
        ("[]", r"holds no list of names"),
        ('["a", 3]', r"Entry 1 of the class file .* is no name: 3"),
        ('{"0": "a", "2": "b"}', r"are not the numbers from 0 without gaps"),
        ('{"a": "b"}', r"are not the numbers from 0 without gaps"),
    ],
)
def test_class_files_with_mistakes(tmp_path, content, message):
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(DatasetError, match=message):
        read_class_file(tmp_path / "c.json")


def test_where_class_files_are_looked_for(tmp_path):
    """From the nearest place to the farthest; each file is found once the nearer ones are gone."""
    folder = tmp_path / "pets-train"
    folder.mkdir()
    nearest_first = [
        folder / "classes.txt",
        folder / "pets-train-classes.json",
        tmp_path / "pets-train-classes.json",
        tmp_path / "pets-classes.txt",
        tmp_path / "classes.json",
    ]
    others = [tmp_path / "pet-classes.txt", tmp_path / "pets-val-classes.txt"]
    for path in [*nearest_first, *others]:
        path.write_text('["a"]' if path.suffix == ".json" else "a\n")
    for path in nearest_first:
        assert find_class_file(str(folder), "pets-train-0000").path == str(path)
        path.unlink()
    assert find_class_file(str(folder), "pets-train-0000") is None


def test_names_are_numbered_in_sorted_order_or_as_the_class_file_says(tmp_path):
    labels = Labels("here")
    for label in ["dog", None, "cat", " dog "]:
        labels.append(label)
    numbers, names = labels.finish()
    assert (numbers.tolist(), names) == ([1, -1, 0, 1], ("cat", "dog"))

    (tmp_path / "classes.txt").write_text("zebra\ndog\ncat\n")
    classes = read_class_file(tmp_path / "classes.txt")
    labels = Labels("here", classes)
    labels.append("cat")
    assert labels.finish()[0].tolist() == [2]
    labels.append("cow")
    with pytest.raises(DatasetError, match=r"here has 1 class names that are not in .*classes\.txt, such as 'cow'"):
        labels.finish()


def test_no_label_at_all():
    labels = Labels("here")
    assert labels.finish() == (None, None)
    labels.append(None)
    labels.append("-1")
    assert labels.finish() == (None, None)
