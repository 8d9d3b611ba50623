"""The per-image objectives: which views of a picture they look at, and the loss of their embeddings.

Each is a module of fixed random maps. Anything else with a name and the two methods of `Objective` is one as well.
Legend of shape comments: B images, V views, C width of the backbone's summary, S side of a view.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amradio.errors import OptionError
from amradio.fungi.clusters import assign, kmeans
from amradio.fungi.heads import Head
from amradio.fungi.losses import Denominator, LossDtype, cluster_loss, dino_loss, info_nce, kl_to_uniform
from amradio.fungi.views import Crop, crop_views, random_crop, resize_view, window_views

Preset = Literal["clean", "fungivision", "fungi-paper"]
"""Whose settings: ours, those of the library fungivision, or those of the scripts that the paper's numbers are from."""

PUBLISHED_STD, MISTYPED_STD = 0.229, 0.228  # of the red channel, in the paper's DeepCluster script


@runtime_checkable
class Objective(Protocol):
    """A self-supervised loss of the views of one image.

    Attributes:
        name: Of its part of the features; different for each objective of a wrapper.
    """

    name: str

    def views(self, picture: Tensor, seed: int) -> Tensor:
        """Make the views.

        Args:
            picture: uint8 [3, H, W] on the CPU.
            seed: Belongs to the picture; all that is random comes from it.

        Returns:
            float32 [V, 3, S, S], in [0, 1] but for overshoot, with the same V and S for every picture.
        """
        ...

    def loss(self, embeddings: Tensor) -> Tensor:
        """Compute the loss of each image; nothing may depend on the others.

        Args:
            embeddings: float32 [B, V, C] the backbone's summaries of the views.

        Returns:
            [B].
        """
        ...


@runtime_checkable
class FittedObjective(Protocol):
    """An objective that needs to see some pictures before.

    Attributes:
        support_size: How many.
    """

    support_size: int

    def support_views(self, picture: Tensor, seed: int) -> Tensor:
        """Make the views of a picture to fit on: float32 [V', 3, S, S]."""
        ...

    def fit(self, embeddings: Tensor) -> None:
        """Take in the embeddings float32 [N, V', C] of the pictures' views."""
        ...


class KlObjective(nn.Module):
    """KL divergence between the uniform distribution and the softmax of a random map of the unit embedding.

    Args:
        embed_dim: C.
        latent_dim: Width of the map's result.
        temperature: Of the softmax.
        resize: Side that the picture is resized to.
        size: Side of its centre, the view.
        seed: Of the map.
    """

    name = "kl"

    def __init__(
        self,
        embed_dim: int,
        *,
        latent_dim: int = 768,
        temperature: float = 1.0,
        resize: int = 256,
        size: int = 224,
        seed: int = 42,
    ) -> None:
        super().__init__()
        self.head = Head.random(embed_dim, latent_dim, _generator(seed, self.name))
        self.temperature = temperature
        self.resize = resize
        self.size = size

    def views(self, picture: Tensor, seed: int) -> Tensor:
        """See `Objective`."""
        return resize_view(picture, self.resize, self.size)

    def loss(self, embeddings: Tensor) -> Tensor:
        """See `Objective`."""
        return kl_to_uniform(self.head(F.normalize(embeddings[:, 0], dim=-1)), self.temperature)


class DinoObjective(nn.Module):
    """Cross-entropy between global crops, through one random map, and all crops through another.

    Args:
        embed_dim: C.
        latent_dim: Width of the maps' results.
        student_temperature: Of the softmax over all crops' latents.
        teacher_temperature: Of the softmax over the global crops' latents.
        local_crops: Small crops beside the two global ones.
        size: Side of the views.
        seed: Of the maps.
    """

    name = "dino"
    global_crops = 2
    global_scale, local_scale = (0.25, 1.0), (0.05, 0.25)

    def __init__(
        self,
        embed_dim: int,
        *,
        latent_dim: int = 2048,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.07,
        local_crops: int = 10,
        size: int = 224,
        seed: int = 42,
    ) -> None:
        super().__init__()
        generator = _generator(seed, self.name)
        self.student = Head.random(embed_dim, latent_dim, generator)
        self.teacher = Head.random(embed_dim, latent_dim, generator)
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature
        self.local_crops = local_crops
        self.size = size

    def views(self, picture: Tensor, seed: int) -> Tensor:
        """See `Objective`."""
        scales = [self.global_scale] * self.global_crops + [self.local_scale] * self.local_crops
        return crop_views(picture, _crops(picture, scales, random.Random(seed)), self.size, "bicubic")

    def loss(self, embeddings: Tensor) -> Tensor:
        """See `Objective`."""
        unit = F.normalize(embeddings, dim=-1)
        return dino_loss(
            self.student(unit),
            self.teacher(unit[:, : self.global_crops].detach()),
            self.student_temperature,
            self.teacher_temperature,
        )


