import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from amradio.errors import DatasetError, OptionError
from amradio.images import ImageSet, open_images
from amradio.images.sources import ImageFile


class Numbers:
    """Rows whose sources are files that do not exist."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def source(self, row):
        return ImageFile(f"{row}.png", f"{row}.png")

    def stamps(self, rows):
        yield rows.astype("<i8").tobytes()


def numbered(count, **how):
    return ImageSet(Numbers(count), name="numbers", **how)


def ids(images):
    return [int(s.id.removesuffix(".png")) for s in images]


@given(st.data())
def test_selections_compose_like_arrays(data):
    count = data.draw(st.integers(1, 30))
    labels = np.arange(count) % 5 - 1
    images, reference = numbered(count, labels=labels), np.arange(count)
    for _ in range(data.draw(st.integers(0, 4))):
        if not len(images):
            break
        chosen = data.draw(st.lists(st.integers(-len(images), len(images) - 1), max_size=20))
        images, reference = images.select(chosen), reference[np.array(chosen, dtype=np.int64)]
    assert ids(images) == reference.tolist()
    np.testing.assert_array_equal(images.labels, labels[reference])
    assert [images[i].id for i in range(-len(images), 0)] == [images[i].id for i in range(len(images))]


@given(st.integers(0, 200), st.integers(0, 2**63))
def test_shuffles_are_permutations_that_depend_on_the_seed_only(count, seed):
    images = numbered(count)
    assert sorted(ids(images.shuffled(seed))) == list(range(count))
    assert ids(images.shuffled(seed)) == ids(numbered(count).shuffled(seed))


def test_the_shuffle_of_a_seed_stays_what_it_is():
    assert ids(numbered(8).shuffled(3)) == [0, 4, 7, 1, 5, 6, 3, 2]
    assert ids(numbered(8).shuffled(4)) != ids(numbered(8).shuffled(3))


def test_head():
    assert ids(numbered(5).head(2)) == [0, 1]
    assert ids(numbered(5).head(9)) == [0, 1, 2, 3, 4]
    assert ids(numbered(5).head(0)) == []


@given(st.lists(st.integers(-1, 3), min_size=1, max_size=60), st.integers(0, 3), st.integers(0, 99))
def test_few_shot_draws_as_many_of_each_class(labels, count, seed):
    images = numbered(len(labels), labels=np.array(labels))
    sizes = {c: labels.count(c) for c in set(labels) - {-1}}
    if any(n < count for n in sizes.values()):
        with pytest.raises(DatasetError, match=r"pictures of each class were asked for, and \d+ of \d+ classes"):
            images.per_class(count, seed)
        return
    drawn = images.per_class(count, seed)
    assert sorted(drawn.labels.tolist()) == sorted([c for c in sizes for _ in range(count)])
    assert ids(drawn) == sorted(ids(drawn))
    assert ids(drawn) == ids(images.per_class(count, seed))


def test_few_shot_draws_differ_between_seeds_and_are_fair():
    images = numbered(40, labels=np.repeat([0, 1], 20))
    drawn = np.array([ids(images.per_class(5, seed)) for seed in range(400)])  # [400, 10]
    frequency = np.bincount(drawn.ravel(), minlength=40) / 400
    assert abs(frequency - 0.25).max() < 0.09  # four standard deviations


def test_mistakes():
    images = numbered(3, labels=np.array([0, 1, 1]), class_names=["cat", "dog"])
    with pytest.raises(OptionError, match=r"Index 3 is outside the 3 pictures of numbers\."):
        images.select([0, 3])
    with pytest.raises(OptionError, match=r"by whole numbers, got float64"):
        images.select([0.5])
    with pytest.raises(IndexError):
        images[3]
    with pytest.raises(DatasetError, match=r"2 pictures .* 1 of 2 classes of numbers have fewer: 'cat' has 1"):
        images.per_class(2, 0)
    with pytest.raises(DatasetError, match=r"numbers has no labels"):
        numbered(3).per_class(1, 0)
    with pytest.raises(DatasetError, match=r"3 pictures and labels of shape \(2,\)"):
        numbered(3, labels=np.zeros(2))
    with pytest.raises(DatasetError, match=r"has the label -2"):
        numbered(1, labels=np.array([-2]))
    with pytest.raises(DatasetError, match=r"the label 2, and only 2 class names, for labels from 0 to 1"):
        numbered(1, labels=np.array([2]), class_names=["a", "b"])
    with pytest.raises(ValueError, match="read-only"):
        images.labels[0] = 3


def test_what_it_says_of_itself():
    assert repr(numbered(1000)) == "<ImageSet 'numbers': 1,000 pictures, unlabelled>"
    assert (
        repr(numbered(2, split="val", labels=np.array([0, 1]), class_names=["a", "b"]))
        == "<ImageSet 'numbers', split 'val': 2 pictures, labelled, 2 classes>"
    )


def test_fingerprints_tell_what_changed(tree, encoded):
    folder = tree(["a/1.png", "a/2.png", "b/1.png"])
    images = open_images(folder)
    first = images.fingerprint
    assert open_images(folder).fingerprint == first
    assert images.select(range(3)).fingerprint == first
    assert images.select([1, 0, 2]).fingerprint != first
    assert images.head(2).fingerprint != first
    other = {first}

    def changed():
        other.add(open_images(folder).fingerprint)
        return len(other)

    os.utime(folder / "a/1.png", ns=(1, 1))
    assert changed() == 2
    status = os.stat(folder / "a/2.png")
    (folder / "a/2.png").write_bytes(encoded(9) + b"more")
    os.utime(folder / "a/2.png", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert changed() == 3
    (folder / "a/2.png").rename(folder / "a/3.png")
    assert changed() == 4
    (folder / "b").rename(folder / "c")
    assert changed() == 5
    (folder / "a/3.png").unlink()
    assert changed() == 6
    labelled = numbered(2, labels=np.array([0, 1]))
    assert labelled.fingerprint != numbered(2, labels=np.array([1, 0])).fingerprint
    assert labelled.fingerprint != numbered(2).fingerprint


def test_fingerprints_do_not_depend_on_the_process_or_the_place(tree, tmp_path):
    folder = tree(["a/1.png", "b/1.png", "b/2.png"])
    code = f"from amradio.images import open_images; print(open_images({str(folder)!r}).fingerprint)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = open_images(folder).fingerprint
    assert shown.stdout.strip() == here
    folder.rename(tmp_path / "elsewhere")
    assert open_images(tmp_path / "elsewhere").fingerprint == here


def test_sets_and_sources_can_be_pickled(tree):
    images = open_images(tree(["a/1.png", "b/1.png"])).shuffled(1)
    copy = pickle.loads(pickle.dumps(images))
    assert [s.location for s in copy] == [s.location for s in images]
    assert copy.fingerprint == images.fingerprint


def test_a_part_with_some_of_each_class():
    labels = np.array([0] * 50 + [1] * 3 + [2] * 20 + [-1] * 2)
    part = numbered(75, labels=labels).balanced_head(14, seed=0)
    counts = np.bincount(part.labels + 1).tolist()
    assert counts[0] == 2  # there are no more
    assert counts[2] == 3
    assert sorted([counts[1], counts[3]]) == [4, 5]
    assert sorted(set(ids(part))) == sorted(ids(part))
    assert ids(numbered(75, labels=labels).balanced_head(14, seed=0)) == ids(part)
    assert ids(numbered(75, labels=labels).balanced_head(14, seed=1)) != ids(part)
    assert ids(numbered(9).balanced_head(4, seed=2)) == ids(numbered(9).shuffled(2).head(4))
    assert len(numbered(9).balanced_head(400, seed=2)) == 9


def test_pictures_in_two_sets():
    images = numbered(10)
    assert images.select([1, 2, 2]).shared_with(images.select([2, 3])) == 2
    assert images.select([1]).shared_with(images.select([2, 3])) == 0
    assert images.shared_with(images) == 10


def test_other_labels():
    images = numbered(3, labels=[0, 1, 0], class_names=["a", "b"]).relabelled(np.array([2, 0, 2]), ["x", "y", "z"])
    assert (images.labels.tolist(), images.class_names) == ([2, 0, 2], ("x", "y", "z"))
    with pytest.raises(DatasetError, match="has the label 5"):
        images.relabelled(np.array([5, 0, 0]), ["x"])
