"""Packed pictures: the same ones, smaller, in files that stay below their bound."""

import tarfile

import numpy as np
import pytest
from PIL import Image

from amradio.errors import DatasetError, OptionError
from amradio.images import MAX_PIXELS, WHITE, open_images
from amradio.images.pack import MIB, PackOptions, pack_images

SIZES = [(64, 48), (300, 200), (200, 500), (256, 256), (90, 1000)]


@pytest.fixture
def photos(tmp_path):
    """Smooth pictures of several sizes in two classes, and a broken file."""
    generator = np.random.default_rng(0)
    for i, size in enumerate(SIZES):
        folder = tmp_path / "photos" / ("cat", "dog.s")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        small.resize(size, Image.Resampling.BICUBIC).save(folder / f"a picture.{i}.png")
    (tmp_path / "photos" / "cat" / "broken.png").write_bytes(b"no picture")
    return tmp_path / "photos"


def decoded(images):
    return [s.decode(max_pixels=MAX_PIXELS, background=WHITE) for s in images]


def test_packed_pictures_are_the_same_smaller(photos, tmp_path):
    images = open_images(photos)
    packed = pack_images(images, tmp_path / "out", PackOptions(short_side=100))
    assert (packed.count, len(packed.shards)) == (5, 1)
    assert [path for path, _ in packed.failures] == [str(photos / "cat" / "broken.png")]
    again = open_images(tmp_path / "out")
    kept = [i for i, s in enumerate(images) if "broken" not in s.id]
    assert again.class_names == images.class_names == ("cat", "dog.s")
    assert again.labels.tolist() == images.labels[kept].tolist()
    whole = decoded(images.select(kept))
    for before, after in zip(whole, decoded(again), strict=True):
        width, height = before.size
        scale = min(100 / min(width, height), 1)
        assert after.size == (round(width * scale), round(height * scale))
        wanted = before.resize(after.size, Image.Resampling.LANCZOS)
        assert np.abs(np.asarray(wanted, float) - np.asarray(after, float)).mean() < 3
    assert "a_picture" in again[0].id


def test_shards_are_bounded_complete_and_repeatable(photos, tmp_path):
    images = open_images(photos).select([0, 2, 3] * 400)
    options = PackOptions(quality=95, shard_bytes=MIB // 4)
    first, second = (pack_images(images, tmp_path / name, options) for name in ("a", "b"))
    assert len(first.shards) > 3
    assert max(p.stat().st_size for p in first.shards) <= MIB // 4
    assert min(p.stat().st_size for p in first.shards[:-1]) > MIB // 8
    assert [p.name for p in first.shards] == [f"shard-{i:06d}.tar" for i in range(len(first.shards))]
    assert [p.read_bytes() for p in first.shards] == [p.read_bytes() for p in second.shards]
    assert first.size == sum(p.stat().st_size for p in first.shards)
    names: list[str] = []
    for path in first.shards:
        with tarfile.open(path) as tar:
            names += tar.getnames()
    assert len(set(names)) == len(names) == 2 * first.count
    assert len(open_images(tmp_path / "a")) == first.count


def test_pictures_without_labels(photos, tmp_path):
    images = open_images(photos / "cat")
    packed = pack_images(images, tmp_path / "out")
    assert packed.count == 3
    assert open_images(tmp_path / "out").labels is None
    assert not (tmp_path / "out" / "classes.txt").exists()


def test_mistakes_are_explained(photos, tmp_path):
    images = open_images(photos)
    pack_images(images, tmp_path / "out")
    with pytest.raises(OptionError, match=r"out has shards already"):
        pack_images(images, tmp_path / "out")
    with pytest.raises(
        DatasetError, match=r"None of the 1 pictures of .* could be read. The first one, .*broken.png: "
    ):
        pack_images(images.select([i for i, s in enumerate(images) if "broken" in s.id]), tmp_path / "none")
    noise = Image.effect_noise((1200, 1200), 90).convert("RGB")
    (tmp_path / "noise").mkdir()
    noise.save(tmp_path / "noise" / "x.png")
    with pytest.raises(OptionError, match=r"The picture 00000000-x_png has .* does not fit into a shard of 262,144"):
        pack_images(
            open_images(tmp_path / "noise"), tmp_path / "small", PackOptions(short_side=1200, shard_bytes=MIB // 4)
        )
    assert not list((tmp_path / "small").iterdir())
    with pytest.raises(OptionError, match="a quality from 1 to 100"):
        PackOptions(quality=0)
