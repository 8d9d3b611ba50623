"""FUNGI for whole images: the summary with the gradients of self-supervised losses beside it.

For each objective: views of the picture go through the backbone; the gradient of the picture's own loss with respect to
the last attention's output projection, summed over views and tokens, is projected to the width of the summary and
scaled to length 1. One projection serves all objectives.

Simoncini et al. 2024 (arXiv 2407.10964), section 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amradio.errors import OptionError
from amradio.fungi.collect import as_picture, pictures
from amradio.fungi.hashing import picture_seed
from amradio.fungi.objectives import FittedObjective, Objective, Preset, make_objective
from amradio.fungi.projections import ExactKernel, Projection, check_projection, make_projection, unit
from amradio.fungi.tail import make_splitter
from amradio.fungi.wrapper import Wrapper, settings_of
from amradio.models.output import RadioOutput

_WORKERS = 8
_FITTED_AT_ONCE = 4  # pictures whose views are held at once


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """How per-image gradient features are made.

    Attributes:
        preset: Settings of the objectives that are given by name.
        layer: Linear layer whose gradient is taken; None: the output projection of the last attention.
        projection: See `amradio.fungi.projections`.
        projection_dim: Its width; None: that of the summary.
        include_embedding: Whether the summary begins with the backbone's own, scaled to length 1.
        view_size: Side of the views in pixels; None: 224, rounded to what the backbone supports.
        view_batch: Most views in one pass through the backbone.
        seed: Of heads, projection, crops and the choice of supporting pictures.
    """

    preset: Preset = "clean"
    layer: str | None = None
    projection: str = "sign"
    projection_dim: int | None = None
    include_embedding: bool = True
    view_size: int | None = None
    view_batch: int = 64
    seed: int = 42

    def __post_init__(self) -> None:
        if self.view_batch < 1:
            raise OptionError(f"view_batch must be at least 1, got {self.view_batch}.")
        if self.view_size is not None and self.view_size < 1:
            raise OptionError(f"view_size must be at least 1, got {self.view_size}.")
        check_projection(self.projection)


@dataclass(frozen=True)
class ImageGradients:
    """Gradients of one objective, before the projection.

    Attributes:
        losses: float32 [B].
        embeddings: float32 [B, V, C] the backbone's summaries of the views.
        upstream: float32 [B, R, H] gradients at the layer's output; R is views times tokens.
        inputs: [B, R, inputs] what the layer took. An image's gradient is ``sum_r upstream_r [inputs_r, 1]'``.
    """

    losses: Tensor
    embeddings: Tensor
    upstream: Tensor
    inputs: Tensor


class FungiWrapper(Wrapper):
    """A backbone whose summary has gradients beside it. Its features are those of the backbone inside.

    What is computed for a picture depends on this picture, the pictures of `fit` and the seed, and on nothing else in
    its batch.

    Args:
        backbone: Any backbone with attention layers; shared, never changed.
        objectives: Names out of `amradio.fungi.objectives.OBJECTIVES`, or objects that are an `Objective`.
        config: How.
        projection: Default made from the config.

    Attributes:
        base: The backbone inside.
        objectives: By name.
        config: See above.

    Raises:
        CapabilityError: The backbone has no such layer.
        OptionError: There is no objective, or two have one name.
    """

    def __init__(
        self,
        backbone: Any,
        objectives: Sequence[str | Objective] = ("kl", "dino", "simclr"),
        config: ImageConfig | None = None,
        *,
        projection: Projection | None = None,
    ) -> None:
        super().__init__(backbone)
        self.config = config or ImageConfig()
        self._split = make_splitter(self.base, self.config.layer)
        width, size = self.base.summary_dim, self._view_size()
        self.objectives: dict[str, Objective] = {}
        for given in objectives:
            objective: Any = given
            if isinstance(given, str):
                objective = make_objective(given, width, preset=self.config.preset, size=size, seed=self.config.seed)
            if not isinstance(objective, Objective):
                raise OptionError(f"{type(objective).__name__} is no objective: it needs name, views() and loss().")
            if objective.name in self.objectives:
                raise OptionError(f"Two objectives are called {objective.name!r}.")
            self.objectives[objective.name] = objective
        if not self.objectives:
            raise OptionError("FungiWrapper needs at least one objective.")
        self._own_projection = projection is None
        self.projection = projection or make_projection(
            self.config.projection, self._split.shape, self.config.projection_dim or width, self.config.seed + 1
        )
        if isinstance(self.projection, ExactKernel):
            raise OptionError("exact-kernel is for dense features; a summary is compared by one inner product.")
        device = self._device
        self._modules_inside = nn.ModuleList(
            m for m in (*self.objectives.values(), self.projection) if isinstance(m, nn.Module)
        ).to(device)

    @property
    def summary_dim(self) -> int:
        """Width of the summary."""
        own = self.base.summary_dim if self.config.include_embedding else 0
        return own + self.projection.dim * len(self.objectives)

    @property
    def layer(self) -> str:
        """Full name of the layer whose gradient is taken."""
        return self._split.layer

    @property
    def description(self) -> str:
        """What was added, in a few words for reports."""
        return f"FUNGI ({', '.join(self.objectives)}; {self.config.preset}, {self.config.projection})"

    @property
    def record(self) -> dict[str, Any]:
        """See `amradio.fungi.wrapper.Wrapper.record`: settings, layer, each objective with what it was fitted to."""
        settings = asdict(self.config)
        del settings["view_batch"]  # of speed only
        return {
            "kind": "image",
            **settings,
            "layer": self.layer,
            "summary_dim": self.summary_dim,
            "objectives": {name: settings_of(objective) for name, objective in self.objectives.items()},
            "given_projection": None if self._own_projection else settings_of(self.projection),
        }

    def fit(self, data: Iterable[Any]) -> FungiWrapper:
        """Let the objectives that need it see some pictures: SimCLR its negatives, DeepCluster its clusters.

        Args:
            data: A set of pictures as `amradio.images.open_images` gives it, a data loader of batches in [0, 1], a list
                of PIL images, ...; of tuples the first member is taken. Of a set of
                pictures some are chosen by the seed; otherwise the first ones are taken.

        Returns:
            This backbone.

        Raises:
            OptionError: There are not enough pictures.
        """
        for name, objective in self.objectives.items():
            if not isinstance(objective, FittedObjective):
                continue
            embeddings = []
            for batch in _grouped(pictures(self._ordered(data), objective.support_size), _FITTED_AT_ONCE):
                views = self._made(objective.support_views, batch, name)  # [B, V', 3, S, S]
                embeddings.append(self._embedded(views.flatten(0, 1)).unflatten(0, views.shape[:2]))
            if not embeddings:
                raise OptionError(f"The objective {name!r} needs pictures to fit on, and there are none.")
            objective.fit(torch.cat(embeddings))
        return self

    def features(self, items: Sequence[Any] | Tensor) -> dict[str, Tensor]:
        """Compute the gradient features of pictures, each objective's by itself.

        Args:
            items: Pictures: PIL images, tensors uint8 [3, H, W] or in [0, 1], or a batch of such tensors.

        Returns:
            By the objectives' names float32 [B, E], each row of length 1.

        Raises:
            OptionError: An objective is not fitted, or embeddings are NaN or infinite.
        """
        batch = [as_picture(item) for item in items]
        result = {}
        for name, objective in self.objectives.items():
            projected = [self.project(self.gradients(objective, views)) for views in self._passes(objective, batch)]
            result[name] = unit(torch.cat(projected)) if projected else torch.empty(0, self.projection.dim)
        return result

    def forward(self, images: Tensor, feature_fmt: str = "NLC") -> RadioOutput:
        """Compute summary and features.

        Args:
            images: [B, 3, H, W] in [0, 1].
            feature_fmt: ``NLC``, ``NCHW`` or ``NHWC``.

        Returns:
            Summary float32 [B, C]: the backbone's own, then each objective's gradients, each part of length 1; and the
            backbone's features.

        Raises:
            OptionError: See `features`.
            ResolutionError: The image size is not supported.
        """
        summary, features = self.base(images, feature_fmt)
        parts = [F.normalize(summary.float(), dim=-1)] if self.config.include_embedding else []
        return RadioOutput(torch.cat([*parts, *self.features(images).values()], dim=-1), features)

    def gradients(self, objective: Objective, views: Tensor) -> ImageGradients:
        """Compute the factors of the gradient of each picture's loss.

        Args:
            objective: One of `objectives`.
            views: [B, V, 3, S, S] in [0, 1].

        Returns:
            The factors.

        Raises:
            OptionError: Embeddings are NaN or infinite.
        """
        b, v = views.shape[:2]
        chunks = views.flatten(0, 1).split(self.config.view_batch)  # [b, 3, S, S] each
        splits = [self._split(chunk.to(self._device), summary_only=True) for chunk in chunks]
        with (
            torch.inference_mode(False),
            torch.autocast(self._device.type, enabled=False),
            torch.enable_grad(),
        ):
            embeddings = torch.cat([s.summary.detach() for s in splits]).float().unflatten(0, (b, v))  # [B, V, C]
            _check_finite(embeddings)
            losses = objective.loss(embeddings.requires_grad_())
            (gradient,) = torch.autograd.grad(losses.sum(), embeddings)
            parts = gradient.flatten(0, 1).split([len(c) for c in chunks])
            upstream = [s.upstream([s.summary], [g]) for s, g in zip(splits, parts, strict=True)]
        return ImageGradients(
            losses=losses.detach(),
            embeddings=embeddings.detach(),
            upstream=torch.cat(upstream).unflatten(0, (b, v)).flatten(1, 2),
            inputs=torch.cat([s.inputs for s in splits]).unflatten(0, (b, v)).flatten(1, 2),
        )

    def project(self, found: ImageGradients) -> Tensor:
        """Project the gradients of pictures: float32 [B, E], of any length."""
        with torch.no_grad(), torch.autocast(self._device.type, enabled=False):
            return self.projection(found.upstream, self._split.shape.augmented(found.inputs))

    @property
    def _device(self) -> torch.device:
        return next(self.base.parameters()).device  # type: ignore[no-any-return]

    def _view_size(self) -> int:
        wanted = self.config.view_size or 224
        size = self.get_nearest_supported_resolution(wanted, wanted)
        if size[0] != size[1] or (self.config.view_size and size[0] != wanted):
            raise OptionError(f"The backbone does not take views of {wanted}x{wanted}; the nearest size is {size}.")
        return size[0]

    def _passes(self, objective: Objective, batch: Sequence[Tensor]) -> Iterator[Tensor]:
        """Views [b, V, 3, S, S] of some pictures at a time: as many as fill one pass, for views are large."""
        start, count = 0, 1  # the first picture shows how many views there are
        while start < len(batch):
            views = self._made(objective.views, batch[start : start + count], objective.name)
            start += count
            count = max(self.config.view_batch // views.shape[1], 1)
            yield views

    def _made(self, make: Any, batch: Sequence[Tensor], name: str) -> Tensor:
        """Views [B, V, 3, S, S] of some pictures; Pillow resizes without the GIL, so in threads."""
        seeds = [picture_seed(picture, self.config.seed, name) for picture in batch]
        with ThreadPoolExecutor(min(_WORKERS, max(len(batch), 1)), thread_name_prefix="amradio-views") as pool:
            return torch.stack(list(pool.map(make, batch, seeds)))

    def _embedded(self, views: Tensor) -> Tensor:
        """Summaries float32 [n, C] of views, without gradients."""
        chunks = views.split(self.config.view_batch)
        return torch.cat([self._split(c.to(self._device), summary_only=True).summary.detach().float() for c in chunks])

    def _ordered(self, data: Iterable[Any]) -> Iterable[Any]:
        from amradio.images.dataset import ImageSet

        return data.shuffled(self.config.seed) if isinstance(data, ImageSet) else data


def _grouped(items: Iterator[Tensor], size: int) -> Iterator[list[Tensor]]:
    group: list[Tensor] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _check_finite(embeddings: Tensor) -> None:
    finite = torch.isfinite(embeddings).flatten(1).all(1)
    if not bool(finite.all()):
        first = int((~finite).nonzero()[0])
        raise OptionError(
            f"Summaries of the views of image {first} of the batch are NaN or infinite, so it has no gradients. Half "
            f"precision overflows in some models: try bfloat16 or float32."
        )
