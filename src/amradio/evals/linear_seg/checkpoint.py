"""The state of a training of the head, kept so that a killed run goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from amradio.errors import OptionError
from amradio.evals.differences import differences
from amradio.weights.files import atomic_file

if TYPE_CHECKING:
    from amradio.distributed import Group
    from amradio.evals.linear_seg.head import BatchNormLinear

FORMAT = "amradio segmentation head in training 1"


@dataclass
class Checkpoint:
    """A file with head, optimiser and losses. A run that goes on from it ends with the same head, to the bit.

    Attributes:
        path: The file, which all processes can read.
        about: What the training depends on. A file that says something else is refused, not replaced.
        group: The processes that train together; the first one writes.
        every: Steps between two writes; the last step is always kept.
        notes: Gives what else to keep, in JSON's types; called by all processes together.
        found: What `notes` gave when the file was written.
    """

    path: Path
    about: Mapping[str, Any]
    group: Group | None = None
    every: int = 500
    notes: Callable[[], Any] = lambda: None
    found: Any = None

    def load(self, head: BatchNormLinear, optimizer: torch.optim.Optimizer) -> list[float]:
        """Take up the state of the file, if it is there.

        Args:
            head: Gets the weights and statistics.
            optimizer: AdamW over the parameters of the head, in their order.

        Returns:
            The losses of the steps that are done; none if there is no file.

        Raises:
            OptionError: The file is no such state, belongs to another training, or the processes see different files.
        """
        losses = self._read(head, optimizer) if self.path.exists() else []
        if self.group is not None and len(set(steps := self.group.all_gather_objects(len(losses)))) > 1:
            raise OptionError(
                f"The processes found different states in {self.path}: {steps} steps. It must be one file that all can "
                "read."
            )
        return losses

    def save(self, head: BatchNormLinear, optimizer: torch.optim.Optimizer, losses: list[float], *, last: bool) -> None:
        """Write the state, if this step is one after which it is written.

        Args:
            head: As trained so far.
            optimizer: See `load`.
            losses: One for each step that is done.
            last: Whether the training is over.
        """
        if len(losses) % self.every and not last:
            return
        notes = self.notes()
        if self.group is not None and not self.group.is_main:
            return
        from safetensors.torch import save_file

        tensors = {f"head.{name}": tensor for name, tensor in head.state_dict().items()}
        for i, parameter in enumerate(head.parameters()):
            tensors |= {f"optimizer.{i}.{name}": tensor for name, tensor in optimizer.state[parameter].items()}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        tensors["losses"] = torch.tensor(losses, dtype=torch.float64)
        metadata = {"format": FORMAT, "about": json.dumps(self.about), "notes": json.dumps(notes)}
        with atomic_file(self.path) as part:
            save_file(tensors, part, metadata=metadata)

    def _read(self, head: BatchNormLinear, optimizer: torch.optim.Optimizer) -> list[float]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no iterable
        except (SafetensorError, OSError) as error:
            raise OptionError(f"{self.path} cannot be read as the state of a training: {error}") from error
        if metadata.get("format") != FORMAT:
            raise OptionError(
                f"{self.path} is no state of a training of this version: its format is {metadata.get('format')!r}."
            )
        stored, now = json.loads(metadata["about"]), json.loads(json.dumps(self.about))
        if different := list(differences("", stored, now)):
            raise OptionError(
                f"{self.path} belongs to another training: {'; '.join(different)}. Name another file to begin anew."
            )
        self.found = json.loads(metadata["notes"])
        head.load_state_dict({k.removeprefix("head."): t for k, t in tensors.items() if k.startswith("head.")})
        for i, parameter in enumerate(head.parameters()):
            prefix = f"optimizer.{i}."
            state = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
            moved = {k: t if k == "step" else t.to(parameter.device) for k, t in state.items()}  # the count stays here
            optimizer.state[parameter] = moved
        losses: list[float] = tensors["losses"].tolist()
        return losses
