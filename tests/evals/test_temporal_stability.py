"""Change of features at static patches, against NumPy."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from amradio.backbones.callables import CallableBackbone
from amradio.errors import OptionError
from amradio.evals.report import EvalReport, compare
from amradio.evals.temporal_stability import StabilityConfig, TemporalStability, stability_report
from amradio.features import ExtractOptions
from amradio.features.frames import View
from amradio.images import ResizePolicy


def clip(frames: int, seed: int = 0, width: int = 5) -> tuple[list[Tensor], list[Tensor]]:
    """Pixels [3, 12, 16], of which some patches of 4 x 4 move, and features [3, 4, D]."""
    rng = np.random.default_rng(seed)
    pixels = np.repeat(rng.integers(0, 250, (1, 3, 12, 16)), frames, 0)
    for t in range(frames):
        pixels[t] += rng.integers(0, 3, (3, 12, 16))  # noise
        row, column = rng.integers(0, 3), rng.integers(0, 4)
        pixels[t, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = rng.integers(0, 255)
    features = 100 + rng.normal(size=(frames, 3, 4, width)) * rng.uniform(0.1, 3, (3, 4, 1))
    return [torch.from_numpy(p).to(torch.uint8) for p in pixels], [torch.from_numpy(f).float() for f in features]


def measured(pixels: list[Tensor], features: list[Tensor], threshold: float = 0.01) -> TemporalStability:
    stability = TemporalStability(StabilityConfig(threshold))
    for i, (p, f) in enumerate(zip(pixels, features, strict=True)):
        stability.update(p, f, i / 10)
    return stability


@given(seed=st.integers(0, 1000), frames=st.integers(2, 6))
def test_equals_the_definition(seed: int, frames: int) -> None:
    pixels, features = clip(frames, seed)
    found = measured(pixels, features)
    p = np.stack([x.numpy() for x in pixels]).astype(float) / 255
    f = np.stack([x.numpy() for x in features]).astype(float)  # [T, 3, 4, D]
    change = np.abs(np.diff(p, axis=0)).reshape(frames - 1, 3, 3, 4, 4, 4).mean((1, 3, 5))  # [T - 1, 3, 4]
    squares = (np.diff(f, axis=0) ** 2).sum(-1)
    rows = f.reshape(-1, f.shape[-1])
    variance = ((rows - rows.mean(0)) ** 2).sum(-1).mean()
    static = change < 0.01
    metrics = {name: m.value for name, m in found.metrics().items()}
    assert found.variance == pytest.approx(variance, rel=1e-9)
    assert metrics["static"] == pytest.approx(100 * static.mean())
    if static.any():
        assert metrics["change"] == pytest.approx(math.sqrt(squares[static].mean() / (2 * variance)), rel=1e-9)
        cosines = (f[1:] * f[:-1]).sum(-1) / np.linalg.norm(f[1:], axis=-1) / np.linalg.norm(f[:-1], axis=-1)
        assert metrics["cosine"] == pytest.approx(cosines[static].mean(), rel=1e-9)
        worst = [squares[t][static[t]].mean() if static[t].any() else -1 for t in range(frames - 1)]
        assert found.details()["largest_change"]["time_s"] == (int(np.argmax(worst)) + 1) / 10
    if not static.all():
        expected = math.sqrt(squares[~static].mean() / (2 * variance))
        assert metrics["change_of_moving"] == pytest.approx(expected, rel=1e-9)


def test_nothing_moves_is_0_and_random_is_1() -> None:
    still, features = torch.full((3, 64, 64), 90, dtype=torch.uint8), torch.randn(16, 16, 32)
    assert measured([still] * 4, [features] * 4).change == 0
    random = [torch.randn(16, 16, 32) for _ in range(4)]
    assert measured([still] * 4, random).change == pytest.approx(1, abs=0.02)


@given(scale=st.floats(0.01, 100), shift=st.floats(-50, 50))
def test_units_do_not_matter(scale: float, shift: float) -> None:
    pixels, features = clip(3)
    moved = [scale * f.double() + shift for f in features]
    assert measured(pixels, moved).change == pytest.approx(measured(pixels, features).change, rel=1e-6)


def test_resolutions_can_be_compared() -> None:
    """Features that are enlarged change as much."""
    pixels, features = clip(4)
    large = [f.repeat_interleave(2, 0).repeat_interleave(2, 1) for f in features]
    enlarged = [p.repeat_interleave(2, 1).repeat_interleave(2, 2) for p in pixels]
    assert measured(enlarged, large).change == pytest.approx(measured(pixels, features).change, rel=0.1)


def test_what_cannot_be_compared() -> None:
    one = measured(*clip(1))
    assert one.change is None
    assert "one frame only" in one.notes()[0]
    assert set(one.metrics()) == {"static", "feature_spread"}
    pixels, features = clip(3)
    moving = [((p.int() + 60 * i) % 256).to(torch.uint8) for i, p in enumerate(pixels)]
    found = measured(moving, features, 0.001)
    assert found.change is None
    assert "No patch was static: all changed by 0.001" in found.notes()[0]
    assert "change" not in found.metrics()
    assert found.details() == {}
    with pytest.raises(OptionError, match="width 7 follow features of width 5"):
        found.update(pixels[0], torch.zeros(3, 4, 7))
    with pytest.raises(OptionError, match="threshold is a share above 0"):
        StabilityConfig(0)


def test_constant_features_do_not_divide_by_zero() -> None:
    pixels, _ = clip(3)
    assert measured(pixels, [torch.ones(3, 4, 5)] * 3).change == 0


def test_the_report_holds_everything(tmp_path: Path) -> None:
    backbone = CallableBackbone(lambda images: torch.nn.functional.avg_pool2d(images, 4), patch_size=4, name="toy")
    reports = []
    for size in (32, 64):
        found = measured(*clip(4))
        view = View(backbone, ResizePolicy("shortest", (size,), 4))
        about = {"name": "clip.mp4", "start_s": 0.0}
        report = stability_report(found, view, about, ExtractOptions(), wall_s=2.0)
        report.save(tmp_path / str(size))
        assert EvalReport.load(tmp_path / f"{size}.json").to_dict() == json.loads(json.dumps(report.to_dict()))
        reports.append(report)
    assert next(iter(reports[0].metrics)) == "change"
    assert (reports[0].label, reports[0].images_per_s) == ("toy, shortest 32", 2.0)
    assert reports[0].dataset["video"]["count"] == 4
    assert reports[0].config["threshold"] == 0.01
    assert compare(reports).protocol_differs == []
