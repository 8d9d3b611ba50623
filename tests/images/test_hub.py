"""Datasets on the Hub, with the Hub's client replaced by a folder."""

import sys
import types
from pathlib import Path
from unittest.mock import MagicMock

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import errors

from amradio.errors import DatasetError, DownloadError, GatedRepoError, MissingDependencyError, OfflineError
from amradio.images import hub, open_images

try:
    import datasets
except ImportError:
    datasets = None


class FakeHub:
    """What the two functions of huggingface_hub that are used would answer."""

    def __init__(self, root):
        self.root, self.files, self.fetched, self.calls = root, {}, [], []
        self.failure = None

    def add(self, repo, path, cells=(), revision=None, labels=None):
        self.files.setdefault((repo, revision), {})[path] = (cells, labels)

    def _files(self, repo, revision):
        self.calls.append((repo, revision))
        if self.failure:
            raise self.failure
        response = MagicMock()
        if not any(r == repo for r, _ in self.files):
            raise errors.RepositoryNotFoundError("no repository", response=response)
        if (repo, revision) not in self.files:
            raise errors.RevisionNotFoundError("no revision", response=response)
        return self.files[repo, revision]

    def dataset_info(self, repo, *, revision=None, timeout):
        return types.SimpleNamespace(siblings=[types.SimpleNamespace(rfilename=f) for f in self._files(repo, revision)])

    def snapshot_download(self, repo, *, allow_patterns, revision=None, repo_type, local_files_only, token, cache_dir):
        folder = self.root / repo.replace("/", "--") / str(revision).replace("/", "-")
        if local_files_only:
            if not folder.is_dir():
                raise errors.LocalEntryNotFoundError("not cached")
            return str(folder)
        for path, (cells, labels) in self._files(repo, revision).items():
            if path in allow_patterns:
                self.fetched.append(path)
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                table = {"image": list(cells)} | ({} if labels is None else {"label": labels})
                pq.write_table(pa.table(table), folder / path)
        return str(folder)


@pytest.fixture
def fake(monkeypatch, tmp_path):
    fake = FakeHub(tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda token=None: fake)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setitem(sys.modules, "datasets", None)  # tests that use it say so
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return fake


def test_only_the_files_of_the_split_are_fetched(fake, encoded, colour):
    for i in range(2):
        fake.add("me/pets", f"data/train-0000{i}-of-00002.parquet", [encoded(i)], labels=[i])
    fake.add("me/pets", "data/test-00000-of-00001-abc123.parquet", [encoded(5), encoded(6)], labels=[1, 0])
    fake.add("me/pets", "README.md")
    images = open_images("me/pets", "test")
    assert ([colour(s) for s in images], images.labels.tolist()) == ([5, 6], [1, 0])
    assert (images.name, images.split) == ("me/pets", "test")
    assert fake.fetched == ["data/test-00000-of-00001-abc123.parquet"]
    assert [colour(s) for s in open_images("me/pets", "train")] == [0, 1]
    with pytest.raises(
        DatasetError, match=r"The dataset me/pets has the splits test, train\. Say which one is meant\."
    ):
        open_images("me/pets")
    with pytest.raises(DatasetError, match=r"The dataset me/pets has no split 'val'\. Its splits are test, train\."):
        open_images("me/pets", "val")


def test_the_conversion_of_the_hub_is_used_where_the_repository_has_no_tables(fake, encoded, colour):
    fake.add("me/pets", "pets.py")
    fake.add("me/pets", "default/train/0000.parquet", [encoded(1)], "refs/convert/parquet")
    fake.add("me/pets", "default/extra/0000.parquet", [encoded(2)], "refs/convert/parquet")
    fake.add("me/pets", "default/partial-big/0000.parquet", [encoded(3)], "refs/convert/parquet")
    assert [colour(s) for s in open_images("me/pets", "train")] == [1]
    assert [colour(s) for s in open_images("me/pets", "extra")] == [2]
    assert fake.calls[:2] == [("me/pets", None), ("me/pets", "refs/convert/parquet")]
    with pytest.raises(DatasetError, match=r"me/pets to Parquet holds only the beginning of the split 'big'"):
        open_images("me/pets", "big")


def test_configurations(fake, encoded, colour):
    for n, config in enumerate(("cifar10", "cifar100")):
        fake.add("me/cifar", f"{config}/train-00000-of-00001.parquet", [encoded(n)])
    assert [colour(s) for s in open_images("me/cifar:cifar100")] == [1]
    with pytest.raises(
        DatasetError, match=r"has several configurations\. Name one: me/cifar:cifar10, me/cifar:cifar100\."
    ):
        open_images("me/cifar", "train")
    with pytest.raises(DatasetError, match=r"has no configuration 'svhn'\. Name one: me/cifar:cifar10"):
        open_images("me/cifar:svhn")


@pytest.mark.parametrize(
    ("name", "repo", "revision", "split", "count"),
    [
        ("imagenet-1k", "ILSVRC/imagenet-1k", None, "validation", 50_000),
        ("food101", "ethz/food101", None, "validation", 25_250),
        ("imagenet_sketch", "songweig/imagenet_sketch", "refs/convert/parquet", "train", 50_889),
    ],
)
def test_short_names_and_incomplete_copies(fake, encoded, name, repo, revision, split, count):
    path = f"default/{split}/0000.parquet" if revision else f"data/{split}-00000-of-00001.parquet"
    fake.add(repo, path, [encoded(0)], revision)
    for spec in (name, repo):
        with pytest.raises(
            DatasetError,
            match=rf"{repo} is not whole: its split '{split}' has 1 pictures, and the dataset has {count:,}",
        ):
            open_images(spec, split)
    fake.files[repo, revision][path] = ([encoded(0)] * count, None)
    assert len(open_images(name, split)) == count


