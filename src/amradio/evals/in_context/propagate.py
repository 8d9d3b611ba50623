"""From neighbours to label maps: attention over the neighbours' labels, upsampled, the best class of each pixel.

Balazevic et al. 2023, "Towards In-context Scene Understanding", equations 1 to 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from amradio.errors import OptionError

_VALUES_AT_ONCE = 2**22  # 16 MiB in float32: more does not get faster


def attention(scores: Tensor, norms: Tensor | None, temperature: float) -> Tensor:
    """Weights of neighbours: softmax of their cosines.

    Args:
        scores: [Q, k] inner products of queries with unit rows; -inf where no neighbour was found.
        norms: [Q] lengths of the queries; None if the scores are similarities already.
        temperature: Of the softmax.

    Returns:
        float32 [Q, k], each row adds up to 1.

    Raises:
        OptionError: A query has no neighbour at all.
    """
    lost = int((scores == float("-inf")).all(1).sum())
    if lost:
        raise OptionError(
            f"The index found no neighbour for {lost} of {len(scores)} patches. Let it look further: more "
            "num_leaves_to_search (ScaNN), more nprobe (FAISS), or the exact search."
        )
    logits = scores.float() / temperature
    if norms is not None:
        logits = logits / norms.float().clamp(min=1e-12)[:, None]
    return logits.softmax(1)


def mix_labels(weights: Tensor, indices: Tensor, counts: Tensor) -> Tensor:
    """Mix the label distributions of neighbours.

    Args:
        weights: [Q, k].
        indices: int64 [Q, k] rows of the memory; -1 where the weight is 0.
        counts: integers [M, C]: of each row, pixels of each class.

    Returns:
        float32 [Q, C] on the device of the weights.
    """
    (q, k), classes = weights.shape, counts.shape[1]
    mixed = torch.empty(q, classes, device=weights.device)
    step = max(_VALUES_AT_ONCE // (k * classes), 1)
    for start in range(0, q, step):
        rows = indices[start : start + step].clamp(min=0).to(counts.device)
        found = counts[rows].to(weights.device, torch.float32)  # [q, k, C]
        share = weights[start : start + step] / found.sum(2).clamp(min=1)  # [q, k]
        mixed[start : start + step] = torch.bmm(share[:, None], found)[:, 0]
    return mixed


def label_map(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Upsample label distributions bilinearly and take the best class of each pixel.

    Only classes with any weight in the picture are upsampled, and no more rows at once than fit into a bounded memory.

    Args:
        labels: [h, w, C], not negative.
        size: (height, width) of the result.

    Returns:
        uint8 [height, width].
    """
    height, width = size
    active = labels.flatten(0, 1).amax(0).nonzero()[:, 0]  # [n], ascending
    if len(active) == 0:  # nothing but empty rows of the memory was found
        return torch.zeros(size, dtype=torch.uint8, device=labels.device)
    maps = labels[..., active].permute(2, 0, 1)  # [n, h, w]
    above, below, weight = _between(maps.shape[1], height, labels.device)
    best = torch.empty(size, dtype=torch.uint8, device=labels.device)
    names = active.to(torch.uint8)
    step = max(_VALUES_AT_ONCE // (len(active) * width), 1)
    for start in range(0, height, step):
        rows = slice(start, start + step)
        tall = torch.lerp(maps[:, above[rows]], maps[:, below[rows]], weight[rows, None])  # [n, r, w]
        full = F.interpolate(tall[None], (tall.shape[1], width), mode="bilinear", align_corners=False)  # [1, n, r, W]
        best[rows] = names[full[0].max(0).indices]  # several times as fast as argmax, and of equals the first too
    return best


def _between(count: int, wanted: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For each of the wanted rows, between which of the given ones its centre lies, and how far from the first."""
    places = ((torch.arange(wanted, device=device) + 0.5) * (count / wanted) - 0.5).clamp(min=0)
    above = places.long().clamp(max=count - 1)
    return above, (above + 1).clamp(max=count - 1), (places - above).float()
