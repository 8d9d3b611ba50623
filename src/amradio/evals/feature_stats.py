"""Statistics of features, without labels: ranks, distribution, weights, activations, cost.

The examples ``ssl_metrics``, ``feature_distribution``, ``model_stats`` and ``count_parameters`` of RADIO as one
evaluation of any backbone. The mathematics is in `amradio.statistics`; what is stored there in one pass is exact.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from amradio.backbones.protocol import Backbone
from amradio.errors import OptionError, nearest_names
from amradio.evals.activations import Layer, observed
from amradio.evals.augment import AugmentedView
from amradio.evals.model_cost import measure_cost
from amradio.evals.report import EvalReport, Metric
from amradio.evals.runner import Measurement, Setup, policy_for
from amradio.evals.spectral_norms import spectral_norms
from amradio.evals.streaming import FeaturePass
from amradio.features.extract import extract
from amradio.statistics.histograms import Histogram
from amradio.statistics.moments import Moments
from amradio.statistics.ranks import Lidar, rankme, rankme_of_moments, smooth_rank

if TYPE_CHECKING:
    from amradio.images.dataset import ImageSet

Part = Literal["ranks", "distribution", "weights", "activations", "cost"]
PARTS: tuple[str, ...] = get_args(Part)

BINS = 100
_SIGMAS = 5  # histograms reach so far from the mean
_KEPT_EIGENVALUES = 256  # of the covariance, in the report


@dataclass(frozen=True, kw_only=True)
class FeatureStatsConfig:
    """What is measured.

    Attributes:
        parts: ``ranks``: RankMe of summaries and of features, LiDAR; ``distribution``: mean, covariance and histograms
            of features; ``weights``: spectral norms; ``activations``: attention and MLP layers; ``cost``: parameters,
            operations, pictures a second.
        views: Augmented views of each picture, for LiDAR; RADIO's examples take 99 of 1000 pictures. 0 leaves LiDAR
            out.
        seed: Of the views.
        cost_batch_size: Pictures in each timed forward pass.
        cost_batches: Timed forward passes.
    """

    parts: tuple[str, ...] = PARTS
    views: int = 9
    seed: int = 0
    cost_batch_size: int = 8
    cost_batches: int = 3

    def __post_init__(self) -> None:
        for part in self.parts:
            if part not in PARTS:
                raise OptionError(f"Unknown part {part!r}. {nearest_names(part, PARTS)}")
        if not self.parts or self.views < 0 or self.cost_batch_size < 1 or self.cost_batches < 1:
            raise OptionError(
                "At least one part, views of at least 0, a batch and a pass of at least 1 are needed, got "
                f"{list(self.parts)}, {self.views}, {self.cost_batch_size} and {self.cost_batches}."
            )


class MapCache:
    """Feature maps of one pass for a second one, as long as they fit.

    Args:
        limit_bytes: How much memory they may take.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.maps: list[Tensor] | None = []
        """In order; None: they did not fit."""
        self._left = limit_bytes

    def add(self, maps: Tensor) -> None:
        """Keep a map [D, h, w]."""
        self._left -= maps.numel() * maps.element_size()
        if self._left < 0:
            self.maps = None
        elif self.maps is not None:
            self.maps.append(maps)


