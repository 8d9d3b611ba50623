"""What a finished student is: the same in every layout, and speaking its teachers' own language."""

import pytest
import torch

import amradio
from amradio.distill.balancing import Balancing
from amradio.distill.export import balancing_of, finished_model, start_from_exported
from amradio.distill.objective import Objective
from amradio.distill.student import Widths, build_student, radio_config
from amradio.statistics.moments import Moments

WIDTHS = {"one": Widths(12, 12), "two": Widths(10, 10)}


@pytest.fixture
def parts(config):
    """Student, fitted objective and description of a run with everything that is folded."""
    c = config(student__spectral=True, student__damp=0.1, student__model__preferred_resolution=[32, 32])
    description = radio_config(c, WIDTHS)
    student, _ = build_student(c, description)
    objective = Objective(c, WIDTHS)
    for teacher in c.teachers:
        moments = Moments(WIDTHS[teacher.name].features)
        moments.update(torch.randn(200, moments.dim) @ torch.randn(moments.dim, moments.dim) + 3)
        fitted = Balancing.fit(teacher.features.balancing, moments)
        objective.teachers[teacher.name].balancing.load_state_dict(fitted.state_dict())
    return c, description, student, objective


def finished(parts):
    c, description, student, objective = parts
    return finished_model(description, c.student, student.state_dict(), objective)


@pytest.mark.parametrize("layout", ["native", "official", "huggingface", "transformers", "timm"])
def test_every_layout_gives_the_same(parts, tmp_path, layout):
    model = finished(parts)
    images = torch.rand(2, 3, 32, 40)
    path = tmp_path / {"official": "model.pth.tar", "native": "model.safetensors"}.get(layout, "model")
    whole = layout in ("native", "official", "huggingface")
    names = ["one", "two"] if whole else []
    amradio.save(model, path, layout=layout, backbone_only=not whole)
    loaded = amradio.load(str(path), names)
    wanted, found = model(images), loaded(images)
    if not whole:
        wanted, found = {"backbone": wanted["backbone"]}, {"backbone": found}
    assert wanted.keys() == found.keys()
    for name in wanted:
        summary = wanted[name].summary
        if layout == "timm":  # which takes the first token alone for the summary of a model that it does not know
            summary = summary[:, : model.embed_dim]
        assert torch.equal(summary, found[name].summary), name
        assert torch.equal(wanted[name].features, found[name].features), name


def test_adaptors_speak_the_teachers_language(parts):
    _, _, student, objective = parts
    model = finished(parts)
    student.eval()
    images = torch.rand(2, 3, 32, 32)
    said, out = student(images, ["one", "two"]), model(images, feature_fmt="NCHW")
    for name in WIDTHS:
        raw = balancing_of(objective, name).inverse(said[name].features.movedim(1, -1)).movedim(-1, 1)
        torch.testing.assert_close(out[name].features, raw, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(out[name].summary, said[name].summary, rtol=1e-4, atol=1e-5)


def test_training_goes_on_from_an_exported_student(parts, config, tmp_path):
    _, _, student, objective = parts
    path = amradio.save(finished(parts), tmp_path / "model.safetensors")
    c = config(student={"init": str(path)})
    again, loaded = build_student(c, radio_config(c, WIDTHS))
    assert loaded == {"one", "two"}
    start_from_exported(again, objective, loaded)
    images = torch.rand(2, 3, 32, 32)
    before, after = student.eval()(images, ["one", "two"]), again.eval()(images, ["one", "two"])
    for name in WIDTHS:
        torch.testing.assert_close(after[name].features, before[name].features, rtol=1e-3, atol=1e-3)
