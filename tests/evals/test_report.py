"""Reports: what is saved comes back, and comparisons name what differs."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amradio.errors import ConfigError, OptionError
from amradio.evals.report import EvalReport, Metric, append_csv, compare, flatten, sweep_table


def report(**changes: object) -> EvalReport:
    data = {"name": "pets", "split": "val", "count": 100, "failed": 2, "classes": 2, "fingerprint": "ab"}
    failures = [{"path": "a|b.jpg", "reason": "truncated"}, {"path": "c\ud800.jpg", "reason": "empty"}]
    fields: dict[str, object] = {
        "task": "knn",
        "protocol": "weighted vote",
        "metrics": {"top1": Metric(97.5, "%"), "top5": Metric(100.0, "%", 0.25)},
        "config": {"k": [20], "resize": {"mode": "crop", "size": [224, 224], "multiple": 16}},
        "model": {"name": "radio_v2.5-l", "adaptor": None, "sha256": "cd"},
        "dataset": {"eval": {**data, "failures": failures}},
        "environment": {"torch": "2.13.0", "device": "cpu", "dtype": "float32", "world_size": 1},
        "wall_s": 12.5,
        "images_per_s": 8.0,
        "timing": {"search_s": 0.5},
        "per_class": {"cat": 95.0, "dog": 100.0},
        "notes": ("something to know",),
        "details": {"confusion": {"true_predicted_count": [[0, 0, 95], [0, 1, 5]]}},
    }
    return EvalReport(**{**fields, **changes})  # type: ignore[arg-type]


def test_saving_and_loading_gives_the_same_report(tmp_path: Path) -> None:
    original = report()
    json_path, markdown_path = original.save(tmp_path / "deep" / "report")
    assert (json_path.name, markdown_path.name) == ("report.json", "report.md")
    assert EvalReport.load(json_path) == original
    assert original.save(tmp_path / "deep" / "report.json") == (json_path, markdown_path)
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["report.json", "report.md"]


@given(st.dictionaries(st.text(min_size=1), st.floats(allow_nan=False, allow_infinity=False)))
def test_any_metric_survives_the_dictionary(values: dict[str, float]) -> None:
    original = report(metrics={name: Metric(v, "px", v) for name, v in values.items()})
    assert EvalReport.from_dict(json.loads(json.dumps(original.to_dict()))) == original


def test_markdown_has_numbers_protocol_and_identities() -> None:
    text = report().to_markdown()
    assert text.startswith("# knn: radio_v2.5-l, 224x224\n\nweighted vote\n")
    for line in (
        "| top1 | 97.500 % |",
        "| top5 | 100.000 ± 0.250 % |",
        "| sha256 | cd |",
        "| eval.count | 100 |",
        "| resize.size | 224, 224 |",
        "| torch | 2.13.0 |",
        "| eval | a\\|b.jpg | truncated |",
        "| dog | 100.000 |",
        "- something to know",
    ):
        assert line in text.splitlines(), line
    many = report(per_class={str(i): 1.0 for i in range(1000)}).to_markdown()
    assert "1000 values are in the JSON file" in many
    assert "## Classes" not in report(per_class=None).to_markdown()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", "Expecting value"),
        ("[]", "holds a list, not a JSON object"),
        ("{}", "has no schema version; this amradio reads reports of version 1"),
        ('{"schema": 2}', "has schema version 2"),
        ('{"schema": 1}', "is not an evaluation report: 'metrics'"),
        ('{"schema": 1, "metrics": {}, "notes": [], "odd": 1}', "is not an evaluation report"),
    ],
)
def test_a_file_that_is_no_report_is_refused(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        EvalReport.load(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"There is no report .*nope\.json"):
        EvalReport.load(tmp_path / "nope.json")


def test_failed_pictures_are_counted_over_all_sets() -> None:
    one = report().dataset["eval"]
    both = report(dataset={"train": {**one, "count": 300, "failed": 0}, "eval": one})
    assert (both.failed, both.failed_fraction) == (2, 0.005)


def test_sizes_are_told_apart() -> None:
    sizes = {
        "224x224": {"mode": "crop", "size": [224, 224]},
        "shortest 378": {"mode": "shortest", "size": [378]},
        "nearest": {"mode": "nearest", "size": []},
    }
    for label, resize in sizes.items():
        assert report(config={"resize": resize}).size_label == label
    assert report(model={"name": "m", "adaptor": "clip"}).model_label == "m/clip"


def test_one_table_of_many_reports() -> None:
    single = report(metrics={"top1": Metric(96.0, "%"), "mae": Metric(0.5)})
    head, rows = sweep_table([report(), single])
    assert head == ["task", "model", "size", "top1 %", "top5 %", "top5 std", "mae", "failed", "images/s"]
    assert rows[0] == ["knn", "radio_v2.5-l", "224x224", "97.500", "100.000", "0.250", "", "2", "8.0"]
    assert rows[1] == ["knn", "radio_v2.5-l", "224x224", "96.000", "", "", "0.500", "2", "8.0"]


def test_csv_lines_are_added(tmp_path: Path) -> None:
    path = tmp_path / "out" / "sweep.csv"
    value = 100 / 3
    append_csv(report(), path)
    append_csv(report(metrics={"top1": Metric(value, "%"), "top5": Metric(1.0, "%", 0.0)}), path)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(r["top1 %"]) for r in rows] == [97.5, value]
    with pytest.raises(OptionError, match=r"has the columns task, .* Choose another CSV file"):
        append_csv(report(metrics={"mae": Metric(1.0)}), path)


def test_compare_names_what_differs() -> None:
    first = report()
    second = replace(
        first,
        metrics={"top1": Metric(98.0, "%"), "mae": Metric(1.0)},
        config={"k": [10], "resize": {"mode": "crop", "size": [378, 378], "multiple": 16}},
        model={"name": "other", "adaptor": None},
        wall_s=1.0,
        timing={},
    )
    found = compare([first, second])
    assert found.labels == ("radio_v2.5-l, 224x224", "other, 378x378")
    assert found.differing == {
        "config.k": ([20], [10]),
        "config.resize.size": ([224, 224], [378, 378]),
        "model.name": ("radio_v2.5-l", "other"),
        "model.sha256": ("cd", None),
    }
    assert found.protocol_differs == ["config.k"]
    assert {m.name: m.values for m in found.metrics} == {
        "top1": (97.5, 98.0),
        "top5": (100.0, None),
        "mae": (None, 1.0),
    }
    rows = {row[0]: row[1:] for row in found.metric_table().rows}
    assert rows == {"top1 %": ["97.500", "98.000 (+0.500)"], "top5 %": ["100.000", "-"], "mae": ["-", "1.000"]}
    assert ["config.k", "20", "10"] in found.difference_table().rows
    assert json.loads(json.dumps(found.to_dict()))["metrics"][0]["differences"] == [0.0, 0.5]


def test_a_report_equals_itself_from_a_file(tmp_path: Path) -> None:
    original = report(config={"k": (20,), "resize": {"mode": "crop", "size": (224, 224)}})
    again = EvalReport.load(original.save(tmp_path / "r")[0])
    found = compare([original, again])
    assert not found.differing
    assert found.labels == ("radio_v2.5-l, 224x224 [1]", "radio_v2.5-l, 224x224 [2]")


def test_a_comparison_needs_two() -> None:
    with pytest.raises(OptionError, match="at least two reports, got 1"):
        compare([report()])
    with pytest.raises(OptionError, match="2 reports and 1 labels"):
        compare([report(), report()], ["a"])


def test_flatten() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": {}}) == {"a.b": 1, "a.c.d": [2]}
