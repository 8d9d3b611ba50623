"""Logistic regression, checked against scikit-learn's optimum."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from amradio.errors import OptionError
from amradio.evals import logistic
from amradio.evals.linear import LinearConfig, holdout_mask, run_linear
from amradio.evals.logistic import channel_statistics, fit_logistic


def problem(count: int = 300, width: int = 12, classes: int = 5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(count, width)) + 0.5
    y = (x @ rng.normal(size=(width, classes)) + 3 * rng.normal(size=(count, classes))).argmax(1)
    return x, y


@pytest.mark.parametrize("c", [1e-3, 1.0, 100.0])
def test_the_optimum_is_scikit_learns(c: float) -> None:
    x, y = problem()
    reference = LogisticRegression(C=c, tol=1e-10, max_iter=10_000).fit(x, y)
    fit = fit_logistic(torch.from_numpy(x), torch.from_numpy(y), 5, c, tolerance=1e-8)
    assert fit.converged
    assert fit.gradient <= 1e-8
    np.testing.assert_allclose(fit.weight, reference.coef_, atol=1e-5)
    bias = fit.bias.numpy() - fit.bias.numpy().mean()  # a constant added to all biases changes nothing
    np.testing.assert_allclose(bias, reference.intercept_ - reference.intercept_.mean(), atol=1e-5)


def test_float32_gets_close() -> None:
    x, y = problem()
    reference = LogisticRegression(C=0.1, tol=1e-10, max_iter=10_000).fit(x, y)
    fit = fit_logistic(torch.from_numpy(x).float(), torch.from_numpy(y), 5, 0.1)
    assert fit.converged
    np.testing.assert_allclose(fit.weight, reference.coef_, atol=5e-3)


def test_blocks_and_a_warm_start_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = (torch.from_numpy(a) for a in problem())
    whole = fit_logistic(x, y, 5, 1.0, tolerance=1e-8)
    monkeypatch.setattr(logistic, "_LOGITS_AT_ONCE", 5 * 70)
    start = fit_logistic(x, y, 5, 0.01)
    blocks = fit_logistic(x, y, 5, 1.0, tolerance=1e-8, start=start)
    torch.testing.assert_close(blocks.weight, whole.weight, atol=1e-6, rtol=1e-6)
    assert blocks.iterations > 0


def test_the_gradient_is_autograds() -> None:
    x, y = (torch.from_numpy(a) for a in problem(50))
    theta = torch.randn(5, 13, dtype=torch.float64, requires_grad=True)
    loss, gradient = logistic._loss_and_gradient(theta.detach(), x, y)
    expected = torch.nn.functional.cross_entropy(x @ theta[:, :-1].T + theta[:, -1], y, reduction="sum")
    expected.backward()
    assert loss == pytest.approx(expected.item())
    assert theta.grad is not None
    torch.testing.assert_close(gradient, theta.grad)


def test_too_few_iterations_are_said() -> None:
    x, y = problem()
    fit = fit_logistic(torch.from_numpy(x), torch.from_numpy(y), 5, 1.0, max_iterations=2, tolerance=1e-8)
    assert not fit.converged
    assert fit.iterations == 2


def test_statistics_are_scikit_learns() -> None:
    x, _ = problem()
    x = np.concatenate([x + 1e4, np.full((len(x), 1), 3.0)], 1)  # a large mean, and a constant channel
    mean, deviation = channel_statistics(torch.from_numpy(x), None)
    scaler = StandardScaler().fit(x)
    np.testing.assert_allclose(mean, scaler.mean_)
    np.testing.assert_allclose(deviation, scaler.scale_)


@given(hnp.arrays(np.int64, st.integers(1, 60), elements=st.integers(0, 4)), st.floats(0.05, 0.95), st.integers(0, 99))
def test_the_held_out_part_is_stratified(labels: np.ndarray, fraction: float, seed: int) -> None:
    mask = holdout_mask(labels, fraction, seed)
    np.testing.assert_array_equal(mask, holdout_mask(labels, fraction, seed))
    for label in np.unique(labels):
        size, held = int((labels == label).sum()), int(mask[labels == label].sum())
        assert held == min(max(round(fraction * size), 1), size - 1)


def test_the_held_out_part_depends_on_the_seed() -> None:
    labels = np.repeat(np.arange(3), 50)
    assert (holdout_mask(labels, 0.5, 0) != holdout_mask(labels, 0.5, 1)).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"c": ()}, "c must be one or several different numbers above 0"),
        ({"c": (1.0, 1.0)}, "different numbers"),
        ({"c": (0.0,)}, "above 0"),
        ({"holdout": 1.0}, "holdout must be between 0 and 1"),
        ({"max_iterations": 0}, "max_iterations must be at least 1"),
    ],
)
def test_impossible_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        LinearConfig(**options)  # type: ignore[arg-type]


def test_a_run_equals_scikit_learn(backbone, sets, reference) -> None:
    (train, train_labels), (queries, targets) = reference(sets.train), reference(sets.eval)
    scaler = StandardScaler().fit(train.astype(np.float64))
    config = LinearConfig(c=(0.05,), dtype="float64", tolerance=1e-8)
    report = run_linear(backbone, sets.train, sets.eval, config)
    model = LogisticRegression(C=0.05, tol=1e-10, max_iter=10_000).fit(scaler.transform(train), train_labels)
    assert report.metrics["top1"].value == pytest.approx(100 * model.score(scaler.transform(queries), targets))
    predicted = model.predict(scaler.transform(queries))
    expected = {f"class{c}": 100 * (predicted[targets == c] == c).mean() for c in range(6)}
    assert report.per_class == pytest.approx(expected)
    assert 50 < report.metrics["top1"].value < 100
    assert report.task == "linear"
    assert report.details["sweep"] == []
    assert "C = 0.05" in report.protocol


@pytest.mark.parametrize("normalise", ["standardise", "l2", "none"])
def test_the_regularisation_is_chosen_on_held_out_pictures(backbone, sets, normalise: str) -> None:
    config = LinearConfig(c=(1e-4, 1e-1, 1e2, 1e4), normalise=normalise, holdout=0.25)  # type: ignore[arg-type]
    report = run_linear(backbone, sets.train, sets.eval, config)
    sweep = report.details["sweep"]
    assert [s["c"] for s in sweep] == [1e-4, 1e-1, 1e2, 1e4]
    best = max(s["top1"] for s in sweep)
    assert report.details["c"] == next(s["c"] for s in sweep if s["top1"] == best)
    assert report.metrics["top1"].value > 50  # of six classes
    assert "chosen on 25%" in report.protocol
    at_the_end = report.details["c"] in (1e-4, 1e4)
    assert any("at the end of what was tried" in note for note in report.notes) == at_the_end


def test_what_did_not_converge_is_noted(backbone, sets) -> None:
    report = run_linear(backbone, sets.train, sets.eval, LinearConfig(c=(1.0, 10.0), max_iterations=1, tolerance=1e-8))
    assert any("did not reach the tolerance within 1 iterations for C = 1, 10." in note for note in report.notes)
    assert any("The final fit stopped after 1 iterations" in note for note in report.notes)
