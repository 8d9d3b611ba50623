import io
import sys

import numpy as np
import pytest
from PIL import Image

from amradio.errors import DatasetError, ImageError, MissingDependencyError
from amradio.images import open_images

datasets = pytest.importorskip("datasets")


def table(labels, *, start=0, names=("cat", "dog"), column="image", label="label", kind=None):
    features = datasets.Features({column: datasets.Image(), label: kind or datasets.ClassLabel(names=list(names))})
    pictures = [Image.new("RGB", (5, 4), (start + i, 0, 7)) for i in range(len(labels))]
    return datasets.Dataset.from_dict({column: pictures, label: list(labels)}, features=features)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    datasets.disable_progress_bars()


def test_a_saved_dataset_is_what_the_library_reads(tmp_path, colour):
    saved = table([1, 0, 1])
    saved.save_to_disk(tmp_path / "d")
    images = open_images(tmp_path / "d")
    assert images.labels.tolist() == saved["label"][:]
    assert images.class_names == ("cat", "dog")
    assert [colour(s) for s in images] == [0, 1, 2]
    assert [s.id for s in images] == ["00000000", "00000001", "00000002"]
    assert images[1].location == f"{tmp_path / 'd'}, row 1"
    for source, row in zip(images, saved, strict=True):
        decoded = source.decode(max_pixels=100, background=(0, 0, 0))
        np.testing.assert_array_equal(np.asarray(decoded), np.asarray(row["image"]))
    with pytest.raises(DatasetError, match=r"has no split 'train'\. It has no splits: leave the split out\."):
        open_images(tmp_path / "d", "train")


def test_saved_splits(tmp_path, colour):
    both = datasets.DatasetDict({"train": table([0, 1, 1]), "validation": table([1], start=9)})
    both.save_to_disk(tmp_path / "d")
    images = open_images(tmp_path / "d", "val")
    assert ([colour(s) for s in images], images.labels.tolist(), images.split) == ([9], [1], "validation")
    assert images[0].id == "validation-00000000"
    with pytest.raises(DatasetError, match=r"d has the splits train, validation\. Say which one is meant\."):
        open_images(tmp_path / "d")
    with pytest.raises(DatasetError, match=r"has no split 'test'\. Its splits are train, validation\."):
        open_images(tmp_path / "d", "test")


def test_selected_rows_are_kept_in_their_order(tmp_path, colour):
    table([0, 1, 0, 1]).select([3, 0]).save_to_disk(tmp_path / "d")
    images = open_images(tmp_path / "d")
    assert ([colour(s) for s in images], images.labels.tolist()) == ([3, 0], [1, 0])


def test_columns_are_found_by_type_then_by_name(tmp_path, colour):
    table([1, 0], column="photo", label="kind").save_to_disk(tmp_path / "by_type")
    images = open_images(tmp_path / "by_type")
    assert (images.labels.tolist(), images.class_names) == ([1, 0], ("cat", "dog"))
    two = table([1, 0], label="coarse").add_column("label", [5, 6])
    two.save_to_disk(tmp_path / "two")
    assert open_images(tmp_path / "two").class_names == ("cat", "dog")  # a type says more than a name
    assert open_images(tmp_path / "two", label_column="label").labels.tolist() == [5, 6]
    table(["dog", "ant"], kind=datasets.Value("string")).save_to_disk(tmp_path / "names")
    assert open_images(tmp_path / "names").class_names == ("ant", "dog")
    fine = table([0, 1], names="ab", label="coarse_label").add_column("fine_label", [1, 0])
    fine = fine.cast_column("fine_label", datasets.ClassLabel(names=["x", "y"]))
    fine.save_to_disk(tmp_path / "fine")
    assert open_images(tmp_path / "fine").class_names == ("x", "y")
    with pytest.raises(DatasetError, match=r"has no label column 'kinds'\. Its columns are coarse, label\."):
        open_images(tmp_path / "two", label_column="kinds")
    with pytest.raises(DatasetError, match=r"has no image column 'pic'\. Its columns are image, coarse, label\."):
        open_images(tmp_path / "two", image_column="pic")


def test_what_cannot_be_used(tmp_path):
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "text")
    with pytest.raises(DatasetError, match=r"no column that is known to hold pictures\. Its columns: text"):
        open_images(tmp_path / "text")
    table([]).save_to_disk(tmp_path / "empty")
    with pytest.raises(DatasetError, match=r"has no rows|empty cannot be read"):
        open_images(tmp_path / "empty")
    table([0]).save_to_disk(tmp_path / "broken")
    (tmp_path / "broken" / "state.json").write_text("{}")
    with pytest.raises(DatasetError, match=r"The dataset in .*broken cannot be read: "):
        open_images(tmp_path / "broken")
    features = datasets.Features({"image": datasets.Image()})
    rows = [{"bytes": b"text", "path": None}]
    datasets.Dataset.from_dict({"image": rows}, features=features).save_to_disk(tmp_path / "bad")
    images = open_images(tmp_path / "bad")
    with pytest.raises(ImageError, match=r"Cannot decode .*bad, row 0: it is text"):
        images[0].decode(max_pixels=9, background=(0, 0, 0))


def test_without_the_library(tmp_path, monkeypatch):
    table([0]).save_to_disk(tmp_path / "d")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match=r"needs the library datasets: pip install 'amradio\[datasets\]'"):
        open_images(tmp_path / "d")


def test_fingerprints_are_of_the_content(tmp_path):
    table([0, 1]).save_to_disk(tmp_path / "a")
    table([0, 1], start=5).save_to_disk(tmp_path / "b")
    first = open_images(tmp_path / "a")
    assert open_images(tmp_path / "a").fingerprint == first.fingerprint
    assert open_images(tmp_path / "b").fingerprint != first.fingerprint
    assert first.select([1, 0]).fingerprint != first.fingerprint


def test_pictures_are_decoded_safely_and_not_by_the_library(tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (40, 40)).save(file, "PNG")
    features = datasets.Features({"image": datasets.Image()})
    rows = [{"bytes": file.getvalue(), "path": None}]
    datasets.Dataset.from_dict({"image": rows}, features=features).save_to_disk(tmp_path / "d")
    with pytest.raises(ImageError, match=r"40 x 40 = 1,600 pixels, more than the budget of 100"):
        open_images(tmp_path / "d")[0].decode(max_pixels=100, background=(0, 0, 0))
