"""Batches through a model: moved to its device, reduced there, and brought back as records of single pictures."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from amradio.errors import OptionError
from amradio.features.loader import LoadedPicture
from amradio.features.timing import StageTimer
from amradio.images.decode import MAX_PIXELS, WHITE, DecodeMode
from amradio.images.resize import Resizer
from amradio.images.sources import ImageSource
from amradio.models.output import RadioOutput

Keep = Literal["all", "pooled", "summary"]
"""What is kept of a model's features: the maps, their mean over all positions, or nothing but the summary."""


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
            results are held at most (each). If not given, 4 batches, or up to 16 if feature maps are not kept.
        workers: Decoding threads; one for each CPU core, up to 8, if not given.
        device: Where the images are moved to; where the model is.
        dtype: Of the images handed to the model.
        autocast: Run the model under autocast to this dtype.
        compile: Run the model through `torch.compile`, with shapes that may change from the start on.
        keep: Reduced on the device, so that what is not kept is never copied from it.
        decode: ``draft`` decodes large JPEGs at a fraction of their size, which is faster and not the same to the last
            digit; see `amradio.images.decode.DecodeMode`.
        resizer: What resizes: ``pillow``, or the faster ``torch``; see `amradio.images.resize.Resizer`.
        max_pixels: Budget for decoding one picture.
        background: RGB colour 0..255 behind transparent parts.
    """

    batch_size: int = 8
    look_ahead: int | None = None
    workers: int | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    compile: bool = False
    keep: Keep = "all"
    decode: DecodeMode = "full"
    resizer: Resizer = "pillow"
    max_pixels: int = MAX_PIXELS
    background: tuple[int, int, int] = WHITE

    def __post_init__(self) -> None:
        for name in ("batch_size", "look_ahead", "workers", "max_pixels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"{name} must be at least 1, got {value}.")
        for name, kind in (("keep", Keep), ("decode", DecodeMode), ("resizer", Resizer)):
            if getattr(self, name) not in get_args(kind):
                raise OptionError(f"{name} must be one of {list(get_args(kind))}, got {getattr(self, name)!r}.")


@dataclass(frozen=True)
class FeatureRecord:
    """What became of one picture.

    Attributes:
        position: In the input, from 0.
        source: The picture.
        size: (height, width) of the upright original; None if it could not be decoded.
        image: uint8 [3, H, W]: what the model saw; None if it failed before that.
        outputs: On the CPU, in the model's dtypes: for ``backbone`` and each adaptor a summary [C] and features
            [D, h, w]. With ``keep="pooled"`` the features are their mean [D] in float32, with ``keep="summary"`` they
            are None. Empty if it failed.
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


@dataclass(frozen=True)
class _Pass:
    """A forward pass that was started.

    Attributes:
        pictures: B of them, or one that does not fit into memory.
        outputs: [B, ...] on the CPU, complete once the device has done its work; empty if memory ran out.
        events: Beginning and end on a device that works by itself; None if the work is done.
        reason: Why there are no outputs.
    """

    pictures: Sequence[LoadedPicture]
    outputs: Mapping[str, RadioOutput] = field(default_factory=dict)
    events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
    reason: str | None = None


