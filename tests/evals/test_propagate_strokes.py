from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from amradio.errors import OptionError
from amradio.evals.propagate_strokes import Carried, Stroke, carry, paint, remember, settle

VOID = 255


def test_strokes_are_painted_in_order() -> None:
    line = Stroke(1, 0.05, ((0.1, 0.5), (0.9, 0.5)))
    across = Stroke(2, 0.05, ((0.5, 0.1), (0.5, 0.9)))
    mask = paint([line, across], (100, 100))
    assert mask.dtype == np.uint8
    assert (mask[50, 20], mask[20, 50], mask[50, 50], mask[5, 5]) == (1, 2, 2, VOID)
    area = 0.8 * 100 * 10 + math.pi * 25
    assert (paint([line], (100, 100)) == 1).sum() == pytest.approx(area, rel=0.12)
    wiped = paint([line, Stroke(VOID, 0.5, ((0.5, 0.5),))], (100, 100))
    assert (wiped == VOID).all()


def test_a_dot_is_round_and_never_nothing() -> None:
    mask = paint([Stroke(3, 0.1, ((0.5, 0.5),))], (100, 200))
    assert (mask == 3).sum() == pytest.approx(math.pi * 20**2, rel=0.08)
    assert (paint([Stroke(3, 0.0, ((0.5, 0.5),))], (50, 50)) == 3).any()
    assert (paint([], (5, 7)) == VOID).all()


@pytest.mark.parametrize(
    ("label", "radius", "points"),
    [(-1, 0.1, ((0, 0),)), (256, 0.1, ((0, 0),)), (1, 1.1, ((0, 0),)), (1, 0.1, ()), (1, 0.1, ((0, math.nan),))],
)
def test_strokes_that_cannot_be(label: int, radius: float, points: tuple[tuple[float, float], ...]) -> None:
    with pytest.raises(OptionError, match="A stroke has a label from 0 to 255"):
        Stroke(label, radius, points)


def two_kinds(h: int = 6, w: int = 8) -> tuple[torch.Tensor, np.ndarray]:
    """Features with the left half of one kind and the right half of another, and where they are."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.eye(2, 16)
    which = np.zeros((h, w), np.int64)
    which[:, w // 2 :] = 1
    return kinds[which] + 0.02 * torch.randn(h, w, 16, generator=generator), which


def test_labels_follow_features() -> None:
    features, which = two_kinds()
    mask = np.full((48, 64), VOID, np.uint8)
    mask[20:30, 4:12] = 0
    mask[20:30, 50:60] = 1
    memory = remember([(features, mask)], 2)
    assert len(memory.features) == 8  # patches of 8 x 8 pixels that were touched
    torch.testing.assert_close(memory.features.norm(dim=1), torch.ones(8))
    found = carry(memory, features.flip(1))
    assert (found.shares.argmax(2).numpy() == which[:, ::-1]).all()
    torch.testing.assert_close(found.shares.sum(2), torch.ones(6, 8))
    assert settle(found, (60, 80)).shape == (60, 80)
    assert (settle(found, (60, 80)).numpy()[:, [5, 75]] == [1, 0]).all()


def test_what_is_like_no_thing_is_background() -> None:
    features, which = two_kinds()
    mask = np.full((6, 8), VOID, np.uint8)
    mask[2, 1] = 1
    memory = remember([(features, mask)], 2)
    found = carry(memory, features)
    assert (settle(found, (6, 8)) == 1).all()
    assert (settle(found, (6, 8), 0.5).numpy() == 1 - which).all()
    assert found.similarity.shape == (6, 8)
    only_ground = remember([(features, np.zeros((6, 8), np.uint8))], 1)
    assert (carry(only_ground, features).similarity == -1).all()


def test_examples_are_used_together() -> None:
    features, which = two_kinds()
    masks = [np.full((6, 8), VOID, np.uint8) for _ in range(2)]
    masks[0][1, 1], masks[1][1, 6] = 2, 5
    found = carry(remember([(features, masks[0]), (features, masks[1])], 6), features)
    assert (settle(found, (6, 8)).numpy() == np.where(which == 1, 5, 2)).all()


def test_refusals() -> None:
    features, _ = two_kinds()
    empty = np.full((6, 8), VOID, np.uint8)
    with pytest.raises(OptionError, match="Nothing is labelled yet"):
        remember([(features, empty)], 2)
    with pytest.raises(OptionError, match="does not fit 6 x 8 patches"):
        remember([(features, np.zeros((12, 8), np.uint8))], 2)
    with pytest.raises(OptionError, match=r"has the class 7; classes are below 2\."):
        remember([(features, np.full((6, 8), 7, np.uint8))], 2)
    with pytest.raises(OptionError):
        carry(remember([(features, np.zeros((6, 8), np.uint8))], 1), features[..., :3])


def test_settling_needs_no_memory() -> None:
    shares = torch.zeros(2, 2, 3)
    shares[..., 2] = 1
    assert (settle(Carried(shares, torch.ones(2, 2)), (4, 4), 0.9) == 2).all()