class SimclrObjective(nn.Module):
    """InfoNCE between the windows of a picture, against those of other pictures.

    Args:
        embed_dim: C.
        latent_dim: Width of the map's result.
        temperature: Of InfoNCE.
        denominator: See `amradio.fungi.losses.info_nce`.
        loss_dtype: See `amradio.fungi.losses.info_nce`.
        support_size: Pictures whose windows are the negatives.
        num_patches: See `amradio.fungi.views.window_views`.
        stride_scale: See `amradio.fungi.views.window_views`.
        size: Side of the views.
        seed: Of the map.
    """

    name = "simclr"
    negatives: Tensor

    def __init__(
        self,
        embed_dim: int,
        *,
        latent_dim: int = 96,
        temperature: float = 0.07,
        denominator: Denominator = "tempered",
        loss_dtype: LossDtype = "float32",
        support_size: int = 64,
        num_patches: int = 4,
        stride_scale: int = 6,
        size: int = 224,
        seed: int = 42,
    ) -> None:
        super().__init__()
        self.head = Head.random(embed_dim, latent_dim, _generator(seed, self.name))
        self.register_buffer("negatives", torch.empty(0, latent_dim))
        self.temperature = temperature
        self.denominator: Denominator = denominator
        self.loss_dtype: LossDtype = loss_dtype
        self.support_size = support_size
        self.num_patches = num_patches
        self.stride_scale = stride_scale
        self.size = size

    def views(self, picture: Tensor, seed: int) -> Tensor:
        """See `Objective`."""
        return window_views(picture, self.size, self.num_patches, self.stride_scale)

    def support_views(self, picture: Tensor, seed: int) -> Tensor:
        """See `FittedObjective`."""
        return self.views(picture, seed)

    def fit(self, embeddings: Tensor) -> None:
        """See `FittedObjective`."""
        with torch.inference_mode(False), torch.no_grad():
            self.negatives = self.head(embeddings).flatten(0, 1)  # [N * V, d]

    def loss(self, embeddings: Tensor) -> Tensor:
        """See `Objective`.

        Raises:
            OptionError: There are no negatives yet.
        """
        if len(self.negatives) == 0:
            raise OptionError("The SimCLR objective needs pictures to take negatives from: call fit() first.")
        return info_nce(
            self.head(embeddings),
            self.negatives[None],
            temperature=self.temperature,
            denominator=self.denominator,
            dtype=self.loss_dtype,
        )


