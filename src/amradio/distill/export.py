"""From a student under training to a model that anybody can load, and a card that says what it is."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from amradio.distill.balancing import Balancing
from amradio.distill.card import model_card
from amradio.distill.config import DistillConfig, StudentConfig
from amradio.distill.hooks import Result
from amradio.distill.objective import Objective
from amradio.distill.parametrize import fold_parametrizations
from amradio.distill.student import Student, last_linear, parametrized
from amradio.distill.teachers import Teacher
from amradio.errors import CheckpointError
from amradio.models.adaptors import Adaptor
from amradio.models.configs import RadioConfig
from amradio.models.radio import RadioModel
from amradio.weights.checkpoint import Checkpoint
from amradio.weights.convert import save
from amradio.weights.files import atomic_file

MODEL = "model.safetensors"
CARD = "README.md"
_PREFIX = "radio."


def finished_model(
    description: RadioConfig, settings: StudentConfig, tensors: Mapping[str, Tensor], objective: Objective
) -> RadioModel:
    """Make a plain model of a student's weights: parametrisations and balancing are folded in.

    Its adaptors give what the teachers themselves would, not standardised targets.

    Args:
        description: Of the student.
        settings: Its training-time parametrisations.
        tensors: The student's state, whole and on the CPU; or its moving average.
        objective: Holds the balancing.

    Returns:
        The model on the CPU, in evaluation mode, its parameters without gradients.
    """
    radio = parametrized(RadioModel(description, tuple(description.adaptors)), settings).eval()
    radio.load_state_dict({k.removeprefix(_PREFIX): v for k, v in tensors.items()})
    fold_parametrizations(radio)
    for name, adaptor in radio.adaptors.items():
        assert isinstance(adaptor, Adaptor)  # there are no other ones
        balancing_of(objective, name).fold(last_linear(adaptor.feat_mlp))
    return radio.requires_grad_(False)


def start_from_exported(student: Student, objective: Objective, adaptors: Collection[str]) -> None:
    """Let heads that came from an exported model predict standardised targets, the inverse of what exporting does.

    Args:
        student: Changed in place.
        objective: Holds the balancing.
        adaptors: Which heads.
    """
    from torch.distributed.tensor import DTensor

    for name in sorted(adaptors):
        adaptor = student.radio.adaptors[name]
        assert isinstance(adaptor, Adaptor)  # there are no other ones
        balancing = balancing_of(objective, name)
        layer = last_linear(adaptor.feat_mlp)
        if isinstance(layer.weight, DTensor):
            _unfold_sharded(layer, balancing)
        else:
            balancing.to(layer.weight.device).unfold(layer)


def balancing_of(objective: Objective, name: str) -> Balancing:
    """A copy on the CPU of how a teacher's features are standardised."""
    part: Any = objective.teachers[name]
    return copy.deepcopy(cast("Balancing", part.balancing)).cpu()


def write_model(model: RadioModel, path: Path, dtype: torch.dtype) -> Path:
    """Write a finished student with weights of another precision, which loading turns into single precision again.

    Args:
        model: The student.
        path: File in this package's own layout.
        dtype: Of the stored weights.

    Returns:
        The path.

    Raises:
        CheckpointError: A weight has no finite value in that precision, or the file cannot be written.
    """
    checkpoint = Checkpoint.of(model)
    tensors = {k: v.to(dtype) if v.is_floating_point() else v for k, v in checkpoint.tensors.items()}
    over = [
        name for name, tensor in tensors.items() if tensor.is_floating_point() and not bool(tensor.isfinite().all())
    ]
    if over:
        raise CheckpointError(
            f"{over[0]} has values that {dtype} cannot hold, so {path} was not written. Choose bfloat16 or float32."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    return save(dataclasses.replace(checkpoint, tensors=tensors), path)


def write_results(
    folder: Path,
    config: DistillConfig,
    model: RadioModel,
    teachers: Mapping[str, Teacher],
    pictures: int,
    results: Sequence[Result],
    seconds: float,
) -> Path:
    """Write the finished student and its card.

    Args:
        folder: Of the run.
        config: Of the run.
        model: The student.
        teachers: What it was trained from.
        pictures: In the training set.
        results: What hooks have measured, in order.
        seconds: Training time.

    Returns:
        The model's file, in this package's own layout; `amradio.save` and ``amradio convert`` write the others.
    """
    path = save(model.cpu(), folder / MODEL)
    facts = {name: teacher.facts for name, teacher in teachers.items()}
    with atomic_file(folder / CARD) as part:
        part.write_text(model_card(config, model, facts, pictures, results, seconds), encoding="utf-8")
    return path


def _unfold_sharded(layer: nn.Linear, balancing: Balancing) -> None:
    """Unfold into a layer whose rows are spread over processes."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    sharded = {"weight": layer.weight, "bias": layer.bias}
    full = nn.Linear(layer.in_features, layer.out_features)
    with torch.no_grad():
        for name, parameter in sharded.items():
            assert isinstance(parameter, DTensor)  # which the caller has checked
            getattr(full, name).copy_(parameter.full_tensor())
        balancing.unfold(full)
        for name, parameter in sharded.items():
            assert isinstance(parameter, DTensor)  # as above
            tensor = getattr(full, name).to(parameter.device)
            parameter.copy_(distribute_tensor(tensor, parameter.device_mesh, parameter.placements))
