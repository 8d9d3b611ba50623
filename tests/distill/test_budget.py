"""What a run will cost."""

import pytest

from amradio.distill.budget import run_cost
from amradio.distill.config import TeacherShape
from amradio.distill.cost import A100_PEAK, device_hours


def test_the_cost_of_a_run(config):
    small, large = run_cost(config()), run_cost(config(schedule__steps=60))
    assert small.record["images"] == 24
    assert set(small.record["teachers"]) == {"one", "two"}
    assert large.record["total"] == pytest.approx(10 * small.record["total"])
    r = small.record
    assert r["total"] == pytest.approx(6 * (r["student"] + sum(r["teachers"].values())))
    assert r["a100_hours"] == pytest.approx(device_hours(r["total"], A100_PEAK))
    assert "6 steps, 24 pictures shown" in small.text


def test_a_teacher_that_is_not_at_hand(config):
    vit = {"embed_dim": 12, "depth": 2, "num_heads": 2, "mlp_hidden_dim": 24, "patch_size": 8, "num_registers": 1}
    shape = {"summary_dim": 12, "embed_dim": 12, "vit": {**vit, "position_grid": [8, 8]}}
    described = config(teachers__0__shape=shape, teachers__0__backbone="timm:nothing")
    assert isinstance(described.teachers[0].shape, TeacherShape)
    loaded = run_cost(config()).record["teachers"]["one"]
    assert run_cost(described).record["teachers"]["one"] == pytest.approx(loaded)


def test_a_mosaic_costs_as_much_as_its_canvas(config):
    changes = {"teachers__0__summary": None, "partitions__0__sizes": [32]}
    one, four = (run_cost(config(**changes, teachers__0__mosaic=k)).record["teachers"]["one"] for k in (1, 2))
    assert one < four < 2 * one  # attention over the whole canvas costs more than that over its pictures
