"""The student."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from amradio.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """The student.

    Attributes:
        architecture: A published name such as ``vit_base_patch16_224`` (`amradio.models.architectures`).
        model_kwargs: Overrides of the architecture in timm's terms.
        max_size: Side in pixels of the position grid: the largest size that positions are learned for.
        registers: Register tokens.
        model: Instead of an architecture: the fields of a `amradio.models.configs.RadioConfig`. Class tokens, summary,
            and adaptors follow from the teachers where they are not given.
        init: A checkpoint to start from: a path, version key or repository. Without `architecture` and `model` the
            student is what the checkpoint describes. ``efficientnet-lite0`` fills the convolutional stem of that name
            (`amradio.models.stem`) with a teacher's weights.
        frozen_stem: Keep the weights of a convolutional stem as they are, which makes a step two to three times
            cheaper; what follows the convolutions is trained.
        mean: Of each channel, that pictures are standardised with; None: CLIP's, or the checkpoint's.
        std: Likewise.
        spectral: Spectral reparametrisation of all linear layers of the blocks (arXiv 2303.06296).
        damp: Standard deviation of DAMP's multiplicative weight noise (arXiv 2402.17863); None: none.
        checkpointing: Recompute activations in the backward pass.
        compile: Compile the blocks.
        ema: Decay of the moving average of weights for each step; None keeps none.
    """

    architecture: str | None = None
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    max_size: int = 2048
    registers: int = 0
    model: Mapping[str, Any] | None = None
    init: str | None = None
    frozen_stem: bool = False
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    spectral: bool = False
    damp: float | None = None
    checkpointing: bool = False
    compile: bool = False
    ema: float | None = None

    def __post_init__(self) -> None:
        if self.architecture is not None and self.model is not None:
            raise ConfigError("student.architecture and student.model exclude each other.")
        if self.architecture is None and self.model is None and self.init is None:
            raise ConfigError("The student is not described: give student.architecture, student.model or student.init.")
        if (self.mean is None) != (self.std is None):
            raise ConfigError("student.mean and student.std go together.")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ConfigError(f"student.ema must be between 0 and 1, got {self.ema}.")
