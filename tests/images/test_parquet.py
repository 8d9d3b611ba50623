import json
import os
import pickle
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from amradio.errors import DatasetError, ImageError
from amradio.images import open_images, parquet

OPTIONS = {"max_pixels": 1000, "background": (0, 0, 0)}


@pytest.fixture
def write(tmp_path, encoded):
    """Writes a table of pictures with the given labels; returns its path."""

    def write(name, labels=None, start=0, count=None, column="image", struct=True, features=None, **how):
        count = len(labels) if count is None else count
        cells = [encoded(start + i) for i in range(count)]
        if struct:
            cells = [{"bytes": c, "path": f"{i}.png"} for i, c in enumerate(cells)]
        table = pa.table({column: cells} | ({} if labels is None else {"label": labels}))
        if features:
            table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path, **{"row_group_size": 3, **how})
        return path

    return write


def test_rows_in_order_and_in_any_order(write, colour):
    write("t/0.parquet", [0, 1, 0, 1, 0, 1, 0])
    where = write("t/1.parquet", [2, 2, 2, 2], start=7).parent
    images = open_images(where)
    assert [colour(s) for s in images] == list(range(11))
    assert images.labels.tolist() == [0, 1, 0, 1, 0, 1, 0, 2, 2, 2, 2]
    assert [s.id for s in images][6:8] == ["0__00000006", "1__00000000"]
    assert images[8].location == f"{where / '1.parquet'}, row 1"
    assert [colour(s) for s in images.select([9, 0, 5])] == [9, 0, 5]
    assert [colour(s) for s in open_images(f"{where}/{{1,0}}.parquet")] == [7, 8, 9, 10, *range(7)]
    assert len(open_images(where / "1.parquet")) == 4


def test_plain_bytes_and_named_columns(write, colour):
    images = open_images(write("t.parquet", ["dog", "cat", None], column="blob", struct=False))
    assert [colour(s) for s in images] == [0, 1, 2]
    assert images.labels.tolist() == [1, 0, -1]
    assert images.class_names == ("cat", "dog")
    assert open_images(write("u.parquet", count=2)).labels is None


def test_labels_of_dictionaries_and_lists_as_columns(tmp_path, encoded):
    table = pa.table(
        {
            "image": [encoded(0), encoded(1)],
            "other": [encoded(2), encoded(3)],
            "label": pa.array(["b", "a"]).dictionary_encode(),
            "boxes": [[1.0], [2.0]],
        }
    )
    pq.write_table(table, tmp_path / "t.parquet")
    assert open_images(tmp_path / "t.parquet").labels.tolist() == [1, 0]
    chosen = open_images(tmp_path / "t.parquet", image_column="other", label_column="label")
    assert chosen.labels.tolist() == [1, 0]
    assert chosen.fingerprint != open_images(tmp_path / "t.parquet").fingerprint
    with pytest.raises(DatasetError, match=r"has no label column 'boxes'\. Its columns are label\."):
        open_images(tmp_path / "t.parquet", label_column="boxes")
    with pytest.raises(DatasetError, match=r"has no image column 'pic'\. Its columns are image, other\."):
        open_images(tmp_path / "t.parquet", image_column="pic")


def test_class_names_of_hugging_face(write):
    features = {
        "image": {"_type": "Image"},
        "label": {"_type": "ClassLabel", "names": ["tench", "goldfish"]},
    }
    images = open_images(write("t.parquet", [1, 0], features=features))
    assert images.class_names == ("tench", "goldfish")
    with pytest.raises(DatasetError, match=r"has the label 2, and only 2 class names"):
        open_images(write("t.parquet", [2], features=features))
    named = {"kind": {"_type": "ClassLabel", "names": ["x"]}}  # not a usual name, and the type says what it is
    path = write("u.parquet", None, count=1, features=named)
    table = pq.read_table(path)
    pq.write_table(table.append_column("kind", pa.array([0])), path)
    assert open_images(path).class_names == ("x",)


def test_class_names_from_a_file_beside_it(write):
    path = write("pets/train.parquet", [1, 0])
    (path.parent / "classes.txt").write_text("cat\ndog\n")
    assert open_images(path).class_names == ("cat", "dog")


