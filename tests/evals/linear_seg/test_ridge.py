"""The closed form against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from amradio.evals.linear_seg import RidgeSums, fit_ridge


def patches(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, 5, generator=generator) * torch.tensor([1, 10, 0.1, 3, 1]) + 4
    return features, torch.randint(0, 6, (count, 3), generator=generator, dtype=torch.int32)


def sums(features: torch.Tensor, counts: torch.Tensor, parts: int = 3) -> RidgeSums:
    found = RidgeSums(5, 3)
    for x, y in zip(features.chunk(parts), counts.chunk(parts), strict=True):
        found.add(x, y)
    return found


@pytest.mark.parametrize("strength", [1e-4, 0.3])
def test_it_is_scikit_learns_ridge_on_standardised_features(strength: float) -> None:
    features, counts = patches(60, 0)
    counts[7] = 0  # all void: has no weight
    solution = sums(features, counts).solve(strength)
    x, y, weight = features.double().numpy(), counts.double().numpy(), counts.sum(1).double().numpy()
    shares = y / np.maximum(weight, 1)[:, None]
    mean = np.average(x, axis=0, weights=weight)
    deviation = np.sqrt(np.average((x - mean) ** 2, axis=0, weights=weight))
    reference = Ridge(alpha=strength * weight.sum()).fit((x - mean) / deviation, shares, sample_weight=weight)
    found = np.concatenate([x, np.ones((60, 1))], 1) @ solution.numpy()
    np.testing.assert_allclose(found, reference.predict((x - mean) / deviation), atol=1e-9)
    error = (weight[:, None] * (found - shares) ** 2).sum() / weight.sum()
    assert sums(features, counts, 1).error(solution) == pytest.approx(error, rel=1e-9)


def test_the_strength_is_the_one_that_predicts_other_pictures_best() -> None:
    strengths = (1e-6, 1e-2, 1.0, 100.0)
    fit, held_out = sums(*patches(12, 1), 1), sums(*patches(40, 2), 1)
    found = fit_ridge(fit, held_out, strengths)
    errors = [held_out.error(fit.solve(s)) for s in strengths]
    assert found.strength == strengths[int(np.argmin(errors))] != 1e-6
    assert found.errors == pytest.approx(errors)
    both = fit.plus(held_out).solve(found.strength)
    torch.testing.assert_close(found.head.weight.double(), both[:-1].T, atol=1e-5, rtol=1e-5)


def test_a_feature_that_never_changes_does_no_harm() -> None:
    features, counts = patches(30, 3)
    features[:, 2] = 7.0
    found = fit_ridge(sums(features, counts), RidgeSums(5, 3), (1e-6,))
    assert found.head(features).isfinite().all()
    assert found.errors == ()


def test_without_held_out_patches_the_strength_is_no_weak_one() -> None:
    found = fit_ridge(sums(*patches(12, 1), 1), RidgeSums(5, 3), (1e-6, 1e-4, 2e-2, 10.0))
    assert (found.strength, found.errors) == (2e-2, ())