def run_feature_stats(
    backbone: Backbone,
    images: ImageSet,
    config: FeatureStatsConfig | None = None,
    setup: Setup | None = None,
    *,
    on_moments: Callable[[Moments], None] | None = None,
    cache_bytes: int = 2**32,
) -> EvalReport:
    """Measure the features of a backbone.

    Args:
        backbone: A view measures an adaptor's features; weights and layers are those of the whole model.
        images: Pictures; labels are not used.
        config: What is measured.
        setup: Size of the pictures, device.
        on_moments: Gets the mean and the covariance of the features, which are too large for a report.
        cache_bytes: Histograms need limits, and so a second look at the features: from memory if they fit into so much,
            otherwise the backbone runs again.

    Returns:
        The report; ``details`` has a field for each part.

    Raises:
        DatasetError: No picture worked.
        OptionError: Features are not finite, or this is one of several processes.
    """
    config = config or FeatureStatsConfig()
    setup = setup or Setup(policy_for(backbone))
    if setup.group is not None:
        raise OptionError("Statistics of features are measured by one process; start it without torchrun.")
    # Layers cannot be watched in a compiled network.
    setup = dataclasses.replace(setup, options=dataclasses.replace(setup.options, compile=False))
    measurement = Measurement(backbone, setup)
    metrics: dict[str, Metric] = {}
    details: dict[str, Any] = {}
    if {"ranks", "distribution", "activations"} & set(config.parts):
        _measure_features(measurement, images, config, metrics, details, on_moments, cache_bytes)
    if "weights" in config.parts and isinstance(backbone, torch.nn.Module):
        with measurement.stage("weights"):
            norms = spectral_norms(backbone)
        if norms:
            details["weights"] = norms
            values = np.array(list(norms.values()))
            metrics |= {
                f"spectral_norm_{name}": Metric(float(value))
                for name, value in (("max", values.max()), ("median", np.median(values)), ("mean", values.mean()))
            }
    if "cost" in config.parts:
        height, width = backbone.get_nearest_supported_resolution(*_view_size(setup))
        with measurement.stage("cost"):
            cost = measure_cost(
                backbone,
                height,
                width,
                batch_size=config.cost_batch_size,
                batches=config.cost_batches,
                device=setup.options.device,
                autocast=setup.options.autocast,
            )
        details["cost"] = dataclasses.asdict(cost)
        metrics |= {
            "parameters": Metric(cost.parameters / 1e6, "M"),
            "operations": Metric(cost.flops / 1e9, "GFLOP"),
            "throughput": Metric(cost.images_per_s, "images/s"),
        }
    return measurement.report(
        task="feature-stats", protocol=_protocol(config), config=config, metrics=metrics, details=details
    )


def _measure_features(
    measurement: Measurement,
    images: ImageSet,
    config: FeatureStatsConfig,
    metrics: dict[str, Metric],
    details: dict[str, Any],
    on_moments: Callable[[Moments], None] | None,
    cache_bytes: int,
) -> None:
    """Everything that needs pictures."""
    backbone = measurement.backbone
    cache = MapCache(cache_bytes if "distribution" in config.parts else 0)
    moments = Moments(backbone.embed_dim)
    summaries: list[Tensor] = []
    module = backbone if isinstance(backbone, torch.nn.Module) and "activations" in config.parts else None
    layers: list[Layer] = []
    features = FeaturePass(measurement, images, np.arange(len(images)), "all")
    with observed(module) if module is not None else nullcontext(layers) as layers:
        for record in features:
            summary, maps = record.outputs["backbone"]
            summaries.append(summary.float())
            moments.update(maps.permute(1, 2, 0))
            cache.add(maps)
    features.finish("eval")
    if "ranks" in config.parts:
        metrics |= _ranks(measurement, images, config, torch.stack(summaries), moments)
    if "distribution" in config.parts and moments.count > 1:
        details["distribution"] = _distribution(moments, lambda: _maps_again(measurement, images, cache))
        covariance = moments.covariance
        metrics |= {
            "feature_std": Metric(float(covariance.diagonal().mean().sqrt())),
            "effective_rank": Metric(smooth_rank(torch.linalg.eigvalsh(covariance))),
        }
        if on_moments is not None:
            on_moments(moments)
    if module is not None:
        details["activations"] = [layer.values() for layer in layers if layer.was_run]
        metrics |= _attention_metrics(details["activations"])
        if not details["activations"]:
            measurement.notes.append("The backbone has no attention or MLP layers whose activations could be measured.")


def _ranks(
    measurement: Measurement, images: ImageSet, config: FeatureStatsConfig, summaries: Tensor, moments: Moments
) -> dict[str, Metric]:
    metrics = {"rankme": Metric(rankme(summaries))}
    if moments.count > 1:
        metrics["rankme_features"] = Metric(rankme_of_moments(moments))
    if config.views and len(summaries) > 1:
        with measurement.stage("views"):
            found = Lidar(summaries.shape[1])
            for rows in _views(measurement, images, config):
                found.update(rows)
            if found.count > 1:
                metrics["lidar"] = Metric(found.value())
    if len(summaries) <= summaries.shape[1]:
        measurement.notes.append(
            f"RankMe and LiDAR of summaries cannot exceed the number of pictures, here {len(summaries)}: take more "
            f"than {summaries.shape[1]} to compare backbones."
        )
    return metrics


