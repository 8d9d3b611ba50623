"""A whole run from pictures to a folder of features, as a command line needs it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from typing import Any

from amradio.features.extract import ExtractOptions, FeatureModel, FeatureRecord, extract
from amradio.features.timing import StageTimer
from amradio.features.writer import FeatureWriter, WriterOptions
from amradio.images.resize import ResizePolicy
from amradio.images.sources import ImageSource


def run_job(
    images: Iterable[ImageSource],
    model: FeatureModel,
    policy: ResizePolicy,
    folder: str | os.PathLike[str],
    options: ExtractOptions | None = None,
    writer_options: WriterOptions | None = None,
    on_record: Callable[[FeatureRecord], None] | None = None,
) -> dict[str, Any]:
    """Compute features and write them.

    Args:
        images: The pictures.
        model: In evaluation mode.
        policy: To which sizes pictures are brought.
        folder: Where to write; see `FeatureWriter`.
        options: How to compute.
        writer_options: What to write.
        on_record: Called for each picture, in order; for a progress bar.

    Returns:
        A record that can be saved as JSON: ``images``, ``ok``, ``failed``, ``wall_s``, ``images_per_s`` (of successful
        ones), ``waited_s`` and ``busy_s`` by stage (see `StageTimer`), ``bottleneck``, ``policy``, ``folder``.

    Raises:
        OptionError: See `extract` and `FeatureWriter`.
        OSError: Features could not be written. What was written so far is in the index.
    """
    timer = StageTimer()
    start = time.perf_counter()
    with (
        FeatureWriter(folder, writer_options, timer) as writer,
        closing(extract(images, model, policy, options, timer)) as records,
    ):
        for record in records:
            writer.write(record)
            if on_record is not None:
                on_record(record)
    wall_s = time.perf_counter() - start
    return {
        "images": writer.ok + writer.failed,
        "ok": writer.ok,
        "failed": writer.failed,
        "wall_s": wall_s,
        "images_per_s": writer.ok / wall_s,
        "waited_s": dict(timer.waited_s),
        "busy_s": dict(timer.busy_s),
        "bottleneck": timer.bottleneck,
        "policy": str(policy),
        "folder": str(writer.folder),
    }
