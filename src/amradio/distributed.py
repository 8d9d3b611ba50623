"""Several processes as one: who takes which part, and how the parts come together.

Programs are started by ``torchrun``, on one machine or several; alone, everything here does nothing. Collectives carry
rows of different counts (no padding is seen, nothing is dropped or repeated), and objects for reports.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from amradio.errors import OptionError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Group:
    """A process among those that share a job.

    Attributes:
        rank: Of this process, from 0.
        world_size: How many processes there are.
        local_rank: Of this process on its machine.
        device: The device of this process; collectives run on it.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes reports."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every process is here."""
        import torch.distributed as dist

        dist.barrier(device_ids=[self.local_rank] if self.device.type == "cuda" else None)

    def all_gather_rows(self, rows: Tensor) -> list[Tensor]:
        """Give every process the rows of all.

        Args:
            rows: [N_r, ...]: any number of rows in each process, also none; the rest of the shape and the dtype are
                the same everywhere.

        Returns:
            One tensor for each rank, in rank order, on the device of `rows`.
        """
        import torch
        import torch.distributed as dist

        counts = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.world_size)]
        dist.all_gather(counts, torch.tensor([len(rows)], device=self.device))
        longest = max(int(c) for c in counts)
        padded = rows.new_zeros((longest, *rows.shape[1:]), device=self.device)  # [longest, ...]
        padded[: len(rows)] = rows
        gathered = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(gathered, padded)
        return [g[: int(c)].to(rows.device) for g, c in zip(gathered, counts, strict=True)]

    def all_gather_objects(self, value: Any) -> list[Any]:
        """Give every process the picklable values of all, in rank order."""
        import torch.distributed as dist

        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Add up a tensor of one shape over all processes; returns the sum on the device of `values`."""
        import torch.distributed as dist

        total = values.detach().clone().to(self.device)
        dist.all_reduce(total)
        return total.to(values.device)


@contextmanager
def init_group(device: torch.device | str | None = None) -> Iterator[Group | None]:
    """Join the processes that ``torchrun`` started.

    Args:
        device: ``cpu``, ``cuda``, ...; None takes a GPU where there is one for each local process. Under ``cuda`` each
            process takes the GPU of its local rank and the backend is nccl, otherwise gloo.

    Yields:
        The group, or None if this process was not started by ``torchrun`` or is the only one.

    Raises:
        OptionError: There are fewer GPUs than processes on this machine.
    """
    import torch
    import torch.distributed as dist

    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1 or "RANK" not in os.environ:
        yield None
        return
    missing = [name for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise OptionError(
            f"WORLD_SIZE is {world_size}, but {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set, so "
            "the processes cannot find each other. Start them with torchrun; under a scheduler, start torchrun on each "
            "machine (--nnodes, --rdzv-endpoint)."
        )
    local_rank, local_count = int(os.environ["LOCAL_RANK"]), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    enough = torch.cuda.is_available() and torch.cuda.device_count() >= local_count
    kind = torch.device(device).type if device is not None else "cuda" if enough else "cpu"
    if kind == "cuda" and not enough:
        raise OptionError(
            f"torchrun started {local_count} processes on this machine, which has {torch.cuda.device_count()} GPUs. "
            "Start as many as there are GPUs, or choose the device cpu."
        )
    own = torch.device("cuda", local_rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(own)
    # A process that is done waits for the slowest one, maybe for hours; if one fails, torchrun ends the others.
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        device_id=own if kind == "cuda" else None,
        timeout=datetime.timedelta(days=1),
    )
    try:
        yield Group(int(os.environ["RANK"]), world_size, local_rank, own)
    finally:
        dist.destroy_process_group()
