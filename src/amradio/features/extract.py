"""Pictures in, summaries and feature maps out, in the order of the pictures."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable
from contextlib import closing

from amradio.errors import OptionError
from amradio.features.bucketing import batches_by_shape, in_order
from amradio.features.loader import DecodeOptions, LoadedPicture, load_pictures
from amradio.features.runner import ExtractOptions, FeatureModel, FeatureRecord, Runner
from amradio.features.timing import StageTimer
from amradio.images.resize import ResizePolicy
from amradio.images.sources import ImageSource

__all__ = ["ExtractOptions", "FeatureModel", "FeatureRecord", "extract"]

_LONGEST_DEFAULT_LOOK_AHEAD = 512  # of pictures for a model at 378 pixels these are 0.2 GB


def extract(
    images: Iterable[ImageSource],
    model: FeatureModel,
    policy: ResizePolicy,
    options: ExtractOptions | None = None,
    timer: StageTimer | None = None,
    shard_size: int | None = None,
) -> Generator[FeatureRecord, None, None]:
    """Compute summary and features of many pictures.

    Pictures of one shape are batched, also when others lie between them. A picture that cannot be decoded, or that does
    not fit into memory even alone, gives a record with the reason, and the others go on. Which pictures share a batch
    depends on their shapes only, never on how fast anything was.

    Args:
        images: The pictures; read lazily, so the stream may be longer than memory.
        model: In evaluation mode, on the device of the options.
        policy: To which sizes pictures are brought; results are rounded to sizes that the model supports.
        options: Batch size, device and so on.
        timer: Gets the seconds of the stages ``decode`` and ``model``, and the batches.
        shard_size: No batch holds pictures from both sides of a multiple of this, so that the features of a shard are
            the same to the last bit whatever else is in the stream; None: there are no such borders.

    Yields:
        One record for each picture, in the order of the pictures.

    Raises:
        OptionError: The model is in training mode.
    """
    if getattr(model, "training", False):
        raise OptionError("The model is in training mode, in which features are random. Call model.eval() first.")
    return _extract(images, model, policy, options or ExtractOptions(), timer or StageTimer(), shard_size)


def _extract(
    images: Iterable[ImageSource],
    model: FeatureModel,
    policy: ResizePolicy,
    options: ExtractOptions,
    timer: StageTimer,
    shard_size: int | None,
) -> Generator[FeatureRecord, None, None]:
    prefetch = 4 * options.batch_size
    look_ahead = options.look_ahead or _default_look_ahead(options)
    how = DecodeOptions(
        policy,
        model.get_nearest_supported_resolution,
        options.max_pixels,
        options.background,
        options.decode,
        options.resizer,
    )
    workers = options.workers or min(os.cpu_count() or 1, 8)
    runner = Runner(model, options, timer, shard_size)
    with closing(load_pictures(images, how, workers, min(prefetch, look_ahead), timer)) as pictures:
        batches = batches_by_shape(pictures, _shape, options.batch_size, look_ahead, shard_size)
        yield from in_order(runner.records(batches), lambda record: record.position)


def _default_look_ahead(options: ExtractOptions) -> int:
    """Far enough for batches of mixed sizes to fill, but not so far that results fill the memory."""
    few = 4 * options.batch_size
    return few if options.keep == "all" else max(few, min(4 * few, _LONGEST_DEFAULT_LOOK_AHEAD))


def _shape(picture: LoadedPicture) -> tuple[int, ...] | None:
    return None if picture.pixels is None else tuple(picture.pixels.shape)
