"""The position predictor: the golden targets, least squares against NumPy, Adam against torch's own layers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from amradio.errors import DatasetError, OptionError
from amradio.evals.position import (
    AdamFit,
    LinearMap,
    NormalEquations,
    PositionConfig,
    PositionErrors,
    Tokens,
    gather_tokens,
    run_position,
    target_grid,
)
from amradio.evals.runner import Setup, policy_for
from amradio.images import open_images
from amradio.models.output import RadioOutput


class KnowsPositions(nn.Module):
    """Patches of 4 pixels; a feature is a point of the sphere over its coordinates, beside the patch's mean colour."""

    patch_size = min_resolution_step = 4
    embed_dim, summary_dim = 6, 3
    preferred_resolution = (16, 20)

    def __init__(self, colour: float = 0.0) -> None:
        super().__init__()
        self.colour = colour
        self.passes = 0
        self.eval()

    def get_nearest_supported_resolution(self, height: int, width: int) -> tuple[int, int]:
        return round(height / 4) * 4, round(width / 4) * 4

    def forward(self, images: Tensor, feature_fmt: str = "NLC") -> RadioOutput:
        assert feature_fmt == "NCHW"
        self.passes += len(images)
        colours = F.avg_pool2d(images, 4) * self.colour  # [B, 3, h, w]
        xy = target_grid(*colours.shape[2:]) / 2  # [2, h, w]
        sphere = torch.cat([xy, (1 - xy.square().sum(0, keepdim=True)).sqrt()])  # [3, h, w] of length 1
        return RadioOutput(images.mean((2, 3)), torch.cat([sphere.expand(len(images), -1, -1, -1), colours], 1))


@pytest.fixture
def two_sets(pictures):
    return open_images(str(pictures("position-train", 9, 2))), open_images(str(pictures("position-eval", 4, 2, seed=1)))


def random_tokens(count: int, dim: int, pictures: int = 3, seed: int = 0) -> Tokens:
    rng = torch.Generator().manual_seed(seed)
    features = F.normalize(torch.randn(count, dim, generator=rng) + 1, dim=1)
    shares = torch.rand(count, generator=rng)
    return Tokens(features, torch.rand(count, 2, generator=rng) * 2 - 1, shares * pictures / shares.sum())


def numpy_lstsq(tokens: Tokens) -> tuple[np.ndarray, np.ndarray]:
    features, targets, weights = (t.double().numpy() for t in tokens)
    design = np.hstack([features, np.ones((len(features), 1))]) * np.sqrt(weights)[:, None]
    solution = np.linalg.lstsq(design, targets * np.sqrt(weights)[:, None], rcond=None)[0]
    return solution[:-1].T, solution[-1]


def test_targets_are_the_golden_ones(goldens) -> None:
    golden = load_file(goldens / "cases" / "metrics.safetensors")["pos.targets_2x3x5"]
    torch.testing.assert_close(target_grid(3, 5).expand(2, -1, -1, -1), golden)


@pytest.mark.parametrize("grid", [(1, 2), (3, 1), (1, 1)])
def test_a_single_patch_has_no_position(grid: tuple[int, int]) -> None:
    with pytest.raises(OptionError, match="has no positions to tell apart"):
        target_grid(*grid)


def test_maps_of_different_sizes_weigh_the_same() -> None:
    maps = [torch.randn(5, 2, 3), torch.randn(5, 4, 4).bfloat16()]
    features, targets, weights = gather_tokens(maps)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features.norm(dim=1), torch.ones(22))
    torch.testing.assert_close(features[1], F.normalize(maps[0][:, 0, 1], dim=0))
    assert targets[1].tolist() == [0.0, -1.0]  # x, y
    torch.testing.assert_close(torch.stack([weights[:6].sum(), weights[6:].sum()]), torch.ones(2))


@pytest.mark.parametrize("parts", [1, 7])
def test_least_squares_are_numpys(parts: int) -> None:
    tokens = random_tokens(400, 12)
    equations = NormalEquations(12)
    for part in zip(*(t.chunk(parts) for t in tokens), strict=True):
        equations.add(Tokens(*part))
    weight, bias = numpy_lstsq(tokens)
    found = equations.solve()
    np.testing.assert_allclose(found.weight, weight, atol=1e-5)
    np.testing.assert_allclose(found.bias, bias, atol=1e-5)


