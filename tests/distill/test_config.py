"""Configurations: strict, overridable, and told apart by what matters."""

import re
from pathlib import Path

import pytest
import yaml

from amradio.distill.config import config_names, load_config, parse_config
from amradio.errors import ConfigError, OptionError


def test_a_whole_configuration(config):
    c = config()
    assert c.teachers[0].features.balancing == "phi-s"
    assert c.teachers_of(c.partitions[0]) == c.teachers
    assert c.student.ema == 0.9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule__stepps": 3}, r"no setting 'schedule.stepps'. Nearest names: steps"),
        ({"teachers__1__features__balancng": "none"}, r"no setting 'teachers.1.features.balancng'.*balancing"),
        ({"data__crops": {"scael": [0.1, 1]}}, r"no setting 'data.crops.scael'.*scale"),
        ({"teachers__0__features__loss": "l7"}, r"teachers\[0\].features.loss must be one of"),
        ({"schedule__steps": "many"}, r"schedule.steps must be int, got 'many'"),
        ({"schedule__warmup": 7}, "a warm-up within it, got 6 and 7"),
        ({"teachers__0__name": "two"}, "There are 2 teachers named 'two'"),
        ({"partitions__0__teachers": ["one"]}, "The teacher 'two' is in no partition"),
        ({"partitions__0__teachers": ["one", "tow"]}, "unknown teacher 'tow'. Nearest names: two"),
        ({"teachers__0__summary": None, "teachers__0__features": None}, "'one' teaches nothing"),
        ({"teachers__0__mosaic": 2}, "no summary of one: set summary: null"),
        ({"data__cache_dir": "x"}, "needs data.fixed_views"),
        ({"data__cache_dir": "x", "data__fixed_views": 2}, "the targets of 'one' cannot be cached"),
        ({"student__ema": 1.0}, "between 0 and 1"),
        ({"student__model": None}, "The student is not described"),
        ({"student__architecture": "vit_tiny_patch16_224"}, "exclude each other"),
        ({"partitions__0__sizes": []}, "needs sizes"),
        ({"run__accumulate": 0}, "run.accumulate must be at least 1"),
        ({"run__teacher_dropping": 1.0}, r"in \[0, 1\)"),
        ({"run__state_file_mib": 0}, "state_file_mib must be at least 0.1, got 0"),
        ({"data__sources": []}, "data.sources is empty"),
        ({"hooks": [{"kind": "knn", "every": 1}] * 2}, "There are 2 hooks named 'knn'"),
    ],
)
def test_what_is_wrong_is_named(settings, changes, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(settings(**changes), "run.yaml")


def test_a_file_with_overrides(settings, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings()))
    c = load_config(str(path), ["schedule.steps=9", "teachers.1.weight=2", "student.damp=0.1", "optimizer.lr=1e-2"])
    assert (c.schedule.steps, c.teachers[1].weight, c.student.damp, c.optimizer.lr) == (9, 2.0, 0.1, 0.01)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("schedule.steps", "KEY=VALUE"),
        ("teachers.5.weight=1", "'5' is no position in a list of 2"),
        ("name.x=1", "no settings"),
    ],
)
def test_overrides_that_cannot_be(settings, tmp_path, word, message):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings()))
    with pytest.raises(OptionError, match=message):
        load_config(str(path), [word])


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(OptionError, match=r"no configuration 'tiny-gpu'.*tiny-cpu"):
        load_config("tiny-gpu")
    with pytest.raises(OptionError, match="cannot be read"):
        load_config(str(tmp_path / "none.yaml"))
    (tmp_path / "a.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="is not YAML"):
        load_config(str(tmp_path / "a.yaml"))
    (tmp_path / "b.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="must hold settings by name"):
        load_config(str(tmp_path / "b.yaml"))


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"seed": 1}, "seed"),
        ({"teachers__0__weight": 2.0}, "teachers"),
        ({"partitions__0__batch_size": 8}, "partitions"),
        ({"student__damp": 0.1}, "student"),
        ({"data__crops": {"flip": 0.0}}, "data"),
        ({"optimizer": {"kind": "lamb"}}, "optimizer.kind"),
        ({"optimizer": {"betas": [0.8, 0.9]}}, "optimizer.betas"),
        ({"optimizer": {"eps": 1e-6}}, "optimizer.eps"),
        ({"optimizer": {"weight_decay": 0.5}}, "optimizer.weight_decay"),
        ({"optimizer": {"layer_decay": 0.5}}, "optimizer.layer_decay"),
        ({"run__accumulate": 2}, "run"),
    ],
)
def test_identity_tells_what_changed(config, changes, part):
    before, after = config().identity, config(**changes).identity
    assert [name for name in before if before[name] != after[name]] == [part]


def test_identity_does_not_mind_how_it_is_run(config):
    changes = {"run__log_steps": 5, "data__workers": 1, "student__checkpointing": True, "schedule__steps": 7}
    changes |= {"optimizer__lr": 0.5, "optimizer__clip": 3.0}
    assert config(**changes).identity == config().identity


@pytest.mark.parametrize("name", config_names())
def test_packaged_configurations_are_valid(name):
    c = load_config(name)
    assert c.teachers
    assert c.schedule.steps > 0


def test_settings_in_the_documentation_are_right():
    from amradio.cli.distill_hooks import _KINDS
    from amradio.distill.config import HookConfig, parse_strictly

    page = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "distill.md"
    blocks = re.findall(r"^```yaml\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    hooks = [parse_strictly(HookConfig, h, "a hook") for block in blocks for h in yaml.safe_load(block)["hooks"]]
    assert {h.kind for h in hooks} == set(_KINDS)
    for hook in hooks:
        assert parse_strictly(_KINDS[hook.kind], hook.options, "its options").eval


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer__lr": -1.0}, r"optimizer\.lr must be above 0, got -1\.0"),
        ({"optimizer__lr": float("inf")}, r"optimizer\.lr must be above 0, got inf"),
        ({"optimizer__betas": [0.9, 1.0]}, r"optimizer\.betas must be at least 0 and below 1, got \[0\.9, 1\.0\]"),
        ({"optimizer__eps": 0.0}, r"optimizer\.eps must be above 0"),
        ({"optimizer__weight_decay": -0.1}, r"optimizer\.weight_decay must be at least 0"),
        ({"optimizer__layer_decay": 1.5}, r"optimizer\.layer_decay must be above 0 and at most 1"),
        ({"optimizer__clip": 0.0}, r"optimizer\.clip must be above 0 \(or null: no bound\)"),
        ({"schedule__floor": 2.0}, r"schedule\.floor must be a share from 0 to 1, got 2\.0"),
        ({"run__checkpoint_minutes": 0.0}, r"run\.checkpoint_minutes must be above 0"),
        ({"run__checkpoint_steps": 0}, r"run\.checkpoint_steps must be at least 1"),
    ],
)
def test_numbers_out_of_range(config, changes, message):
    with pytest.raises(ConfigError, match=message):
        config(**changes)
