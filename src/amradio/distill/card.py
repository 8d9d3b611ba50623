"""The model card of a trained student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from amradio import __version__
from amradio.distill.config import DistillConfig, TeacherConfig
from amradio.distill.hooks import Result
from amradio.models.radio import RadioModel


def model_card(
    config: DistillConfig,
    model: RadioModel,
    teachers: Mapping[str, Mapping[str, Any]],
    pictures: int,
    results: Sequence[Result],
    seconds: float,
) -> str:
    """Say in Markdown what a student is, what it was made of, what it cost and what it reaches.

    Args:
        config: Of the run.
        model: The student.
        teachers: What is known of each teacher's weights, by name.
        pictures: In the training set.
        results: What hooks have measured, in order.
        seconds: Training time.

    Returns:
        Markdown.
    """
    parameters = sum(p.numel() for p in model.model.parameters())
    heads = sum(p.numel() for p in model.adaptors.parameters())
    shown = sum(p.batch_size for p in config.partitions) * config.schedule.steps
    sizes = sorted({s for p in config.partitions for s in p.sizes})
    lines = [
        f"# {config.name}",
        "",
        f"A vision backbone distilled from {len(config.teachers)} teachers with amradio {__version__} "
        "(multi-teacher distillation as in AM-RADIO, arXiv 2312.06709).",
        "",
        *([config.notes.strip(), ""] if config.notes.strip() else []),
        "| | |",
        "|---|---|",
        f"| parameters | {parameters:,} in the trunk, {heads:,} in the adaptors |",
        f"| patch size | {model.patch_size} |",
        f"| trained at | {', '.join(map(str, sizes))} pixels |",
        f"| licence of the weights | {config.licence or 'not stated; the terms of teachers and data apply'} |",
        "",
        "## Teachers",
        "",
        "| adaptor | weights | licence | resolution | summary | features |",
        "|---|---|---|---|---|---|",
        *(_teacher_row(t, teachers[t.name]) for t in config.teachers),
        "",
        "## Data",
        "",
        f"{pictures:,} pictures; the photos are not part of this model, and their terms apply to its training.",
        "",
        *(f"* `{s.path}`{f', split {s.split}' if s.split else ''}" for s in config.data.sources),
        "",
        "## Training",
        "",
        f"{config.schedule.steps:,} steps, {shown:,} pictures shown, {seconds / 3600:.2f} hours. "
        f"{config.optimizer.kind.upper()}, learning rate {config.optimizer.lr:g}, weight decay "
        f"{config.optimizer.weight_decay:g}, {config.schedule.warmup:,} steps of warm-up, seed {config.seed}.",
        "",
        "## What was reached",
        "",
        *_results(results),
        "",
    ]
    return "\n".join(lines)


def _teacher_row(config: TeacherConfig, facts: Mapping[str, Any]) -> str:
    licence = config.licence or facts.get("license") or "unknown"
    size = "as the student" if config.resolution is None else str(config.resolution)
    summary = "not matched" if config.summary is None else config.summary.loss
    features = "not matched" if config.features is None else f"{config.features.loss}, {config.features.balancing}"
    source = facts.get("source") or config.backbone
    return f"| {config.name} | {source} | {licence} | {size} | {summary} | {features} |"


def _results(results: Sequence[Result]) -> list[str]:
    """The last value of each measure with what it was measured on, and how measures went."""
    if not results:
        return ["No evaluation was run during training."]
    last = {r.name: r for r in results}
    rows = [f"| {r.name} | {r.value:.4g} {r.unit}".rstrip() + f" | {r.step:,} | {r.data} |" for r in last.values()]
    lines = ["| measure | value | after step | on |", "|---|---|---|---|", *rows]
    steps = sorted({r.step for r in results})
    if len(steps) > 1:
        values = {(r.step, r.name): f"{r.value:.4g}" for r in results}
        lines += ["", f"| after step | {' | '.join(last)} |", f"|---{'|---' * len(last)}|"]
        lines += [f"| {step:,} | {' | '.join(values.get((step, name), '') for name in last)} |" for step in steps]
    return lines
