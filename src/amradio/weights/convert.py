"""Saving models, and converting checkpoints between layouts."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from amradio.errors import CheckpointKeyError, CheckpointShapeError
from amradio.models.configs import ERadioConfig
from amradio.models.radio import RadioModel
from amradio.weights.checkpoint import Checkpoint
from amradio.weights.layouts import layout_of, read_checkpoint

_SHOWN = 20


def save(
    model_or_checkpoint: RadioModel | Checkpoint,
    path: str | os.PathLike[str],
    layout: str = "native",
    backbone_only: bool = False,
) -> Path:
    """Save a model in any layout. Files appear under their name only once they are complete.

    Args:
        model_or_checkpoint: A model with the adaptors that are loaded, or a checkpoint with all it has.
        path: File (``native``, ``official``, ``timm``) or directory (``huggingface``, ``transformers``, ``timm``).
        layout: ``native``, ``official``, ``huggingface``, ``transformers`` or ``timm``.
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
    source = checkpoint.identity.source
    backbone = checkpoint.config.backbone
    depth = sum(backbone.depths) if isinstance(backbone, ERadioConfig) else backbone.depth
    if depth > len(checkpoint.tensors):  # before as many modules are built
        raise CheckpointShapeError(
            f"{source} describes a model of {depth} blocks but has only {len(checkpoint.tensors)} tensors, so it is "
            f"not written anywhere."
        )
    with torch.device("meta"):
        model = RadioModel(checkpoint.config, tuple(checkpoint.config.adaptors))
    wanted = {k: v.shape for k, v in model.state_dict().items() if k != "summary_idxs"}
    have = {k: v.shape for k, v in checkpoint.tensors.items()}
    problems = [f"missing {k}" for k in wanted if k not in have]
    problems += [f"unexpected {k}" for k in have if k not in wanted]
    if problems:
        more = f", and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise CheckpointKeyError(
            f"{source} does not fit the model that it describes, so it is not written anywhere: "
            f"{', '.join(problems[:_SHOWN])}{more}."
        )
    wrong = [f"{k} is {list(have[k])}, expected {list(s)}" for k, s in wanted.items() if have[k] != s]
    if wrong:
        raise CheckpointShapeError(
            f"{source} does not fit the model that it describes, so it is not written anywhere: "
            f"{'; '.join(wrong[:_SHOWN])}."
        )
