"""All masks of a picture without prompts: a grid of points is asked, and what is doubtful or double is left out.

The method of Kirillov et al., arXiv 2304.02643, appendix B, with the published defaults.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from amradio.errors import OptionError
from amradio.images.decode import to_uint8_tensor
from amradio.sam import rle as runs
from amradio.sam.boxes import mask_boxes, nms
from amradio.sam.predictor import EncodedImage, SamPredictor
from amradio.sam.regions import without_small_regions
from amradio.sam.rle import Rle

if TYPE_CHECKING:
    from PIL.Image import Image

_EDGE = 20  # pixels from the edge of a crop at which a mask is taken to be cut off
_RESTORED_AT_ONCE = 16

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class AutomaticOptions:
    """What is asked, and what is left out.

    Attributes:
        points_per_side: Of the grid of points over the picture.
        points_per_batch: Points that are decoded together.
        min_score: Masks whose predicted IoU is not above this are left out.
        min_stability: Masks whose stability (`stability`) is not above this are left out.
        stability_offset: By how much the threshold of logits is moved for that.
        box_nms: Of two masks whose boxes overlap by more than this, the one with the lower score is left out.
        crop_layers: Ask again in enlarged parts of the picture: 4 in the first layer, 16 in the second, ...
        crop_nms: As `box_nms`, between parts; what comes from the smaller part stays.
        crop_overlap: Of the parts of the first layer, as a share of the picture's shorter side.
        crop_points_factor: By this the points per side become fewer with each layer.
        min_region_area: Holes and islands with fewer pixels are removed; 0 leaves masks as they are.
    """

    points_per_side: int = 32
    points_per_batch: int = 64
    min_score: float = 0.88
    min_stability: float = 0.95
    stability_offset: float = 1.0
    box_nms: float = 0.7
    crop_layers: int = 0
    crop_nms: float = 0.7
    crop_overlap: float = 512 / 1500
    crop_points_factor: int = 1
    min_region_area: int = 0

    def __post_init__(self) -> None:
        counts = {
            "points_per_side": self.points_per_side,
            "points_per_batch": self.points_per_batch,
            "crop_points_factor": self.crop_points_factor,
        }
        for name, count in counts.items():
            if count < 1:
                raise OptionError(f"{name} must be at least 1, got {count}.")
        for name, least in (("crop_layers", self.crop_layers), ("min_region_area", self.min_region_area)):
            if least < 0:
                raise OptionError(f"{name} must be at least 0, got {least}.")


@dataclass(frozen=True)
class AutomaticMask:
    """A mask that was found.

    Attributes:
        rle: The mask, as run lengths.
        box: First column and row, last column and row that are inside.
        score: Its IoU with the true mask, as the decoder predicts it.
        stability: See `stability`.
        point: x and y of the point that was asked.
        crop: (x0, y0, x1, y1) of the part of the picture in which it was found.
    """

    rle: Rle
    box: Box
    score: float
    stability: float
    point: tuple[float, float]
    crop: Box

    @property
    def area(self) -> int:
        """Pixels inside."""
        return runs.area(self.rle)

    def mask(self) -> np.ndarray:
        """The mask as bool [H, W]."""
        return runs.decode(self.rle)

    def to_coco(self) -> dict[str, Any]:
        """Return a record that JSON can hold, with the names that SAM's own tools use; run lengths are plain."""
        x0, y0, x1, y1 = self.box
        left, top, right, bottom = self.crop
        return {
            "segmentation": self.rle,
            "area": self.area,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "predicted_iou": self.score,
            "stability_score": self.stability,
            "point_coords": [list(self.point)],
            "crop_box": [left, top, right - left, bottom - top],
        }


class Crop(NamedTuple):
    """A part of a picture.

    Attributes:
        box: (x0, y0, x1, y1) in pixels.
        layer: 0 for the whole picture.
    """

    box: Box
    layer: int


def automatic_masks(
    predictor: SamPredictor, picture: Image | Tensor, options: AutomaticOptions | None = None
) -> list[AutomaticMask]:
    """Find all masks of a picture.

    Args:
        predictor: Encodes the picture, and answers.
        picture: See `SamPredictor.prepare`.
        options: Default the published ones.

    Returns:
        The masks, the best first.

    Raises:
        ImageError: The picture is none.
    """
    options = options or AutomaticOptions()
    pixels = picture if isinstance(picture, Tensor) else to_uint8_tensor(picture)  # [3, H, W]
    height, width = pixels.shape[-2:]
    crops = crop_boxes(height, width, options.crop_layers, options.crop_overlap)
    found: list[AutomaticMask] = []
    for crop in crops:
        masks = list(_of_crop(predictor, pixels, crop, options))
        kept = nms(_boxes(masks), torch.tensor([m.score for m in masks]), options.box_nms)
        found += [masks[i] for i in kept.tolist()]
    if len(crops) > 1:
        small_first = torch.tensor([1 / _box_area(m.crop) for m in found], dtype=torch.float64)
        found = [found[i] for i in nms(_boxes(found), small_first, options.crop_nms).tolist()]
    return _tidied(found, options) if options.min_region_area else found


def stability(logits: Tensor, offset: float, threshold: float = 0.0) -> Tensor:
    """How little a mask depends on where its logits are cut: the IoU of the masks at a higher and a lower threshold.

    Args:
        logits: [..., H, W].
        offset: By how much the threshold is moved up and down.
        threshold: Where masks are cut.

    Returns:
        float32 [...]; 0 where both are empty.
    """
    inner = (logits > threshold + offset).sum((-2, -1))
    outer = (logits > threshold - offset).sum((-2, -1))  # which holds the inner one
    return inner / outer.clamp(min=1)


