"""How far a student is from its teachers, and how the parts are weighed against one another.

Losses are float32 whatever comes in, one number for each picture, and unreduced over the batch. Sources: AM-RADIO
(arXiv 2312.06709), PHI-S (2410.01680), RADIOv2.5 (2412.07679), UNIC (2408.05088) and C-RADIOv4 (2601.17237).
Legend of shape comments: B pictures, T teachers or terms, C summary width, D feature width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amradio.distributed import Group
from amradio.errors import OptionError, nearest_names

SummaryLoss = Literal["cosine", "balanced-angle", "mse"]
FeatureLoss = Literal["mse", "cosine", "smooth-l1", "cosine-smooth-l1"]
Match = Literal["student", "teacher", "smaller", "larger"]
SUMMARY_LOSSES: tuple[str, ...] = get_args(SummaryLoss)
FEATURE_LOSSES: tuple[str, ...] = get_args(FeatureLoss)
MATCH: tuple[str, ...] = get_args(Match)

COSINE_SHARE = 0.9
"""Of ``cosine-smooth-l1``; the rest is smooth L1 (AM-RADIO)."""
_SMALLEST = 1e-12


def summary_loss(kind: SummaryLoss, student: Tensor, teacher: Tensor, dispersion: Tensor | None = None) -> Tensor:
    """Compare summaries.

    ``cosine``: one minus the cosine (AM-RADIO). ``balanced-angle``: the squared angle over the teacher's angular
    dispersion, so that teachers whose summaries fill a wide cone do not outweigh those in a narrow one (C-RADIOv4,
    section 2.5). ``mse``: the mean squared difference.

    Args:
        kind: See above.
        student: [B, C].
        teacher: [B, C].
        dispersion: Of the teacher, in squared radians, see `Dispersion`; for ``balanced-angle``.

    Returns:
        float32 [B].

    Raises:
        OptionError: There is no such loss, shapes differ, or the dispersion is missing.
    """
    _check(kind, SUMMARY_LOSSES, "summary loss", student, teacher)
    x, y = student.float(), teacher.float()
    if kind == "cosine":
        return 1 - F.cosine_similarity(x, y, dim=-1)
    if kind == "mse":
        return (x - y).square().mean(-1)
    if dispersion is None:
        raise OptionError("The loss 'balanced-angle' needs the dispersion of the teacher's summaries.")
    return squared_angle(x, y) / dispersion.to(x)


def squared_angle(x: Tensor, y: Tensor) -> Tensor:
    """Squared angle between vectors, exact also where they nearly agree, with finite gradients everywhere.

    Args:
        x: [..., C].
        y: [..., C].

    Returns:
        [...] in squared radians.
    """
    # The arccosine of a cosine near 1 would lose half of the digits and have no gradient at 1; the chord does not.
    chord = (F.normalize(x, dim=-1) - F.normalize(y, dim=-1)).square().sum(-1)
    chord = chord.clamp(_SMALLEST, 4 - 1e-6)
    return (2 * torch.atan2(chord.sqrt(), (4 - chord).sqrt())).square()


class Dispersion:
    """Angular dispersion of summaries that stream by: the mean squared angle to their mean direction.

    C-RADIOv4, section 2.5 (0.69 for SigLIP2-g, 2.19 for DINOv3-7B). The mean direction is that of unit vectors, so
    that long summaries do not count more (our choice). It is known only at the end, so directions are kept: 4 C bytes
    for each picture.
    """

    def __init__(self) -> None:
        self._directions: list[Tensor] = []

    def update(self, summaries: Tensor) -> None:
        """Add summaries [..., C].

        Raises:
            OptionError: Some are not finite.
        """
        rows = summaries.detach().reshape(-1, summaries.shape[-1])  # [N, C]
        if not bool(torch.isfinite(rows).all()):
            raise OptionError("The dispersion cannot be updated: some summaries are NaN or infinite.")
        self._directions.append(F.normalize(rows.double(), dim=-1).float().cpu())

    def all_reduce(self, group: Group) -> None:
        """Make this the dispersion of what all processes have seen.

        Args:
            group: The processes; each calls this once, after one update at least.
        """
        self._directions = group.all_gather_rows(torch.cat(self._directions))

    def value(self) -> Tensor:
        """The dispersion.

        Returns:
            float64 scalar, in squared radians.

        Raises:
            OptionError: Nothing was seen, or all summaries have one direction.
        """
        if not self._directions:
            raise OptionError("There is no dispersion yet: update it with summaries first.")
        directions = torch.cat(self._directions).double()  # [N, C]
        value = squared_angle(directions, directions.mean(0)).mean()
        if not bool(value > 1e-10):
            raise OptionError(
                f"All {len(directions)} summaries of the teacher have the same direction, so angles cannot be balanced "
                "by their dispersion. Check its input, or use the loss 'cosine'."
            )
        return value


def feature_loss(kind: FeatureLoss, student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """Compare maps of features on one grid.

    ``mse``: the mean squared difference, meant for standardised targets (PHI-S). ``cosine``: one minus the cosine at
    each position. ``smooth-l1``: with the bend at 1 (our choice). ``cosine-smooth-l1``: 0.9 of the one and 0.1 of the
    other (AM-RADIO).

    Args:
        kind: See above.
        student: [B, D, h, w].
        teacher: [B, D, h, w].
        valid: [B, 1, h, w], bool or weights: which positions count, such as those that are not padding.

    Returns:
        float32 [B], the mean over channels and (valid) positions; 0 where nothing is valid.

    Raises:
        OptionError: There is no such loss, or shapes differ.
    """
    _check(kind, FEATURE_LOSSES, "feature loss", student, teacher)
    x, y = student.float(), teacher.float()
    if valid is not None:
        y = torch.where(valid > 0, y, x.detach())  # so that not even NaN in the padding reaches the gradient
    if kind == "mse":
        each = (x - y).square().mean(1)  # [B, h, w]
    elif kind == "cosine":
        each = 1 - F.cosine_similarity(x, y, dim=1)
    elif kind == "smooth-l1":
        each = F.smooth_l1_loss(x, y, reduction="none").mean(1)
    else:
        rest = F.smooth_l1_loss(x, y, reduction="none").mean(1)
        each = COSINE_SHARE * (1 - F.cosine_similarity(x, y, dim=1)) + (1 - COSINE_SHARE) * rest
    if valid is None:
        return each.mean((1, 2))
    counts = valid[:, 0].float()  # [B, h, w]
    return (each * counts).sum((1, 2)) / counts.sum((1, 2)).clamp(min=_SMALLEST)


def match_grids(student: Tensor, teacher: Tensor, direction: Match) -> tuple[Tensor, Tensor]:
    """Bring two maps to one grid, bilinearly; antialiased where that takes positions away (our choice).

    Args:
        student: [B, D, h, w].
        teacher: [B, D, H, W].
        direction: Which one changes: ``student`` is brought to the teacher's grid or ``teacher`` to the student's;
            under ``smaller`` and ``larger`` each axis has the smaller or larger number of positions.

    Returns:
        Both, float32, on one grid.

    Raises:
        OptionError: There is no such direction.
    """
    if direction not in MATCH:
        raise OptionError(f"Unknown direction {direction!r} for matching grids. {nearest_names(direction, MATCH)}")
    own, others = student.shape[-2:], teacher.shape[-2:]
    if direction == "student":
        grid = (others[0], others[1])
    elif direction == "teacher":
        grid = (own[0], own[1])
    else:
        choose = min if direction == "smaller" else max
        grid = (choose(own[0], others[0]), choose(own[1], others[1]))
    return _resized(student, grid), _resized(teacher, grid)


def overlap(student: Tensor, teacher: Tensor, shift: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Cut two maps of shifted windows to the region that both see.

    The shift-equivariant loss of C-RADIOv4 (section 2.3): student and teacher see windows of the same picture that are
    some whole cells apart, so that noise which is tied to positions cannot be imitated.

    Args:
        student: [B, D, h, w].
        teacher: [B, D, h, w]: row r, column c shows what the student has at r + rows, c + columns.
        shift: (rows, columns), of either sign.

    Returns:
        Both, [B, D, h - abs(rows), w - abs(columns)].

    Raises:
        OptionError: Shapes differ, or nothing is common to both.
    """
    height, width = student.shape[-2:]
    rows, columns = shift
    if student.shape != teacher.shape or abs(rows) >= height or abs(columns) >= width:
        raise OptionError(
            f"Maps {list(student.shape)} and {list(teacher.shape)} that are {shift} cells apart have no common region."
        )
    ours = student[..., max(rows, 0) : height + min(rows, 0), max(columns, 0) : width + min(columns, 0)]
    theirs = teacher[..., max(-rows, 0) : height - max(rows, 0), max(-columns, 0) : width - max(columns, 0)]
    return ours, theirs


