"""The self-supervised objectives of FUNGI as functions of latents: one loss for each image, nothing mixes images.

Simoncini et al. 2024, "No Train, all Gain: Self-Supervised Gradients Improve Deep Frozen Representations"
(arXiv 2407.10964). Legend of shape comments: B images, V views (or tokens) of an image, N negatives, d latent width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from amradio.errors import OptionError

Denominator = Literal["tempered", "raw"]
LossDtype = Literal["float32", "float16"]
_SCORES_AT_ONCE = 2**24


def kl_to_uniform(latents: Tensor, temperature: float = 1.0) -> Tensor:
    """KL divergence between the uniform distribution and that of the latents, over the number of latents.

    Args:
        latents: [B, d].
        temperature: Of the softmax.

    Returns:
        [B].
    """
    log_p = F.log_softmax(latents / temperature, dim=-1)
    return (-math.log(latents.shape[-1]) - log_p.mean(-1)) / latents.shape[-1]


def dino_loss(
    student: Tensor, teacher: Tensor, student_temperature: float = 0.1, teacher_temperature: float = 0.07
) -> Tensor:
    """Cross-entropy between every teacher view and every student view, pairs of one and the same view included.

    Args:
        student: [B, V, d].
        teacher: [B, G, d]; no gradient flows into it.
        student_temperature: Of the student's softmax.
        teacher_temperature: Of the teacher's softmax.

    Returns:
        [B], summed over the G x V pairs.
    """
    targets = F.softmax(teacher.detach() / teacher_temperature, dim=-1)  # [B, G, d]
    log_p = F.log_softmax(student / student_temperature, dim=-1)  # [B, V, d]
    return -(targets.sum(1) * log_p.sum(1)).sum(-1)  # the sum over pairs is a product of sums


def cluster_loss(latents: Tensor, prototypes: Sequence[Tensor], targets: Tensor, temperature: float = 0.1) -> Tensor:
    """DeepCluster: cross-entropy of similarities to prototypes against the cluster of the image.

    Args:
        latents: [B, V, d] unit vectors.
        prototypes: For each head [K, d].
        targets: int64 [B, heads].
        temperature: Of the softmax.

    Returns:
        [B], the mean over heads and views.
    """
    total = latents.new_zeros(len(latents))
    for head, centroids in enumerate(prototypes):
        log_p = F.log_softmax(latents @ centroids.T / temperature, dim=-1)  # [B, V, K]
        chosen = targets[:, head, None, None].expand(-1, latents.shape[1], 1)  # [B, V, 1]
        total = total - log_p.gather(-1, chosen).mean((1, 2))
    return total / len(prototypes)


def info_nce(
    positives: Tensor,
    negatives: Tensor,
    keep: Tensor | None = None,
    *,
    temperature: float = 0.07,
    denominator: Denominator = "tempered",
    dtype: LossDtype = "float32",
) -> Tensor:
    """InfoNCE of each latent of an image against the image's other latents and its negatives.

    ``mean_i( -mean_{j != i} s_ij / t + log sum_{j != i} exp(s_ij / t) )`` with cosines s; the sum of exponentials runs
    over positives and negatives. Its gradient is computed together with the value, by matrix products of unit
    vectors: O(V (V + N)) memory for one image.

    Args:
        positives: [B, V, d], of any length.
        negatives: [B or 1, N, d], of any length; no gradient flows into them.
        keep: bool [B, N]: which of the negatives an image has; None: all.
        temperature: t.
        denominator: ``raw`` leaves the temperature out of the sum of exponentials, as the code of FUNGI's dense
            experiments and the library fungivision do.
        dtype: ``float16`` rounds latents to that, as the same code does.

    Returns:
        [B].

    Raises:
        OptionError: There is only one latent an image, or the temperature is not positive.
    """
    if positives.shape[1] < 2:
        raise OptionError(
            f"InfoNCE compares an image's views (or tokens) with one another, so it needs at least 2 of them, got "
            f"{positives.shape[1]}."
        )
    if not temperature > 0:
        raise OptionError(f"The temperature must be above 0, got {temperature}.")
    negatives = negatives.detach()
    if dtype == "float16":
        positives, negatives = positives.half().float(), negatives.half().float()
    unit, others = F.normalize(positives, dim=-1), F.normalize(negatives, dim=-1)
    scale = 1 / temperature if denominator == "tempered" else 1.0
    loss: Tensor = _InfoNce.apply(unit, others, keep, 1 / temperature, scale)  # type: ignore[no-untyped-call]
    return loss


class _InfoNce(torch.autograd.Function):
    """InfoNCE of unit vectors, with its gradient computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, positives: Tensor, negatives: Tensor, keep: Tensor | None, pull: float, scale: float
    ) -> Tensor:
        b, v, _ = positives.shape
        losses = positives.new_empty(b)
        gradient = torch.empty_like(positives)
        step = max(_SCORES_AT_ONCE // (v * (v + negatives.shape[1])), 1)
        for start in range(0, b, step):
            part = slice(start, start + step)
            own = negatives if len(negatives) == 1 else negatives[part]
            kept = None if keep is None else keep[part]
            losses[part], gradient[part] = _info_nce(positives[part], own, kept, pull, scale)
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[:, None, None], None, None, None, None


def _info_nce(
    positives: Tensor, negatives: Tensor, keep: Tensor | None, pull: float, scale: float
) -> tuple[Tensor, Tensor]:
    """Losses [B] and their gradients [B, V, d].

    With P the softmax over the columns j of ``scale * s_ij``, the gradient with respect to s_ij is
    ``(scale * P_ij - pull / (V - 1) [j is positive]) / V``; a positive is in row i and in column i.
    """
    b, v, _ = positives.shape
    columns = torch.cat([positives, negatives.expand(b, -1, -1)], dim=1)  # [B, V + N, d]
    p = torch.bmm(positives, columns.transpose(1, 2)).mul_(scale)  # [B, V, V + N]
    p.diagonal(dim1=1, dim2=2).fill_(-math.inf)
    if keep is not None:
        p[:, :, v:].masked_fill_(~keep[:, None], -math.inf)
    largest = p.amax(-1, keepdim=True)
    p.sub_(largest).exp_()
    total = p.sum(-1, keepdim=True)  # [B, V, 1]
    p.div_(total)
    others = positives.sum(1, keepdim=True) - positives  # [B, V, d] the sum of an image's other latents
    attraction = (positives * others).sum(-1) * (pull / (v - 1))  # [B, V]
    losses = ((largest + total.log())[:, :, 0] - attraction).mean(1)
    repulsion = torch.bmm(p, columns) + torch.bmm(p[:, :, :v].transpose(1, 2), positives)  # [B, V, d]
    gradient = repulsion.mul_(scale).sub_(others, alpha=2 * pull / (v - 1)).div_(v)
    return losses, gradient
