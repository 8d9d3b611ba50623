"""Training the head: AdamW, a linear warm-up, a linear fall to zero."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from amradio.errors import OptionError
from amradio.evals.linear_seg.config import LinearSegProtocol
from amradio.evals.linear_seg.head import BatchNormLinear
from amradio.images.segmentation import VOID

if TYPE_CHECKING:
    from amradio.distributed import Group
    from amradio.evals.linear_seg.checkpoint import Checkpoint


@dataclass(frozen=True)
class Batch:
    """What one step sees of this process's pictures; there may be none.

    Attributes:
        features: float32 [N, D].
        counts: Pixels of each class [N, C] of each row; the loss is taken at patches.
        masks: uint8 [B, H, W]; the loss is taken at pixels, and the rows are B grids one after the other.
        grid: (h, w) of these grids.
    """

    features: Tensor
    counts: Tensor | None = None
    masks: Tensor | None = None
    grid: tuple[int, int] = (0, 0)


def learning_rate(step: int, protocol: LinearSegProtocol) -> float:
    """The learning rate of a step, counted from 0."""
    if step < protocol.warmup:
        share = protocol.warmup_start + (1 - protocol.warmup_start) * step / protocol.warmup
        return protocol.lr * share
    return protocol.lr * (protocol.iterations - step) / max(protocol.iterations - protocol.warmup, 1)


def batches_of(count: int, protocol: LinearSegProtocol, seed: int, first: int = 0) -> Iterator[list[int]]:
    """Positions of the pictures of each step: one permutation of the set after the other.

    Args:
        count: Pictures in the set.
        protocol: Batch size and number of steps.
        seed: Of the order.
        first: Steps to leave out at the beginning.
    """
    rng = np.random.default_rng(seed)
    waiting: list[int] = []
    for step in range(protocol.iterations):
        while len(waiting) < protocol.batch_size:
            waiting += rng.permutation(count).tolist()
        if step >= first:
            yield waiting[: protocol.batch_size]
        waiting = waiting[protocol.batch_size :]


def summed_loss(scores: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Cross entropy, added up, and how much there is of what has a class.

    Args:
        scores: [N, C] of the batch's rows.
        batch: The truth.
    """
    if batch.counts is not None:
        counts = batch.counts.to(scores)
        return -(scores.log_softmax(1) * counts).sum(), counts.sum()
    assert batch.masks is not None
    maps = scores.unflatten(0, (len(batch.masks), *batch.grid)).permute(0, 3, 1, 2)  # [B, C, h, w]
    full = F.interpolate(maps, batch.masks.shape[-2:], mode="bilinear", align_corners=False)  # [B, C, H, W]
    truth = batch.masks.long()
    return F.cross_entropy(full, truth, ignore_index=VOID, reduction="sum"), (truth != VOID).sum()


def train_head(
    head: BatchNormLinear,
    batches: Callable[[int], Iterator[Batch]],
    protocol: LinearSegProtocol,
    group: Group | None = None,
    on_step: Callable[[int, float], None] | None = None,
    checkpoint: Checkpoint | None = None,
) -> list[float]:
    """Train a head in place.

    Args:
        head: On the device of the batches.
        batches: Gives one for each step, from a given step on.
        protocol: The schedule.
        group: The processes that share each batch; all have the same head before and after.
        on_step: Gets number and loss of each step.
        checkpoint: Where the state is kept, and taken up from.

    Returns:
        Mean loss of each tenth of the training.

    Raises:
        OptionError: The loss is not finite; nothing of that step is kept.
    """
    parameters = list(head.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=protocol.lr, betas=(0.9, 0.999), weight_decay=protocol.weight_decay)
    losses: list[float] = [] if checkpoint is None else checkpoint.load(head, optimizer)
    for step, batch in enumerate(batches(len(losses)), len(losses)):
        for settings in optimizer.param_groups:
            settings["lr"] = learning_rate(step, protocol)
        mean, variance = head.observe(batch.features, group)
        loss, amount = summed_loss(head(batch.features, mean, variance), batch)
        optimizer.zero_grad()
        loss.backward()
        losses.append(_averaged(parameters, loss.detach(), amount, group))
        if not math.isfinite(losses[-1]):
            raise OptionError(
                f"The loss is {losses[-1]} at step {step + 1}, so the training has failed. Choose a lower learning "
                f"rate than {protocol.lr:g}."
            )
        optimizer.step()
        if checkpoint is not None:
            checkpoint.save(head, optimizer, losses, last=step + 1 == protocol.iterations)
        if on_step is not None:
            on_step(step, losses[-1])
    edges = np.linspace(0, len(losses), min(10, len(losses)) + 1).round().astype(int)
    return [float(np.mean(losses[a:b])) for a, b in itertools.pairwise(edges)]


def _averaged(parameters: list[torch.nn.Parameter], loss: Tensor, amount: Tensor, group: Group | None) -> float:
    """Turn gradients of this process's summed loss into those of the mean over all processes; returns that mean."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    sums = torch.cat([*(g.flatten() for g in gradients), torch.stack([loss, amount.to(loss)])])
    if group is not None:
        sums = group.all_reduce_sum(sums)
    means = sums / sums[-1].clamp(min=1)
    for gradient, mean in zip(gradients, means[:-2].split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
    return float(means[-2])
