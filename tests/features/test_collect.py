import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from amradio.features import ExtractOptions, collect
from amradio.features.collect import _exchanged
from amradio.images import ResizePolicy, decode

OWN_SIZE = ResizePolicy("nearest")


def test_a_table(model, labelled):
    images = labelled([(8, 8), (8, 12), (12, 8)] * 4, broken={2, 7})
    model.with_adaptor = True
    seen = []
    options = ExtractOptions(batch_size=4, keep="all")
    table = collect(images, model, OWN_SIZE, options, shard_size=5, on_record=seen.append)
    worked = [p for p in range(12) if p not in (2, 7)]
    assert len(table) == 10
    assert table.positions.tolist() == worked
    assert table.positions.dtype == table.labels.dtype == torch.int64
    assert table.labels.tolist() == [int(images.labels[p]) for p in worked]
    assert [r.position for r in seen] == list(range(12))
    assert all(output.features is None for r in seen for output in r.outputs.values())
    expected = [np.asarray(decode(images[p].path), np.float64).mean((0, 1)) / 255 for p in worked]
    np.testing.assert_allclose(table.summaries["backbone"], np.stack(expected), atol=1e-6)
    assert torch.equal(table.summaries["clip"], table.summaries["backbone"] * 2)
    assert table.summaries["clip"].dtype == torch.float32
    assert [(f.position, f.id, f.location) for f in table.failures] == [
        (p, images[p].id, images[p].location) for p in (2, 7)
    ]
    assert "not a picture" in table.failures[0].reason
    assert set(table.timing) == {"wall_s", "images_per_s", "waited_s", "busy_s", "bottleneck", "batch_fill"}


def test_without_labels_and_with_nothing_that_works(model, photos):
    table = collect(photos([(8, 8)] * 2, broken={0, 1}), model, OWN_SIZE)
    assert table.labels is None
    assert table.summaries == {}
    assert table.positions.shape == (0,)
    assert [f.position for f in table.failures] == [0, 1]
    assert table.timing["batch_fill"] is None


def test_summaries_become_float32(photos):
    class Half:
        def __call__(self, images, feature_fmt):
            from amradio.models.output import RadioOutput

            return RadioOutput(images.mean((2, 3)).bfloat16(), images)

        def get_nearest_supported_resolution(self, height, width):
            return height, width

    assert collect(photos([(8, 8)]), Half(), OWN_SIZE).summaries["backbone"].dtype == torch.float32


class Together:
    """What one process of a group of several sees, with all parts known in advance."""

    def __init__(self, parts):
        self.parts = parts
        self.at = 0

    def all_gather_objects(self, value):
        if isinstance(value, dict):
            return [{n: r.shape[1] for n, r in summaries.items()} for _, summaries, _ in self.parts]
        return [failures for _, _, failures in self.parts]

    def all_gather_rows(self, rows):
        if rows.dtype == torch.int64:
            return [positions for positions, _, _ in self.parts]
        start, self.at = self.at, self.at + 3
        return [s["a"][start : start + 3] if "a" in s else torch.empty(0, 2) for _, s, _ in self.parts]


@settings(max_examples=50)
@given(st.lists(st.integers(-1, 3), max_size=40), st.integers(0, 3))
def test_rows_of_all_processes_come_into_order(owners, me):
    """-1 marks a picture that failed in nobody's hands; processes may have no rows at all."""
    values = torch.randn(len(owners), 2)
    parts = []
    for rank in range(4):
        positions = torch.tensor([p for p, owner in enumerate(owners) if owner == rank], dtype=torch.int64)
        parts.append((positions, {"a": values[positions]} if len(positions) else {}, []))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[_exchanged.__module__], "_ROWS_AT_ONCE", 3)
        positions, summaries, _ = _exchanged(*parts[me], Together(parts), gather=True)
    expected = [p for p, owner in enumerate(owners) if owner >= 0]
    assert positions.tolist() == expected
    if expected:
        assert torch.equal(summaries["a"], values[expected])
