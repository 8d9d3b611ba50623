"""Where pictures lie in the encoder's square: against slow references, and as laws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from amradio.errors import OptionError
from amradio.sam.frame import Frame

SIDES = st.integers(1, 5000)


@given(height=SIDES, width=SIDES, side=st.sampled_from([64, 896, 1024]))
def test_the_longest_side_fills_the_square(height: int, width: int, side: int) -> None:
    frame = Frame.of(height, width, side)
    assert max(frame.inner) == side
    assert min(frame.inner) >= 1
    for inner, size in zip(frame.inner, (height, width), strict=True):
        exact = size * side / max(height, width)
        assert inner == max(int(exact + 0.5), 1)
        assert abs(inner - exact) <= 0.5 or inner == 1


@given(height=SIDES, width=SIDES, data=st.data(), placement=st.sampled_from(["pad", "stretch"]))
def test_coordinates_go_by_sams_rule(height: int, width: int, data: st.DataObject, placement: str) -> None:
    frame = Frame.of(height, width, 1024, placement)  # type: ignore[arg-type]
    x, y = data.draw(st.floats(0, width)), data.draw(st.floats(0, height))
    xy = torch.tensor([[x, y]], dtype=torch.float64)
    there = frame.to_square(xy, 1024)
    # SAM's rule in plain numbers: each axis by the ratio of the rounded sizes.
    new_h, new_w = (1024, 1024) if placement == "stretch" else frame.inner
    expected = np.array([x * (new_w / width), y * (new_h / height)])
    np.testing.assert_allclose(there[0].numpy(), expected.astype(np.float32), rtol=1e-6)
    assert 0 <= there[0, 0] <= new_w
    assert 0 <= there[0, 1] <= new_h
    # Affine: the middle of two points goes to the middle.
    middle = frame.to_square(xy / 2, 1024)
    np.testing.assert_allclose(middle.numpy(), there.numpy() / 2, rtol=1e-6)


@pytest.mark.parametrize(("side", "prompt_side"), [(896, 1024), (1152, 1008), (1024, 1024)])
def test_an_encoder_with_other_patches_changes_no_prompt(side: int, prompt_side: int) -> None:
    ours = Frame.of(480, 640, side).to_square(torch.tensor([[100.0, 50.0], [640, 480]]), prompt_side)
    expected = torch.tensor([[100.0, 50.0], [640, 480]]) * prompt_side / 640
    torch.testing.assert_close(ours, expected, rtol=0, atol=0.51 * prompt_side / side)  # rounding of the inner size


def bilinear(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resampling with half-pixel centres, pixel by pixel."""
    out = np.zeros((height, width))
    for i in range(height):
        for j in range(width):
            y = max((i + 0.5) * values.shape[0] / height - 0.5, 0)
            x = max((j + 0.5) * values.shape[1] / width - 0.5, 0)
            top, left = int(y), int(x)
            bottom, right = min(top + 1, values.shape[0] - 1), min(left + 1, values.shape[1] - 1)
            a, b = y - top, x - left
            out[i, j] = (1 - a) * ((1 - b) * values[top, left] + b * values[top, right]) + a * (
                (1 - b) * values[bottom, left] + b * values[bottom, right]
            )
    return out


@pytest.mark.parametrize("placement", ["pad", "stretch"])
@pytest.mark.parametrize("size", [(20, 31), (31, 20), (12, 12), (3, 40)])
def test_masks_are_scaled_up_and_unpadded(placement: str, size: tuple[int, int]) -> None:
    frame = Frame.of(*size, 32, placement)  # type: ignore[arg-type]
    logits = torch.randn(2, 3, 8, 8)
    found = frame.restore(logits)
    assert found.shape == (2, 3, *size)
    for n in range(2):
        for m in range(3):
            values = logits[n, m].double().numpy()
            if placement == "pad":
                values = bilinear(values, 32, 32)[: frame.inner[0], : frame.inner[1]]
            np.testing.assert_allclose(found[n, m].numpy(), bilinear(values, *size), atol=1e-5)


def test_what_lies_in_the_padding_does_not_show() -> None:
    frame = Frame.of(16, 32, 32)
    logits = torch.full((1, 1, 8, 8), -1.0)
    logits[..., 5:, :] = 1  # rows 20 and below of the square; the picture ends at 16
    assert (frame.restore(logits) <= 0).all()
    assert frame.restore(torch.zeros(0, 3, 8, 8)).shape == (0, 3, 16, 32)


def test_sizes_that_are_none() -> None:
    with pytest.raises(OptionError, match=r"A picture of 0 x 5 \(height x width\) has no place in a square of 1024"):
        Frame.of(0, 5, 1024)
