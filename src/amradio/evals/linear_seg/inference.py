"""From a picture to scores of its pixels: whole or by sliding windows, at one or several scales."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

PatchScores = Callable[[Tensor], Tensor]
"""Images [B, 3, H, W] in [0, 1], whose sides are whole patches, to scores [B, C, h, w] of patches."""


def pixel_scores(images: Tensor, scores: PatchScores, multiple: int, fill: Sequence[float]) -> Tensor:
    """Score every pixel of images of any size.

    Args:
        images: [B, 3, H, W] in [0, 1].
        scores: The backbone and the head.
        multiple: What the sides must be multiples of; images are filled up at the right and at the bottom.
        fill: RGB colour 0..1 of what is added.

    Returns:
        float32 [B, C, H, W].
    """
    height, width = images.shape[-2:]
    full = (-(-height // multiple) * multiple, -(-width // multiple) * multiple)
    if full != (height, width):
        canvas = images.new_tensor(fill).view(1, 3, 1, 1).expand(len(images), 3, *full).clone()  # [B, 3, H', W']
        canvas[..., :height, :width] = images
        images = canvas
    maps = F.interpolate(scores(images).float(), full, mode="bilinear", align_corners=False)  # [B, C, H', W']
    return maps[..., :height, :width]


def windows(length: int, side: int, stride: int) -> list[int]:
    """Where windows begin along one axis: the last one ends where the axis does.

    Args:
        length: Of the axis.
        side: Of a window.
        stride: Between beginnings.
    """
    if length <= side:
        return [0]
    count = -(-(length - side) // stride) + 1
    return [min(i * stride, length - side) for i in range(count)]


def sliding_scores(
    image: Tensor, side: int, stride: int, score: Callable[[Tensor], Tensor], batch_size: int = 8
) -> Tensor:
    """Average the scores of overlapping windows.

    Args:
        image: [3, H, W].
        side: Of a window, in pixels; where the image is smaller, the window is too.
        stride: Between windows, in pixels.
        score: Images [B, 3, s, t] to scores [B, C, s, t] of pixels.
        batch_size: Windows that are scored together.

    Returns:
        [C, H, W].
    """
    height, width = image.shape[-2:]
    places = [(top, left) for top in windows(height, side, stride) for left in windows(width, side, stride)]
    total: Tensor | None = None
    count = image.new_zeros(height, width)
    for start in range(0, len(places), batch_size):
        batch = places[start : start + batch_size]
        found = score(torch.stack([image[:, t : t + side, left : left + side] for t, left in batch]))  # [B, C, s, t]
        if total is None:
            total = found.new_zeros(found.shape[1], height, width)
        for (top, left), part in zip(batch, found, strict=True):
            total[:, top : top + side, left : left + side] += part
            count[top : top + side, left : left + side] += 1
    assert total is not None
    return total / count


def segment(views: Sequence[Tensor], score: Callable[[Tensor], Tensor], size: tuple[int, int], flip: bool) -> Tensor:
    """Segment a picture that is given at one or several sizes.

    Args:
        views: Each [3, H, W] in [0, 1].
        score: [3, H, W] to scores [C, H, W] of pixels.
        size: (height, width) of the result.
        flip: Whether each view is also seen mirrored.

    Returns:
        uint8 [height, width]: the class of highest score, or of highest mean probability if there are several views.
    """
    if len(views) == 1 and not flip:
        return _best(_resized(score(views[0]), size))
    total: Tensor | None = None
    for view in views:
        for mirrored in (False, True) if flip else (False,):
            found = score(view.flip(-1)).flip(-1) if mirrored else score(view)  # [C, H, W]
            shares = _resized(found, size).softmax(0)  # [C, height, width]
            total = shares if total is None else total + shares
    assert total is not None
    return _best(total)


def _resized(scores: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(scores.shape[-2:]) == size:
        return scores
    return F.interpolate(scores[None], size, mode="bilinear", align_corners=False)[0]


def _best(scores: Tensor) -> Tensor:
    return scores.max(0).indices.to(torch.uint8)  # of equals the first, as argmax, and faster
