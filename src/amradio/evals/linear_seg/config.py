"""The options of the linear segmentation probe, and the published schedules by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from amradio.errors import OptionError, nearest_names

Solver = Literal["sgd", "ridge"]
Inference = Literal["whole", "slide"]
ScoreAt = Literal["evaluated", "original"]
Padding = Literal["black", "mean"]


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How training pictures are varied: scaled, cut out, mirrored, recoloured (as mmsegmentation does).

    Attributes:
        scale: A picture is scaled such that its shortest side is the resolution times a factor drawn from this range.
        longest: The longest side is at most so many times the shortest side that is asked for; None: no limit.
        max_class_share: Of ten crops the first is taken in which no class has a larger share of the labelled pixels.
        colours: Whether brightness, contrast, saturation and hue are varied.
    """

    scale: tuple[float, float] = (0.5, 2.0)
    longest: float | None = 4.0
    max_class_share: float = 0.75
    colours: bool = True


@dataclass(frozen=True, kw_only=True)
class LinearSegProtocol:
    """How a linear head is fitted on frozen features, and how it is used.

    Attributes:
        name: One of `PROTOCOLS`, or one of your own.
        solver: ``sgd``: batch norm and a linear layer, trained with AdamW. ``ridge``: least squares, in closed form.
        augmentation: None: pictures as they are evaluated, so that features are computed once and kept.
        iterations: Steps of the training.
        batch_size: Pictures in a step, of all processes together.
        lr: Highest learning rate; it falls linearly to 0 at the last step.
        weight_decay: Of AdamW.
        warmup: Steps in which the learning rate rises linearly.
        warmup_start: Where it starts, as a share of `lr`.
        inference: ``whole`` pictures, or windows that slide over them (``slide``), whose scores are averaged.
        window: Side of a window, as a share of the resolution.
        stride: Between windows, as a share of their side.
        snapped: Both sides are rounded to whole patches before the backbone sees a picture. Otherwise pictures keep
            their aspect to the pixel, and are filled up to whole patches at the right and at the bottom.
        padding: With what: ``black``, or ImageNet's ``mean`` colour, which is 0 after the usual normalisation.
        longest: See `Augmentation`; of evaluated pictures.
    """

    name: str
    solver: Solver = "sgd"
    augmentation: Augmentation | None = None
    iterations: int = 2000
    batch_size: int = 16
    lr: float = 1e-3
    weight_decay: float = 0.0
    warmup: int = 100
    warmup_start: float = 1e-6
    inference: Inference = "whole"
    window: float = 1.0
    stride: float = 2 / 3
    snapped: bool = True
    padding: Padding = "black"
    longest: float | None = None

    def __post_init__(self) -> None:
        for name, kind in (("solver", Solver), ("inference", Inference), ("padding", Padding)):
            if getattr(self, name) not in get_args(kind):
                raise OptionError(f"{name} must be one of {list(get_args(kind))}, got {getattr(self, name)!r}.")
        if min(self.iterations, self.batch_size) < 1 or self.warmup < 0:
            raise OptionError(
                "iterations and batch_size must be at least 1 and warmup at least 0, got "
                f"{self.iterations}, {self.batch_size} and {self.warmup}."
            )
        if not (self.lr > 0 and self.weight_decay >= 0 and 0 < self.stride <= 1 and self.window > 0):
            raise OptionError(
                "lr and window must be above 0, weight_decay at least 0 and stride in (0, 1], got "
                f"{self.lr}, {self.window}, {self.weight_decay} and {self.stride}."
            )

    def __str__(self) -> str:
        return f"{self.name}: {self.how}; {self.where}"

    @property
    def how(self) -> str:
        """How the head is fitted, in words."""
        if self.solver == "ridge":
            return "ridge regression of class shares on patch features, in closed form"
        varied = self.augmentation is not None
        pictures = "random scales, crops, flips and colours" if varied else "pictures as they are, loss at patches"
        return (
            f"batch norm and a linear layer, {self.iterations} steps of {self.batch_size} pictures, AdamW at "
            f"{self.lr:g}, weight decay {self.weight_decay:g}; {pictures}"
        )

    @property
    def where(self) -> str:
        """What pictures are segmented in, in words."""
        return "whole pictures" if self.inference == "whole" else "sliding windows"

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> LinearSegProtocol:
        """The protocol that `dataclasses.asdict` made a record of, from JSON."""
        varied = record["augmentation"]
        augmentation = None if varied is None else Augmentation(**{**varied, "scale": tuple(varied["scale"])})
        return cls(**{**record, "augmentation": augmentation})

    @property
    def is_published(self) -> bool:
        """Whether it is one of those behind published numbers, unchanged, or none that claims to be."""
        return self.augmentation is None or self == PROTOCOLS.get(self.name)


