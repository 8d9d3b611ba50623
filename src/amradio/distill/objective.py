"""What is minimised: how far the student's predictions are from the teachers' targets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amradio.distill.balancing import Balancing
from amradio.distill.config import DistillConfig, TeacherConfig
from amradio.distill.draws import Draw
from amradio.distill.losses import LossBalancer, drop_teachers, feature_loss, match_grids, overlap, summary_loss
from amradio.distill.student import Prediction, Widths
from amradio.distill.targets import Targets

BALANCE_MOMENTUM = 0.99


class Terms(NamedTuple):
    """One teacher's part of the objective on a batch.

    Attributes:
        losses: By ``summary`` and ``features``: [B], unweighted.
        metrics: Numbers that tell how well it is imitated, scalars without gradients.
    """

    losses: dict[str, Tensor]
    metrics: dict[str, Tensor]


class TeacherObjective(nn.Module):
    """The losses of one teacher, and the statistics that they need.

    Args:
        config: Of the teacher.
        widths: Of its targets.

    Attributes:
        balancing: Standardises its features.
        dispersion: Angular dispersion of its summaries (a buffer).
    """

    dispersion: Tensor

    def __init__(self, config: TeacherConfig, widths: Widths) -> None:
        super().__init__()
        self.config = config
        kind = "none" if config.features is None else config.features.balancing
        self.balancing = Balancing(kind, widths.features)
        self.register_buffer("dispersion", torch.ones((), dtype=torch.float64))

    def forward(self, said: Prediction, targets: Targets, shift: tuple[int, int], grid: tuple[int, int]) -> Terms:
        """Compare.

        Args:
            said: By the student.
            targets: By the teacher.
            shift: (rows, columns) in student patches by which the teacher's window is moved.
            grid: (h, w) in student patches.

        Returns:
            Losses and metrics.
        """
        losses: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        if self.config.summary is not None and targets.summary is not None:
            summary = said.summary.float()  # [B, C]
            kind = self.config.summary.loss
            losses["summary"] = summary_loss(kind, summary, targets.summary, self.dispersion.float())
            metrics["summary_cosine"] = F.cosine_similarity(summary.detach(), targets.summary, dim=-1).mean()
        if self.config.features is not None and targets.features is not None:
            ours, theirs = self._matched(said.features.float(), targets.features, shift, grid)  # [B, D, h, w]
            losses["features"] = feature_loss(self.config.features.loss, ours, theirs)
            flat = ours.detach()
            metrics["features_cosine"] = F.cosine_similarity(flat, theirs, dim=1).mean()
            metrics["features_variance"] = flat.var(dim=(0, 2, 3), correction=0).mean() / theirs.var(
                dim=(0, 2, 3), correction=0
            ).mean().clamp(min=1e-12)
        return Terms(losses, metrics)

    def _matched(
        self, ours: Tensor, theirs: Tensor, shift: tuple[int, int], grid: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Both maps on one grid, the teacher's standardised."""
        assert self.config.features is not None  # which the caller has checked
        theirs = self.balancing(theirs.movedim(1, -1)).movedim(-1, 1)  # [B, D, H, W]
        if shift == (0, 0):
            return match_grids(ours, theirs, self.config.features.match)
        ours, theirs = match_grids(ours, theirs, "teacher")  # shifts are whole cells of the student's grid only
        cells = (shift[0] * ours.shape[-2] // grid[0], shift[1] * ours.shape[-1] // grid[1])
        return overlap(ours, theirs, cells)


class Objective(nn.Module):
    """All teachers' losses, their weights, and teacher dropping.

    Args:
        config: Of the run.
        widths: Of the teachers' targets, by name.

    Attributes:
        teachers: By name.
        balancer: Running magnitudes of the losses; None without loss balancing.
    """

    def __init__(self, config: DistillConfig, widths: Mapping[str, Widths]) -> None:
        super().__init__()
        self.config = config
        self.teachers = nn.ModuleDict({t.name: TeacherObjective(t, widths[t.name]) for t in config.teachers})
        terms = [
            f"{t.name}/{kind}"
            for t in config.teachers
            for kind, part in (("summary", t.summary), ("features", t.features))
            if part is not None
        ]
        self.weights = {name: self._weight(name) for name in terms}
        self.balancer = LossBalancer(terms, BALANCE_MOMENTUM) if config.run.loss_balancing else None

    def forward(
        self,
        said: Mapping[str, Prediction],
        targets: Mapping[str, Targets],
        shift: tuple[int, int],
        grid: tuple[int, int],
        draw: Draw,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of a batch.

        Args:
            said: By the student, by teacher.
            targets: By the teachers.
            shift: See `TeacherObjective`.
            grid: (h, w) in student patches.
            draw: Of teacher dropping.

        Returns:
            The mean loss of a picture, and losses and metrics by ``TEACHER/WHAT``, scalars without gradients.
        """
        numbers: dict[str, Tensor] = {}
        rows: list[Tensor] = []
        balance = {} if self.balancer is None else self.balancer.factors()
        for name in said:
            terms = self.teachers[name](said[name], targets[name], shift, grid)
            total = torch.zeros(())
            for kind, loss in terms.losses.items():
                key = f"{name}/{kind}"
                numbers[key] = loss.detach().mean()
                total = total.to(loss.device) + loss * self.weights[key] * balance.get(key, 1.0)  # [B]
            rows.append(total)
            numbers |= {f"{name}/{what}": value for what, value in terms.metrics.items()}
        losses = torch.stack(rows)  # [T, B]
        if self.config.run.teacher_dropping:
            losses = losses * self._kept(losses.detach(), draw)
        return losses.sum(dim=0).mean(), numbers

    def _kept(self, losses: Tensor, draw: Draw) -> Tensor:
        """Which teachers count on each picture, [T, B]; drawn as if all processes were one."""
        generator = torch.Generator().manual_seed(draw.seed)
        rows, count = losses.shape
        chance = torch.rand((rows, draw.total), generator=generator)[:, draw.start : draw.start + count]  # [T, B]
        return drop_teachers(losses, self.config.run.teacher_dropping, chance.to(losses.device))

    def _weight(self, term: str) -> float:
        name, kind = term.split("/")
        teacher = next(t for t in self.config.teachers if t.name == name)
        part = teacher.summary if kind == "summary" else teacher.features
        assert part is not None  # terms are made of what there is
        return teacher.weight * part.weight
