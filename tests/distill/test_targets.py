"""Teachers and their targets, computed or kept on disk."""

import numpy as np
import pytest
import torch

import amradio
from amradio.distill.config import TeacherConfig
from amradio.distill.targets import TargetCache, Targets
from amradio.distill.teachers import Teacher, load_teachers
from amradio.errors import ConfigError

CPU = torch.device("cpu")


@pytest.fixture
def images():
    return torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)


def test_targets_are_what_the_backbone_says(teachers, images):
    teacher = Teacher(TeacherConfig(name="one", backbone=teachers[0]), CPU)
    found = teacher.targets(images)
    with torch.inference_mode():
        wanted = amradio.load(teachers[0])(images.float() / 255, feature_fmt="NCHW")
    torch.testing.assert_close(found.summary, wanted.summary)
    torch.testing.assert_close(found.features, wanted.features)
    assert not found.features.is_inference()  # or no loss could use it
    assert (teacher.summary_dim, teacher.feature_dim) == (12, 12)


def test_what_is_not_learned_is_left_out(teachers, images):
    config = TeacherConfig(name="one", backbone=teachers[0], summary=None, dtype="bfloat16")
    found = Teacher(config, CPU).targets(images)
    assert found.summary is None
    assert found.features.dtype == torch.float32
    assert found.features.to(torch.bfloat16).float().equal(found.features)  # it was computed in bfloat16


def test_a_mosaic_is_cut_back_into_pictures(teachers, images):
    config = TeacherConfig(name="one", backbone=teachers[0], summary=None, mosaic=2)
    teacher = Teacher(config, CPU)
    found = teacher.targets(images)
    rows = [torch.cat(list(images[i : i + 2]), dim=2) for i in (0, 2)]
    canvas = torch.cat(rows, dim=1)[None]
    whole = amradio.load(teachers[0])(canvas.float() / 255, feature_fmt="NCHW").features
    torch.testing.assert_close(found.features[0], whole[0, :, :4, :4])
    torch.testing.assert_close(found.features[3], whole[0, :, 4:, 4:])
    assert teacher.side(24) == 24


def test_sizes_that_a_teacher_sees(teachers):
    free = Teacher(TeacherConfig(name="one", backbone=teachers[0]), CPU)
    assert [free.side(s) for s in (24, 30, 32)] == [24, 32, 32]
    fixed = Teacher(TeacherConfig(name="one", backbone=teachers[0], resolution=16), CPU)
    assert fixed.side(32) == 16
    with pytest.raises(ConfigError, match="'one' cannot see pictures of 20 pixels; the nearest size is 16"):
        Teacher(TeacherConfig(name="one", backbone=teachers[0], resolution=20), CPU)


@pytest.mark.parametrize("stored", [False, True], ids=["cast", "from a file"])
def test_teachers_in_half_precision(teachers, images, tmp_path, stored):
    whole = Teacher(TeacherConfig(name="a", backbone=teachers[0]), CPU).targets(images)
    spec, dtype = teachers[0], "float16"
    if stored:
        half = amradio.load_backbone(teachers[0], dtype=torch.float16)
        spec, dtype = str(amradio.save(half, tmp_path / "half.safetensors")), None
    teacher = Teacher(TeacherConfig(name="a", backbone=spec, dtype=dtype), CPU)
    assert all(p.dtype == torch.float16 for p in teacher.backbone.parameters())
    found = teacher.targets(images)
    for half, reference in zip(found, whole, strict=True):
        assert half.dtype == torch.float32
        assert (half - reference).square().mean().sqrt() < 0.02 * reference.std()
        assert not torch.equal(half, reference)


def test_any_callable_can_teach(images):
    def pooled(x):
        return x.mean((2, 3)), torch.nn.functional.avg_pool2d(x, 8)

    found = load_teachers([TeacherConfig(name="mean", backbone="given")], CPU, {"mean": pooled})["mean"].targets(images)
    assert found.features.shape == (4, 3, 4, 4)
    torch.testing.assert_close(found.summary, images.float().div(255).mean((2, 3)))


def test_a_cache_gives_back_what_it_was_given(tmp_path):
    cache = TargetCache(tmp_path, 10, {"teacher": "x"})
    targets = Targets(torch.randn(3, 5), torch.randn(3, 4, 2, 2))
    assert not cache.has([7, 2, 4])
    stored = cache.write([7, 2, 4], targets)
    assert torch.equal(stored.summary, targets.summary.half().float())
    cache.flush()
    again = TargetCache(tmp_path, 10, {"teacher": "x"})
    assert again.has([2, 7])
    assert not again.has([2, 3])
    assert again.filled == 3
    found = again.read([2, 7])
    assert torch.equal(found.summary, stored.summary[[1, 0]])
    assert torch.equal(found.features, stored.features[[1, 0]])


def test_a_cache_without_summaries(tmp_path):
    cache = TargetCache(tmp_path, 4, {})
    cache.write([0], Targets(None, torch.ones(1, 2, 1, 1)))
    assert TargetCache(tmp_path, 4, {}).read([0]).summary is None


def test_a_cache_of_something_else(tmp_path):
    TargetCache(tmp_path, 4, {"teacher": "x", "crops": 1})
    with pytest.raises(ConfigError, match=r"of another teacher, other pictures or other crops. They differ in: crops"):
        TargetCache(tmp_path, 4, {"teacher": "x", "crops": 2})


def test_a_cache_of_other_shapes(tmp_path):
    TargetCache(tmp_path, 4, {}).write([0], Targets(torch.ones(1, 2), None))
    with pytest.raises(ConfigError, match="cached targets of another teacher"):
        TargetCache(tmp_path, 4, {}).write([1], Targets(torch.ones(1, 3), None))


def test_a_cache_takes_room_as_it_fills(tmp_path):
    cache = TargetCache(tmp_path, 100_000, {})
    cache.write([5], Targets(None, torch.ones(1, 64, 8, 8)))
    cache.flush()
    file = tmp_path / "features.f16"
    assert file.stat().st_size == 100_000 * 64 * 64 * np.dtype(np.float16).itemsize
    assert file.stat().st_blocks * 512 < 10**6


def test_what_was_stored_first_stays(tmp_path):
    cache = TargetCache(tmp_path, 6, {})
    cache.write([1, 2], Targets(torch.ones(2, 3), None))
    found = cache.write([2, 4, 4], Targets(torch.tensor([[5.0] * 3, [6.0] * 3, [7.0] * 3]), None))
    assert found.summary[:, 0].tolist() == cache.read([2, 4, 4]).summary[:, 0].tolist()
    assert found.summary[0, 0] == 1
    assert found.summary.dtype == torch.float32
