"""``amradio reproduce``."""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import tyro

if TYPE_CHECKING:
    from amradio.evals.recipes import Comparison, Recipe, RecipeRun
    from amradio.evals.report import EvalReport

_HARMLESS = (  # options that change no number
    *("--device", "--batch-size", "--workers", "--output", "-o", "--csv-out", "--cache-dir", "--offline", "--compile"),
    *("--cache-gib", "--max-failed"),
)


@dataclass(frozen=True, kw_only=True)
class Reproduce:
    """Run a recipe and print what we measure beside what was published; without a recipe, list them.

    A recipe whose weights or data are not at hand says what is missing. The exit code is 0 if every number was
    reproduced, else 1.
    """

    recipe: tyro.conf.Positional[str] = ""
    """Name of a recipe, or path of a recipe file."""
    extra: str = ""
    """Words to add to every command: --extra="--device cuda --limit 1000"."""
    dry_run: bool = False
    """Print the commands and do nothing."""
    json: bool = False
    """Print one JSON object instead of text."""

    def run(self) -> int:
        """Run it; returns the exit code."""
        from amradio.evals.recipes import load_recipe, recipe_names

        if not self.recipe:
            titles = {name: load_recipe(name).title for name in recipe_names()}
            print(json.dumps(titles, indent=2) if self.json else "\n".join(f"{n}\n    {t}" for n, t in titles.items()))
            return 0
        recipe = load_recipe(self.recipe)
        if self.dry_run:
            print("\n".join(shlex.join(["amradio", *self._words(run)]) for run in recipe.runs))
            return 0
        is_main = os.environ.get("RANK", "0") == "0"  # torchrun starts several, and one prints
        if is_main and not self.json:
            print(_head(recipe))
        found = [c for run in recipe.runs for c in self._measure(recipe, run)]
        if is_main and self.json:
            print(json.dumps({"recipe": recipe.name, "results": [asdict(c) for c in found]}, indent=2))
        elif is_main:
            print(_table(found))
        return 0 if all(c.reproduced for c in found) else 1

    def _words(self, run: RecipeRun) -> list[str]:
        return [*run.command, *shlex.split(self.extra)]

    def _measure(self, recipe: Recipe, run: RecipeRun) -> list[Comparison]:
        """One run's values; a missing model or data set becomes the reason, so that the other runs go on."""
        from amradio.cli import parse
        from amradio.errors import AmradioError
        from amradio.evals.recipes import compare_run

        try:
            reports: list[Any] = parse(self._words(run)).reports()
        except (AmradioError, OSError) as error:
            return compare_run(recipe, run, {}, reason=str(error))
        metrics = {name: m.value for name, m in reports[0].metrics.items()}
        return compare_run(recipe, run, metrics, partial=self._partial(reports[0]))

    def _partial(self, report: EvalReport) -> str:
        """How a measurement is not the published one."""
        changed = [w for w in shlex.split(self.extra) if w.startswith("-") and w.partition("=")[0] not in _HARMLESS]
        failed = [f"{report.failed} pictures failed"] if report.failed else []
        return ", ".join([*changed, *failed])


def _head(recipe: Recipe) -> str:
    lines = [recipe.title, f"source: {recipe.source}", f"weights: {recipe.checkpoint}", f"data: {recipe.data}"]
    lines += [f"hardware: {recipe.hardware}", f"time: {recipe.time}", f"tolerance: {recipe.tolerance:g}"]
    return "\n".join([*lines, *([f"note: {' '.join(recipe.note.split())}"] if recipe.note else []), ""])


def _verdict(c: Comparison) -> str:
    if c.ours is None:
        return "not measured"
    verdict = "within tolerance" if c.close else f"off by more than {c.tolerance:g}"
    if c.partial:
        return f"{verdict}, but not the same measurement ({c.partial})"
    return "reproduced" if c.reproduced else verdict


def _table(found: list[Comparison]) -> str:
    from amradio.cli.text import table

    rows = [
        [
            c.setting,
            c.metric,
            f"{c.published:g}",
            "-" if c.ours is None else f"{c.ours:.3f}",
            _verdict(c),
        ]
        for c in found
    ]
    reasons = dict.fromkeys(c.reason for c in found if c.reason)
    lines = [table(["setting", "metric", "published", "ours", "verdict"], rows), *(f"why: {r}" for r in reasons)]
    return "\n".join(lines)