def test_ridge_is_the_textbook_formula() -> None:
    tokens = random_tokens(300, 8)
    equations = NormalEquations(8)
    equations.add(tokens)
    features, targets, weights = (t.double() for t in tokens)
    share = (weights / weights.sum())[:, None]
    x, y = features - (share * features).sum(0), targets - (share * targets).sum(0)
    covariance = (share * x).T @ x
    penalty = 0.3 * covariance.diagonal().mean()
    expected = torch.linalg.solve(covariance + penalty * torch.eye(8), (share * x).T @ y)
    torch.testing.assert_close(equations.solve(0.3).weight.double(), expected.T, atol=1e-6, rtol=1e-6)


def test_fewer_patches_than_channels_give_the_shortest_map() -> None:
    tokens = random_tokens(6, 10)
    equations = NormalEquations(10)
    equations.add(tokens)
    found = equations.solve()
    predicted = F.linear(tokens.features, found.weight, found.bias)
    torch.testing.assert_close(predicted, tokens.targets, atol=1e-4, rtol=0)
    mean = (tokens.weights[:, None] * tokens.features).sum(0) / tokens.weights.sum()
    rows = (tokens.features - mean).double()
    outside = found.weight.double() - found.weight.double() @ torch.linalg.pinv(rows) @ rows
    assert outside.abs().max() < 1e-4  # nothing in directions that no feature has


@given(st.integers(0, 1000), st.integers(2, 9))
def test_a_linear_relation_is_found(seed: int, dim: int) -> None:
    tokens = random_tokens(60, dim, seed=seed)
    rng = torch.Generator().manual_seed(seed + 1)
    true = LinearMap(torch.randn(2, dim, generator=rng), torch.randn(2, generator=rng))
    tokens = tokens._replace(targets=F.linear(tokens.features, *true))
    equations = NormalEquations(dim)
    equations.add(tokens)
    found, errors = equations.solve(), PositionErrors()
    errors.update(found, tokens)
    assert errors.metrics()["mean_l1"].value < 1e-3


def test_errors_are_means_over_pictures() -> None:
    maps = [torch.randn(4, 2, 3), torch.randn(4, 3, 3), torch.randn(4, 2, 2)]
    found = LinearMap(torch.randn(2, 4), torch.randn(2))
    errors, pieces = PositionErrors(), PositionErrors()
    errors.update(found, gather_tokens(maps))
    for m in maps:
        pieces.update(found, gather_tokens([m]))
    expected = []
    for m in maps:
        y = F.conv2d(F.normalize(m[None], dim=1), found.weight[..., None, None], found.bias)[0]
        target = target_grid(*m.shape[1:])
        expected.append([F.l1_loss(y, target), F.smooth_l1_loss(y, target), F.l1_loss(y[0], target[0])])
    for metrics in (errors.metrics(), pieces.metrics()):
        values = [metrics[name].value for name in ("mean_l1", "smooth_l1", "mean_l1_x")]
        assert values == pytest.approx(np.mean(expected, 0).tolist(), rel=1e-5)
        assert metrics["mean_l1"].value == pytest.approx((metrics["mean_l1_x"].value + metrics["mean_l1_y"].value) / 2)


