"""Saving models, and converting checkpoints between layouts."""

from __future__ import annotations

import os
from pathlib import Path

from amradio.errors import CheckpointKeyError
from amradio.models.radio import RadioModel
from amradio.weights.checkpoint import Checkpoint, lay_out
from amradio.weights.layouts import layout_of, read_checkpoint


def save(
    model_or_checkpoint: RadioModel | Checkpoint,
    path: str | os.PathLike[str],
    layout: str = "native",
    backbone_only: bool = False,
) -> Path:
    """Save a model in any layout. Files appear under their name only once they are complete.

    Args:
        model_or_checkpoint: A model with the adaptors that are loaded, or a checkpoint with all it has.
        path: File (``native``, ``official``, ``timm``) or directory (``huggingface``, ``transformers``, ``timm``,
            ``pretrained``).
        layout: ``native``, ``official``, ``huggingface``, ``transformers``, ``timm`` or ``pretrained``.
        backbone_only: Leave out adaptors and normalizers, and whatever else the layout has no place for.

    Returns:
        The path.

    Raises:
        OptionError: There is no such layout.
        LayoutError: The layout cannot hold the model; the message says why.
        CheckpointError: The checkpoint is incomplete, or the file cannot be written.
    """
    writer = layout_of(layout)
    checkpoint = (
        model_or_checkpoint if isinstance(model_or_checkpoint, Checkpoint) else Checkpoint.of(model_or_checkpoint)
    )
    _require_complete(checkpoint)
    return writer.write(checkpoint, Path(path), backbone_only=backbone_only)


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    layout: str = "native",
    backbone_only: bool = False,
) -> Path:
    """Rewrite a checkpoint in another layout. Tensors keep their values and dtypes to the bit.

    Args:
        source: File or directory in any layout that amradio reads.
        target: What to write.
        layout: See `save`.
        backbone_only: See `save`.

    Returns:
        `target`.

    Raises:
        OptionError: There is no such layout.
        LayoutError: The source is in no known layout, or the target's cannot hold the model.
        CheckpointError: The source is unsafe, damaged or incomplete, or the target cannot be written.
    """
    layout_of(layout)
    return save(read_checkpoint(Path(source)), target, layout, backbone_only)


def _require_complete(checkpoint: Checkpoint) -> None:
    """Refuse to spread a checkpoint that does not fit the model that it describes."""
    _, report = lay_out(checkpoint, tuple(checkpoint.config.adaptors))
    if report:
        raise CheckpointKeyError(f"{report.describe(checkpoint.identity.source)}\nIt is not written anywhere.")