def point_grid(per_side: int, height: int, width: int) -> Tensor:
    """Points at the centres of equal cells: float64 [per_side**2, 2] x and y in pixels, row by row."""
    at = (torch.arange(per_side, dtype=torch.float64) + 0.5) / per_side
    y, x = torch.meshgrid(at * height, at * width, indexing="ij")
    return torch.stack([x, y], -1).view(-1, 2)


def crop_boxes(height: int, width: int, layers: int, overlap: float) -> list[Crop]:
    """The parts of a picture in which is asked.

    Args:
        height: Of the picture.
        width: Of the picture.
        layers: In layer i it is cut into 2**i by 2**i parts, which overlap.
        overlap: Of the parts of the first layer, as a share of the shorter side; halved from layer to layer.

    Returns:
        First the whole picture.
    """
    crops = [Crop((0, 0, width, height), 0)]
    for layer in range(1, layers + 1):
        parts = 2**layer
        shared = int(overlap * min(height, width) * (2 / parts))
        h, w = (math.ceil((shared * (parts - 1) + side) / parts) for side in (height, width))
        lefts, tops = ([(size - shared) * i for i in range(parts)] for size in (w, h))
        crops += [Crop((x, y, min(x + w, width), min(y + h, height)), layer) for x in lefts for y in tops]
    return crops


def _of_crop(predictor: SamPredictor, pixels: Tensor, crop: Crop, options: AutomaticOptions) -> Iterator[AutomaticMask]:
    x0, y0, x1, y1 = crop.box
    height, width = y1 - y0, x1 - x0
    image = predictor.encode(pixels[:, y0:y1, x0:x1])
    per_side = max(options.points_per_side // options.crop_points_factor**crop.layer, 1)
    for points in point_grid(per_side, height, width).split(options.points_per_batch):
        yield from _of_points(predictor, image, points, crop, (pixels.shape[1], pixels.shape[2]), options)


def _of_points(
    predictor: SamPredictor,
    image: EncodedImage,
    points: Tensor,
    crop: Crop,
    size: tuple[int, int],
    options: AutomaticOptions,
) -> Iterator[AutomaticMask]:
    """The masks for some points [P, 2] of a crop that are good enough."""
    low = predictor.decode(image, predictor.prompts(points[:, None]))
    scores = low.scores.flatten()  # [P*M]
    good = (scores > options.min_score).nonzero()[:, 0]
    of_point = good // low.scores.shape[1]
    logits = low.logits.flatten(0, 1)[good]  # [G, m, m]
    for part in torch.arange(len(good)).split(_RESTORED_AT_ONCE):
        full = image.frame.restore(logits[part])  # [g, h, w]
        steady = stability(full, options.stability_offset)
        masks = full > 0
        boxes = mask_boxes(masks)
        keep = (steady > options.min_stability) & ~_is_cut(boxes, crop.box, size)
        left, top = crop.box[:2]
        boxes = boxes + boxes.new_tensor([left, top, left, top])
        for i in keep.nonzero()[:, 0].tolist():
            k = int(part[i])
            x, y = points[int(of_point[k])].tolist()
            yield AutomaticMask(
                rle=runs.encode(_uncropped(masks[i], crop.box, size)[None])[0],
                box=_as_box(boxes[i]),
                score=float(scores[good[k]]),
                stability=float(steady[i]),
                point=(x + left, y + top),
                crop=crop.box,
            )


def _is_cut(boxes: Tensor, crop: Box, size: tuple[int, int]) -> Tensor:
    """Whether boxes [N, 4] in a crop come near an edge of it that is no edge of the picture: bool [N]."""
    left, top = crop[:2]
    placed = (boxes + boxes.new_tensor([left, top, left, top])).float()
    near_crop = (placed - placed.new_tensor(crop)).abs() <= _EDGE
    near_picture = (placed - placed.new_tensor([0, 0, size[1], size[0]])).abs() <= _EDGE
    return (near_crop & ~near_picture).any(1)


def _uncropped(mask: Tensor, crop: Box, size: tuple[int, int]) -> Tensor:
    """A mask of a crop as one of the whole picture: bool [H, W]."""
    if tuple(mask.shape) == size:
        return mask
    whole = mask.new_zeros(size)
    whole[crop[1] : crop[3], crop[0] : crop[2]] = mask
    return whole


def _tidied(found: Sequence[AutomaticMask], options: AutomaticOptions) -> list[AutomaticMask]:
    """Without small holes and islands; of masks that are alike then, one that was not changed stays before others."""
    tidy, unchanged = [], []
    for item in found:
        mask = item.mask()
        better = without_small_regions(mask, options.min_region_area)
        tidy.append(item if better is mask else _replaced(item, better))
        unchanged.append(float(better is mask))
    kept = nms(_boxes(tidy), torch.tensor(unchanged), max(options.box_nms, options.crop_nms))
    return [tidy[i] for i in kept.tolist()]


def _replaced(item: AutomaticMask, mask: np.ndarray) -> AutomaticMask:
    masks = torch.from_numpy(mask)[None]
    box = _as_box(mask_boxes(masks)[0])
    return AutomaticMask(runs.encode(masks)[0], box, item.score, item.stability, item.point, item.crop)


def _boxes(masks: Sequence[AutomaticMask]) -> Tensor:
    return torch.tensor([m.box for m in masks]).view(-1, 4)


def _box_area(box: Box) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


def _as_box(values: Tensor) -> Box:
    x0, y0, x1, y1 = values.tolist()
    return x0, y0, x1, y1