def test_steps_are_those_of_a_convolution_under_adam() -> None:
    batches = [[torch.randn(5, 3, 4) for _ in range(3)] for _ in range(8)]
    fit = AdamFit(5, PositionConfig())
    layer = nn.Conv2d(5, 2, 1)
    layer.weight.data, layer.bias.data = fit.map.weight[..., None, None], fit.map.bias
    optimiser = torch.optim.Adam(layer.parameters(), lr=1e-2)
    for maps in batches:
        fit.step(maps)
        optimiser.zero_grad()
        predicted = layer(F.normalize(torch.stack(maps), dim=1))
        F.smooth_l1_loss(predicted, target_grid(3, 4).expand_as(predicted)).backward()
        optimiser.step()
    torch.testing.assert_close(fit.map.weight, layer.weight.data[..., 0, 0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(fit.map.bias, layer.bias.data, atol=1e-5, rtol=1e-4)


def test_an_empty_batch_changes_nothing() -> None:
    fit = AdamFit(5, PositionConfig())
    before = fit.map
    fit.step([])
    assert torch.equal(fit.map.weight, before.weight)


def test_features_that_hold_the_position(two_sets) -> None:
    backbone = KnowsPositions()
    report = run_position(backbone, *two_sets, PositionConfig(solver="ridge", ridge=1e-12))
    assert list(report.metrics) == ["mean_l1", "smooth_l1", "mean_l1_x", "mean_l1_y"]
    assert report.metrics["mean_l1"].value < 1e-4
    assert backbone.passes == 18 + 8  # each picture once
    assert (report.task, report.size_label) == ("position", "16x20")
    assert "closed form" in report.protocol
    assert {role: d["count"] for role, d in report.dataset.items()} == {"train": 18, "eval": 8}


def test_adam_converges_to_the_closed_form(two_sets) -> None:
    backbone = KnowsPositions(colour=0.5)
    ridge = run_position(backbone, *two_sets, PositionConfig(solver="ridge", ridge=0.0))
    config = PositionConfig(epochs=150, batch_size=4, learning_rate=0.05)
    adam = run_position(backbone, *two_sets, config)
    assert "Adam 0.05, 150 epochs, batches of 4" in adam.protocol
    assert adam.metrics["smooth_l1"].value == pytest.approx(ridge.metrics["smooth_l1"].value, abs=3e-4)
    assert 1e-4 < ridge.metrics["mean_l1"].value < 0.1


def test_features_that_hold_nothing(two_sets) -> None:
    class Colours(KnowsPositions):
        def forward(self, images: Tensor, feature_fmt: str = "NLC") -> RadioOutput:
            output = super().forward(images, feature_fmt)
            return RadioOutput(output.summary, torch.ones_like(output.features))

    report = run_position(Colours(), *two_sets, PositionConfig(solver="ridge"))
    # The best guess is the centre: mean distances of -1, -1/2, 0, 1/2, 1 and of -1, -1/3, 1/3, 1 from it.
    assert report.metrics["mean_l1_x"].value == pytest.approx(3 / 5)
    assert report.metrics["mean_l1_y"].value == pytest.approx(2 / 3)


@pytest.mark.parametrize(("cache_bytes", "passes"), [(2**30, 18), (100, 3 * 18), (0, 3 * 18)])
def test_kept_features_give_the_same_map(two_sets, cache_bytes: int, passes: int) -> None:
    config = PositionConfig(epochs=3, batch_size=5)
    reference = run_position(KnowsPositions(colour=0.5), *two_sets, config)
    backbone = KnowsPositions(colour=0.5)
    seen: list[int] = []
    setup = Setup(policy_for(backbone), on_record=lambda record: seen.append(record.position))
    report = run_position(backbone, *two_sets, config, setup, cache_bytes=cache_bytes)
    assert report.metrics["mean_l1"].value == pytest.approx(reference.metrics["mean_l1"].value, rel=1e-5)
    assert backbone.passes == passes + 8
    assert sorted(seen) == sorted([*range(18), *range(8)])  # progress counts each picture once


def test_mixed_sizes(pictures) -> None:
    folders = [pictures("mixed-train", 3, 2), pictures("mixed-eval", 2, 2, seed=1)]
    from PIL import Image

    for folder in folders:
        Image.fromarray(np.full((40, 20, 3), 77, np.uint8)).save(folder / "class0" / "tall.png")
    train, evaluation = (open_images(str(f)) for f in folders)
    backbone = KnowsPositions()
    setup = Setup(policy_for(backbone, (16,)))
    report = run_position(backbone, train, evaluation, PositionConfig(solver="ridge", ridge=1e-12), setup)
    assert report.metrics["mean_l1"].value < 1e-4
    assert run_position(backbone, train, evaluation, PositionConfig(epochs=1), setup).metrics["mean_l1"].value < 1


def test_broken_pictures_are_left_out(pictures, two_sets) -> None:
    broken = open_images(str(pictures("position-broken", 9, 2, broken=2)))
    for config in (PositionConfig(solver="ridge"), PositionConfig(epochs=2, batch_size=4)):
        report = run_position(KnowsPositions(colour=0.5), broken, two_sets[1], config)
        assert (report.dataset["train"]["count"], report.dataset["train"]["failed"]) == (20, 2)
        assert report.dataset["train"]["failures"][0]["path"].endswith("broken0.png")


def test_one_set_for_both(two_sets) -> None:
    with pytest.raises(
        DatasetError, match=r"The train and the evaluation set are the same 18 pictures of .*Choose anot"
    ):
        run_position(KnowsPositions(), two_sets[0], two_sets[0])


def test_features_that_are_no_numbers(two_sets) -> None:
    with pytest.raises(OptionError, match=r"The features of 18 of 18 pictures .* are not finite numbers, so KnowsPosi"):
        run_position(KnowsPositions(colour=torch.inf), *two_sets, PositionConfig(solver="ridge"))


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"batch_size": 0}, {"learning_rate": 0.0}, {"ridge": -1.0}])
def test_wrong_options(wrong) -> None:
    with pytest.raises(OptionError, match="epochs and batch_size must be at least 1, learning_rate above 0 and ridge"):
        PositionConfig(**wrong)
