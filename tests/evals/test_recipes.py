"""Published numbers as files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from amradio.cli import main, parse
from amradio.cli.evaluation import EvalCommand
from amradio.errors import ConfigError, OptionError
from amradio.evals.recipes import compare_run, load_recipe, recipe_names
from amradio.evals.report import Metric
from amradio.weights.catalog import is_catalog_name
from amradio.weights.dino_catalog import DINO_MODELS

RECIPE = """# Toy: 50.
task: knn
source: here
checkpoint: radio_v1
data: none
time: no time
tolerance: 0.1
hardware: any
runs:
  - {setting: one, command: amradio eval knn --dataset ./absent, expected: {top1: 50, top5: 90}}
"""


def is_known(model: str) -> bool:
    return is_catalog_name(model) or model in DINO_MODELS


@pytest.mark.parametrize("name", recipe_names())
def test_every_command_is_understood(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.title
    published = recipe.checkpoint != "e-radio_v1"  # a number without weights; its recipe says so
    assert is_known(recipe.checkpoint) == published
    for run in recipe.runs:
        command = parse(run.command)
        assert isinstance(command.protocol, EvalCommand)
        assert all(is_known(m) == published for m in command.protocol.model)


def test_the_numbers_of_the_first_readme() -> None:
    recipe = load_recipe("zero-shot-imagenet-radio_v1")
    assert [dict(r.expected) for r in recipe.runs] == [
        {"top1": 82.928, "top5": 97.364},
        {"top1": 82.654, "top5": 97.282},
    ]
    assert dict(load_recipe("zero-shot-imagenet_sketch-radio_v1").runs[0].expected) == {"top1": 70.756, "top5": 90.701}


def test_values_are_compared(tmp_path: Path) -> None:
    (tmp_path / "toy.yaml").write_text(RECIPE)
    recipe = load_recipe(str(tmp_path / "toy.yaml"))
    near, far = compare_run(recipe, recipe.runs[0], {"top1": 50.09, "top5": 89.8})
    assert near.reproduced
    assert not far.reproduced
    assert not compare_run(recipe, recipe.runs[0], {}, reason="no data")[0].reproduced
    with pytest.raises(ConfigError, match="expects the metric 'top5'; the evaluation has top1"):
        compare_run(recipe, recipe.runs[0], {"top1": 50.0})


def test_wrong_names_and_files(tmp_path: Path) -> None:
    with pytest.raises(
        OptionError, match=r"There is no recipe 'knn-table-radio_v9'. Nearest names: knn-table-radio_v2"
    ):
        load_recipe("knn-table-radio_v9")
    (tmp_path / "bad.yaml").write_text(RECIPE.replace("tolerance: 0.1\n", ""))
    with pytest.raises(ConfigError, match="bad is not a valid recipe: it has no field 'tolerance'"):
        load_recipe(str(tmp_path / "bad.yaml"))


def test_reproduce(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "toy.yaml")
    Path(path).write_text(RECIPE)
    assert main(["reproduce", path, "--json"]) == 1
    (first, _) = json.loads(capsys.readouterr().out)["results"]
    assert first["ours"] is None
    assert "absent" in first["reason"]
    assert main(["reproduce", path, "--dry-run", "--extra=--limit 10"]) == 0
    assert capsys.readouterr().out == "amradio eval knn --dataset ./absent --limit 10\n"

    class Report:
        metrics = {"top1": Metric(50.0, "%"), "top5": Metric(90.05, "%")}  # noqa: RUF012
        failed = 0

    monkeypatch.setattr(EvalCommand, "reports", lambda _: [Report()])
    assert main(["reproduce", path, "--extra=--batch-size 4"]) == 0
    out = capsys.readouterr().out
    assert "reproduced" in out
    assert "hardware: " in out
    assert "time: no time" in out
    assert main(["reproduce", path, "--extra=--limit 10"]) == 1
    assert "within tolerance, but not the same measurement (--limit)" in capsys.readouterr().out
    Report.failed = 2
    assert main(["reproduce", path]) == 1
    assert "2 pictures failed" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    main(["reproduce", path])
    assert capsys.readouterr().out == ""
    assert main(["reproduce"]) == 0
    assert "zero-shot-imagenet-radio_v1" in capsys.readouterr().out
