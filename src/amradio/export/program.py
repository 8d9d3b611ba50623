"""What both kinds of export begin with: options, a description, and one graph for all sizes asked for."""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from amradio.backbones.exported import BACKBONE, PRECISIONS, ExportInfo, OutputInfo
from amradio.errors import LayoutError, OptionError, ResolutionError
from amradio.models.configs import Resolution, ViTConfig
from amradio.models.eradio import ERadio
from amradio.models.output import RadioOutput
from amradio.models.radio import RadioModel
from amradio.weights.checkpoint import Identity

INPUT = "images"
MAX_STEPS = 4096
"""Sides of a graph for any size go up to so many resolution steps; its traces are checked for that range."""

CONVOLUTIONAL_STRIDE = 32
"""The last stride of the convolutional stem, whose padding depends on the remainder."""

_TRACED_STEPS, _TRACED_BATCH = (6, 4), 2  # no side and no count that could be taken for another, or for 1
_LOUD = ("torch.onnx", "torch.export", "torch._inductor")


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to export.

    Attributes:
        size: The only (height, width) in pixels that the file will take; None for every size that the model takes.
        batch: The only number of images that it will take at once; None for any.
        feature_fmt: How its features are laid out: ``NLC`` [B, L, D] or ``NCHW`` [B, D, h, w].
        precision: ``fp32``, ``fp16``, ``int8`` (ONNX), ``bf16`` (AOTInductor).
    """

    size: Sequence[int] | None = None
    batch: int | None = None
    feature_fmt: Literal["NLC", "NCHW"] = "NLC"
    precision: str = "fp32"

    def check(self, model: RadioModel, precisions: Sequence[str]) -> None:
        """Refuse what cannot be exported.

        Args:
            model: The model.
            precisions: Those that this kind of file has.

        Raises:
            OptionError: A value is not valid, or the model takes one size only and none is given.
            ResolutionError: The model does not take the size.
        """
        if self.precision not in precisions:
            raise OptionError(f"precision must be one of {', '.join(precisions)}, got {self.precision!r}.")
        if self.feature_fmt not in ("NLC", "NCHW"):
            raise OptionError(f"feature_fmt must be NLC or NCHW in an exported file, got {self.feature_fmt!r}.")
        if self.batch is not None and self.batch < 1:
            raise OptionError(f"batch must be at least 1 image, got {self.batch}.")
        if self.size is None:
            _require_any_size(model)
            return
        if len(self.size) != 2:
            raise OptionError(f"size must be (height, width) in pixels, got {tuple(self.size)}.")
        nearest = model.get_nearest_supported_resolution(*self.size)
        if nearest != tuple(self.size):
            raise ResolutionError(
                f"The model does not take {self.size[0]}x{self.size[1]} (height x width); the nearest supported size "
                f"is {nearest.height}x{nearest.width}."
            )


def _require_any_size(model: RadioModel) -> None:
    trunk = model.config.backbone
    if isinstance(trunk, ViTConfig) and trunk.position == "fixed":
        rows, cols = (side * trunk.patch_size for side in trunk.position_grid)
        raise OptionError(f"This model has a fixed position embedding: pass size=({rows}, {cols}).")
    if isinstance(model.model, ERadio):
        raise OptionError(
            "E-RADIO resizes its maps until windows fit, which is another graph for each size: pass size=(height, "
            "width)."
        )


def describe(
    model: RadioModel, options: ExportOptions, max_side: int | None, environment: dict[str, str]
) -> ExportInfo:
    """All that must be known of an exported model to use it.

    Args:
        model: The model, with the adaptors that are exported.
        options: How it is exported.
        max_side: Largest side that the file takes, in pixels.
        environment: What it is made with.
    """
    identity = model.identity if isinstance(model.identity, Identity) else Identity(source="memory", layout="memory")
    teachers = {teacher["name"]: dict(teacher) for teacher in reversed(model.config.teachers)}
    dtype = str(PRECISIONS[options.precision]).removeprefix("torch.")
    outputs = [OutputInfo(name=BACKBONE, summary_dim=model.summary_dim, embed_dim=model.embed_dim, dtype=dtype)]
    for name in model.adaptors:
        view = model.view(name)
        outputs.append(
            OutputInfo(
                name=name,
                summary_dim=view.summary_dim,
                embed_dim=view.embed_dim,
                upsample_factor=model.patch_size // view.patch_size,
                teacher=teachers.get(name),
            )
        )
    return ExportInfo(
        precision=options.precision,
        patch_size=model.patch_size,
        step=step_of(model),
        size=None if options.size is None else Resolution(*options.size),
        max_side=max_side,
        batch=options.batch,
        feature_fmt=options.feature_fmt,
        outputs=tuple(outputs),
        preferred_resolution=model.preferred_resolution,
        window_size=model.window_size,
        version=identity.version or model.config.version,
        license=identity.license,
        source=identity.source,
        source_sha256=identity.sha256,
        revision=identity.revision,
        environment=environment,
    )


def step_of(model: RadioModel) -> int:
    """What both sides of images must be multiples of, in pixels, for one graph to be right for all of them."""
    step = max(model.min_resolution_step, model.model.input_multiple)
    trunk = model.config.backbone
    if isinstance(trunk, ViTConfig) and trunk.stem != "patch":
        return math.lcm(step, CONVOLUTIONAL_STRIDE)
    return step


def export_program(model: RadioModel, options: ExportOptions, device: torch.device | None = None) -> ExportedProgram:
    """Trace a model into one graph that is right for all sizes asked for.

    Args:
        model: The model; it stays as it is.
        options: What to export.
        device: Where the graph will run; default where the model is.

    Returns:
        A program from float32 images [B, 3, H, W] in [0, 1] to a summary and features for each output.

    Raises:
        LayoutError: The model cannot be traced.
    """
    step = step_of(model)
    flat = _Flat(_in_precision(model, PRECISIONS[options.precision], device), options.feature_fmt).eval()
    height, width = options.size or [count * step for count in _TRACED_STEPS]
    where = next(flat.parameters()).device
    images = torch.zeros(options.batch or _TRACED_BATCH, 3, height, width, device=where)
    shapes: dict[int, Any] = {}
    if options.batch is None:
        shapes[0] = Dim("batch", min=1)
    if options.size is None:
        shapes |= {2: step * Dim("rows", min=1, max=MAX_STEPS), 3: step * Dim("columns", min=1, max=MAX_STEPS)}
    try:
        with torch.no_grad(), quietly():
            return torch.export.export(flat, (images,), dynamic_shapes={INPUT: shapes or None}, strict=False)
    except Exception as e:  # torch.export raises whatever the trace trips over
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0][:300]
        hint = "" if options.size is not None else " A file for one size may be possible: pass size=(height, width)."
        raise LayoutError(f"The model cannot be exported by torch {torch.__version__}: {reason}.{hint}") from e


class _Flat(nn.Module):
    """The model with a flat tuple of outputs: summary and features of the backbone, then of each adaptor."""

    def __init__(self, model: RadioModel, feature_fmt: str) -> None:
        super().__init__()
        self.model = model
        self.feature_fmt = feature_fmt

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        output = self.model(images, self.feature_fmt)
        outputs = [output] if isinstance(output, RadioOutput) else output.values()
        return tuple(tensor for one in outputs for tensor in one)


def _in_precision(model: RadioModel, dtype: torch.dtype, device: torch.device | None) -> RadioModel:
    """The model in a dtype and on a device; a copy where that is not how it is."""
    where = next(model.parameters()).device
    device = device or where
    if (model.dtype, where) == (dtype, device) and not model.training:
        return model
    return copy.deepcopy(model).eval().to(device=device, dtype=dtype)


@contextmanager
def quietly() -> Iterator[None]:
    """Without what exporters say of themselves: packages that they do not find, their own deprecations."""
    levels = {name: logging.getLogger(name).level for name in _LOUD}
    try:
        for name in _LOUD:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