def test_a_revision_that_is_asked_for(fake, encoded, colour):
    fake.add("me/pets", "data/train.parquet", [encoded(1)])
    fake.add("me/pets", "data/train.parquet", [encoded(2)], "v2")
    assert [colour(s) for s in open_images("me/pets", revision="v2")] == [2]
    with pytest.raises(
        DatasetError, match=r"The dataset me/pets has no revision 'v3'\. See https://huggingface\.co/data"
    ):
        open_images("me/pets", revision="v3")


def test_what_has_been_fetched_is_there_without_the_network(fake, encoded, colour, monkeypatch):
    fake.add("me/pets", "default/train/0000.parquet", [encoded(1)], "refs/convert/parquet")
    fake.add("me/pets", "pets.py")
    open_images("me/pets")
    calls = len(fake.calls)
    assert [colour(s) for s in open_images("me/pets", local_files_only=True)] == [1]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert [colour(s) for s in open_images("me/pets", "train")] == [1]
    assert len(fake.calls) == calls
    with pytest.raises(
        OfflineError, match=r"The dataset me/cats is not in .*, and HF_HUB_OFFLINE is set\. There is no file"
    ):
        open_images("me/cats")


def test_a_split_that_was_fetched_in_part(fake, encoded):
    for i in range(3):
        fake.add("me/pets", f"data/train-0000{i}-of-00003.parquet", [encoded(i)])
    images = open_images("me/pets")
    Path(images.rows._paths[1]).unlink()
    with pytest.raises(
        DatasetError, match=r"Only 2 of the 3 files of me/pets are there, such as data/train-00000-of-00003"
    ):
        open_images("me/pets", local_files_only=True)


def test_errors_of_the_hub(fake):
    response = MagicMock()
    with pytest.raises(
        DatasetError, match=r"no file or folder me/gone here, and no dataset of this name on the Hugging"
    ):
        open_images("me/gone", "train")
    fake.failure = errors.GatedRepoError("gated", response=response)
    with pytest.raises(
        GatedRepoError, match=r"The dataset ILSVRC/imagenet-1k is gated: accept its terms on https://hugging"
    ):
        open_images("imagenet-1k", "validation")
    fake.failure = errors.HfHubHTTPError("server is tired", response=response)
    with pytest.raises(
        DownloadError, match=r"dataset of this name cannot be fetched from the Hugging Face Hub: server is tired"
    ):
        open_images("me/pets")


def test_without_a_connection(fake):
    fake.failure = RuntimeError("the client's own error")
    fake.failure.__cause__ = ConnectionError("name or service not known")
    with pytest.raises(DownloadError, match=r"There is no file or folder me/pets here, and .*: the client's own error"):
        open_images("me/pets")
    fake.failure = RuntimeError("a mistake of ours")
    with pytest.raises(RuntimeError, match=r"^a mistake of ours$"):
        open_images("me/pets")


def test_other_datasets_are_loaded_by_the_library(fake, monkeypatch, encoded, colour):
    fake.add("me/pets", "pets.zip")
    with pytest.raises(
        MissingDependencyError, match=r"Reading me/pets needs the library datasets: pip install 'amradio\["
    ):
        open_images("me/pets", "train")
    if datasets is None:
        pytest.skip("needs the library datasets")
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"image": [{"bytes": encoded(4), "path": None}], "label": [1]}
    calls = []

    def builder(repo, config, **how):
        calls.append((repo, config, how["revision"], how["token"]))
        splits = dict.fromkeys(("train", "test"))
        return types.SimpleNamespace(info=types.SimpleNamespace(splits=splits), config=None)

    def load(repo, config, split, **how):
        calls.append((repo, config, split))
        return datasets.Dataset.from_dict(rows, features=features)

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    monkeypatch.setattr(datasets, "load_dataset", load)
    images = open_images("me/pets:small", "test", token="t0ken")
    assert calls == [("me/pets", "small", None, "t0ken"), ("me/pets", "small", "test")]
    assert (colour(images[0]), images.labels.tolist(), images.class_names) == (4, [1], ("cat", "dog"))
    with pytest.raises(
        DatasetError, match=r"The dataset me/pets has the splits test, train\. Say which one is meant\."
    ):
        open_images("me/pets")

    def refuse(repo, config, **how):
        raise RuntimeError("Dataset scripts are no longer supported, but found pets.py")

    monkeypatch.setattr(datasets, "load_dataset_builder", refuse)
    with pytest.raises(
        DatasetError, match=r"cannot load it either \(RuntimeError: Dataset scripts are no longer support"
    ):
        open_images("me/pets", "test")
    with pytest.raises(OfflineError, match=r"me/pets is not in"):
        open_images("me/pets", "test", local_files_only=True)


def test_the_known_names_are_those_of_published_commands():
    assert set(hub.KNOWN_DATASETS) == {"imagenet-1k", "imagenet_sketch", "food101"}
