"""The stream of pictures is a function of seed and step, whoever reads it."""

import dataclasses
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from amradio.distill.stream import Loader, Pictures, Planner, Purpose, open_pictures, seed_for
from amradio.errors import DatasetError
from amradio.images import open_images


def test_seeds_are_the_same_everywhere_and_differ_by_use():
    assert seed_for(0, Purpose.SIZE, 1) == 4324601099084218337
    assert len({seed_for(0, p, s) for p in range(6) for s in range(50)}) == 300


def test_every_picture_once_an_epoch(config):
    planner = Planner(config(), 24, 8)
    seen = [s.view.indices[0] for step in range(6) for s in planner.plan(step, 0).samples]
    assert sorted(seen) == list(range(24))
    after = [s.view.indices[0] for step in range(6, 12) for s in planner.plan(step, 0).samples]
    assert sorted(after) == list(range(24))
    assert after != seen


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_share_what_one_would_do(config, world_size):
    c = config()
    for step in range(4):
        whole = Planner(c, 24, 8).plan(step, 0)
        parts = [Planner(c, 24, 8, rank, world_size).plan(step, 0) for rank in range(world_size)]
        assert sum((p.samples for p in parts), ()) == whole.samples
        assert {(p.size, p.window, p.shift, p.total) for p in parts} == {(whole.size, whole.window, whole.shift, 4)}
        assert [p.start for p in parts] == [i * 4 // world_size for i in range(world_size)]


def test_sizes_windows_and_shifts_are_drawn(config):
    c = config(partitions__0__windows=[0, 2], run__shift=1, partitions__0__sizes=[24, 32])
    plans = [Planner(c, 24, 8).plan(step, 0) for step in range(60)]
    assert {p.size for p in plans} == {24, 32}
    assert {p.window for p in plans if p.size == 32} == {None, 2}
    assert {p.window for p in plans if p.size == 24} == {None}  # which windows of 2 patches do not divide
    assert {p.shift for p in plans} == {(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)}


def test_fixed_views_come_back(config):
    c = config(data__fixed_views=2)
    planner = Planner(c, 24, 8)
    by_slot = {}
    for position in range(24 * 4):
        sample = planner.sample(0, position)
        assert by_slot.setdefault(sample.slot, sample.view) == sample.view
    assert sorted(by_slot) == list(range(48))


def test_batches_are_the_same_whenever_loading_starts(config):
    c = config()
    pictures = open_pictures(c.data)
    loader = Loader(pictures, Planner(c, len(pictures), 8), c.data, lambda plan: {40})
    whole = [b for (b,) in loader.batches(0, 5, [0])]
    later = [b for (b,) in loader.batches(3, 5, [0])]
    for a, b in zip(whole[3:], later, strict=True):
        assert a.plan == b.plan
        assert a.ids == b.ids
        assert torch.equal(a.student, b.student)
        assert torch.equal(a.teachers[40], b.teachers[40])
    assert whole[0].student.shape == (4, 3, whole[0].plan.size, whole[0].plan.size)
    assert whole[0].student.dtype == torch.uint8


def test_student_and_teacher_see_the_same_crop(config):
    c = config(partitions__0__sizes=[32])
    pictures = open_pictures(c.data)
    loader = Loader(pictures, Planner(c, len(pictures), 8), c.data, lambda plan: {32, 64})
    ((batch,),) = loader.batches(0, 1, [0])
    assert torch.equal(batch.teachers[32], batch.student)
    halved = torch.nn.functional.interpolate(batch.teachers[64].float(), (32, 32), mode="area")
    assert (halved - batch.student.float()).abs().mean() < 3


def test_broken_pictures_are_replaced_and_named(config, photos, tmp_path):
    files = sorted(photos.iterdir())
    for i, file in enumerate(files[:6]):
        (tmp_path / file.name).write_bytes(b"no picture" if i in (1, 2) else file.read_bytes())
    c = config(data__sources=[{"path": str(tmp_path)}], partitions__0__batch_size=6)
    pictures = open_pictures(c.data)
    loader = Loader(pictures, Planner(c, len(pictures), 8), c.data, lambda plan: set())
    ((batch,),) = loader.batches(0, 1, [0])
    assert sorted(batch.ids) == ["00.png", "03.png", "03.png", "03.png", "04.png", "05.png"]
    assert len(batch.broken) == 3
    assert "01.png" in "".join(batch.broken)


def test_only_broken_pictures(config, tmp_path):
    for i in range(20):
        (tmp_path / f"{i}.png").write_bytes(b"no picture")
    c = config(data__sources=[{"path": str(tmp_path)}])
    pictures = open_pictures(c.data)
    loader = Loader(pictures, Planner(c, len(pictures), 8), c.data, lambda plan: set())
    with pytest.raises(DatasetError, match="16 pictures in a row cannot be read"):
        list(loader.batches(0, 1, [0]))


def test_sources_are_joined(config, photos):
    c = config()
    sources = (dataclasses.replace(c.data.sources[0], limit=3, repeat=2), c.data.sources[0])
    pictures = open_pictures(dataclasses.replace(c.data, sources=sources))
    assert len(pictures) == 3 * 2 + 24
    assert [pictures[i].id for i in (0, 2, 3, 5, 6, 29)] == ["00.png", "02.png", "00.png", "02.png", "00.png", "23.png"]
    assert pictures.identity != open_pictures(c.data).identity
    with pytest.raises(DatasetError, match="no pictures"):
        Pictures([open_images(str(photos)).head(0)], [1])


def test_every_name_counts_and_the_place_does_not(config, tmp_path):
    def identity(folder):
        return open_pictures(config(data__sources=[{"path": str(folder)}]).data).identity

    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for i in range(200):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / folder / f"{i:04d}.png")
    before = identity(tmp_path / "a")
    assert identity(tmp_path / "b") == before
    (tmp_path / "a" / "0101.png").rename(tmp_path / "a" / "0101x.png")
    assert identity(tmp_path / "a") != before


