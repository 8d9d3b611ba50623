import threading

import numpy as np
import pytest
import torch
from torch import nn

from amradio.errors import OptionError
from amradio.features import ExtractOptions, StageTimer, extract
from amradio.features.runner import is_out_of_memory
from amradio.images import ResizePolicy, decode
from amradio.models.output import RadioOutput

OWN_SIZE = ResizePolicy("nearest")


def run(images, model, policy=OWN_SIZE, timer=None, **options):
    return list(extract(images, model, policy, ExtractOptions(**options), timer))


def expected_output(source, policy=OWN_SIZE):
    x = np.asarray(policy.apply(decode(source.path)), np.float64) / 255  # [H, W, 3]
    h, w = x.shape[0] // 4, x.shape[1] // 4
    return x.mean((0, 1)), x.reshape(h, 4, w, 4, 3).mean((1, 3)).transpose(2, 0, 1)


def test_order_and_values_with_mixed_sizes(model, photos):
    sizes = [(8, 8), (8, 12), (12, 8), (8, 8), (16, 16), (8, 12)] * 5
    images = photos(sizes)
    records = run(images, model, batch_size=3)
    assert [r.position for r in records] == list(range(30))
    assert [r.source for r in records] == list(images)
    assert [r.size for r in records] == sizes
    for record in records:
        summary, features = expected_output(record.source)
        assert record.ok
        np.testing.assert_allclose(record.outputs["backbone"].summary, summary, atol=1e-6)
        np.testing.assert_allclose(record.outputs["backbone"].features, features, atol=1e-6)
        np.testing.assert_array_equal(record.image.permute(1, 2, 0), np.asarray(decode(record.source.path)))
    assert max(b[0] for b in model.batches) == 3
    assert len(model.batches) < 20  # batched by shape although the shapes alternate


def test_broken_pictures_are_recorded_and_skipped(model, photos):
    images = photos([(8, 8)] * 6, broken={1, 4})
    records = run(images, model)
    assert [r.ok for r in records] == [True, False, True, True, False, True]
    assert records[1].reason.startswith(f"Cannot decode {images[1].path}: it is text, not a picture")
    assert records[1].size is None
    assert records[1].outputs == {}


def test_a_picture_that_the_policy_refuses_is_recorded(model, photos):
    policy = ResizePolicy("shortest", (8,), max_pixels=500)
    records = run(photos([(8, 8), (4, 400)]), model, policy)
    assert [r.ok for r in records] == [True, False]
    assert "more than 500 pixels" in records[1].reason
    assert records[1].size == (4, 400)


def test_sizes_snap_to_what_the_model_supports(model, photos):
    record = run(photos([(30, 50)]), model, ResizePolicy("shortest", (10,)))[0]
    assert tuple(record.image.shape) == (3, 8, 16)  # 10 x 16.7, to multiples of 4
    assert record.size == (30, 50)


def test_budget_and_background_reach_the_decoder(model, photos):
    assert "budget of 50" in run(photos([(8, 8)]), model, max_pixels=50)[0].reason


def test_adaptors(model, photos):
    model.with_adaptor = True
    record = run(photos([(8, 8)]), model)[0]
    assert list(record.outputs) == ["backbone", "clip"]
    torch.testing.assert_close(record.outputs["clip"].features, record.outputs["backbone"].features * 2)


def test_out_of_memory_halves_the_batch_and_remembers(model, photos):
    model.max_pixels = 3 * 64
    records = run(photos([(8, 8)] * 16 + [(16, 8)] * 3), model, batch_size=8)
    assert all(r.ok for r in records)
    assert [b[0] for b in model.batches if b[2:] == (8, 8)] == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2]
    assert [b[0] for b in model.batches if b[2:] == (16, 8)] == [1, 1, 1]
    assert [r.position for r in records] == list(range(19))


def test_a_picture_that_does_not_fit_alone_fails_and_the_rest_goes_on(model, photos):
    model.max_pixels = 64
    records = run(photos([(8, 8), (16, 16), (8, 8)]), model)
    assert [r.ok for r in records] == [True, False, True]
    assert records[1].reason == "Out of memory for this picture alone, at 16 x 16 pixels; use a smaller resolution."


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("x"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("MPS backend out of memory"), True),
        (RuntimeError("shape mismatch"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, expected):
    assert is_out_of_memory(error) is expected


def test_other_errors_of_the_model_are_raised_and_threads_end(model, photos):
    def broken(images, feature_fmt):
        raise RuntimeError("shape mismatch")

    broken.get_nearest_supported_resolution = model.get_nearest_supported_resolution
    with pytest.raises(RuntimeError, match="shape mismatch"):
        run(photos([(8, 8)] * 3), broken)
    assert not [t for t in threading.enumerate() if t.name.startswith("amradio-decode")]


def test_stopping_early_ends_the_threads_and_reads_no_further(model, photos):
    images = photos([(8, 8)] * 40)
    read = []

    def stream():
        for image in images:
            read.append(image)
            yield image

    records = extract(stream(), model, OWN_SIZE, ExtractOptions(batch_size=2, look_ahead=4))
    next(records)
    records.close()
    assert len(read) <= 8
    assert not [t for t in threading.enumerate() if t.name.startswith("amradio-decode")]


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 5, 4, 4)
        self.seen = None

    def forward(self, images, feature_fmt="NLC"):
        self.seen = images.dtype
        features = self.layer(images)
        return RadioOutput(features.mean((2, 3)), features)

    def get_nearest_supported_resolution(self, height, width):
        return height, width


def test_dtype_and_autocast_are_explicit(photos):
    images, model = photos([(8, 8)]), Network().eval()
    assert run(images, model)[0].outputs["backbone"].features.dtype == torch.float32
    assert run(images, model, autocast=torch.bfloat16)[0].outputs["backbone"].features.dtype == torch.bfloat16
    assert model.seen == torch.float32
    run(images, model.to(torch.bfloat16), dtype=torch.bfloat16)
    assert model.seen == torch.bfloat16


def test_no_gradients_and_no_training_mode(photos):
    images, model = photos([(8, 8)]), Network()
    with pytest.raises(OptionError, match=r"The model is in training mode.* Call model\.eval\(\) first\."):
        extract(images, model, OWN_SIZE)
    features = run(images, model.eval())[0].outputs["backbone"].features
    assert not features.requires_grad
    assert not features.is_inference()  # may be used in training something on top


def test_records_do_not_hold_their_batch(model, photos):
    features = run(photos([(8, 8)] * 8), model, batch_size=8)[0].outputs["backbone"].features
    assert features.untyped_storage().nbytes() == features.numel() * 4


@pytest.mark.parametrize("name", ["batch_size", "look_ahead", "workers", "max_pixels"])
def test_options_are_checked(name):
    with pytest.raises(OptionError, match=f"{name} must be at least 1, got 0"):
        ExtractOptions(**{name: 0})


def test_nothing_in_nothing_out(model):
    assert run([], model) == []


def test_timer(model, photos):
    timer = StageTimer()
    assert timer.bottleneck is None
    run(photos([(64, 64)] * 4), model, timer=timer)
    assert timer.waited_s["decode"] > 0
    assert timer.busy_s["decode"] > 0
    assert timer.waited_s["model"] >= timer.busy_s["model"] > 0
    assert timer.waited_s["write"] == 0
    timer.waited_s["write"] = 1e3
    assert timer.bottleneck == "write"
