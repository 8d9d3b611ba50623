"""What is minimised: shifted windows meet where they show the same, dropped teachers do not count."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from amradio.distill.draws import Draw
from amradio.distill.objective import Objective
from amradio.distill.stream import Loader, Planner, open_pictures
from amradio.distill.student import Prediction, Widths
from amradio.distill.targets import Targets

WIDTHS = {"one": Widths(12, 3), "two": Widths(10, 10)}
NOTHING = Draw(0, 0, 1)


@pytest.fixture
def colours(config):
    """A run whose teacher says the mean colour of each patch, by its own resolution, and pictures for it."""

    def make(shift, upsample, side):
        changes = {"teachers__0__features": {"balancing": "none", "upsample": upsample, "match": "student"},
                   "teachers__0__summary": None, "partitions__0__sizes": [64], "run__shift": shift}  # fmt: skip
        c = config(**changes)
        pictures = open_pictures(c.data)
        loader = Loader(pictures, Planner(c, len(pictures), 8), c.data, lambda plan: {side})
        return c, (batch for (batch,) in loader.batches(0, 12, [0]))

    return make


@pytest.mark.parametrize(("upsample", "side"), [(1, 64), (1, 128), (2, 128)])
def test_shifted_windows_meet_where_they_show_the_same(colours, upsample, side):
    """A student that describes its own window perfectly has no loss, whatever the shift; without it, it does."""
    c, batches = colours(2, upsample, side)
    objective = Objective(c, WIDTHS)
    shifts = set()
    for batch in batches:
        ours = F.avg_pool2d(batch.student.float() / 255, 8 // upsample)  # [B, 3, u*h, u*w]
        theirs = F.avg_pool2d(batch.teachers[side].float() / 255, side // 8)  # [B, 3, h, w]
        said = {"one": Prediction(torch.zeros(4, 12), ours)}
        targets = {"one": Targets(None, theirs)}
        loss, _ = objective(said, targets, batch.plan.shift, (8, 8), NOTHING)
        still, _ = objective(said, targets, (0, 0), (8, 8), NOTHING)
        if upsample > 1:  # the teacher is coarser than what the student says: only the order of magnitude is the same
            assert batch.plan.shift == (0, 0) or loss < 0.2 * still
        else:
            assert loss < 1e-4
            assert batch.plan.shift == (0, 0) or still > 20 * loss
        shifts.add(batch.plan.shift)
    assert len(shifts) > 5
    assert {-2, 2} <= {s for shift in shifts for s in shift}


def predictions(scale):
    torch.manual_seed(0)
    said = {n: Prediction(torch.randn(8, w.summary), torch.randn(8, w.features, 4, 4)) for n, w in WIDTHS.items()}
    theirs = {n: Targets(torch.randn(8, w.summary), torch.randn(8, w.features, 4, 4)) for n, w in WIDTHS.items()}
    theirs["two"] = Targets(*(t * scale for t in theirs["two"]))
    return said, theirs


def test_dropped_teachers_do_not_count_and_the_worst_always_does(config):
    losses = {"summary": {"loss": "mse"}, "features": {"loss": "mse", "balancing": "none"}}
    c = config(**{f"teachers__{i}__{k}": v for i in (0, 1) for k, v in losses.items()}, run__teacher_dropping=0.999)
    said, theirs = predictions(scale=10)
    dropped, numbers = Objective(c, WIDTHS)(said, theirs, (0, 0), (4, 4), Draw(0, 0, 8))
    torch.testing.assert_close(dropped, numbers["two/summary"] + numbers["two/features"])
    c = dataclasses.replace(c, run=dataclasses.replace(c.run, teacher_dropping=0.0))
    whole, _ = Objective(c, WIDTHS)(said, theirs, (0, 0), (4, 4), Draw(0, 0, 8))
    torch.testing.assert_close(whole, sum(numbers[f"{n}/{k}"] for n in WIDTHS for k in ("summary", "features")))


def test_dropping_in_parts_is_that_of_the_whole_batch(config):
    c = config(run__teacher_dropping=0.5, teachers__1__features={"upsample": 1})
    objective = Objective(c, WIDTHS)
    said, theirs = predictions(scale=1)

    def part(rows):
        some = {n: Prediction(*(t[rows] for t in p)) for n, p in said.items()}
        targets = {n: Targets(*(t[rows] for t in p)) for n, p in theirs.items()}
        return objective(some, targets, (0, 0), (4, 4), Draw(7, rows.start, 8))[0]

    whole = part(slice(0, 8))
    torch.testing.assert_close((part(slice(0, 4)) + part(slice(4, 8))) / 2, whole)


def test_balanced_losses_contribute_the_same(config):
    c = config(run__loss_balancing=True, teachers__1__features={"upsample": 1, "balancing": "none"})
    objective = Objective(c, WIDTHS)
    said, theirs = predictions(scale=100)
    _, numbers = objective(said, theirs, (0, 0), (4, 4), Draw(0, 0, 8))
    terms = {name: float(numbers[name]) for name in objective.weights}
    assert max(terms.values()) > 50 * min(terms.values())
    objective.balancer.update(terms)
    loss, _ = objective(said, theirs, (0, 0), (4, 4), Draw(0, 0, 8))
    torch.testing.assert_close(loss.double(), torch.tensor(sum(terms.values())).double(), rtol=1e-4, atol=1e-4)
    factors = objective.balancer.factors()
    contributions = [terms[name] * factors[name] for name in terms]
    assert max(contributions) == pytest.approx(min(contributions), rel=1e-6)
