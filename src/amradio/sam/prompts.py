"""What a user points at: points, boxes and earlier masks, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amradio.errors import OptionError

ArrayLike = Tensor | np.ndarray | Sequence[Any]

FOREGROUND, BACKGROUND, PADDING = 1, 0, -1
"""Labels of points: on the object, beside it, or none at all, which fills up prompts with fewer points."""


@dataclass(frozen=True)
class Prompts:
    """N prompts for one picture; each asks for one object.

    Attributes:
        points: float64 [N, K, 2] x and y, on the CPU until they are placed; None for no points.
        labels: int64 [N, K]: `FOREGROUND`, `BACKGROUND` or `PADDING`; None without points.
        boxes: float64 [N, 4] x0, y0, x1, y1, likewise; None for no boxes.
        masks: float32 [N, m, m] logits of an earlier prediction; None for no masks.
    """

    points: Tensor | None
    labels: Tensor | None
    boxes: Tensor | None
    masks: Tensor | None

    def __len__(self) -> int:
        return next((len(t) for t in (self.points, self.boxes, self.masks) if t is not None), 0)

    def __getitem__(self, part: slice) -> Prompts:
        """Some of the prompts."""
        return Prompts(*(None if t is None else t[part] for t in (self.points, self.labels, self.boxes, self.masks)))

    def to(self, device: torch.device) -> Prompts:
        """Move to a device."""
        moved = (None if t is None else t.to(device) for t in (self.points, self.labels, self.boxes, self.masks))
        return Prompts(*moved)


def make_prompts(
    points: ArrayLike | None,
    labels: ArrayLike | None,
    boxes: ArrayLike | None,
    masks: ArrayLike | None,
    mask_side: int,
) -> Prompts:
    """Check prompts.

    Args:
        points: [N, K, 2] x and y in pixels of the picture.
        labels: [N, K]; default every point is on its object.
        boxes: [N, 4] x0, y0, x1, y1 in pixels of the picture.
        masks: [N, m, m] logits.
        mask_side: The m that the decoder takes.

    Raises:
        OptionError: There are no prompts, or shapes or values are not these.
    """
    found = Prompts(
        points=_numbers("points", points, torch.float64),
        labels=_numbers("labels", labels, torch.int64),
        boxes=_numbers("boxes", boxes, torch.float64),
        masks=_numbers("masks", masks, torch.float32),
    )
    if not len(found):
        raise OptionError("There is no prompt: give points [N, K, 2], boxes [N, 4] or masks [N, m, m], N at least 1.")
    _check_shape("points", found.points, (None, None, 2), "[N, K, 2]: K points for each of N objects")
    _check_shape("boxes", found.boxes, (None, 4), "[N, 4]: a box for each of N objects")
    _check_shape(
        "masks", found.masks, (None, mask_side, mask_side),
        f"[N, {mask_side}, {mask_side}]: the logits of an earlier prediction",
    )  # fmt: skip
    counts = {n: len(t) for n, t in vars(found).items() if t is not None and n != "labels"}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise OptionError(f"Prompts of several kinds belong together one by one, and there are {listed}.")
    found = _with_labels(found)
    if found.boxes is not None:
        _check_boxes(found.boxes)
    return found


def _with_labels(prompts: Prompts) -> Prompts:
    points, labels = prompts.points, prompts.labels
    if points is None:
        if labels is not None:
            raise OptionError("Labels are of points, and no points were given.")
        return prompts
    if labels is None:
        labels = torch.full(points.shape[:2], FOREGROUND)
    if labels.shape != points.shape[:2]:
        raise OptionError(
            f"Labels must be [N, K] = {list(points.shape[:2])}, one for each point, got the shape {list(labels.shape)}."
        )
    known = (labels == FOREGROUND) | (labels == BACKGROUND) | (labels == PADDING)
    if not known.all():
        raise OptionError(
            f"The label of a point is {FOREGROUND} (on the object), {BACKGROUND} (beside it) or {PADDING} (no point), "
            f"got {int(labels[~known][0])}."
        )
    return Prompts(points, labels, prompts.boxes, prompts.masks)


def _numbers(name: str, values: ArrayLike | None, dtype: torch.dtype) -> Tensor | None:
    if values is None:
        return None
    try:
        found = values if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values))
        found = found.to(dtype=dtype) if dtype == torch.float32 else found.cpu().to(dtype)  # not every GPU has float64
    except (TypeError, ValueError) as error:
        raise OptionError(f"The {name} are no array of numbers: {error}.") from error
    if not torch.isfinite(found).all():
        raise OptionError(f"The {name} have values that are not finite.")
    return found


def _check_shape(name: str, values: Tensor | None, wanted: tuple[int | None, ...], words: str) -> None:
    if values is None:
        return
    fits = values.ndim == len(wanted) and all(w in (None, s) for s, w in zip(values.shape, wanted, strict=True))
    if not fits:
        raise OptionError(f"The {name} must be {words}; got the shape {list(values.shape)}.")


def _check_boxes(boxes: Tensor) -> None:
    wrong = (boxes[:, 0] > boxes[:, 2]) | (boxes[:, 1] > boxes[:, 3])  # [N]
    if wrong.any():
        i = int(wrong.nonzero()[0])
        raise OptionError(
            f"Boxes are x0, y0, x1, y1 with x0 <= x1 and y0 <= y1; box {i} is {boxes[i].tolist()}. Boxes of COCO files "
            f"are x, y, width, height."
        )
