"""Contact sheets: colours are those of Pascal VOC, and everything is on the page."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from amradio.viz.contact_sheet import VOID_COLOUR, class_colours, contact_sheet


def test_colours_are_those_of_pascal_voc() -> None:
    colours = class_colours()
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 3: (128, 128, 0), 4: (0, 0, 128), 8: (64, 0, 0)}
    known |= {15: (192, 128, 128), 20: (0, 64, 128), 255: VOID_COLOUR}
    assert {i: tuple(colours[i].tolist()) for i in known} == known
    assert len({tuple(c) for c in colours.tolist()}) == 256
    assert np.array_equal(class_colours(21), colours[:21])


@pytest.fixture
def sheet() -> Any:
    rng = np.random.default_rng(0)
    neighbour = SimpleNamespace(
        pixels=rng.integers(0, 256, (40, 40, 3)).astype(np.uint8), box=(16, 16, 8, 8), weight=0.25, label=1
    )
    patches = [SimpleNamespace(box=(8 * i, 16, 8, 8), label=i % 3, neighbours=(neighbour,) * (4 - i)) for i in range(3)]
    truth = rng.integers(0, 3, (90, 120)).astype(np.uint8)
    truth[:20] = 255
    return SimpleNamespace(
        id="picture",
        title="memory of all patches",
        image=rng.integers(0, 256, (48, 64, 3)).astype(np.uint8),
        truth=truth,
        prediction=np.full((90, 120), 2, np.uint8),
        class_names=("road", "sky", "a class with a name that is too long for its tile"),
        patches=patches,
    )


def test_everything_is_on_the_page(sheet: Any) -> None:
    page = contact_sheet(sheet)
    assert page.mode == "RGB"
    found = {tuple(c) for c in np.asarray(page).reshape(-1, 3).tolist()}
    assert {VOID_COLOUR, (128, 0, 0), (0, 128, 0), (255, 255, 255)} <= found
    assert np.array_equal(np.asarray(contact_sheet(sheet)), np.asarray(page))
    sheet.patches = sheet.patches[:1]
    assert contact_sheet(sheet).height < page.height


def test_small_pictures_and_no_patches(sheet: Any) -> None:
    sheet.patches = []
    sheet.image = sheet.image[:4, :4]
    assert contact_sheet(sheet).width > 3 * 300
