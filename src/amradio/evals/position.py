"""How well do patch features say where in the picture they are? A linear map from each feature to its coordinates.

The patch position predictor of RADIO's examples: frozen features, each scaled to length 1, a 1x1 convolution to (x, y)
in [-1, 1], smooth L1 loss. Below an error of 1, which is half the picture, smooth L1 is half the squared error, so the
best map is known in closed form: `ridge` finds in one pass over the pictures what `adam` approaches in several.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from amradio.backbones.protocol import Backbone
from amradio.errors import DatasetError, OptionError
from amradio.evals.epochs import ShuffledMaps
from amradio.evals.report import EvalReport, Metric
from amradio.evals.runner import Measurement, Setup, policy_for
from amradio.evals.streaming import FeaturePass, own_part

if TYPE_CHECKING:
    from amradio.distributed import Group
    from amradio.features.extract import FeatureRecord
    from amradio.images.dataset import ImageSet

_MAPS_AT_ONCE = 8
_VALUES_AT_ONCE = 2**24  # in float64: 128 MiB


@dataclass(frozen=True, kw_only=True)
class PositionConfig:
    """How to fit the map.

    Attributes:
        solver: ``adam``, as published, or ``ridge``: closed form.
        epochs: Of ``adam``.
        batch_size: Pictures in a step of ``adam``, over all processes together.
        learning_rate: Of ``adam``.
        seed: Of the initial map and of the order of the pictures.
        ridge: Of ``ridge``: what is added to the variances of the features, as a share of their mean.
    """

    solver: Literal["adam", "ridge"] = "adam"
    epochs: int = 5
    batch_size: int = 32
    learning_rate: float = 1e-2
    seed: int = 0
    ridge: float = 1e-6

    def __post_init__(self) -> None:
        finite = math.isfinite(self.learning_rate) and math.isfinite(self.ridge)
        if self.epochs < 1 or self.batch_size < 1 or not finite or self.learning_rate <= 0 or self.ridge < 0:
            raise OptionError(
                "epochs and batch_size must be at least 1, learning_rate above 0 and ridge not below 0, got "
                f"{self.epochs}, {self.batch_size}, {self.learning_rate} and {self.ridge}."
            )


class LinearMap(NamedTuple):
    """From features of length 1 to coordinates.

    Attributes:
        weight: [2, D].
        bias: [2].
    """

    weight: Tensor
    bias: Tensor


class Tokens(NamedTuple):
    """The patches of some pictures, all in one list.

    Attributes:
        features: [T, D] float32, each of length 1.
        targets: [T, 2] coordinates (x, y).
        weights: [T] one over the number of the picture's patches, so that pictures count equally.
    """

    features: Tensor
    targets: Tensor
    weights: Tensor


def target_grid(height: int, width: int) -> Tensor:
    """Coordinates of patches: -1 and 1 at the centres of the outermost ones.

    Args:
        height: h, in patches.
        width: w, in patches.

    Returns:
        [2, h, w]: x, then y.

    Raises:
        OptionError: A side has only one patch, which has no place between the outermost ones.
    """
    if min(height, width) < 2:
        raise OptionError(
            f"A grid of {height}x{width} patches has no positions to tell apart. Choose a higher resolution."
        )
    x, y = torch.linspace(-1, 1, width), torch.linspace(-1, 1, height)
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width)])


def gather_tokens(maps: Sequence[Tensor], device: torch.device | str = "cpu") -> Tokens:
    """Take feature maps apart.

    Args:
        maps: At least one, [D, h, w] each; h and w may differ.
        device: Where the result is.

    Returns:
        Their patches.
    """
    features = torch.cat([m.flatten(1).T for m in maps]).to(device, torch.float32)  # [T, D]
    targets = torch.cat([target_grid(*m.shape[1:]).flatten(1).T for m in maps])  # [T, 2]
    weights = torch.cat([torch.full((m[0].numel(),), 1 / m[0].numel()) for m in maps])  # [T]
    return Tokens(F.normalize(features, dim=1), targets.to(device), weights.to(device))


class NormalEquations:
    """Sums from which the least squares map follows, in float64; features are added and forgotten.

    Args:
        dim: D.
        device: Where the sums are; one that knows float64.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self._dim = dim
        # One matrix for all moments of (feature, x, y, 1): [D + 3, D + 3].
        self._moments = torch.zeros(dim + 3, dim + 3, dtype=torch.float64, device=device)

    def add(self, tokens: Tokens) -> None:
        """Add patches."""
        step = max(_VALUES_AT_ONCE // len(self._moments), 1)
        for features, targets, weights in zip(*(t.split(step) for t in tokens), strict=True):
            ones = torch.ones_like(weights)[:, None]
            rows = torch.cat([features, targets, ones], dim=1).to(self._moments)  # [t, D + 3]
            self._moments.addmm_((rows * weights.to(rows)[:, None]).T, rows)

    def reduce(self, group: Group | None) -> None:
        """Add the sums of other processes."""
        if group is not None:
            self._moments = group.all_reduce_sum(self._moments)

    def solve(self, ridge: float = 0.0) -> LinearMap:
        """Minimise the mean over pictures of the mean squared error over patches.

        Args:
            ridge: See `PositionConfig.ridge`; the bias is not penalised. With 0 and features that do not determine the
                map, the shortest of the best ones is taken.

        Returns:
            The map, float32.
        """
        total = self._moments[-1, -1]
        mean = self._moments[-1] / total  # [D + 3]
        covariance = self._moments / total - mean[:, None] * mean  # [D + 3, D + 3]
        d = self._dim
        values, vectors = torch.linalg.eigh(covariance[:d, :d])
        values = values.clamp_min(0)
        shifted = values + ridge * values.mean()
        threshold = d * torch.finfo(torch.float64).eps * values.max()
        inverse = torch.where(shifted > threshold, 1 / shifted, 0)
        weight = (vectors * inverse) @ (vectors.T @ covariance[:d, d : d + 2])  # [D, 2]
        bias = mean[d : d + 2] - mean[:d] @ weight  # [2]
        return LinearMap(weight.T.float(), bias.float())


class AdamFit:
    """The published optimisation, one step a batch of pictures. Under a group gradients are added up.

    Args:
        dim: D.
        config: Learning rate and seed.
        device: Where the map is.
        group: The processes that take part in each step. All of them hold the same map.
    """

    def __init__(
        self, dim: int, config: PositionConfig, device: torch.device | str = "cpu", group: Group | None = None
    ) -> None:
        generator = torch.Generator().manual_seed(config.seed)
        bound = dim**-0.5  # torch's own start of a 1x1 convolution, weight and bias
        start = torch.empty(2, dim + 1).uniform_(-bound, bound, generator=generator)
        self._parameters = start.to(device).requires_grad_()  # [2, D + 1], the bias last
        self._optimiser = torch.optim.Adam([self._parameters], lr=config.learning_rate)
        self._group = group

    def step(self, maps: Sequence[Tensor]) -> None:
        """Take a step on a batch.

        Args:
            maps: Features [D, h, w] of this process's pictures in the batch; maybe none.
        """
        sums = self._parameters.new_zeros(self._parameters.numel() + 1)  # the gradient's sum over pictures, their count
        if maps:
            tokens = gather_tokens(maps, self._parameters.device)
            predicted = F.linear(tokens.features, self._parameters[:, :-1], self._parameters[:, -1])  # [T, 2]
            losses = F.smooth_l1_loss(predicted, tokens.targets, reduction="none").mean(1)  # [T]
            (gradient,) = torch.autograd.grad((losses * tokens.weights).sum(), self._parameters)
            sums[:-1], sums[-1] = gradient.flatten(), len(maps)
        if self._group is not None:
            sums = self._group.all_reduce_sum(sums)
        if sums[-1] > 0:
            self._parameters.grad = (sums[:-1] / sums[-1]).view_as(self._parameters)
            self._optimiser.step()

    @property
    def map(self) -> LinearMap:
        """The present map."""
        parameters = self._parameters.detach()
        return LinearMap(parameters[:, :-1].clone(), parameters[:, -1].clone())


class PositionErrors:
    """Mean errors over pictures, added up batch by batch."""

    def __init__(self) -> None:
        self._sums = torch.zeros(4, dtype=torch.float64)  # |x error|, |y error|, smooth L1, pictures

    def update(self, found: LinearMap, tokens: Tokens) -> None:
        """Count the patches of whole pictures."""
        predicted = F.linear(tokens.features, found.weight, found.bias)  # [T, 2]
        absolute = (predicted - tokens.targets).abs()  # [T, 2]
        smooth = F.smooth_l1_loss(predicted, tokens.targets, reduction="none").mean(1, keepdim=True)  # [T, 1]
        rows = torch.cat([absolute, smooth, torch.ones_like(smooth)], dim=1)  # [T, 4]
        self._sums += (rows * tokens.weights[:, None]).double().sum(0).cpu()

    def reduce(self, group: Group | None) -> None:
        """Add what other processes counted."""
        if group is not None:
            self._sums = group.all_reduce_sum(self._sums)

    def metrics(self) -> dict[str, Metric]:
        """Errors where the picture is 2 wide and 2 high: ``mean_l1`` over both coordinates, ``smooth_l1``, one each."""
        x, y, smooth = (self._sums[:3] / self._sums[3]).tolist()
        values = {"mean_l1": (x + y) / 2, "smooth_l1": smooth, "mean_l1_x": x, "mean_l1_y": y}
        return {name: Metric(value) for name, value in values.items()}


def run_position(
    backbone: Backbone,
    train: ImageSet,
    evaluation: ImageSet,
    config: PositionConfig | None = None,
    setup: Setup | None = None,
    *,
    cache_bytes: int = 4 * 2**30,
) -> EvalReport:
    """Evaluate how linearly the features of a backbone hold the position of their patch.

    Args:
        backbone: Its features are what is evaluated; a view evaluates an adaptor's.
        train: Pictures to fit the map on; labels are not used.
        evaluation: Pictures to measure the error on.
        config: The protocol's options.
        setup: Size of the pictures, device, processes.
        cache_bytes: ``adam`` keeps the features of the train set in memory if those of each process fit into so much;
            otherwise they are computed anew in each epoch.

    Returns:
        The report, on every process.

    Raises:
        DatasetError: Both sets are the same, or no picture worked.
    """
    config = config or PositionConfig()
    setup = setup or Setup(policy_for(backbone))
    if train.fingerprint == evaluation.fingerprint:
        raise DatasetError(
            f"The train and the evaluation set are the same {len(train)} pictures of {train.name}. Choose another "
            "evaluation set or split."
        )
    measurement = Measurement(backbone, setup)
    with measurement.stage("fit"):
        if config.solver == "ridge":
            found = _fit_ridge(measurement, train, config)
        else:
            found = _fit_adam(measurement, train, config, cache_bytes)
    if not all(bool(t.isfinite().all()) for t in found):
        raise OptionError("The fit diverged: the map is not finite. Choose a smaller learning rate, or solver='ridge'.")
    found = LinearMap(*(t.to(setup.options.device) for t in found))
    errors = PositionErrors()
    features = FeaturePass(measurement, evaluation, own_part(len(evaluation), setup.group), "all")
    for batch in features.batches(_MAPS_AT_ONCE):
        errors.update(found, gather_tokens(_maps(batch), setup.options.device))
    features.finish("eval")
    errors.reduce(setup.group)
    return measurement.report(
        task="position",
        protocol=f"linear map from L2-normalised patch features to (x, y) in [-1, 1]; {_fit_text(config)}",
        config=config,
        metrics=errors.metrics(),
        details={"bias": found.bias.tolist(), "weight_norm": float(found.weight.norm())},
    )


def _fit_ridge(measurement: Measurement, train: ImageSet, config: PositionConfig) -> LinearMap:
    device, group = measurement.setup.options.device, measurement.setup.group
    if device.type == "mps":  # which knows no float64
        device = torch.device("cpu")
    equations = NormalEquations(measurement.backbone.embed_dim, device)
    features = FeaturePass(measurement, train, own_part(len(train), group), "all")
    for batch in features.batches(_MAPS_AT_ONCE):
        equations.add(gather_tokens(_maps(batch), device))
    features.finish("train")
    equations.reduce(group)
    return equations.solve(config.ridge)


def _fit_adam(measurement: Measurement, train: ImageSet, config: PositionConfig, cache_bytes: int) -> LinearMap:
    setup = measurement.setup
    fit = AdamFit(measurement.backbone.embed_dim, config, setup.options.device, setup.group)
    batches = ShuffledMaps(measurement, train, config.batch_size, config.seed, cache_bytes)
    for epoch in range(config.epochs):
        for maps in batches.epoch(epoch):
            fit.step(maps)
    return fit.map


def _maps(records: Sequence[FeatureRecord]) -> list[Tensor]:
    return [record.outputs["backbone"].features for record in records]


def _fit_text(config: PositionConfig) -> str:
    if config.solver == "ridge":
        return f"least squares in closed form, ridge {config.ridge:g}"
    return f"smooth L1, Adam {config.learning_rate:g}, {config.epochs} epochs, batches of {config.batch_size}"