@pytest.mark.parametrize("packed", [False, True])
def test_other_pictures_of_the_same_names_have_other_contents(config, tmp_path, packed):
    found = {}
    for folder, shade in (("a", 0), ("copy", 0), ("b", 128)):
        (tmp_path / folder).mkdir()
        for i in range(40):  # as pixels without compression all files are of one size
            Image.new("RGB", (8, 8), (shade, i, 0)).save(tmp_path / folder / f"{i:04d}.bmp")
        path = tmp_path / folder
        if packed:
            path = tmp_path / folder / "pictures.tar"
            with tarfile.open(path, "w") as tar:
                for file in sorted((tmp_path / folder).glob("*.bmp")):
                    tar.add(file, file.name)
        found[folder] = open_pictures(config(data__sources=[{"path": str(path)}]).data)
    assert found["a"].identity == found["copy"].identity == found["b"].identity
    assert found["a"].contents == found["copy"].contents != found["b"].contents


def test_a_file_of_another_size_has_other_contents(config, tmp_path):
    for i in range(700):
        (tmp_path / f"{i:04d}.png").write_bytes(b"x")
    pictures = [open_pictures(config(data__sources=[{"path": str(tmp_path)}]).data)]
    before = pictures[0].contents
    (tmp_path / "0001.png").write_bytes(b"xy")  # which is not among those that are read
    again = open_pictures(config(data__sources=[{"path": str(tmp_path)}]).data)
    assert again.identity == pictures[0].identity
    assert again.contents != before


@pytest.fixture
def large(tmp_path):
    """Large JPEGs of fine detail, which draft decoding shrinks."""
    folder = tmp_path / "large"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(8):
        small = Image.fromarray(rng.integers(0, 256, (120, 160, 3), dtype=np.uint8))
        small.resize((640, 480), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=90)
    return folder


def test_pixels_do_not_depend_on_what_is_cached(config, large, tmp_path):
    changes = {"data__sources": [{"path": str(large)}], "data__fixed_views": 1, "data__decode": "draft"}
    changes |= {"partitions__0__sizes": [24], "teachers__0__resolution": 96, "data__cache_dir": str(tmp_path / "cache")}
    c = config(**changes)
    pictures = open_pictures(c.data)

    def student(sizes):
        loader = Loader(pictures, Planner(c, len(pictures), 8), c.data, lambda plan: sizes)
        return next(loader.batches(0, 1, [0]))[0].student

    assert c.decoded_side == 96
    assert torch.equal(student({96}), student(set()))