class Runner:
    """Runs batches and remembers how much fits into memory.

    On a GPU a batch is started before the results of the one before it are taken, so that the GPU does not wait while
    pictures are stacked and results are given out.

    Args:
        model: In evaluation mode, on the device of the options.
        options: How.
        timer: Gets the seconds of the stage ``model``, and the batches.
        shard_size: What is known of memory is forgotten at multiples of this position, so that the passes of a shard
            do not depend on which others came before.
    """

    def __init__(
        self, model: FeatureModel, options: ExtractOptions, timer: StageTimer, shard_size: int | None = None
    ) -> None:
        # Dynamic from the start: a graph for the size that came first would make results depend on the order.
        self._call: Any = torch.compile(model, dynamic=True) if options.compile else model
        self._options = options
        self._timer = timer
        self._shard_size = shard_size
        self._shard = 0
        self._max_batch_pixels: int | None = None  # known after memory ran out once
        self._ahead = 1 if options.device.type == "cuda" else 0

    def records(self, batches: Iterable[Sequence[LoadedPicture]]) -> Iterator[FeatureRecord]:
        """Records of all pictures, batch by batch.

        Args:
            batches: Pictures of equal shape, or pictures that failed already.
        """
        started: deque[_Pass] = deque()
        for batch in batches:
            for one in self._start(batch):
                started.append(one)
                if len(started) > self._ahead:
                    yield from self._finish(started.popleft())
        while started:
            yield from self._finish(started.popleft())

    def _start(self, batch: Sequence[LoadedPicture]) -> Iterator[_Pass]:
        """Start the passes of one batch: one, or several where memory does not suffice."""
        if batch[0].pixels is None:
            yield _Pass(batch)
            return
        self._enter_shard(batch[0].position)
        height, width = batch[0].pixels.shape[-2:]
        start = 0
        while start < len(batch):
            part = batch[start : start + self._how_many(height, width)]
            done = self._forward(part)
            if done is not None:
                yield done
                start += len(part)
            elif len(part) > 1:
                self._max_batch_pixels = len(part) // 2 * height * width
            else:
                reason = (
                    f"Out of memory for this picture alone, at {height} x {width} pixels; use a smaller resolution."
                )
                yield _Pass(part, reason=reason)
                start += 1

    def _enter_shard(self, position: int) -> None:
        shard = 0 if self._shard_size is None else position // self._shard_size
        if shard != self._shard:
            self._shard, self._max_batch_pixels = shard, None

    def _how_many(self, height: int, width: int) -> int:
        if self._max_batch_pixels is None:
            return self._options.batch_size
        return max(self._max_batch_pixels // (height * width), 1)

    def _forward(self, pictures: Sequence[LoadedPicture]) -> _Pass | None:
        """Start a forward pass, or return None if memory ran out."""
        device, dtype = self._options.device, self._options.autocast
        # The exception holds the frames, and so the tensors, of the failed pass: it must be gone before the next one.
        try:
            with (
                self._timer.waiting("model"),
                torch.inference_mode(),
                torch.autocast(device.type, dtype, enabled=dtype is not None),
            ):
                if device.type != "cuda":
                    with self._timer.busy("model"):
                        outputs = self._outputs(self._stacked(pictures).to(device))
                    done = _Pass(pictures, outputs)
                else:
                    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    begin.record(torch.cuda.current_stream(device))
                    outputs = self._outputs(self._stacked(pictures).to(device, non_blocking=True))
                    end.record(torch.cuda.current_stream(device))
                    done = _Pass(pictures, outputs, (begin, end))
            self._timer.count_batch(len(pictures))
            return done
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def _stacked(self, pictures: Sequence[LoadedPicture]) -> Tensor:
        """uint8 [B, 3, H, W]; in memory that a GPU can fetch by itself where there is one."""
        pixels = [p.pixels for p in pictures if p.pixels is not None]
        shape = (len(pixels), *pixels[0].shape)
        stacked = torch.empty(shape, dtype=torch.uint8, pin_memory=self._options.device.type == "cuda")
        return torch.stack(pixels, out=stacked)

    def _outputs(self, pixels: Tensor) -> dict[str, RadioOutput]:
        """Pixels on the device to outputs on the CPU; of a GPU's, the copy is only enqueued."""
        # Bytes crossed to the device, a quarter of what float32 would be.
        images = pixels.to(self._options.dtype).div_(255)  # [B, 3, H, W]
        out = self._call(images, feature_fmt="NCHW")
        named = {"backbone": out} if isinstance(out, RadioOutput) else dict(out)
        return {
            name: _reduced(RadioOutput(*o), self._options.keep).to("cpu", non_blocking=pixels.is_cuda)
            for name, o in named.items()
        }

    def _finish(self, done: _Pass) -> Iterator[FeatureRecord]:
        """Wait for a pass and take it apart."""
        if done.events is not None:
            begin, end = done.events
            with self._timer.waiting("model"):
                end.synchronize()
            self._timer.add_busy("model", begin.elapsed_time(end) / 1e3)
        for i, p in enumerate(done.pictures):
            yield FeatureRecord(
                p.position, p.source, p.size, p.pixels, _one(done.outputs, i), reason=p.reason or done.reason
            )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that a device, or the machine, has no memory left."""
    text = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        phrase in text for phrase in ("out of memory", "can't allocate memory", "not enough memory")
    )


def _reduced(output: RadioOutput, keep: Keep) -> RadioOutput:
    """Leave of the features [B, D, h, w] what is kept."""
    if keep == "all":
        return output
    pooled: Any = output.features.mean((2, 3), dtype=torch.float32) if keep == "pooled" else None  # [B, D]
    return RadioOutput(output.summary, pooled)


def _one(outputs: Mapping[str, RadioOutput], i: int) -> dict[str, RadioOutput]:
    """One picture's outputs, copied so that a record that is kept does not keep its whole batch."""
    one = {}
    for name, output in outputs.items():
        members: tuple[Tensor | None, ...] = output  # features that are not kept are None
        copied: list[Any] = [None if m is None else m[i].clone() for m in members]
        one[name] = RadioOutput(*copied)
    return one
