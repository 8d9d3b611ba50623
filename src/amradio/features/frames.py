"""Frames of a video to feature maps, of one backbone or of several side by side, each frame read once."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from amradio.backbones.protocol import Backbone
from amradio.errors import OptionError
from amradio.features.maps import FeatureMap, feature_maps
from amradio.images.resize import ResizePolicy
from amradio.images.video import Frame


@dataclass(frozen=True)
class View:
    """One way to look at a frame.

    Attributes:
        backbone: In evaluation mode; an adaptor is a backbone too (`amradio.models.view.RadioView`).
        policy: At which size.
        layer: Block whose features are taken; None for the backbone's own output.
    """

    backbone: Backbone
    policy: ResizePolicy
    layer: int | None = None


def frame_maps(
    views: Sequence[View], frames: Iterable[Frame], *, batch_size: int = 8
) -> Iterator[tuple[Frame, tuple[FeatureMap, ...]]]:
    """Compute the feature maps of frames as they come.

    Args:
        views: At least one.
        frames: Read lazily, one batch at a time; nothing of earlier ones is kept.
        batch_size: Most frames in one forward pass.

    Returns:
        An iterator over each frame with one map a view, in order.

    Raises:
        OptionError: There is no view, or the batch size is below 1; see also `amradio.features.maps.feature_maps`.
    """
    if not views or batch_size < 1:
        raise OptionError(f"Frames need at least one view and a batch of at least 1, got {len(views)}, {batch_size}.")
    return _frame_maps(views, iter(frames), batch_size)


def _frame_maps(
    views: Sequence[View], frames: Iterator[Frame], batch_size: int
) -> Iterator[tuple[Frame, tuple[FeatureMap, ...]]]:
    while batch := list(itertools.islice(frames, batch_size)):
        photos = [frame.image for frame in batch]
        columns = [
            feature_maps(view.backbone, photos, view.policy, layer=view.layer, batch_size=batch_size) for view in views
        ]
        yield from zip(batch, zip(*columns, strict=True), strict=True)
