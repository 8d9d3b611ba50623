"""Points, boxes and masks meet at the same place: with an encoder and a decoder that can be read by eye."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from amradio.sam import SamPredictor

BACK, FRONT = (40, 60, 80), (220, 120, 30)


def picture_of(height: int, width: int, box: tuple[int, int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A rectangle on a ground: uint8 [3, H, W], and its mask."""
    mask = torch.zeros(height, width, dtype=torch.bool)
    x0, y0, x1, y1 = box
    mask[y0:y1, x0:x1] = True
    return torch.where(mask, torch.tensor(FRONT)[:, None, None], torch.tensor(BACK)[:, None, None]).byte(), mask


# The encoder's square has 16 x 16 patches of 8 pixels; pictures of these sizes fill it at scales 1, 2, 1/2.
@pytest.mark.parametrize(("height", "width"), [(128, 128), (64, 128), (128, 96), (32, 64), (256, 192)])
@pytest.mark.parametrize(("row", "column"), [(0, 0), (1, 2), (3, 1)])
def test_a_shift_by_whole_patches_shifts_the_mask(
    height: int, width: int, row: int, column: int, colours: SimpleNamespace
) -> None:
    decoder = colours.Decoder()
    predictor = SamPredictor(colours.Encoder(decoder), decoder)
    patch = 8 * max(height, width) // 128  # in pixels of the picture
    x0, y0 = column * patch, row * patch
    box = (x0, y0, x0 + 3 * patch, y0 + 2 * patch)
    picture, truth = picture_of(height, width, box)
    corners = 4 if max(height, width) > 128 else 0  # scaled up twice, a rectangle loses the pixels at its corners
    inside, beside = [x0 + 1.5 * patch, y0 + patch * 0.5], [x0 + 3.5 * patch, y0 + patch * 0.5]
    by_point = predictor.predict(picture, points=[[inside], [beside]], multimask=False).masks[:, 0]
    assert (by_point[0] ^ truth).sum() <= corners
    assert (by_point[1] ^ ~truth).sum() <= corners
    by_box = predictor.predict(picture, boxes=[list(box)], multimask=True)
    assert (by_box.masks[0, 0] ^ truth).sum() <= corners
    assert torch.equal(by_box.best().masks[0, 0], by_box.masks[0, 0])


def test_stretched_pictures(colours: SimpleNamespace) -> None:
    decoder = colours.Decoder("stretch")
    predictor = SamPredictor(colours.Encoder(decoder), decoder)
    picture, truth = picture_of(64, 128, (16, 8, 48, 24))  # patches are 8 wide and 4 high here
    assert torch.equal(predictor.predict(picture, boxes=[[16, 8, 48, 24]], multimask=False).masks[0, 0], truth)
    assert torch.equal(predictor.predict(picture, points=[[[20, 10]]], multimask=False).masks[0, 0], truth)


@pytest.mark.parametrize("placement", ["pad", "stretch"])
@pytest.mark.parametrize("patch", [7, 8])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(
    height=st.integers(20, 300),
    width=st.integers(20, 300),
    left=st.floats(0, 0.6),
    top=st.floats(0, 0.6),
    share=st.floats(0.2, 0.4),
)
def test_a_box_comes_back_where_it_was(
    placement: str,
    patch: int,
    colours: SimpleNamespace,
    height: int,
    width: int,
    left: float,
    top: float,
    share: float,
) -> None:
    decoder = colours.Decoder(placement)
    predictor = SamPredictor(colours.Encoder(decoder, patch), decoder)
    box = np.array([left * width, top * height, (left + share) * width, (top + share) * height])
    picture = torch.zeros(3, height, width, dtype=torch.uint8)
    (mask,) = predictor.predict(picture, boxes=box[None], multimask=False).masks[0]
    rows, columns = mask.nonzero().T.numpy()
    found = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    cell = np.array([width, height, width, height]) / 64  # of the low-resolution mask
    if placement == "pad":
        cell = np.full(4, max(height, width) / 64)
    assert (np.abs(found - box) <= cell + 1).all()


def test_padding_has_the_encoders_colour_of_zero(colours: SimpleNamespace) -> None:
    decoder = colours.Decoder()
    encoder = colours.Encoder(decoder)
    picture, _ = picture_of(64, 128, (0, 0, 8, 8))
    SamPredictor(encoder, decoder).encode(picture)
    (seen,) = encoder.seen
    assert torch.equal(seen[0, :, :64], picture.float() / 255)
    assert (seen[0, :, 64:] == encoder.fill[:, None, None]).all()
