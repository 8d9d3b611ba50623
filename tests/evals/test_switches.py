"""Switches: found where there is a step, and not where a curve is smooth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amradio.errors import OptionError
from amradio.evals.switches import find_switches

COARSE = list(range(64, 1025, 64))
FINE = list(range(192, 1537, 16))
GROWTH = {
    "flat": lambda r: 0.3 + 0 * r,
    "falls as a power": lambda r: 40 / r,
    "decays": lambda r: 0.2 + 0.8 * np.exp(-r / 90),
    "valley": lambda r: 0.2 + 0.3 * np.log(r / 300) ** 2,
    "grows": lambda r: 0.1 + 0.5 * np.log(r / 64) / np.log(16),
    "bends": lambda r: 0.2 + 0.6 * np.maximum(np.log(r / 500), 0),
}


def pictures(curve: np.ndarray, count: int = 8, noise: float = 0.0, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    spread = rng.normal(0, 0.05, count) + noise * rng.normal(size=(len(curve), count))
    return curve[:, None] + spread


@pytest.mark.parametrize("sweep", [COARSE, FINE])
@pytest.mark.parametrize("name", GROWTH)
def test_a_smooth_curve_has_no_switch(name: str, sweep: list[int]) -> None:
    r = np.array(sweep, float)
    verdict = find_switches(sweep, pictures(GROWTH[name](r), noise=0.003))
    assert verdict.switches == ()
    assert str(verdict).startswith("No switch between")
    assert verdict.at_end is None


@pytest.mark.parametrize(("first", "low", "high"), [(0, 896, 960), (0, 960, 1024), (0, 64, 128), (1, 128, 192)])
def test_a_step_at_an_end_of_the_sweep_is_named_and_not_judged(first: int, low: int, high: int) -> None:
    sweep = COARSE[first:]
    verdict = find_switches(sweep, pictures(0.25 + 0.65 * (np.array(sweep) > low), noise=0.003))
    assert verdict.switches == ()
    assert verdict.at_end is not None
    assert (verdict.at_end.low, verdict.at_end.high) == (low, high)
    assert verdict.at_end.after - verdict.at_end.before == pytest.approx(0.65, abs=0.01)
    assert verdict.searched is not None
    words = f"No switch between {verdict.searched[0]} and {verdict.searched[1]} px. But between {low} and {high} px, at"
    assert str(verdict).startswith(words)


def test_a_switch_inside_and_a_step_at_the_end() -> None:
    r = np.array(COARSE, float)
    verdict = find_switches(COARSE, pictures(0.2 + 0.2 * (r > 320) + 0.6 * (r > 960), noise=0.003))
    assert [s.low for s in verdict.switches] == [320]
    assert "But between 960 and 1024 px" in str(verdict)


@pytest.mark.parametrize("sweep", [COARSE, FINE])
@pytest.mark.parametrize("name", GROWTH)
@pytest.mark.parametrize("size", [0.15, -0.15])
def test_a_step_is_found_at_its_place_and_with_its_size(name: str, size: float, sweep: list[int]) -> None:
    r = np.array(sweep, float)
    verdict = find_switches(sweep, pictures(GROWTH[name](r) + size * (r > 720), noise=0.003))
    (switch,) = verdict.switches
    assert switch.low <= 720 < switch.high
    assert switch.high - switch.low == sweep[1] - sweep[0]
    assert switch.size == pytest.approx(size, abs=0.05)
    assert switch.agreement == 1
    assert f"Switch between {switch.low} and {switch.high} px" in str(verdict)


def test_a_switch_may_be_spread_over_some_points() -> None:
    r = np.array(FINE, float)
    verdict = find_switches(FINE, pictures(0.3 + 0.2 / (1 + np.exp(-(r - 720) / 12))))
    (switch,) = verdict.switches
    assert 660 < switch.low < 720 < switch.high < 780
    assert switch.size == pytest.approx(0.2, abs=0.02)


def test_a_bend_is_said_to_be_one() -> None:
    verdict = find_switches(COARSE, pictures(np.maximum(np.log(np.array(COARSE) / 500), 0)))
    assert str(verdict).endswith("is a bend of the curve and no step.")


def test_two_switches_largest_first() -> None:
    r = np.array(FINE, float)
    verdict = find_switches(FINE, pictures(0.1 + 0.1 * (r > 400) + 0.3 * (r > 900)))
    assert [(s.low, s.high) for s in verdict.switches] == [(896, 912), (400, 416)]


def test_one_odd_resolution_is_no_switch() -> None:
    r = np.array(FINE, float)
    assert find_switches(FINE, pictures(0.1 + 0.4 * (r == 720))).switches == ()


def test_a_step_of_few_pictures_is_no_switch() -> None:
    values = pictures(np.full(len(COARSE), 0.2), noise=0.01)
    values[11:, :2] += 0.8
    verdict = find_switches(COARSE, values)
    assert verdict.switches == ()
    assert verdict.largest is not None
    assert abs(verdict.largest.size) > 0.1
    assert str(verdict).endswith("shows in 25 % of the pictures only.")


def test_a_small_step_is_below_the_threshold_that_is_asked_for() -> None:
    r = np.array(COARSE, float)
    values = pictures(0.2 + 0.04 * (r > 500))
    assert str(find_switches(COARSE, values)).endswith("is below 0.05.")
    assert len(find_switches(COARSE, values, least_size=0.03).switches) == 1


@settings(max_examples=30, deadline=None)
@given(st.floats(0.05, 5), st.floats(-3, 3), st.integers(0, 99))
def test_scale_and_offset_of_the_error_change_nothing_else(scale: float, offset: float, seed: int) -> None:
    values = pictures(0.2 + 0.2 * (np.array(COARSE) > 500), noise=0.01, seed=seed)
    one = find_switches(COARSE, values)
    other = find_switches(COARSE, scale * values + offset, least_size=scale * one.least_size)
    assert [(s.low, s.high) for s in one.switches] == [(s.low, s.high) for s in other.switches]
    assert [scale * s.size for s in one.switches] == pytest.approx([s.size for s in other.switches])


def test_missing_pictures_are_left_out() -> None:
    values = pictures(0.2 + 0.2 * (np.array(COARSE) > 500))
    values[-1, 0] = np.nan
    assert len(find_switches(COARSE, values).switches) == 1
    with pytest.raises(OptionError, match="No picture has an error at every resolution"):
        find_switches(COARSE, values[:, :1])


def test_too_short_a_sweep_has_no_verdict() -> None:
    verdict = find_switches([224, 240], np.zeros((2, 3)))
    assert verdict.largest is None
    assert str(verdict).startswith("No verdict: too few resolutions")


@pytest.mark.parametrize("resolutions", [[224, 200, 300], [100, 200], [100, 100, 200]])
def test_what_is_no_sweep(resolutions: list[int]) -> None:
    with pytest.raises(OptionError, match=r"ascending resolutions, got \[3, 2\]"):
        find_switches(resolutions, np.zeros((3, 2)))