class DeepClusterObjective(nn.Module):
    """Cross-entropy of an image's crops against the clusters that two other crops of it fall into.

    Clusters are found in the pictures that it is fitted on, each head's by k-means over the latents of one of the two
    crops, heads taking turns. They become the heads' prototypes.

    Args:
        embed_dim: C.
        latent_dim: Width of the latents.
        prototypes: For each head the number of clusters.
        temperature: Of the softmax.
        iterations: Of k-means.
        support_size: Pictures to fit on.
        local_crops: Small crops beside the two large ones.
        size: Side of the views.
        mistyped_std: Scale the red channel as the published script does, whose deviation is mistyped.
        seed: Of the map, and of the first centroids.
    """

    name = "deepcluster"
    large_scale, small_scale = (0.14, 1.0), (0.05, 0.14)
    memory_crops = 2

    def __init__(
        self,
        embed_dim: int,
        *,
        latent_dim: int = 128,
        prototypes: Sequence[int] = (3000, 3000, 3000),
        temperature: float = 0.1,
        iterations: int = 10,
        support_size: int = 10_000,
        local_crops: int = 6,
        size: int = 224,
        mistyped_std: bool = False,
        seed: int = 42,
    ) -> None:
        super().__init__()
        weight = Head.random(embed_dim, latent_dim, _generator(seed, self.name)).weight
        self.head = Head(F.normalize(weight, dim=1), torch.zeros(latent_dim))  # weight-normed, of gain 1, without bias
        self.prototypes = tuple(prototypes)
        self.centroids: list[Tensor] = []
        self.temperature = temperature
        self.iterations = iterations
        self.support_size = support_size
        self.local_crops = local_crops
        self.size = size
        self.mistyped_std = mistyped_std
        self.seed = seed

    def views(self, picture: Tensor, seed: int) -> Tensor:
        """See `Objective`; the first two views decide on the clusters and get no gradient."""
        scales = [self.large_scale] * 2 + [self.small_scale] * self.local_crops
        crops = _crops(picture, scales, random.Random(f"{seed} crops"))
        return torch.cat([self.support_views(picture, seed), self._cropped(picture, crops)])

    def support_views(self, picture: Tensor, seed: int) -> Tensor:
        """See `FittedObjective`."""
        crops = _crops(picture, [self.large_scale] * self.memory_crops, random.Random(f"{seed} memory"))
        return self._cropped(picture, crops)

    def fit(self, embeddings: Tensor) -> None:
        """See `FittedObjective`.

        Raises:
            OptionError: There are fewer pictures than clusters.
        """
        generator = _generator(self.seed, "clusters")
        with torch.inference_mode(False), torch.no_grad():
            latents = self.latents(embeddings)  # [N, 2, d]
            initial = [torch.randperm(len(latents), generator=generator)[:count] for count in self.prototypes]
            for count, rows in zip(self.prototypes, initial, strict=True):
                if len(rows) < count:
                    raise OptionError(
                        f"The DeepCluster objective has {count} clusters, and was given {len(rows)} pictures to find "
                        f"them in. Give more pictures or lower `prototypes`."
                    )
            self.cluster(latents, initial)

    def cluster(self, latents: Tensor, initial: Sequence[Tensor]) -> None:
        """Find the prototypes.

        Args:
            latents: [N, 2, d] of the pictures' two crops.
            initial: For each head int64 [K]: the pictures that are the first centroids.
        """
        self.centroids = [
            kmeans(latents[:, head % self.memory_crops], rows.to(latents.device), self.iterations)
            for head, rows in enumerate(initial)
        ]

    def latents(self, embeddings: Tensor) -> Tensor:
        """Unit latents of embeddings [..., C]."""
        return F.normalize(self.head(embeddings), dim=-1)

    def targets(self, latents: Tensor) -> Tensor:
        """The cluster of each image for each head, from the latents [B, 2, d] of its two crops: int64 [B, heads]."""
        assigned = [assign(latents[:, head % self.memory_crops], c) for head, c in enumerate(self.centroids)]
        return torch.stack(assigned, dim=1)

    def loss(self, embeddings: Tensor) -> Tensor:
        """See `Objective`.

        Raises:
            OptionError: There are no clusters yet.
        """
        if not self.centroids:
            raise OptionError("The DeepCluster objective needs pictures to find clusters in: call fit() first.")
        self.centroids = [c.to(embeddings.device) for c in self.centroids]
        memory, crops = embeddings[:, : self.memory_crops].detach(), embeddings[:, self.memory_crops :]
        targets = self.targets(self.latents(memory))
        return cluster_loss(self.latents(crops), self.centroids, targets, self.temperature)

    def _cropped(self, picture: Tensor, crops: Sequence[Sequence[int]]) -> Tensor:
        views = crop_views(picture, crops, self.size, "bilinear")
        if self.mistyped_std:  # so that what a backbone with the right statistics sees is what the script's saw
            red, mean = views[:, 0], 0.485
            views[:, 0] = (red - mean) * (PUBLISHED_STD / MISTYPED_STD) + mean
        return views


OBJECTIVES = ("kl", "dino", "simclr", "deepcluster")
_CLASSES: dict[str, type[nn.Module]] = {
    "kl": KlObjective,
    "dino": DinoObjective,
    "simclr": SimclrObjective,
    "deepcluster": DeepClusterObjective,
}
_PRESETS: dict[str, dict[str, dict[str, object]]] = {
    "clean": {"kl": {"temperature": 15.0}, "simclr": {"support_size": 256}},
    "fungivision": {"simclr": {"denominator": "raw"}},
    "fungi-paper": {
        "kl": {"temperature": 15.0},
        "simclr": {"support_size": 256, "loss_dtype": "float16"},
        "deepcluster": {"mistyped_std": True},
    },
}


def make_objective(
    name: str, embed_dim: int, *, preset: Preset = "clean", size: int = 224, seed: int = 42
) -> nn.Module:
    """Make an objective by its name.

    Args:
        name: One of `OBJECTIVES`.
        embed_dim: Width of the backbone's summary.
        preset: Whose settings.
        size: Side of the views in pixels.
        seed: Of its random maps.

    Returns:
        The objective.

    Raises:
        OptionError: There is no such objective or preset.
    """
    if name not in _CLASSES:
        raise OptionError(f"Unknown objective {name!r}. Known: {', '.join(OBJECTIVES)}, or an object of your own.")
    if preset not in _PRESETS:
        raise OptionError(f"Unknown preset {preset!r}. Known: {', '.join(get_args(Preset))}.")
    options = dict(_PRESETS[preset].get(name, {}))
    if name == "kl":
        options["resize"] = max(round(size * 256 / 224), size)
    return _CLASSES[name](embed_dim, size=size, seed=seed, **options)


def _crops(picture: Tensor, scales: Sequence[tuple[float, float]], rng: random.Random) -> list[Crop]:
    _, height, width = picture.shape
    return [random_crop(height, width, scale, rng) for scale in scales]


def _generator(seed: int, name: str) -> torch.Generator:
    """Each map has numbers of its own, which do not depend on the other objectives that are in use."""
    return torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
