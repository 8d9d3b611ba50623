import random
import time

import pytest
import torch
from torch import nn

from amradio.errors import OptionError
from amradio.features import ExtractOptions, StageTimer, extract
from amradio.features.runner import Runner
from amradio.images import ResizePolicy, open_images
from amradio.models.output import RadioOutput

OWN_SIZE = ResizePolicy("nearest")


def run(images, model, timer=None, shard_size=None, policy=OWN_SIZE, **options):
    return list(extract(images, model, policy, ExtractOptions(**options), timer, shard_size))


def test_what_is_not_kept_never_leaves_the_device(model, photos, monkeypatch):
    images = photos([(8, 12)] * 3)
    moved = []
    to = RadioOutput.to
    monkeypatch.setattr(RadioOutput, "to", lambda self, *a, **k: (moved.append(self), to(self, *a, **k))[1])
    whole = run(images, model)
    pooled = run(images, model, keep="pooled")
    summary = run(images, model, keep="summary")
    assert [None if m.features is None else m.features.ndim for m in moved] == [4, 2, None]
    for a, b, c in zip(whole, pooled, summary, strict=True):
        assert torch.equal(a.outputs["backbone"].summary, b.outputs["backbone"].summary)
        assert torch.equal(a.outputs["backbone"].summary, c.outputs["backbone"].summary)
        mean = a.outputs["backbone"].features.mean((1, 2))
        torch.testing.assert_close(b.outputs["backbone"].features, mean)
        assert c.outputs["backbone"].features is None


def test_means_of_half_precision_features_are_taken_in_float32(photos):
    class Half:
        def __call__(self, images, feature_fmt):
            maps = images.new_full((len(images), 1, 100, 100), 1.0).half()
            maps[:, :, 0, 0] = 2048.0
            return RadioOutput(images.mean((2, 3)), maps)

        def get_nearest_supported_resolution(self, height, width):
            return height, width

    (record,) = run(photos([(8, 8)]), Half(), keep="pooled")
    assert record.outputs["backbone"].features.item() == pytest.approx((9999 + 2048) / 10000, abs=1e-6)


@pytest.mark.parametrize(("name", "known"), [("keep", "'all'"), ("decode", "'draft'"), ("resizer", "'torch'")])
def test_named_options_are_checked(name, known):
    with pytest.raises(OptionError, match=rf"{name} must be one of \[.*{known}.*\], got 'nothing'"):
        ExtractOptions(**{name: "nothing"})


def test_draft_decoding_and_the_other_resizer(model, tmp_path):
    from PIL import Image

    gradient = torch.linspace(0, 255, 640).to(torch.uint8).expand(480, 640).numpy()
    Image.fromarray(gradient).convert("RGB").save(tmp_path / "a.jpg", quality=95)
    images = open_images(str(tmp_path))
    policy = ResizePolicy.parse([48], multiple=4)
    (full,) = run(images, model, policy=policy)
    for options in ({"decode": "draft"}, {"resizer": "torch"}):
        (other,) = run(images, model, policy=policy, **options)
        assert other.size == full.size == (480, 640)
        assert other.image.shape == full.image.shape == (3, 48, 64)
        assert (other.image.int() - full.image.int()).abs().max() <= 5


def test_batches_do_not_cross_shards_and_memory_is_forgotten_there(model, photos):
    images = photos([(8, 8)] * 14)
    model.max_pixels = 2 * 64
    run(images, model, shard_size=5, batch_size=4)
    assert [b[0] for b in model.batches] == [4, 2, 2, 1] * 2 + [4, 2, 2]


def test_results_of_a_shard_do_not_depend_on_the_others(model, photos):
    rng = random.Random(0)
    images = photos([(8 * rng.randint(1, 3), 8 * rng.randint(1, 3)) for _ in range(48)])
    run(images, model, shard_size=16, batch_size=4, look_ahead=8)
    everything, model.batches = model.batches, []
    parts = []
    for start in (0, 16, 32):
        run(images.select(range(start, start + 16)), model, shard_size=16, batch_size=4, look_ahead=8)
        parts += model.batches
        model.batches = []
    assert everything == parts


def test_batches_do_not_depend_on_the_threads(model, photos, monkeypatch):
    rng = random.Random(0)
    images = photos([(8 * rng.randint(1, 2), 8 * rng.randint(1, 2)) for _ in range(40)])
    run(images, model, batch_size=4, workers=1)
    first, model.batches = model.batches, []
    original = type(images[0]).decode

    def slow(self, **options):
        time.sleep(random.uniform(0, 0.003))
        return original(self, **options)

    monkeypatch.setattr(type(images[0]), "decode", slow)
    run(images, model, batch_size=4, workers=7)
    assert model.batches == first


def test_a_pass_may_be_started_before_the_last_one_is_taken(model, photos, monkeypatch):
    """As on a GPU: records come one batch later, and all come, in order, also around a lack of memory."""
    init = Runner.__init__

    def ahead(self, *args):
        init(self, *args)
        self._ahead = 1

    monkeypatch.setattr(Runner, "__init__", ahead)
    images = photos([(8, 8)] * 11, broken={3})
    model.max_pixels = 2 * 64
    started = []
    for record in extract(images, model, OWN_SIZE, ExtractOptions(batch_size=4, look_ahead=4)):
        started.append((record.position, len(model.batches), record.ok))
    assert [position for position, _, _ in started] == list(range(11))
    assert [position for position, _, ok in started if not ok] == [3]
    assert started[0][1] >= 3  # the failed pass, its first half, and the next one
    expected = run(images, model, batch_size=2)
    for a, b in zip(run(images, model, batch_size=4), expected, strict=True):
        assert a.outputs.keys() == b.outputs.keys()
        assert all(torch.equal(a.outputs[n].summary, b.outputs[n].summary) for n in a.outputs)


@pytest.mark.parametrize(("keep", "passes"), [("summary", 8), ("all", 16)])
def test_more_is_read_ahead_where_results_are_small(model, photos, keep, passes):
    images = photos([(8 * (1 + i % 8), 8) for i in range(64)])
    run(images, model, batch_size=8, keep=keep)
    assert len(model.batches) == passes


def test_batch_fill(model, photos):
    timer = StageTimer()
    run(photos([(8, 8)] * 5 + [(16, 8)] * 2), model, timer, batch_size=4)
    record = timer.record(4)
    assert (timer.batches, timer.pictures) == (3, 7)
    assert record["batch_fill"] == pytest.approx(7 / 12)
    assert record["images_per_s"] == pytest.approx(7 / record["wall_s"])
    assert StageTimer().record(4)["batch_fill"] is None


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 5, 4, 4)

    def forward(self, images, feature_fmt="NLC"):
        maps = self.layer(images)
        return RadioOutput(maps.mean((2, 3)), maps)

    def get_nearest_supported_resolution(self, height, width):
        return round(height / 4) * 4, round(width / 4) * 4


def test_compile_serves_all_sizes_with_few_graphs(photos, monkeypatch):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **k: compile_(model, backend=backend, **k))
    torch.compiler.reset()
    model = Small().eval()
    images = photos([(8 * h, 8 * w) for h in (2, 3, 4) for w in (2, 3, 4)] * 3)
    compiled = run(images, model, batch_size=2, compile=True)
    eager = run(images, model, batch_size=2)
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a.outputs["backbone"].features, b.outputs["backbone"].features)
    assert 1 <= len(graphs) <= 2  # any batch, and perhaps a batch of one
    torch.compiler.reset()
