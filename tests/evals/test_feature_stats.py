"""Statistics of features against NumPy, on backbones with and without attention."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from amradio.errors import DatasetError, OptionError
from amradio.evals.compare_features import CompareFeaturesConfig, aligned, run_compare_features
from amradio.evals.feature_stats import FeatureStatsConfig, MapCache, run_feature_stats
from amradio.evals.report import EvalReport
from amradio.evals.runner import Setup
from amradio.features import ExtractOptions, extract
from amradio.images.resize import ResizePolicy
from amradio.models.configs import RadioConfig, ViTConfig
from amradio.models.radio import RadioModel
from amradio.statistics.cca import compare_spaces
from amradio.statistics.moments import Moments
from amradio.statistics.ranks import lidar

SETUP = Setup(ResizePolicy("crop", (16, 16)), ExtractOptions(batch_size=16, workers=1))


def transformer(seed: int = 0, width: int = 16) -> RadioModel:
    torch.manual_seed(seed)
    trunk = ViTConfig(embed_dim=width, depth=2, num_heads=2, mlp_hidden_dim=24, patch_size=4, position_grid=(4, 4))
    return RadioModel(RadioConfig(backbone=trunk, summary_idxs=(0,))).eval()


def rows_of(backbone, images) -> tuple[np.ndarray, np.ndarray]:
    records = list(extract(iter(images), backbone, SETUP.policy, SETUP.options))
    summaries = np.stack([r.outputs["backbone"].summary.double().numpy() for r in records])
    features = np.concatenate([r.outputs["backbone"].features.flatten(1).T.double().numpy() for r in records])
    return summaries, features


def rank_of(rows: np.ndarray) -> float:
    s = np.linalg.svd(rows, compute_uv=False)
    p = s / s.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def test_ranks_and_distribution_against_numpy(sets: SimpleNamespace) -> None:
    backbone = transformer()
    images = sets.eval
    seen: list[Moments] = []
    report = run_feature_stats(
        backbone, images, FeatureStatsConfig(parts=("ranks", "distribution"), views=0), SETUP, on_moments=seen.append
    )
    summaries, features = rows_of(backbone, images)
    assert report.metrics["rankme"].value == pytest.approx(rank_of(summaries), rel=1e-4)
    assert report.metrics["rankme_features"].value == pytest.approx(rank_of(features), rel=1e-4)
    assert np.allclose(seen[0].covariance.numpy(), np.cov(features.T), rtol=1e-6)
    values = np.linalg.eigvalsh(np.cov(features.T))
    shares = values[values > 0] / values.sum()
    assert report.metrics["effective_rank"].value == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-4)
    found = report.details["distribution"]
    assert found["rows"] == len(features)
    assert found["mean"] == pytest.approx(features.mean(0).tolist(), rel=1e-5)
    assert found["eigenvalues"] == pytest.approx(values[::-1].tolist(), rel=1e-5, abs=1e-12)
    for name, columns in (("all", features), ("largest_variance", features[:, [int(features.var(0).argmax())]])):
        histogram = found["histograms"][name]
        centre, std = columns.mean(), columns.std(ddof=0 if name == "all" else 1)
        assert (histogram["low"], histogram["high"]) == pytest.approx((centre - 5 * std, centre + 5 * std), rel=1e-3)
        edges = np.linspace(histogram["low"], histogram["high"], 101)
        assert histogram["shares"] == pytest.approx((np.histogram(columns, edges)[0] / columns.size).tolist(), abs=1e-4)
    assert found["histograms"]["smallest_mean"]["channel"] == int(features.mean(0).argmin())


def test_histograms_do_not_depend_on_the_cache(sets: SimpleNamespace) -> None:
    config = FeatureStatsConfig(parts=("distribution",))
    one, other = (
        run_feature_stats(transformer(), sets.eval, config, SETUP, cache_bytes=size).details["distribution"]
        for size in (2**30, 100)
    )
    assert one == other
    cache = MapCache(100)
    cache.add(torch.zeros(3, 2, 2))
    assert cache.maps is not None
    cache.add(torch.zeros(3, 4, 4))
    assert cache.maps is None


def test_lidar_is_of_the_picture_and_its_views(sets: SimpleNamespace, backbone) -> None:
    from amradio.evals.augment import AugmentedView

    images = sets.eval.head(8)
    config = FeatureStatsConfig(parts=("ranks",), views=3, seed=5)
    report = run_feature_stats(backbone, images, config, SETUP)
    views = []
    for i in range(8):
        sources = [images[i], *(AugmentedView(images[i], (16, 16), (5, i, v)) for v in range(3))]
        records = extract(iter(sources), backbone, SETUP.policy, SETUP.options)
        views.append(torch.stack([r.outputs["backbone"].summary for r in records]))
    assert report.metrics["lidar"].value == pytest.approx(lidar(torch.stack(views)), rel=1e-4)
    assert "cannot exceed the number of pictures, here 8: take more than 16" in report.notes[0]


def test_everything_of_a_transformer(sets: SimpleNamespace, tmp_path) -> None:
    backbone = transformer()
    config = FeatureStatsConfig(views=1, cost_batch_size=1, cost_batches=1)
    report = run_feature_stats(backbone, sets.eval.head(5), config, SETUP)
    assert [(layer["name"], layer["kind"]) for layer in report.details["activations"]] == [
        (f"model.blocks.{i}.{name}", kind) for i in range(2) for name, kind in (("attn", "attention"), ("mlp", "mlp"))
    ]
    assert 0 < report.metrics["attention_entropy"].value <= 1
    assert report.metrics["spectral_norm_max"].value == max(report.details["weights"].values())
    assert report.metrics["parameters"].value == sum(p.numel() for p in backbone.parameters()) / 1e6
    assert report.details["cost"]["flops"] > 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in backbone.modules())
    path, _ = report.save(tmp_path / "stats")
    assert EvalReport.load(path).metrics == report.metrics


def test_a_backbone_without_attention(sets: SimpleNamespace, backbone) -> None:
    report = run_feature_stats(backbone, sets.eval.head(4), FeatureStatsConfig(parts=("activations",)), SETUP)
    assert report.metrics == {}
    assert "has no attention or MLP layers" in report.notes[0]


def test_a_constant_channel_has_a_histogram(sets: SimpleNamespace, backbone) -> None:
    class Flat(type(backbone)):
        def forward(self, images, feature_fmt="NLC"):
            summary, features = super().forward(images, "NCHW")
            return type(super().forward(images))(summary, features * torch.tensor([1.0, 0, 0])[:, None, None] + 2)

    report = run_feature_stats(Flat(), sets.eval.head(4), FeatureStatsConfig(parts=("distribution",)), SETUP)
    assert sum(report.details["distribution"]["histograms"]["smallest_variance"]["shares"]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"parts": ("rank",)}, "Unknown part 'rank'. Nearest names: ranks"),
        ({"parts": ()}, "At least one part"),
        ({"views": -1}, "views of at least 0"),
    ],
)
def test_what_cannot_be_measured(options: dict, text: str) -> None:
    with pytest.raises(OptionError, match=text):
        FeatureStatsConfig(**options)


# ---- two backbones ----


def test_a_comparison_against_rows(sets: SimpleNamespace) -> None:
    first, second = transformer(0, 8), transformer(1, 6)
    report = run_compare_features(first, second, sets.eval, None, SETUP, SETUP.policy)
    (sa, fa), (sb, fb) = rows_of(first, sets.eval), rows_of(second, sets.eval)
    for name, a, b in (("features", fa, fb), ("summary", sa, sb)):
        joint = Moments(a.shape[1] + b.shape[1])
        joint.update(torch.from_numpy(np.concatenate([a, b], 1)))
        expected = compare_spaces(joint, a.shape[1])
        assert report.details["rows"][name] == len(a)
        assert report.metrics[f"{name}_cca_rank"].value == pytest.approx(float(expected.correlations.sum()), rel=1e-3)
        assert report.metrics[f"{name}_cka"].value == pytest.approx(expected.cka, rel=1e-3)
        assert report.metrics[f"{name}_rank_a"].value == pytest.approx(expected.rank_a, rel=1e-3)
        assert report.metrics[f"{name}_fidelity_a_to_b"].value == pytest.approx(expected.fidelity_a_to_b, rel=1e-2)
    assert report.details["second"]["embed_dim"] == 6


def test_a_backbone_agrees_with_itself(sets: SimpleNamespace) -> None:
    config = CompareFeaturesConfig(of="features", max_rows=200)
    report = run_compare_features(transformer(), transformer(), sets.eval, config, SETUP, SETUP.policy)
    assert report.metrics["features_mean_correlation"].value == pytest.approx(1, abs=1e-4)
    assert report.metrics["features_cka"].value == pytest.approx(1)
    assert report.metrics["features_explained_b_to_a"].value == pytest.approx(1, abs=1e-4)
    assert 200 <= report.details["rows"]["features"] < 48 * 16


def test_maps_are_brought_to_the_smaller_grid() -> None:
    a, b = torch.rand(3, 4, 6), torch.rand(5, 2, 3)
    x, y = aligned(a, b)
    assert (x.shape, y.shape) == ((6, 3), (6, 5))
    assert torch.equal(y, b.flatten(1).T)
    assert torch.equal(aligned(b, a)[1], x)


def test_too_few_pictures(sets: SimpleNamespace) -> None:
    few = sets.eval.head(4)
    report = run_compare_features(transformer(), transformer(1), few, None, SETUP, SETUP.policy)
    assert "4 rows are too few to compare the summary of widths (16, 16), so they are left out" in report.notes[0]
    assert "features_cca_rank" in report.metrics
    assert "summary_cca_rank" not in report.metrics
    with pytest.raises(OptionError, match="with no more rows than channels, everything correlates"):
        run_compare_features(
            transformer(), transformer(1), few, CompareFeaturesConfig(of="summary"), SETUP, SETUP.policy
        )


def test_no_picture_works(tmp_path) -> None:
    from amradio.images import open_images

    (tmp_path / "a.png").write_bytes(b"no picture")
    images = open_images(str(tmp_path))
    with pytest.raises(DatasetError, match="None of the 1 pictures"):
        run_feature_stats(transformer(), images, FeatureStatsConfig(parts=("ranks",)), SETUP)
    with pytest.raises(DatasetError, match="None of the 1 pictures"):
        run_compare_features(transformer(), transformer(), images, None, SETUP, SETUP.policy)