PROTOCOLS = {
    p.name: p
    for p in (
        LinearSegProtocol(name="clean"),
        LinearSegProtocol(name="ridge", solver="ridge"),
        # NVlabs/RADIO's settings for mmsegmentation: 16 pictures of 8 GPUs, 80,000 steps.
        LinearSegProtocol(
            name="radio",
            augmentation=Augmentation(),
            iterations=80_000,
            warmup=1500,
            warmup_start=1e-6,
            snapped=False,
            longest=4.0,
        ),
        LinearSegProtocol(
            name="e-radio",
            augmentation=Augmentation(),
            iterations=80_000,
            warmup=1500,
            warmup_start=1e-6,
            inference="slide",
            snapped=False,
            longest=4.0,
        ),
        # DINOv2's linear evaluation (arXiv 2304.07193, section 7.4).
        LinearSegProtocol(
            name="dinov2",
            augmentation=Augmentation(longest=None),
            iterations=40_000,
            weight_decay=1e-4,
            warmup=1500,
            inference="slide",
            snapped=False,
            padding="mean",
        ),
    )
}
"""What is quick and right (``clean``, ``ridge``), and the schedules behind published numbers."""


def get_protocol(name: str) -> LinearSegProtocol:
    """Find a named protocol.

    Raises:
        OptionError: There is none of this name.
    """
    if name not in PROTOCOLS:
        raise OptionError(f"There is no protocol {name!r}. {nearest_names(name, PROTOCOLS)}")
    return PROTOCOLS[name]


@dataclass(frozen=True, kw_only=True)
class LinearSegConfig:
    """What is fitted and how it is scored.

    Attributes:
        protocol: The schedule.
        iterations: Instead of the protocol's; the warm-up shrinks with it.
        batch_size: Instead of the protocol's.
        lr: Instead of the protocol's.
        inference: Instead of the protocol's.
        scales: Factors of the resolution at which each picture is segmented; probabilities of several are averaged.
        flip: Also segment each picture mirrored.
        score_at: ``original``: at the size of the mask file. ``evaluated``: at the size that the model sees.
        ridge: Strengths of the regularisation to choose from, as shares of the features' variance.
        layers: Blocks whose features are put side by side, from 0, or from -1 backwards; empty: the backbone's own.
        layer_norm: Whether the norm that follows the last block is applied to the features of `layers`.
        seed: Of the first weights, the order of pictures, and augmentation.
    """

    protocol: LinearSegProtocol = field(default_factory=lambda: get_protocol("clean"))
    iterations: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    inference: Inference | None = None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    score_at: ScoreAt = "original"
    ridge: tuple[float, ...] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    layers: tuple[int, ...] = ()
    layer_norm: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.scales or any(not 0.1 <= s <= 10 for s in self.scales):
            raise OptionError(f"scales must be one or several numbers from 0.1 to 10, got {list(self.scales)}.")
        if not self.ridge or any(not r > 0 for r in self.ridge):
            raise OptionError(f"ridge must be one or several numbers above 0, got {list(self.ridge)}.")
        if self.score_at not in get_args(ScoreAt):
            raise OptionError(f"score_at must be one of {list(get_args(ScoreAt))}, got {self.score_at!r}.")
        self.resolved()  # which refuses what is impossible

    def resolved(self) -> LinearSegProtocol:
        """The protocol with what was chosen instead of its own."""
        protocol = self.protocol
        chosen = {
            name: getattr(self, name)
            for name in ("iterations", "batch_size", "lr", "inference")
            if getattr(self, name) is not None
        }
        if "iterations" in chosen:
            chosen["warmup"] = round(protocol.warmup * chosen["iterations"] / protocol.iterations)
        return replace(protocol, **chosen)
