"""Plots: drawn from plain numbers, the same bytes each time, in three formats."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from amradio.errors import MissingDependencyError, OptionError
from amradio.viz.grid import draw_sheet
from amradio.viz.plots import check_plots, plot_correlations, plot_feature_stats, plot_mode_switching, save_plot
from amradio.viz.strips import resolution_strips

SWITCH = {"low": 192, "high": 256}


def curve(**further: float) -> list[dict[str, Any]]:
    return [
        {
            "resolution": r,
            "teacher_resolution": r,
            "pictures": 4,
            "one_minus_cosine": 10 / r,
            "one_minus_cosine_se": 1 / r,
            "mse": 20 / r,
            "fidelity": None if r == 128 else r / 10,
            "student_variance": 1.0,
            "teacher_variance": 2.0,
            **further,
        }
        for r in (64, 128, 192, 256)
    ]


def details() -> dict[str, Any]:
    histogram = {"channel": 1, "low": -1.0, "high": 1.0, "shares": [0.0, 0.25, 0.5, 0.25]}
    layer = {"name": "a", "kind": "attention", "input_norm": 2.0, "output_norm": 3.0}
    seen = {"logit_min": -1.0, "logit_max": 2.0, "logit_mean": 0.1, "entropy": 1.0, "relative_entropy": 0.5}
    return {
        "distribution": {"histograms": {"all": {**histogram, "channel": None}, "largest_mean": histogram},
                         "eigenvalues": [3.0, 1.0, 1e-20, 0.0]},
        "weights": {"qkv.q": 1.0, "qkv.k": 2.0, "qkv.v": 3.0, "proj": 4.0},
        "activations": [layer | seen | {"entropy_of_heads": [0.9, 1.1]}, {**layer, "kind": "mlp"}],
    }  # fmt: skip


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_two_files_are_equal(tmp_path: Path, suffix: str) -> None:
    paths = [
        save_plot(plot_mode_switching(curve(), [SWITCH], "a model"), tmp_path / f"{i}" / f"plot.{suffix}")
        for i in range(2)
    ]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_text_stays_text(tmp_path: Path) -> None:
    text = save_plot(plot_mode_switching(curve(), [], "a model"), tmp_path / "a.svg").read_text()
    assert ">a model</text>" in text
    assert ">resolution in px</text>" in text


def test_a_sweep_shows_its_numbers_and_its_switch() -> None:
    figure = plot_mode_switching(curve(), [SWITCH], "a model")
    cosine, mse, fidelity, variances = figure.axes
    assert cosine.lines[0].get_ydata().tolist() == [10 / r for r in (64, 128, 192, 256)]
    assert mse.get_ylim()[0] == 0
    assert np.isnan(fidelity.lines[0].get_ydata()).tolist() == [False, True, False, False]  # infinite: a gap
    assert [line.get_label() for line in variances.lines] == ["student", "teacher"]
    assert all((p.patches[0].get_x(), p.patches[0].get_width()) == (192, 64) for p in figure.axes)


def test_accuracies_get_a_panel() -> None:
    figure = plot_mode_switching(curve(knn_top1=50.0, zero_shot_top1=40.0), [], "a model")
    assert [line.get_label() for line in figure.axes[4].lines] == ["knn top1", "zero shot top1"]


def test_statistics_get_panels_for_what_is_there() -> None:
    assert plot_feature_stats({}, "") is None
    figure = plot_feature_stats(details(), "a model")
    assert figure is not None
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "density of feature values",
        "variance of features along components",
        "largest singular value",
        "mean length of tokens",
        "entropy of attention, 1: even",
        "logits of attention",
    ]
    assert len(figure.axes[1].lines[0].get_ydata()) == 2  # rounding is not drawn
    assert sorted(figure.axes[4].lines[0].get_ydata()) == pytest.approx([0.45, 0.55])
    only_weights = plot_feature_stats({"weights": details()["weights"]}, "")
    assert only_weights is not None
    assert len(only_weights.axes) == 1


def test_correlations() -> None:
    figure = plot_correlations({"features": [1.0, 0.5]}, "two models")
    assert figure.axes[0].lines[0].get_label() == "features: sum 1.5 of 2"


def test_nothing_global_is_changed() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    plot_correlations({"features": [1.0]}, "")
    assert dict(matplotlib.rcParams) == before


def test_a_file_must_say_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"end it with one of \.png, \.svg, \.pdf"):
        save_plot(plot_correlations({"features": [1.0]}, ""), tmp_path / "plot.gif")


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match=r"Plots need matplotlib: pip install 'amradio\[viz\]'"):
        check_plots()


def test_strips_have_a_row_a_picture_and_gaps_where_a_map_is_missing() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = [
        SimpleNamespace(
            picture=picture,
            resolution=side,
            pixels=torch.full((3, side, side), 40 * picture, dtype=torch.uint8),
            features=torch.randn(side // 16, side // 16, 5, generator=generator),
        )
        for picture, side in ((0, 32), (0, 64), (1, 64))
    ]
    sheet = resolution_strips(maps, "a model", "a note")
    assert list(sheet.heads) == ["picture", "32 px", "64 px"]
    assert [len(row) for row in sheet.rows] == [3, 3]
    assert sheet.rows[1][0].picture.getpixel((0, 0)) == (40, 40, 40)
    assert sheet.rows[1][1].picture.getcolors() == [(150 * 150, (236, 236, 236))]
    assert len(sheet.rows[0][1].picture.getcolors()) == 4  # 2 x 2 patches, each of one colour
    assert draw_sheet(sheet).tobytes() == draw_sheet(resolution_strips(maps[::-1], "a model", "a note")).tobytes()