def _views(measurement: Measurement, images: ImageSet, config: FeatureStatsConfig) -> Iterator[Tensor]:
    """[V, C] summaries of each picture that works: as it is, then its augmented views."""
    setup = measurement.setup
    height, width = measurement.backbone.get_nearest_supported_resolution(*_view_size(setup))
    options = dataclasses.replace(setup.options, keep="summary")

    def sources() -> Iterator[Any]:
        for position, source in enumerate(images):
            yield source
            for view in range(config.views):
                yield AugmentedView(source, (height, width), (config.seed, position, view))

    rows: list[Tensor] = []
    with closing(extract(sources(), measurement.backbone, setup.policy, options)) as records:
        for i, record in enumerate(records):
            if setup.on_record is not None:
                setup.on_record(record)
            if record.ok:
                rows.append(record.outputs["backbone"].summary.float())
            if i % (config.views + 1) == config.views:
                if len(rows) > 1:
                    yield torch.stack(rows)
                rows = []


def _view_size(setup: Setup) -> tuple[int, int]:
    """(height, width) of views, and of the pictures that cost is measured with."""
    size = setup.policy.size
    if not size:
        raise OptionError("Views of one size need a resolution; the mode 'nearest' has none. Leave --mode out.")
    return (size[0], size[-1])


def _maps_again(measurement: Measurement, images: ImageSet, cache: MapCache) -> Iterable[Tensor]:
    if cache.maps is not None:
        return cache.maps
    features = FeaturePass(measurement, images, np.arange(len(images)), "all", shows_progress=False)
    return (record.outputs["backbone"].features for record in features)


def _distribution(moments: Moments, maps: Callable[[], Iterable[Tensor]]) -> dict[str, Any]:
    """Moments as a report holds them, and histograms of all values and of the most unusual channels."""
    mean, covariance = moments.mean, moments.covariance
    variance = covariance.diagonal()
    of_all = float(mean.mean()), float((variance.mean() + mean.var(correction=0)).sqrt())
    channels = {
        "smallest_mean": int(mean.argmin()),
        "largest_mean": int(mean.argmax()),
        "smallest_variance": int(variance.argmin()),
        "largest_variance": int(variance.argmax()),
    }
    series = {"all": of_all} | {
        name: (float(mean[channel]), float(variance[channel].sqrt())) for name, channel in channels.items()
    }
    histograms = {name: Histogram(*_limits(centre, deviation), BINS) for name, (centre, deviation) in series.items()}
    for one in maps():
        histograms["all"].update(one)
        for name, channel in channels.items():
            histograms[name].update(one[channel])
    eigenvalues = torch.linalg.eigvalsh(covariance).flip(0).clamp(min=0)
    return {
        "rows": moments.count,
        "mean": mean.tolist(),
        "variance": variance.tolist(),
        "eigenvalues": eigenvalues[:_KEPT_EIGENVALUES].tolist(),
        "histograms": {
            name: {
                "channel": channels.get(name),
                "mean": series[name][0],
                "std": series[name][1],
                "low": histogram.low,
                "high": histogram.high,
                "shares": histogram.shares.tolist(),
                "outside": histogram.outside / max(int(histogram.counts.sum()) + histogram.outside, 1),
            }
            for name, histogram in histograms.items()
        },
    }


def _limits(centre: float, deviation: float) -> tuple[float, float]:
    reach = _SIGMAS * deviation or max(abs(centre), 1.0) * 1e-6  # a constant channel has one full bin
    return centre - reach, centre + reach


def _attention_metrics(layers: list[dict[str, Any]]) -> dict[str, Metric]:
    seen = [layer for layer in layers if "entropy" in layer]
    found = {}
    if seen:
        found["attention_entropy"] = Metric(float(np.mean([layer["relative_entropy"] for layer in seen])))
        found["largest_logit"] = Metric(max(max(abs(layer["logit_min"]), abs(layer["logit_max"])) for layer in seen))
    if layers:
        names = ("input_min", "input_max", "output_min", "output_max")
        found["largest_activation"] = Metric(max(abs(layer[name]) for layer in layers for name in names))
    return found


def _protocol(config: FeatureStatsConfig) -> str:
    said = {
        "ranks": "RankMe of summaries and of patch features"
        + (f", LiDAR of each picture with {config.views} augmented views" if config.views else ""),
        "distribution": "mean and covariance of patch features",
        "weights": "largest singular values of weights",
        "activations": "activations of attention and MLP layers; attention entropy as a share of the largest possible",
        "cost": f"parameters, operations of a forward pass, pictures a second in batches of {config.cost_batch_size}",
    }
    return "; ".join(text for part, text in said.items() if part in config.parts)
