"""A whole run from pictures to a folder of features, as a command line needs it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import closing
from typing import Any

from amradio.errors import OptionError
from amradio.features.extract import extract
from amradio.features.runner import ExtractOptions, FeatureModel, FeatureRecord
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
        A record that can be saved as JSON: ``images``, ``ok``, ``failed``, ``policy``, ``folder``, and what
        `StageTimer.record` says.

    Raises:
        OptionError: The feature maps are not kept. See also `extract` and `FeatureWriter`.
        OSError: Features could not be written. What was written so far is in the index.
    """
    options = options or ExtractOptions()
    if options.keep != "all":
        raise OptionError(f"Feature maps are written, so they must be kept: keep='all', got {options.keep!r}.")
    timer = StageTimer()
    with (
        FeatureWriter(folder, writer_options, timer) as writer,
        closing(extract(images, model, policy, options, timer)) as records,
    ):
        for record in records:
            writer.write(record)
            if on_record is not None:
                on_record(record)
    return {
        "images": writer.ok + writer.failed,
        "ok": writer.ok,
        "failed": writer.failed,
        **timer.record(options.batch_size),
        "policy": str(policy),
        "folder": str(writer.folder),
    }
