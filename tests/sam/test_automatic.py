"""Automatic masks: every object of a picture that can be read by eye, once; and the parts against published tools."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from amradio.errors import OptionError
from amradio.sam import AutomaticMask, AutomaticOptions, SamDecoder, SamPredictor, SamVision, automatic_masks
from amradio.sam.automatic import crop_boxes, point_grid, stability

GROUND = (20, 20, 20)
THINGS = {  # x0, y0, x1, y1 on a grid of patches of 8 pixels: colour
    (8, 8, 40, 24): (220, 40, 40),
    (64, 16, 88, 56): (40, 220, 40),
    (16, 72, 104, 88): (40, 40, 220),
}


def scene(height: int = 96, width: int = 128) -> np.ndarray:
    pixels = np.full((height, width, 3), GROUND, dtype=np.uint8)
    for (x0, y0, x1, y1), colour in THINGS.items():
        pixels[y0:y1, x0:x1] = colour
    return pixels


@pytest.fixture
def predictor(colours: SimpleNamespace) -> SamPredictor:
    decoder = colours.Decoder()
    return SamPredictor(colours.Encoder(decoder), decoder)


def is_thing(mask: AutomaticMask, pixels: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return bool((mask.mask() == (pixels == colour).all(-1)).all())


def test_every_object_is_found_once(predictor: SamPredictor) -> None:
    pixels = scene()
    found = automatic_masks(predictor, Image.fromarray(pixels), AutomaticOptions(points_per_side=8))
    assert len(found) == len(THINGS) + 1
    for colour in (GROUND, *THINGS.values()):
        (one,) = [m for m in found if is_thing(m, pixels, colour)]
        assert one.area == (pixels == colour).all(-1).sum()
        x, y = one.point
        assert tuple(pixels[int(y), int(x)]) == colour
        assert one.stability == 1
        assert one.score == pytest.approx(0.95)
        assert one.crop == (0, 0, 128, 96)
    boxes = {m.box for m in found}
    assert {(x0, y0, x1 - 1, y1 - 1) for x0, y0, x1, y1 in THINGS} < boxes
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    assert automatic_masks(predictor, tensor, AutomaticOptions(points_per_side=8, points_per_batch=3)) == found


def test_records_as_sams_own_tools_write_them(predictor: SamPredictor) -> None:
    found = automatic_masks(predictor, Image.fromarray(scene()), AutomaticOptions(points_per_side=8))
    record = next(m for m in found if m.box == (8, 8, 39, 23)).to_coco()
    assert json.loads(json.dumps(record)) == record
    assert record["bbox"] == [8, 8, 31, 15]
    assert record["area"] == 32 * 16
    assert record["crop_box"] == [0, 0, 128, 96]
    assert record["segmentation"]["size"] == [96, 128]
    assert set(record) == {
        *("segmentation", "area", "bbox", "predicted_iou", "stability_score", "point_coords", "crop_box")
    }


def test_what_is_doubtful_is_left_out(colours: SimpleNamespace) -> None:
    picture = Image.fromarray(scene())
    doubtful = colours.Decoder(score=0.5)
    assert automatic_masks(SamPredictor(colours.Encoder(doubtful), doubtful), picture) == []
    sure = colours.Decoder()
    predictor = SamPredictor(colours.Encoder(sure), sure)
    assert automatic_masks(predictor, picture, AutomaticOptions(points_per_side=2, stability_offset=11.0)) == []
    assert automatic_masks(predictor, picture, AutomaticOptions(points_per_side=2, min_stability=1.0)) == []


def test_parts_of_the_picture_show_what_the_whole_does_not(predictor: SamPredictor) -> None:
    pixels = scene()
    pixels[56:68, 107:119] = (250, 250, 0)  # holds no patch of the whole picture, and some of an enlarged part
    whole = AutomaticOptions(points_per_side=16)
    parts = AutomaticOptions(points_per_side=16, crop_layers=1)
    picture = Image.fromarray(pixels)

    def small(options: AutomaticOptions) -> list[AutomaticMask]:
        found = automatic_masks(predictor, picture, options)
        return [m for m in found if m.area >= 80 and m.mask()[56:68, 107:119].sum() == m.area]

    assert not small(whole)
    (found,) = small(parts)
    assert found.crop == (48, 32, 128, 96)
    assert 107 <= found.point[0] < 119
    assert 56 <= found.point[1] < 68
    boxes = [m.box for m in automatic_masks(predictor, picture, parts)]
    assert len(set(boxes)) == len(boxes)


def test_small_holes_and_islands_are_removed(predictor: SamPredictor) -> None:
    pixels = scene()
    pixels[16:24, 80:88] = GROUND  # a hole at a corner would be none: inside
    pixels[32:40, 72:80] = GROUND
    picture = Image.fromarray(pixels)
    plain = automatic_masks(predictor, picture, AutomaticOptions(points_per_side=16))
    tidy = automatic_masks(predictor, picture, AutomaticOptions(points_per_side=16, min_region_area=100))
    (before,) = [m for m in plain if is_thing(m, pixels, (40, 220, 40))]
    (after,) = [m for m in tidy if m.point == before.point]
    assert after.area == before.area + 64
    assert after.score == before.score
    assert automatic_masks(predictor, picture, AutomaticOptions(points_per_side=16, min_region_area=1)) != tidy


def test_with_a_random_sam(sam_models: dict[str, Any]) -> None:
    predictor = SamPredictor(SamVision(sam_models["sam"]), SamDecoder(sam_models["sam"]))
    anything = {"min_score": -1e9, "stability_offset": 0.0}
    options = AutomaticOptions(points_per_side=4, crop_layers=1, **anything)  # type: ignore[arg-type]
    found = automatic_masks(predictor, Image.fromarray(scene()), options)
    assert found
    assert all(m.mask().shape == (96, 128) and m.mask().sum() == m.area for m in found)


def test_the_parts_are_those_of_transformers() -> None:
    theirs = pytest.importorskip("transformers.models.sam.image_processing_pil_sam")
    for height, width in ((480, 640), (333, 500), (97, 31)):
        for layers in range(4):
            boxes, indices = theirs._generate_per_layer_crops(layers, 512 / 1500, (height, width))
            ours = crop_boxes(height, width, layers, 512 / 1500)
            assert [list(c.box) for c in ours] == boxes
            assert [c.layer for c in ours] == indices
    for count in (1, 4, 32):
        grid = theirs._build_point_grid(count) * np.array([640, 480])
        np.testing.assert_allclose(point_grid(count, 480, 640).numpy(), grid)
    logits = torch.randn(5, 20, 30) * 3
    torch.testing.assert_close(stability(logits, 1.0), theirs._compute_stability_score(logits, 0.0, 1.0))
    assert stability(torch.full((1, 4, 4), -5.0), 1.0).tolist() == [0.0]


@pytest.mark.parametrize("name", ["points_per_side", "points_per_batch", "crop_points_factor"])
def test_options_that_are_none(name: str) -> None:
    with pytest.raises(OptionError, match=f"{name} must be at least 1, got 0"):
        AutomaticOptions(**{name: 0})
    with pytest.raises(OptionError, match="crop_layers must be at least 0, got -1"):
        AutomaticOptions(crop_layers=-1)
