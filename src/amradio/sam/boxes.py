"""Boxes: around masks, their overlap, and non-maximum suppression."""

from __future__ import annotations

import torch
from torch import Tensor


def mask_boxes(masks: Tensor) -> Tensor:
    """Find the box around each mask.

    Args:
        masks: bool [N, H, W].

    Returns:
        int64 [N, 4]: first column and row, last column and row that are inside; zeros for an empty mask.
    """
    columns, rows = masks.any(1), masks.any(2)  # [N, W], [N, H]

    def ends(inside: Tensor) -> tuple[Tensor, Tensor]:
        size = inside.shape[1]
        first = inside.int().argmax(1)
        return first, size - 1 - inside.flip(1).int().argmax(1)

    (x0, x1), (y0, y1) = ends(columns), ends(rows)
    boxes = torch.stack([x0, y0, x1, y1], 1)
    return boxes * columns.any(1)[:, None]  # the last column of an empty mask would be W - 1


def box_iou(box: Tensor, boxes: Tensor) -> Tensor:
    """Intersection over union of one box [4] with others [N, 4]: x0, y0, x1, y1; NaN if both are empty."""
    corner0, corner1 = torch.maximum(box[:2], boxes[:, :2]), torch.minimum(box[2:], boxes[:, 2:])  # [N, 2]
    shared = (corner1 - corner0).clamp(min=0).prod(1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return shared / ((box[2:] - box[:2]).prod() + areas - shared)


def nms(boxes: Tensor, scores: Tensor, max_iou: float) -> Tensor:
    """Greedy non-maximum suppression.

    Args:
        boxes: [N, 4] x0, y0, x1, y1.
        scores: [N]; equal ones keep their order.
        max_iou: A box that overlaps with a better one by more than this is left out.

    Returns:
        int64 indices of the boxes that stay, the best first.
    """
    boxes = boxes.float()
    waiting = scores.argsort(descending=True, stable=True)
    kept = []
    while len(waiting):
        kept.append(waiting[0])
        rest = waiting[1:]
        waiting = rest[~(box_iou(boxes[waiting[0]], boxes[rest]) > max_iou)]
    return torch.stack(kept) if kept else waiting