def test_splits_by_file_names(write, colour):
    write("d/train-00000-of-00001.parquet", [0, 1])
    where = write("d/validation-00000-of-00001.parquet", [1], start=2).parent
    images = open_images(where, "val")
    assert ([colour(s) for s in images], images.split) == ([2], "val")
    with pytest.raises(DatasetError, match=r"has the splits train, validation\. Say which"):
        open_images(where)
    with pytest.raises(DatasetError, match=r"has no split 'test'\. Its splits are train, validation\."):
        open_images(where, "test")


def test_what_cannot_be_read(tmp_path, write):
    (tmp_path / "x.parquet").write_bytes(b"no table")
    with pytest.raises(DatasetError, match=r"The Parquet file .*x\.parquet cannot be read: "):
        open_images(tmp_path / "x.parquet")
    pq.write_table(pa.table({"a": [1], "b": ["x"]}), tmp_path / "y.parquet")
    with pytest.raises(
        DatasetError, match=r"known to hold pictures\. Its columns: a \(int64\), b \(string\)\. Name one"
    ):
        open_images(tmp_path / "y.parquet")
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "z.parquet")
    with pytest.raises(DatasetError, match=r"z\.parquet has no rows"):
        open_images(tmp_path / "z.parquet")
    write("m/0.parquet", [1])
    where = write("m/1.parquet", [1], column="picture").parent
    with pytest.raises(DatasetError, match=r"1\.parquet has no column 'image', which .*0\.parquet has its pictures in"):
        open_images(where)
    (tmp_path / "s.tar").touch()
    with pytest.raises(DatasetError, match=r"mixes tar shards, Parquet files and other files"):
        open_images([where / "0.parquet", tmp_path / "s.tar"])


def test_cells_without_a_picture(tmp_path, encoded, colour):
    (tmp_path / "beside.png").write_bytes(encoded(9))
    cells = [
        {"bytes": None, "path": "beside.png"},
        {"bytes": None, "path": "gone.png"},
        None,
        {"bytes": b"x", "path": None},
    ]
    pq.write_table(pa.table({"image": cells}), tmp_path / "t.parquet")
    images = open_images(tmp_path / "t.parquet")
    assert colour(images[0]) == 9
    for row, reason in (
        (1, r"it refers to the file .*gone\.png, which cannot be read"),
        (2, "there is no picture in it"),
    ):
        with pytest.raises(ImageError, match=rf"Cannot decode .*t\.parquet, row {row}: {reason}"):
            images[row].decode(**OPTIONS)
    with pytest.raises(ImageError, match=r"Cannot decode .*t\.parquet, row 3: it is text"):
        images[3].decode(**OPTIONS)
    os.truncate(tmp_path / "t.parquet", 50)
    with pytest.raises(ImageError, match=r"row 0: The Parquet file .*t\.parquet cannot be read"):
        pickle.loads(pickle.dumps(images))[0].decode(**OPTIONS)


def test_few_row_groups_are_kept_and_each_is_read_once(write, monkeypatch, colour):
    path = write("t.parquet", list(range(30)))
    images = open_images(path)
    group_bytes = images.rows._load(0).nbytes
    monkeypatch.setattr(parquet, "_CACHE_BYTES", 3 * group_bytes)
    loads = []
    load = images.rows._cache._load
    monkeypatch.setattr(images.rows._cache, "_load", lambda g: loads.append(g) or load(g))
    wrong = []

    def work(part):
        for i in range(part, 30, 4):
            if colour(images[i]) != i:
                wrong.append(i)

    for _ in range(2):
        threads = [threading.Thread(target=work, args=(p,)) for p in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert not wrong
    assert set(loads) == set(range(10))
    assert len(images.rows._cache._groups) <= 3
    loads.clear()
    for i in range(30):
        images[i].read()
    assert len(loads) <= 10


def test_fingerprints(write):
    path = write("t.parquet", [0, 1, 2])
    images = open_images(path)
    assert open_images(path).fingerprint == images.fingerprint
    assert images.head(2).fingerprint != images.fingerprint
    os.utime(path, ns=(1, 1))
    assert open_images(path).fingerprint != images.fingerprint
