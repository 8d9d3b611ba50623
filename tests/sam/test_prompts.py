"""Prompts are checked before anything is computed, and the messages say what is wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from amradio.errors import OptionError
from amradio.sam.prompts import make_prompts

BOX = [[0.0, 0, 4, 4]]
POINT = [[[1.0, 2.0]]]


def make(points: Any = None, labels: Any = None, boxes: Any = None, masks: Any = None) -> Any:
    return make_prompts(points, labels, boxes, masks, 8)


def test_defaults_and_slices() -> None:
    found = make(points=np.zeros((5, 2, 2)), boxes=torch.zeros(5, 4))
    assert len(found) == 5
    assert found.labels.tolist() == [[1, 1]] * 5
    part = found[1:3]
    assert len(part) == 2
    assert part.points.shape == (2, 2, 2)
    assert part.masks is None
    assert len(make(masks=torch.zeros(3, 8, 8))) == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"There is no prompt: give points \[N, K, 2\], boxes \[N, 4\] or masks \[N, m, m\], N at least 1"),
        ({"boxes": np.zeros((0, 4))}, "There is no prompt"),
        ({"points": [[1.0, 2.0]]}, r"The points must be \[N, K, 2\]: K points for each of N objects; got .* \[1, 2\]"),
        ({"boxes": [0, 0, 4, 4]}, r"The boxes must be \[N, 4\]: a box for each of N objects; got the shape \[4\]"),
        (
            {"masks": np.zeros((1, 9, 9))},
            r"The masks must be \[N, 8, 8\]: the logits of an earlier prediction; got the shape \[1, 9, 9\]",
        ),
        (
            {"points": POINT, "boxes": BOX * 2},
            "Prompts of several kinds belong together one by one, and there are 1 points, 2 boxes",
        ),
        ({"boxes": BOX, "labels": [[1]]}, "Labels are of points, and no points were given"),
        (
            {"points": POINT, "labels": [1]},
            r"Labels must be \[N, K\] = \[1, 1\], one for each point, got the shape \[1\]",
        ),
        (
            {"points": POINT, "labels": [[2]]},
            r"The label of a point is 1 \(on the object\), 0 \(beside it\) or -1 \(no point\), got 2",
        ),
        (
            {"boxes": [*BOX, [5.0, 0, 4, 9]]},
            r"with x0 <= x1 and y0 <= y1; box 1 is \[5.0, 0.0, 4.0, 9.0\]. Boxes of COCO files are x, y, width",
        ),
        ({"boxes": [[0.0, 0, float("nan"), 1]]}, "The boxes have values that are not finite"),
        ({"boxes": [["a", "b", "c", "d"]]}, "The boxes are no array of numbers"),
        ({"points": [[[1.0, 2.0]], [[1.0, 2.0], [3.0, 4.0]]]}, "The points are no array of numbers"),
    ],
)
def test_what_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make(**given)
