"""Losses against loops and formulas, their gradients, and the weighing of teachers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from amradio.distill.losses import (
    FEATURE_LOSSES,
    SUMMARY_LOSSES,
    Dispersion,
    LossBalancer,
    drop_teachers,
    feature_loss,
    match_grids,
    overlap,
    squared_angle,
    summary_loss,
)
from amradio.errors import OptionError


def cosine(x: Tensor, y: Tensor) -> float:
    return float(x @ y / (x.norm() * y.norm()))


def smooth_l1(x: Tensor, y: Tensor) -> float:
    d = (x - y).abs()
    return float(torch.where(d < 1, d**2 / 2, d - 0.5).mean())


def at_position(kind: str, x: Tensor, y: Tensor) -> float:
    return {
        "mse": lambda: float(((x - y) ** 2).mean()),
        "cosine": lambda: 1 - cosine(x, y),
        "smooth-l1": lambda: smooth_l1(x, y),
        "cosine-smooth-l1": lambda: 0.9 * (1 - cosine(x, y)) + 0.1 * smooth_l1(x, y),
    }[kind]()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", FEATURE_LOSSES)
def test_features_equal_loops(kind: Any, masked: bool) -> None:
    x, y = torch.randn(3, 5, 2, 4) * 2, torch.randn(3, 5, 2, 4)
    valid = torch.rand(3, 1, 2, 4) < 0.5 if masked else torch.ones(3, 1, 2, 4, dtype=torch.bool)
    valid[0, 0, 0, 0] = True
    valid[2] = not masked
    found = feature_loss(kind, x, y, valid if masked else None)
    assert found.shape == (3,)
    for b in range(3):
        each = [
            at_position(kind, x[b, :, r, c], y[b, :, r, c]) for r in range(2) for c in range(4) if valid[b, 0, r, c]
        ]
        assert float(found[b]) == pytest.approx(sum(each) / len(each) if each else 0.0, abs=1e-5)


@pytest.mark.parametrize("kind", FEATURE_LOSSES)
def test_nothing_reaches_the_gradient_from_where_nothing_is_valid(kind: Any) -> None:
    x, y = torch.randn(2, 5, 2, 2, requires_grad=True), torch.randn(2, 5, 2, 2)
    y[:, :, 1, 1] = math.nan
    valid = torch.ones(2, 1, 2, 2, dtype=torch.bool)
    valid[:, :, 1, 1] = False
    feature_loss(kind, x, y, valid).sum().backward()
    assert x.grad is not None
    assert bool(torch.isfinite(x.grad).all())
    assert not x.grad[:, :, 1, 1].any()
    assert bool((x.grad[:, :, 0] != 0).any())


@pytest.mark.parametrize("kind", FEATURE_LOSSES)
def test_a_perfect_student_has_no_loss(kind: Any) -> None:
    x = torch.randn(2, 5, 3, 3)
    torch.testing.assert_close(feature_loss(kind, x, x), torch.zeros(2), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", SUMMARY_LOSSES)
def test_summaries_equal_formulas(kind: Any) -> None:
    x, y = torch.randn(4, 7), torch.randn(4, 7)
    found = summary_loss(kind, x, y, torch.tensor(0.7, dtype=torch.float64))
    for b in range(4):
        expected = {
            "cosine": 1 - cosine(x[b], y[b]),
            "mse": float(((x[b] - y[b]) ** 2).mean()),
            "balanced-angle": math.acos(cosine(x[b], y[b])) ** 2 / 0.7,
        }[kind]
        assert float(found[b]) == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_float32(dtype: torch.dtype) -> None:
    x, y = torch.randn(2, 6).to(dtype), torch.randn(2, 6).to(dtype)
    for kind in SUMMARY_LOSSES:
        found = summary_loss(kind, x, y, torch.tensor(1.0))  # type: ignore[arg-type]
        assert found.dtype == torch.float32
        assert torch.equal(found, summary_loss(kind, x.float(), y.float(), torch.tensor(1.0)))  # type: ignore[arg-type]
    for kind in FEATURE_LOSSES:
        assert feature_loss(kind, x.reshape(2, 3, 2, 1), y.reshape(2, 3, 2, 1)).dtype == torch.float32  # type: ignore[arg-type]


@pytest.mark.parametrize("angle", [1e-6, 1e-4, 0.01, 1.0, math.pi / 2, 3.0, 3.13])
def test_squared_angles_and_their_gradients(angle: float) -> None:
    phi = torch.tensor(angle, dtype=torch.float64, requires_grad=True)
    x = 3 * torch.stack([phi.cos(), phi.sin(), torch.zeros_like(phi)])
    y = torch.tensor([2.0, 0, 0], dtype=torch.float64)
    found = squared_angle(x, y)
    found.backward()
    assert found.item() == pytest.approx(angle**2, rel=1e-6, abs=1.1e-12)
    assert phi.grad is not None
    assert float(phi.grad) == pytest.approx(2 * angle, rel=1e-5, abs=3e-6)


def test_squared_angles_never_break() -> None:
    for x in (torch.tensor([1.0, 0]), torch.tensor([-1.0, 0]), torch.zeros(2)):
        x.requires_grad_()
        squared_angle(x, torch.tensor([1.0, 0])).backward()
        assert x.grad is not None
        assert bool(torch.isfinite(x.grad).all())


def test_dispersion_equals_its_definition_over_any_batches() -> None:
    summaries = torch.randn(50, 6) + 2
    summaries[:10] *= 100
    unit = F.normalize(summaries.double(), dim=-1)
    mean = F.normalize(unit.mean(0), dim=-1)
    expected = (unit @ mean).clamp(-1, 1).acos().square().mean()
    dispersion = Dispersion()
    for part in summaries.split([1, 30, 19]):
        dispersion.update(part)
    torch.testing.assert_close(dispersion.value(), expected, rtol=1e-6, atol=0)
    assert dispersion.value().dtype == torch.float64


def test_balanced_angles_do_not_favour_wide_cones() -> None:
    g = torch.Generator().manual_seed(0)
    losses = []
    for width in (0.05, 0.2):
        teacher = torch.randn(2000, 16, generator=g) * width + torch.eye(16)[0]
        dispersion = Dispersion()
        dispersion.update(teacher)
        mean = teacher.mean(0).expand_as(teacher)  # a student that has learned nothing but the mean direction
        losses.append(float(summary_loss("balanced-angle", mean, teacher, dispersion.value()).mean()))
    assert losses == pytest.approx([1.0, 1.0], rel=0.02)


def test_dispersion_over_processes() -> None:
    rows = torch.randn(20, 6) + 1
    whole, part = Dispersion(), Dispersion()
    whole.update(rows)
    part.update(rows[:8])
    other = F.normalize(rows[8:].double(), dim=-1).float()

    class Group:
        def all_gather_rows(self, own: Tensor) -> list[Tensor]:
            return [own, other]

    part.all_reduce(Group())  # type: ignore[arg-type]
    torch.testing.assert_close(part.value(), whole.value())


def test_dispersion_mistakes() -> None:
    with pytest.raises(OptionError, match="update it with summaries first"):
        Dispersion().value()
    with pytest.raises(OptionError, match="NaN or infinite"):
        Dispersion().update(torch.tensor([[math.nan, 1.0]]))
    same = Dispersion()
    same.update(torch.ones(5, 3) * torch.arange(1, 6)[:, None])
    with pytest.raises(OptionError, match="All 5 summaries of the teacher have the same direction"):
        same.value()


@pytest.mark.parametrize(
    ("direction", "grid"), [("student", (6, 4)), ("teacher", (3, 8)), ("smaller", (3, 4)), ("larger", (6, 8))]
)
def test_grids_meet_where_stated(direction: Any, grid: tuple[int, int]) -> None:
    student, teacher = torch.randn(2, 5, 3, 8).bfloat16(), torch.randn(2, 5, 6, 4)
    x, y = match_grids(student, teacher, direction)
    assert x.shape == y.shape == (2, 5, *grid)
    assert x.dtype == y.dtype == torch.float32
    if direction == "student":
        assert y is teacher
    if direction == "teacher":
        assert torch.equal(x, student.float())


@pytest.mark.parametrize("direction", ["student", "teacher", "smaller", "larger"])
def test_matching_keeps_constants_and_ramps(direction: Any) -> None:
    def ramp(h: int, w: int) -> Tensor:
        rows = (torch.arange(h) + 0.5) / h
        columns = (torch.arange(w) + 0.5) / w
        return torch.stack([torch.ones(h, w), rows[:, None].expand(h, w), columns.expand(h, w)])[None]

    x, y = match_grids(ramp(12, 12), ramp(16, 18), direction)
    inside = (..., slice(2, -2), slice(2, -2))
    torch.testing.assert_close(x[inside], y[inside], atol=3e-3, rtol=0)  # the filter is cut to whole positions


@settings(max_examples=50, deadline=None)
@given(h=st.integers(1, 6), w=st.integers(1, 6), data=st.data())
def test_overlap_is_what_both_see(h: int, w: int, data: Any) -> None:
    rows, columns = data.draw(st.integers(1 - h, h - 1)), data.draw(st.integers(1 - w, w - 1))
    scene = torch.arange(400.0).reshape(1, 1, 20, 20)
    student = scene[..., 7 : 7 + h, 7 : 7 + w]
    teacher = scene[..., 7 + rows : 7 + rows + h, 7 + columns : 7 + columns + w]
    x, y = overlap(student, teacher, (rows, columns))
    assert x.shape == (1, 1, h - abs(rows), w - abs(columns))
    assert torch.equal(x, y)


def test_dropping_keeps_the_worst_and_drops_others_as_often_as_asked() -> None:
    losses = torch.rand(3, 20_000, generator=torch.Generator().manual_seed(1))
    chance = torch.rand(3, 20_000, generator=torch.Generator().manual_seed(0))
    weights = drop_teachers(losses, 0.4, chance)
    worst = F.one_hot(losses.argmax(0), 3).T.bool()
    assert set(weights.unique().tolist()) == {0.0, 1.0}
    assert bool((weights[worst] == 1).all())
    assert float(weights[~worst].mean()) == pytest.approx(0.6, abs=0.01)
    assert bool((drop_teachers(losses, 0.0, chance) == 1).all())
    assert torch.equal(drop_teachers(losses[:, 5:9], 0.4, chance[:, 5:9]), weights[:, 5:9])  # picture by picture


def test_balancing_makes_contributions_equal() -> None:
    balancer = LossBalancer(["a", "b", "never"], 0.9)
    assert balancer.factors() == {"a": 1.0, "b": 1.0, "never": 1.0}
    balancer.update({"a": 4.0, "b": 1.0})
    factors = balancer.factors()
    assert factors == pytest.approx({"a": 2.5 / 4, "b": 2.5, "never": 1.0})  # 2.5 each: their sum stays 5
    for _ in range(200):
        balancer.update({"a": 1.0, "b": 9.0})
    factors = balancer.factors()
    assert factors["a"] == pytest.approx(5.0, rel=1e-4)
    assert factors["b"] == pytest.approx(5 / 9, rel=1e-4)
    again = LossBalancer(["a", "b", "never"], 0.9)
    again.load_state_dict(balancer.state_dict())
    assert again.factors() == factors
    balancer.update({"b": 0.0})
    assert balancer.factors()["a"] > 1


def test_mistakes_are_explained() -> None:
    x = torch.randn(2, 3)
    maps = torch.randn(2, 3, 4, 4)
    with pytest.raises(OptionError, match=r"Unknown summary loss 'cos'. Nearest names: cosine"):
        summary_loss("cos", x, x)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="Unknown feature loss 'l2'"):
        feature_loss("l2", maps, maps)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"\[2, 3\] of the student and \[2, 2\] of the teacher"):
        summary_loss("cosine", x, x[:, :2])
    with pytest.raises(OptionError, match="needs the dispersion"):
        summary_loss("balanced-angle", x, x)
    with pytest.raises(OptionError, match="Unknown direction 'both'"):
        match_grids(maps, maps, "both")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"\(4, 0\) cells apart have no common region"):
        overlap(maps, maps, (4, 0))
    with pytest.raises(OptionError, match=r"must be in \[0, 1\), got 1"):
        drop_teachers(x, 1.0, x)
    with pytest.raises(OptionError, match="momentum"):
        LossBalancer(["a"], 1.0)
    with pytest.raises(OptionError, match=r"There is no loss 'c' to balance"):
        LossBalancer(["a"], 0.5).update({"c": 1.0})
