"""Teachers: frozen backbones that say what the student should say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from amradio.backbones.dispatch import load_backbone
from amradio.backbones.protocol import HasIdentity
from amradio.distill.config import TeacherConfig
from amradio.distill.crops import cut_mosaic, make_mosaic
from amradio.distill.targets import TargetCache, Targets
from amradio.errors import ConfigError
from amradio.features.manifest import weights_digest
from amradio.weights.checkpoint import torch_dtype

Spec: TypeAlias = str | Callable[..., Any]
"""What `amradio.load_backbone` takes."""


class Teacher:
    """One teacher on one device.

    Args:
        config: Which, and what is learned from it.
        device: Where it runs.
        backbone: What `amradio.load_backbone` takes, instead of what the configuration names.

    Attributes:
        config: See above.
        backbone: In evaluation mode, without gradients.
        cache: Of targets, if there is one.

    Raises:
        ConfigError: It cannot see pictures of the resolution asked for.
        AmradioError: It cannot be loaded.
    """

    def __init__(self, config: TeacherConfig, device: torch.device, backbone: Spec | None = None) -> None:
        self.config = config
        self.device = device
        self._dtype = None if config.dtype is None else torch_dtype(config.dtype)
        self.backbone: Any = load_backbone(
            config.backbone if backbone is None else backbone,
            adaptor=config.adaptor,
            device=device,
            dtype=self._dtype,
            progress=False,
            **config.options,
        )
        if isinstance(self.backbone, nn.Module):
            self.backbone.eval().requires_grad_(False)
        self.cache: TargetCache | None = None
        if config.resolution is not None:
            self._check(config.resolution)

    @property
    def name(self) -> str:
        """Of the adaptor that imitates it."""
        return self.config.name

    @property
    def summary_dim(self) -> int:
        """Width C of its summary."""
        return int(self.backbone.summary_dim)

    @property
    def feature_dim(self) -> int:
        """Width D of its features."""
        return int(self.backbone.embed_dim)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What is known of its weights, for reports and fingerprints; a digest of them where nothing else tells."""
        identity = self.backbone.identity if isinstance(self.backbone, HasIdentity) else None
        names = ("source", "version", "sha256", "revision", "license")
        facts = {"backbone": self.config.backbone} | {n: getattr(identity, n, None) for n in names}
        if not facts["sha256"] and not facts["revision"] and isinstance(self.backbone, nn.Module):
            facts["sha256_of_weights"] = weights_digest(self.backbone)
        return facts

    def side(self, student_side: int) -> int:
        """Side in pixels of the pictures that it sees when the student sees `student_side`."""
        if self.config.resolution is not None:
            return self.config.resolution
        if self.config.mosaic > 1:
            return student_side  # which the mosaic multiplies
        return int(self.backbone.get_nearest_supported_resolution(student_side, student_side)[0])

    def targets(self, images: Tensor, slots: Sequence[int] | None = None) -> Targets:
        """Say what the student should say.

        Args:
            images: uint8 [B, 3, H, W].
            slots: Of the views in the cache, if they are fixed.

        Returns:
            Targets on the teacher's device; None for what is not learned from it.
        """
        found = self._computed(images)
        if self.cache is None or slots is None:
            return found
        return self.cache.write(slots, found)

    def cached(self, slots: Sequence[int] | None) -> Targets | None:
        """Targets from the cache, on the teacher's device; None unless all are there."""
        if self.cache is None or slots is None or not self.cache.has(slots):
            return None
        found = self.cache.read(slots)
        return Targets(*(None if t is None else t.to(self.device, non_blocking=True) for t in found))

    def _computed(self, images: Tensor) -> Targets:
        k = self.config.mosaic
        with torch.inference_mode():
            x = images.to(self.device, non_blocking=True).float() / 255  # [B, 3, H, W] in [0, 1]
            x = make_mosaic(x, k) if k > 1 else x
            x = x if self._dtype is None else x.to(self._dtype)
            summary, features = self.backbone(x, feature_fmt="NCHW")
            summary = summary.float() if self.config.summary is not None else None
            features = features.float() if self.config.features is not None else None
            if features is not None and k > 1:
                features = cut_mosaic(features, k)
        # Tensors of inference mode cannot be kept for a backward pass; their copies can.
        return Targets(
            None if summary is None else summary.clone(),
            None if features is None else features.contiguous().clone(),
        )

    def _check(self, side: int) -> None:
        seen = side * self.config.mosaic
        nearest = tuple(self.backbone.get_nearest_supported_resolution(seen, seen))
        if nearest != (seen, seen):
            raise ConfigError(
                f"The teacher {self.name!r} cannot see pictures of {seen} pixels; the nearest size is {nearest[0]}."
            )


def load_teachers(
    configs: Sequence[TeacherConfig], device: torch.device, backbones: Mapping[str, Spec] | None = None
) -> dict[str, Teacher]:
    """Load all teachers of a run.

    Args:
        configs: Of the run.
        device: Where they run.
        backbones: By teacher, what `amradio.load_backbone` takes, instead of what the configuration names.

    Returns:
        Teachers by name.

    Raises:
        AmradioError: One cannot be loaded, or not be used as asked.
    """
    given = backbones or {}
    return {config.name: Teacher(config, device, given.get(config.name)) for config in configs}
