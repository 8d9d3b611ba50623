"""Heat maps."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from amradio.errors import MissingDependencyError, OptionError
from amradio.viz import colour_bar, heat_picture, heat_rgb, limits_of, overlay, spotlight
from amradio.viz.heat import colour_table


def test_limits_are_the_ends_of_the_colours() -> None:
    table = colour_table("ember")
    found = heat_rgb(torch.tensor([[-1.0, 0.0], [0.5, 2.0]]), limits=(0.0, 1.0)).numpy()
    np.testing.assert_array_equal(found[0, 0], table[0])
    np.testing.assert_array_equal(found[0, 1], table[0])
    np.testing.assert_array_equal(found[1, 1], table[255])
    np.testing.assert_array_equal(found[1, 0], table[128])
    assert (heat_rgb(torch.ones(2, 2)) == torch.from_numpy(table[128])).all()  # no range: the middle


def test_the_default_gets_lighter_all_the_way() -> None:
    table = colour_table("ember").astype(np.float64)
    linear = np.where(table <= 0.04045, table / 12.92, ((table + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(luminance) > 0).all()
    assert luminance[0] < 0.01
    assert luminance[-1] > 0.8


def test_colour_maps_of_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    expected = matplotlib.colormaps["viridis"](np.linspace(0, 1, 256))[:, :3]
    np.testing.assert_allclose(colour_table("viridis"), expected, atol=1e-6)
    with pytest.raises(OptionError, match=r"no colour map 'viridi'. Nearest names: viridis"):
        colour_table("viridi")


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    colour_table.cache_clear()
    assert heat_rgb(torch.rand(2, 2)).shape == (2, 2, 3)
    with pytest.raises(MissingDependencyError, match=r"'magma' is not one of ember, grey; .*amradio\[viz\]"):
        colour_table("magma")


def test_values_are_interpolated_and_then_coloured() -> None:
    values = torch.tensor([[0.0, 1.0]])
    picture = np.asarray(heat_picture(values, (1, 4), colour_map="grey", limits=(0, 1)))
    expected = np.asarray(heat_picture(torch.tensor([[0.0, 0.25, 0.75, 1.0]]), (1, 4), colour_map="grey"))
    np.testing.assert_array_equal(picture, expected)


def test_overlay_takes_colours_out_of_the_photo() -> None:
    photo, heat = Image.new("RGB", (2, 2), (200, 20, 20)), Image.new("RGB", (2, 2), (0, 100, 200))
    grey = photo.convert("L").getpixel((0, 0))
    assert overlay(photo, heat, 0.0).getpixel((0, 0)) == (grey, grey, grey)
    assert overlay(photo, heat, 1.0).getpixel((0, 0)) == (0, 100, 200)
    assert overlay(photo, heat, 0.5).getpixel((1, 1)) == pytest.approx((grey / 2, grey / 2 + 50, grey / 2 + 100), abs=1)
    with pytest.raises(OptionError, match="opacity is from 0 to 1, got 2"):
        overlay(photo, heat, 2)
    with pytest.raises(OptionError, match=r"The photo is \(2, 2\) pixels"):
        overlay(photo, heat.resize((3, 2)))


def test_a_spotlight_shows_the_photo_where_values_are_high() -> None:
    photo = Image.new("RGB", (4, 2), (200, 100, 50))
    pixels = np.asarray(spotlight(photo, torch.tensor([[0.0, 1.0]]), (0.0, 1.0), "nearest"))
    assert (pixels[:, 2:] >= np.array([198, 98, 48])).all()  # the last grey may be rounded
    assert not pixels[:, :2].any()


def test_the_bar_runs_from_left_to_right() -> None:
    bar = np.asarray(colour_bar("grey", (3, 16)))
    assert bar.shape == (3, 16, 3)
    assert (np.diff(bar[0, :, 0].astype(int)) > 0).all()
    assert (bar[0, 0, 0], bar[0, -1, 0]) == (0, 255)


def test_refusals() -> None:
    with pytest.raises(OptionError, match="needs finite values, and at least one"):
        limits_of([])
    with pytest.raises(OptionError, match="needs finite values"):
        heat_rgb(torch.tensor([0.0, torch.nan]))
    with pytest.raises(OptionError, match=r"limits in rising order, got the limits 1\.0 and 0\.0"):
        heat_rgb(torch.zeros(2), limits=(1.0, 0.0))