def drop_teachers(losses: Tensor, probability: float, chance: Tensor) -> Tensor:
    """Choose which teachers count on each picture.

    Teacher dropping of UNIC: on each picture the teacher that the student is worst at always counts; each
    other one is left out with some probability, so that easy teachers do not take over.

    Args:
        losses: [T, B].
        probability: Of leaving one out.
        chance: [T, B] uniform random numbers in [0, 1).

    Returns:
        Weights [T, B] of 0 and 1, without gradient.

    Raises:
        OptionError: The probability is not in [0, 1).
    """
    if not 0 <= probability < 1:
        raise OptionError(f"The probability of dropping a teacher must be in [0, 1), got {probability}.")
    kept = chance >= probability
    kept = kept.scatter(0, losses.detach().argmax(0, keepdim=True), True)
    return kept.to(losses.dtype)


class LossBalancer(nn.Module):
    """Scales losses by their running magnitudes, so that all of them contribute the same.

    As in AdaLoss (Hu et al. 2019, arXiv 1708.06832), factors are inverse to running means of the losses; they are
    scaled so that the sum of contributions stays what it was (our choice).

    Args:
        names: Of the losses.
        momentum: Share of the old mean that an update keeps.

    Attributes:
        names: See above.
        momentum: See above.
        means: float64 [T] running sums of weighted losses.
        masses: float64 [T] sums of the weights, so that early means are not biased towards 0.

    Raises:
        OptionError: The momentum is not in [0, 1).
    """

    means: Tensor
    masses: Tensor

    def __init__(self, names: Sequence[str], momentum: float) -> None:
        super().__init__()
        if not 0 <= momentum < 1:
            raise OptionError(f"The momentum of loss balancing must be in [0, 1), got {momentum}.")
        self.names, self.momentum = tuple(names), momentum
        self.register_buffer("means", torch.zeros(len(self.names), dtype=torch.float64))
        self.register_buffer("masses", torch.zeros(len(self.names), dtype=torch.float64))

    def update(self, losses: Mapping[str, float]) -> None:
        """Take in new losses, averaged over processes; names that are missing keep their means.

        Raises:
            OptionError: A loss is not known.
        """
        unknown = [name for name in losses if name not in self.names]
        if unknown:
            raise OptionError(f"There is no loss {unknown[0]!r} to balance. {nearest_names(unknown[0], self.names)}")
        for i, name in enumerate(self.names):
            if name in losses:
                self.means[i] = self.momentum * self.means[i] + (1 - self.momentum) * float(losses[name])
                self.masses[i] = self.momentum * self.masses[i] + (1 - self.momentum)

    def factors(self) -> dict[str, float]:
        """The factor of each loss; 1 for those that were never seen."""
        seen = (self.masses > 0).tolist()
        means = (self.means / self.masses.clamp(min=_SMALLEST)).clamp(min=_SMALLEST).tolist()
        known = [m for m, s in zip(means, seen, strict=True) if s]
        level = sum(known) / max(len(known), 1)
        return {n: level / m if s else 1.0 for n, m, s in zip(self.names, means, seen, strict=True)}

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"{list(self.names)}, momentum={self.momentum}"


def _check(kind: Any, known: Sequence[str], what: str, student: Tensor, teacher: Tensor) -> None:
    if kind not in known:
        raise OptionError(f"Unknown {what} {kind!r}. {nearest_names(str(kind), known)}")
    if student.shape != teacher.shape:
        raise OptionError(
            f"A {what} compares tensors of one shape, got {list(student.shape)} of the student and "
            f"{list(teacher.shape)} of the teacher."
        )


def _resized(features: Tensor, grid: tuple[int, int]) -> Tensor:
    features = features.float()
    if tuple(features.shape[-2:]) == grid:
        return features
    return F.interpolate(features, grid, mode="bilinear", align_corners=False, antialias=True)
