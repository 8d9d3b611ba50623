"""Teachers and what is learned from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from amradio.distill.balancing import BalancingKind
from amradio.distill.losses import FeatureLoss, Match, SummaryLoss
from amradio.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class HeadSizes:
    """Size of an adaptor head.

    Attributes:
        version: ``v1``, ``v2`` or ``attn`` (spatial heads only), see `amradio.models.adaptors`.
        hidden_dim: Width inside; None: the student's width.
        num_inner: Inner blocks.
    """

    version: Literal["v1", "v2", "attn"] = "v2"
    hidden_dim: int | None = None
    num_inner: int = 0


@dataclass(frozen=True, kw_only=True)
class SummaryTarget:
    """How a teacher's summary is matched.

    Attributes:
        loss: See `amradio.distill.losses`.
        weight: Factor of the loss.
        in_backbone: Whether this teacher's class token is a part of the student's own summary.
        head: Size of the summary head.
    """

    loss: SummaryLoss = "cosine"
    weight: float = 1.0
    in_backbone: bool = True
    head: HeadSizes = HeadSizes()


@dataclass(frozen=True, kw_only=True)
class FeatureTarget:
    """How a teacher's features are matched.

    Attributes:
        loss: See `amradio.distill.losses`.
        weight: Factor of the loss.
        balancing: How targets are standardised, see `amradio.distill.balancing`.
        match: Which grid is interpolated where student and teacher differ: ``student`` or ``teacher`` is brought to the
            other's, or both meet on the ``smaller`` or ``larger`` one.
        upsample: Rows and columns that the spatial head makes of each student patch.
        head: Size of the spatial head.
    """

    loss: FeatureLoss = "mse"
    weight: float = 1.0
    balancing: BalancingKind = "phi-s"
    match: Match = "smaller"
    upsample: int = 1
    head: HeadSizes = HeadSizes()


@dataclass(frozen=True, kw_only=True)
class TeacherShape:
    """What is known of a teacher without loading it, so that costs can be computed without its weights.

    Attributes:
        summary_dim: Width C of its summary.
        embed_dim: Width D of its features.
        vit: Fields of the `amradio.models.configs.ViTConfig` that computes as much.
        window: Side in patches of its attention windows; None: global attention.
    """

    summary_dim: int
    embed_dim: int
    vit: Mapping[str, Any]
    window: int | None = None


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """A teacher and what is learned from it.

    Attributes:
        name: Of the adaptor that will imitate it.
        backbone: What `amradio.load_backbone` loads.
        adaptor: Of a RADIO teacher: whose output is meant.
        options: Further options of `load_backbone`.
        dtype: What the teacher computes in; None: as published.
        resolution: Side in pixels of the square pictures that it sees; None: what the student sees.
        mosaic: Side k of a mosaic: k x k pictures share one teacher input (RADIOv2.5, section 4). Such a teacher has
            no summary.
        weight: Factor of all its losses.
        summary: How its summary is matched; None leaves it out.
        features: How its features are matched; None leaves them out.
        licence: For the model card, where the weights do not say it themselves.
        shape: For cost estimates where the weights are not at hand.
        text: What texts are embedded with in this teacher's space: ``type`` and ``model`` as
            `amradio.text.load_text_tower` takes them; the student's adaptor gets that text side.
    """

    name: str
    backbone: str
    adaptor: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    resolution: int | None = None
    mosaic: int = 1
    weight: float = 1.0
    summary: SummaryTarget | None = SummaryTarget()
    features: FeatureTarget | None = FeatureTarget()
    licence: str | None = None
    shape: TeacherShape | None = None
    text: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        where = f"The teacher {self.name!r}"
        if self.summary is None and self.features is None:
            raise ConfigError(f"{where} teaches nothing: give it a summary, features, or both.")
        if self.mosaic < 1:
            raise ConfigError(f"{where} has mosaic={self.mosaic}; 1 means none.")
        if self.mosaic > 1 and self.summary is not None:
            raise ConfigError(f"{where} sees mosaics of several pictures and has no summary of one: set summary: null.")
        if "." in self.name or not self.name:
            raise ConfigError(f"A teacher's name must not be empty or have dots, got {self.name!r}.")
