"""The same pictures through two backbones, each at its own size, one picture at a time."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amradio.backbones.protocol import Backbone, HasIdentity
from amradio.errors import OptionError
from amradio.evals.runner import Measurement, model_record
from amradio.features.collect import Failure
from amradio.features.extract import ExtractOptions, FeatureRecord, extract
from amradio.images.resize import ResizePolicy
from amradio.models.configs import Resolution
from amradio.models.output import RadioOutput

if TYPE_CHECKING:
    from amradio.images.dataset import ImageSet

_MEAN_COLOUR = (0.485, 0.456, 0.406)  # of ImageNet: what most networks standardise to about zero


class Pair(NamedTuple):
    """A picture that both backbones have seen.

    Attributes:
        position: In the set.
        first: Summary [C] and features [D, h, w], float32 on the CPU.
        second: Of the other backbone.
        pixels: uint8 [3, H, W]: what the first one saw.
    """

    position: int
    first: RadioOutput
    second: RadioOutput
    pixels: Tensor


class Side(NamedTuple):
    """A backbone, and to which size it gets its pictures."""

    backbone: Backbone
    policy: ResizePolicy


class PairedPass:
    """Runs two backbones over a set, in one stream; remembers what failed.

    Args:
        measurement: Gets failures and times; its options are used.
        images: The set.
    """

    def __init__(self, measurement: Measurement, images: ImageSet) -> None:
        self._measurement = measurement
        self._images = images
        self._failures: dict[int, Failure] = {}
        self._seconds = 0.0
        self._kept: dict[tuple[int, ResizePolicy], list[FeatureRecord]] = {}

    def run(self, first: Side, second: Side, *, keep_second_bytes: int = 0) -> Iterator[Pair]:
        """Yield the pictures that worked, in order.

        Args:
            first: Seen by the setup's `on_record`.
            second: The other one.
            keep_second_bytes: The second one's features are kept for further calls with the same side if they fit into
                so much memory.

        Raises:
            OptionError: Features are not finite.
        """
        options = dataclasses.replace(self._measurement.setup.options, keep="all")
        on_record = self._measurement.setup.on_record
        start = time.perf_counter()
        with ExitStack() as open_streams:
            ours = extract(self._images, first.backbone, first.policy, options)
            open_streams.enter_context(closing(ours))
            theirs = self._second(second, options, keep_second_bytes)
            open_streams.enter_context(closing(theirs))
            for record, other in zip(ours, theirs, strict=True):
                if on_record is not None:
                    on_record(record)
                failed = record if not record.ok else other
                if not failed.ok:
                    self._failures.setdefault(record.position, Failure.of(failed))
                    continue
                assert record.image is not None  # it worked
                yield Pair(
                    record.position, _checked(record, first.backbone), _checked(other, second.backbone), record.image
                )
        self._seconds += time.perf_counter() - start

    def finish(self, role: str) -> None:
        """Note in the measurement what happened; called once, after all runs.

        Raises:
            DatasetError: No picture worked.
        """
        failures = [self._failures[position] for position in sorted(self._failures)]
        self._measurement.record(role, self._images, failures, {"wall_s": self._seconds}, self._seconds)

    def _second(self, side: Side, options: ExtractOptions, limit_bytes: int) -> Generator[FeatureRecord, None, None]:
        key = (id(side.backbone), side.policy)
        if key in self._kept:
            yield from self._kept[key]
            return
        kept: list[FeatureRecord] | None = []
        with closing(extract(self._images, side.backbone, side.policy, options)) as records:
            for record in records:
                if kept is not None:
                    features = record.outputs["backbone"].features if record.ok else torch.empty(0)
                    limit_bytes -= features.numel() * features.element_size()
                    if limit_bytes >= 0:
                        kept.append(dataclasses.replace(record, image=None))
                    else:
                        kept = None
                yield record
        if kept is not None:
            self._kept = {key: kept}


class PaddedBackbone(nn.Module):
    """A backbone of one size that is shown smaller pictures in the top left corner, as SAM is.

    Below and right of the picture is the mean colour of ImageNet; of the features, those of the picture are kept.

    Args:
        backbone: Accepts one size only.

    Raises:
        OptionError: It accepts several.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        size = fixed_resolution(backbone)
        if size is None:
            raise OptionError(
                f"{model_record(backbone)['name']} accepts pictures of several sizes, so there is no size to pad to."
            )
        self.backbone = backbone
        self.size = size
        if isinstance(backbone, HasIdentity):
            self.identity = backbone.identity
        self.training = False

    @property
    def patch_size(self) -> int:
        """Pixels between two feature positions."""
        return self.backbone.patch_size

    @property
    def min_resolution_step(self) -> int:
        """One patch: what is smaller than the one size is padded."""
        return self.backbone.patch_size

    @property
    def embed_dim(self) -> int:
        """Width D of the features."""
        return self.backbone.embed_dim

    @property
    def summary_dim(self) -> int:
        """Width C of the summary."""
        return self.backbone.summary_dim

    @property
    def preferred_resolution(self) -> Resolution:
        """The one size."""
        return self.size

    def get_nearest_supported_resolution(self, height: int, width: int) -> Resolution:
        """Whole patches, at least one, at most as many as there are."""
        step = self.patch_size
        goal = zip((height, width), self.size, strict=True)
        return Resolution(*(min(max(round(side / step), 1) * step, most // step * step) for side, most in goal))

    def forward(self, images: Tensor, feature_fmt: str = "NLC") -> RadioOutput:
        """Summary of the padded pictures, features of the pictures in them."""
        height, width = images.shape[-2:]
        colour = images.new_tensor(_MEAN_COLOUR)[:, None, None]
        canvas = colour.expand(len(images), 3, *self.size).clone()  # [B, 3, H, W]
        canvas[..., :height, :width] = images
        summary, maps = self.backbone(canvas, feature_fmt="NCHW")
        maps = maps[..., : height // self.patch_size, : width // self.patch_size]  # [B, D, h, w]
        return RadioOutput(summary, maps if feature_fmt == "NCHW" else maps.flatten(2).mT)


def fixed_resolution(backbone: Backbone) -> Resolution | None:
    """The size of a backbone that accepts only one; None if it accepts several."""
    step = backbone.min_resolution_step
    near, far = (backbone.get_nearest_supported_resolution(n * step, n * step) for n in (1, 64))
    return Resolution(*near) if tuple(near) == tuple(far) else None


def resized_to(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Feature maps [D, h, w] on another grid, bilinearly, corner on corner."""
    if tuple(maps.shape[-2:]) == tuple(grid):
        return maps
    return F.interpolate(maps[None], size=grid, mode="bilinear", align_corners=True)[0]  # [D, *grid]


def _checked(record: FeatureRecord, backbone: Backbone) -> RadioOutput:
    summary, features = record.outputs["backbone"]
    if not bool(features.isfinite().all() and summary.isfinite().all()):
        raise OptionError(
            f"The features of {record.source.location} are not finite numbers, so {model_record(backbone)['name']} "
            "does not work in this precision. Choose float32, or bfloat16 instead of float16."
        )
    return RadioOutput(summary.float(), features.float())
