"""Published numbers as files: what was claimed, by whom, for which weights, and the command that measures it here.

A recipe is a YAML file in ``amradio/recipes`` (or anywhere, given by path):

```yaml
task: zero-shot
source: NVlabs/RADIO, examples/README.md    # where the numbers stand
checkpoint: radio_v1                        # the weights that they belong to
data: imagenet-1k (gated ...)               # what has to be at hand
tolerance: 0.1                              # how far ours may be off, in the unit of the number
hardware: published runs used 8 GPUs ...
time: about 5 minutes on ...                # what to expect
note: what is not certain
runs:
  - setting: shortest side 378, aspect kept
    command: amradio eval zero-shot --model radio_v1 ...
    expected: {top1: 82.928, top5: 97.364}
```
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from amradio.errors import ConfigError, OptionError, nearest_names

_SUFFIX = ".yaml"


@dataclass(frozen=True)
class RecipeRun:
    """One setting of a recipe.

    Attributes:
        setting: For people.
        command: Words after ``amradio``.
        expected: Published values by metric name.
    """

    setting: str
    command: tuple[str, ...]
    expected: Mapping[str, float]


@dataclass(frozen=True)
class Recipe:
    """Published numbers and how to measure them.

    Attributes:
        name: Of the file, without its ending.
        title: Its first comment line.
        task: ``zero-shot``, ``knn``, ...
        source: Where the numbers were published.
        checkpoint: The weights that they belong to.
        data: What has to be at hand.
        tolerance: Largest difference that counts as reproduced, in the unit of the metric.
        hardware: What it takes.
        time: How long it takes.
        note: What is uncertain.
        runs: At least one.
    """

    name: str
    title: str
    task: str
    source: str
    checkpoint: str
    data: str
    tolerance: float
    hardware: str
    time: str
    note: str
    runs: tuple[RecipeRun, ...]


@dataclass(frozen=True)
class Comparison:
    """A published value beside ours.

    Attributes:
        setting: Of the run.
        metric: Name.
        published: The published value.
        ours: What was measured here; None if it could not be.
        tolerance: See `Recipe`.
        reason: Why it could not be measured.
        partial: How what was measured is not what was published, such as on fewer pictures.
    """

    setting: str
    metric: str
    published: float
    ours: float | None
    tolerance: float
    reason: str = ""
    partial: str = ""

    @property
    def close(self) -> bool:
        """Whether ours is within the tolerance."""
        return self.ours is not None and abs(self.ours - self.published) <= self.tolerance

    @property
    def reproduced(self) -> bool:
        """Whether ours is within the tolerance, of the same measurement."""
        return self.close and not self.partial


def recipe_names() -> list[str]:
    """The names of the recipes that the package carries, sorted."""
    folder = resources.files("amradio") / "recipes"
    return sorted(f.name.removesuffix(_SUFFIX) for f in folder.iterdir() if f.name.endswith(_SUFFIX))


def load_recipe(name_or_path: str) -> Recipe:
    """Read a recipe.

    Args:
        name_or_path: One of `recipe_names`, or a path that ends in ``.yaml``.

    Returns:
        The recipe.

    Raises:
        OptionError: There is no such recipe; the nearest names are listed.
        ConfigError: The file is not a recipe.
    """
    if name_or_path.endswith(_SUFFIX):
        path = Path(name_or_path)
        if not path.is_file():
            raise OptionError(f"There is no recipe file {path}.")
        return _parse(path.stem, path.read_text(encoding="utf-8"))
    known = recipe_names()
    if name_or_path not in known:
        raise OptionError(f"There is no recipe {name_or_path!r}. {nearest_names(name_or_path, known)}")
    text = (resources.files("amradio") / "recipes" / f"{name_or_path}{_SUFFIX}").read_text(encoding="utf-8")
    return _parse(name_or_path, text)


def compare_run(
    recipe: Recipe, run: RecipeRun, metrics: Mapping[str, float], reason: str = "", partial: str = ""
) -> list[Comparison]:
    """Put measured values beside the published ones.

    Args:
        recipe: The recipe.
        run: One of its runs.
        metrics: What was measured; empty if nothing could be.
        reason: Why not.
        partial: See `Comparison`.

    Returns:
        One comparison for each published value.

    Raises:
        ConfigError: The evaluation has no metric of that name.
    """
    missing = [name for name in run.expected if metrics and name not in metrics]
    if missing:
        raise ConfigError(
            f"Recipe {recipe.name} expects the metric {missing[0]!r}; the evaluation has {', '.join(metrics)}."
        )
    return [
        Comparison(run.setting, name, value, metrics.get(name), recipe.tolerance, reason, partial)
        for name, value in run.expected.items()
    ]


def _parse(name: str, text: str) -> Recipe:
    import yaml

    try:
        data = yaml.safe_load(text)
        runs = tuple(_parse_run(r) for r in data["runs"])
        title = text.splitlines()[0].removeprefix("#").strip()
        fields: dict[str, Any] = {k: str(data[k]) for k in ("task", "source", "checkpoint", "data", "hardware", "time")}
        recipe = Recipe(
            name=name,
            title=title,
            tolerance=float(data["tolerance"]),
            note=str(data.get("note", "")).strip(),
            runs=runs,
            **fields,
        )
    except (yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
        what = f"it has no field {error}" if isinstance(error, KeyError) else str(error)
        raise ConfigError(f"{name} is not a valid recipe: {what}.") from error
    if not runs:
        raise ConfigError(f"{name} is not a valid recipe: it has no runs.")
    return recipe


def _parse_run(data: Mapping[str, Any]) -> RecipeRun:
    words = shlex.split(data["command"])
    if not words or words[0] != "amradio":
        raise ValueError(f"the command {data['command']!r} does not begin with amradio")
    return RecipeRun(str(data["setting"]), tuple(words[1:]), {str(k): float(v) for k, v in data["expected"].items()})
