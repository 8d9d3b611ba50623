"""With SAM's own image encoder the route is SAM: against `transformers`, whole, from the same pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from amradio.sam import Sam3Decoder, SamPredictor, SamVision, load_sam

KINDS = ("sam", "sam3")
PROMPTS = (("points",), ("boxes",), ("points", "boxes"))


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def predictor(folders: dict[str, Path], kind: str) -> SamPredictor:
    loaded = load_sam(folders[kind])
    return SamPredictor(loaded.vision, loaded.decoder, chunk=3)


def pixel_values(picture: Tensor, kind: str, side: int) -> tuple[Tensor, tuple[int, int]]:
    """What a published image processor makes of a picture, written anew: [1, 3, S, S], and the size inside."""
    image = Image.fromarray(picture.permute(1, 2, 0).numpy())
    if kind == "sam":
        scale = side / max(image.size)
        inner = (int(image.height * scale + 0.5), int(image.width * scale + 0.5))
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    else:
        inner, mean, std = (side, side), torch.full((3,), 0.5), torch.full((3,), 0.5)
    image = image.resize(inner[::-1], Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    values = torch.zeros(1, 3, side, side)
    values[0, :, : inner[0], : inner[1]] = (pixels - mean[:, None, None]) / std[:, None, None]
    return values, inner


def scaled(xy: np.ndarray, size: tuple[int, int], inner: tuple[int, int]) -> Tensor:
    factors = np.array([inner[1] / size[1], inner[0] / size[0]])
    shape = xy.shape
    return torch.from_numpy((xy.reshape(-1, 2) * factors).reshape(shape)).float()[None]


def restored(logits: Tensor, side: int, inner: tuple[int, int], size: tuple[int, int], kind: str) -> Tensor:
    maps = logits
    if kind == "sam":
        maps = torch.nn.functional.interpolate(maps, (side, side), mode="bilinear", align_corners=False)
        maps = maps[..., : inner[0], : inner[1]]
    return torch.nn.functional.interpolate(maps, size, mode="bilinear", align_corners=False) > 0


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("multimask", [True, False])
def test_masks_scores_and_logits_are_those_of_transformers(
    which: int,
    multimask: bool,
    kind: str,
    predictor: SamPredictor,
    sam_models: dict[str, Any],
    pictures: list[Tensor],
    prompts: Callable[..., SimpleNamespace],
) -> None:
    picture = pictures[which]
    size = (picture.shape[1], picture.shape[2])
    side = predictor.encoder.side
    values, inner = pixel_values(picture, kind, side)
    asked = prompts(5, *size)
    encoded = predictor.encode(picture)
    for names in PROMPTS:
        given: dict[str, Any] = {name: getattr(asked, name) for name in names}
        theirs: dict[str, Any] = {f"input_{name}": scaled(given[name], size, inner) for name in names}
        if "points" in names:
            given["labels"] = asked.labels
            theirs["input_labels"] = torch.from_numpy(asked.labels)[None]
        found = predictor.predict(encoded, **given, multimask=multimask)
        expected = [  # in the same parts, as sums of floating point numbers depend on them in the last digit
            sam_models[kind](
                pixel_values=values,
                multimask_output=multimask,
                **{name: value[:, start : start + 3] for name, value in theirs.items()},
            )
            for start in (0, 3)
        ]
        logits = torch.cat([e.pred_masks[0] for e in expected])
        assert torch.equal(found.logits, logits), names
        assert torch.equal(found.scores, torch.cat([e.iou_scores[0] for e in expected])), names
        masks = torch.cat([restored(one[None], side, inner, size, kind) for one in logits])
        assert found.masks.shape == (5, 3 if multimask else 1, *size)
        assert torch.equal(found.masks, masks), names
        assert 0.02 < masks.float().mean() < 0.98  # or nothing would be shown


def test_mask_prompts_are_those_of_transformers(
    kind: str, predictor: SamPredictor, sam_models: dict[str, Any], pictures: list[Tensor]
) -> None:
    picture = pictures[0]
    values, inner = pixel_values(picture, kind, predictor.encoder.side)
    encoded = predictor.encode(picture)
    boxes = np.array([[5.0, 5, 40, 30], [20, 10, 60, 45]])
    earlier = predictor.predict(encoded, boxes=boxes).best().logits[:, 0]
    for given in ({}, {"boxes": boxes}):
        found = predictor.predict(encoded, masks=earlier, multimask=False, **given)
        for i in range(2):
            theirs = {"input_boxes": scaled(boxes[i : i + 1], (50, 70), inner)} if given else {}
            expected = sam_models[kind](
                pixel_values=values, input_masks=earlier[i][None, None].clone(), multimask_output=False, **theirs
            )
            torch.testing.assert_close(found.logits[i], expected.pred_masks[0, 0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(found.scores[i], expected.iou_scores[0, 0], rtol=1e-4, atol=1e-4)


def test_one_picture_at_a_time_or_several_together(predictor: SamPredictor, pictures: list[Tensor]) -> None:
    together = predictor.encode_batch([predictor.prepare(p) for p in pictures])
    for picture, encoded in zip(pictures, together, strict=True):
        alone = predictor.encode(picture)
        assert encoded.frame == alone.frame
        for ours, theirs in zip(encoded.embedding, alone.embedding, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_pixels_are_those_of_the_published_processor(folders: dict[str, Path], pictures: list[Tensor]) -> None:
    processing = pytest.importorskip("transformers.models.sam.image_processing_pil_sam")
    predictor = SamPredictor(*reversed(load_sam(folders["sam"])))
    side = predictor.encoder.side
    compared = 0
    processor = processing.SamImageProcessorPil(size={"longest_edge": side}, pad_size={"height": side, "width": side})
    for picture in pictures:
        theirs = processor(Image.fromarray(picture.permute(1, 2, 0).numpy()), return_tensors="pt")
        ours, inner = pixel_values(picture, "sam", side)
        # The Pillow edition rounds sizes down; compared where both say the same.
        if tuple(theirs["reshaped_input_sizes"][0].tolist()) == inner:
            compared += 1
            torch.testing.assert_close(ours, theirs["pixel_values"], rtol=0, atol=1e-5)
        assert tuple(theirs["original_sizes"][0].tolist()) == tuple(picture.shape[1:])
    assert compared


@pytest.mark.parametrize("scales", [(4.0, 2.0, 1.0), (4.0, 2.0, 1.0, 0.5)])
def test_sam3_with_necks_that_make_three_or_four_maps(
    scales: tuple[float, ...], make_tracker: Callable[..., Any], pictures: list[Tensor]
) -> None:
    model = make_tracker(scales)
    predictor = SamPredictor(SamVision(model), Sam3Decoder(model))
    values, inner = pixel_values(pictures[1], "sam3", predictor.encoder.side)
    maps = model.get_image_embeddings(values)
    if len(scales) == 4:  # what is learned for "no memory" is lost there: on a map that nothing reads
        maps[-1] = maps[-1] + model.no_memory_embedding.view(1, -1, 1, 1)
    expected = model(image_embeddings=maps, input_boxes=scaled(np.array([[3.0, 4, 30, 60]]), (70, 41), inner))
    found = predictor.predict(pictures[1], boxes=[[3.0, 4, 30, 60]])
    assert torch.equal(found.logits, expected.pred_masks[0])
    assert len(predictor.encode(pictures[1]).embedding) == 3
