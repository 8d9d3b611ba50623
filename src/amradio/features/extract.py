"""Pictures in, summaries and feature maps out, in the order of the pictures."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from amradio.errors import OptionError
from amradio.features.bucketing import batches_by_shape, in_order
from amradio.features.loader import DecodeOptions, LoadedPicture, load_pictures
from amradio.features.timing import StageTimer
from amradio.images.decode import MAX_PIXELS, WHITE
from amradio.images.resize import ResizePolicy
from amradio.images.sources import ImageSource
from amradio.models.output import RadioOutput


class FeatureModel(Protocol):
    """What `extract` asks of a model."""

    def __call__(self, images: Tensor, feature_fmt: str = "NLC") -> Any:
        """Map images [B, 3, H, W] in [0, 1] to a `RadioOutput`, or a dict of them with the key ``backbone``."""
        ...

    def get_nearest_supported_resolution(self, height: int, width: int) -> tuple[int, int]:
        """Round a size to one that the model accepts."""
        ...


@dataclass(frozen=True)
class ExtractOptions:
    """How pictures go through a model.

    Attributes:
        batch_size: Most pictures in one forward pass; halved by itself when memory runs out.
        look_ahead: How far pictures are read ahead to fill batches of one shape, and so how many decoded pictures and
            results are held at most (each); 4 batches if not given.
        workers: Decoding threads; one for each CPU core, up to 8, if not given.
        device: Where the images are moved to; where the model is.
        dtype: Of the images handed to the model.
        autocast: Run the model under autocast to this dtype.
        max_pixels: Budget for decoding one picture.
        background: RGB colour 0..255 behind transparent parts.
    """

    batch_size: int = 8
    look_ahead: int | None = None
    workers: int | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    max_pixels: int = MAX_PIXELS
    background: tuple[int, int, int] = WHITE

    def __post_init__(self) -> None:
        for name in ("batch_size", "look_ahead", "workers", "max_pixels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"{name} must be at least 1, got {value}.")


@dataclass(frozen=True)
class FeatureRecord:
    """What became of one picture.

    Attributes:
        position: In the input, from 0.
        source: The picture.
        size: (height, width) of the upright original; None if it could not be decoded.
        image: uint8 [3, H, W]: what the model saw; None if it failed before that.
        outputs: On the CPU, in the model's dtypes: for ``backbone`` and each adaptor a summary [C] and features
            [D, h, w]. Empty if it failed.
        reason: Why it failed; None if it did not.
    """

    position: int
    source: ImageSource
    size: tuple[int, int] | None = None
    image: Tensor | None = None
    outputs: Mapping[str, RadioOutput] = field(default_factory=dict)
    reason: str | None = None

    @property
    def ok(self) -> bool:
        """Whether there are features."""
        return self.reason is None


def extract(
    images: Iterable[ImageSource],
    model: FeatureModel,
    policy: ResizePolicy,
    options: ExtractOptions | None = None,
    timer: StageTimer | None = None,
) -> Generator[FeatureRecord, None, None]:
    """Compute summary and features of many pictures.

    Pictures of one shape are batched, also when others lie between them. A picture that cannot be decoded, or that does
    not fit into memory even alone, gives a record with the reason, and the others go on.

    Args:
        images: The pictures; read lazily, so the stream may be longer than memory.
        model: In evaluation mode, on the device of the options.
        policy: To which sizes pictures are brought; results are rounded to sizes that the model supports.
        options: Batch size, device and so on.
        timer: Gets the seconds of the stages ``decode`` and ``model``.

    Yields:
        One record for each picture, in the order of the pictures.

    Raises:
        OptionError: The model is in training mode.
    """
    if getattr(model, "training", False):
        raise OptionError("The model is in training mode, in which features are random. Call model.eval() first.")
    return _extract(images, model, policy, options or ExtractOptions(), timer or StageTimer())


def _extract(
    images: Iterable[ImageSource],
    model: FeatureModel,
    policy: ResizePolicy,
    options: ExtractOptions,
    timer: StageTimer,
) -> Generator[FeatureRecord, None, None]:
    look_ahead = options.look_ahead or 4 * options.batch_size
    how = DecodeOptions(policy, model.get_nearest_supported_resolution, options.max_pixels, options.background)
    workers = options.workers or min(os.cpu_count() or 1, 8)
    runner = _Runner(model, options, timer)
    with closing(load_pictures(images, how, workers, look_ahead, timer)) as pictures:
        batches = batches_by_shape(pictures, _shape, options.batch_size, look_ahead)
        records = (record for batch in batches for record in runner.records(batch))
        yield from in_order(records, lambda record: record.position)


def _shape(picture: LoadedPicture) -> tuple[int, ...] | None:
    return None if picture.pixels is None else tuple(picture.pixels.shape)


class _Runner:
    """Runs batches and remembers how much fits into memory."""

    def __init__(self, model: FeatureModel, options: ExtractOptions, timer: StageTimer) -> None:
        self.model = model
        self.options = options
        self.timer = timer
        self.max_batch_pixels: int | None = None  # known after memory ran out once

    def records(self, batch: Sequence[LoadedPicture]) -> Iterator[FeatureRecord]:
        """Records of one batch of equal shape, in order."""
        if batch[0].pixels is None:
            for p in batch:
                yield FeatureRecord(p.position, p.source, p.size, reason=p.reason)
            return
        pixels = torch.stack([p.pixels for p in batch if p.pixels is not None])  # [B, 3, H, W]
        start = 0
        while start < len(batch):
            count = self._how_many(pixels[start:])
            outputs = self._forward(pixels[start : start + count])
            if outputs is not None:
                for i, p in enumerate(batch[start : start + count]):
                    yield FeatureRecord(p.position, p.source, p.size, p.pixels, _one(outputs, i))
                start += count
            elif count > 1:
                self.max_batch_pixels = count // 2 * pixels.shape[-2] * pixels.shape[-1]
            else:
                p, (height, width) = batch[start], pixels.shape[-2:]
                reason = (
                    f"Out of memory for this picture alone, at {height} x {width} pixels; use a smaller resolution."
                )
                yield FeatureRecord(p.position, p.source, p.size, p.pixels, reason=reason)
                start += 1

    def _how_many(self, pixels: Tensor) -> int:
        if self.max_batch_pixels is None:
            return len(pixels)
        fitting = self.max_batch_pixels // (pixels.shape[-2] * pixels.shape[-1])
        return min(max(fitting, 1), len(pixels))

    def _forward(self, pixels: Tensor) -> dict[str, RadioOutput] | None:
        """Outputs of a batch on the CPU, or None if memory ran out."""
        device, dtype = self.options.device, self.options.autocast
        # The exception holds the frames, and so the tensors, of the failed pass: it must be gone before the next one.
        try:
            with (
                self.timer.waiting("model"),
                self.timer.busy("model"),
                torch.inference_mode(),
                torch.autocast(device.type, dtype, enabled=dtype is not None),
            ):
                # Bytes cross to the device, a quarter of what float32 would be.
                images = pixels.to(device).to(self.options.dtype).div_(255)  # [B, 3, H, W]
                out = self.model(images, feature_fmt="NCHW")
                named = {"backbone": out} if isinstance(out, RadioOutput) else dict(out)
                return {name: RadioOutput(*o).to("cpu") for name, o in named.items()}
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that a device, or the machine, has no memory left."""
    text = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        phrase in text for phrase in ("out of memory", "can't allocate memory", "not enough memory")
    )


def _one(outputs: Mapping[str, RadioOutput], i: int) -> dict[str, RadioOutput]:
    """One picture's outputs, copied so that a record that is kept does not keep its whole batch."""
    return {name: RadioOutput(o.summary[i].clone(), o.features[i].clone()) for name, o in outputs.items()}
