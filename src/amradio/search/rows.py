"""A database of features, read block by block from wherever it lies."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from amradio.errors import OptionError

FEATURE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Sliceable(Protocol):
    """Rows on disk, for example: something with a length, whose slices are tensors or arrays [n, D]."""

    def __len__(self) -> int:
        """How many rows there are."""
        ...

    def __getitem__(self, rows: slice, /) -> Any:
        """The rows start:stop."""
        ...


Database = Tensor | np.ndarray[Any, Any] | Sliceable


class Rows:
    """A database seen as blocks of rows.

    Attributes:
        dim: D, the length of a row.
        dtype: Of the features as they are stored.
        device: Where blocks come from.
    """

    def __init__(self, data: Database, name: str = "database") -> None:
        self._data = data
        self._name = name
        self._count = len(data)
        probe = self._slice(0, min(self._count, 1))
        self.dim = probe.shape[1]
        self.dtype = probe.dtype
        self.device = probe.device
        if not self.dtype.is_floating_point:
            raise OptionError(f"The {name} has the dtype {_text(self.dtype)}; features are floating point numbers.")
        if self.dim == 0:
            raise OptionError(f"The rows of the {name} are empty: shape [{self._count}, 0].")

    def __len__(self) -> int:
        return self._count

    def block(self, start: int, stop: int) -> Tensor:
        """Rows start to stop, [stop - start, D], as they are stored."""
        return self._slice(start, stop)

    def take(self, start: int, stop: int, local: Tensor) -> Tensor:
        """Some rows of a block.

        Args:
            start: First row of the block.
            stop: End of the block.
            local: int64 [n] positions in the block.

        Returns:
            [n, D] as they are stored.
        """
        if isinstance(self._data, np.ndarray):  # of a file, only these rows are read
            return torch.from_numpy(self._data[start:stop][local.cpu().numpy()])
        block = self._slice(start, stop)
        return block.index_select(0, local.to(block.device))

    def bounds(self, size: int) -> Iterator[tuple[int, int]]:
        """Bounds of all blocks of a size, in order; the last one may be shorter."""
        return ((start, min(start + size, self._count)) for start in range(0, self._count, size))

    def _slice(self, start: int, stop: int) -> Tensor:
        part = self._data[start:stop]
        if isinstance(part, np.ndarray):
            if part.dtype.kind not in "fiub":
                raise OptionError(f"The {self._name} has the NumPy dtype {part.dtype}; use float16 or float32.")
            part = torch.from_numpy(np.array(part))  # a copy, as the array may be read-only, or have negative strides
        if not isinstance(part, Tensor):
            raise OptionError(
                f"A slice of the {self._name} is a {type(part).__name__}; it must be a tensor or a NumPy array [n, D]."
            )
        if part.ndim != 2 or len(part) != stop - start:
            raise OptionError(
                f"Rows {start} to {stop} of the {self._name} have the shape {list(part.shape)}; "
                f"expected [{stop - start}, D]."
            )
        return part.detach()


def common_dtype(queries: torch.dtype, database: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """The dtype to which features are rounded before they are compared.

    Raises:
        OptionError: It is not float32, bfloat16 or float16; higher precision is never dropped unasked.
    """
    dtype = wanted or torch.promote_types(queries, database)
    if dtype in FEATURE_DTYPES:
        return dtype
    raise OptionError(
        f"Features are compared as float32, bfloat16 or float16, not {_text(dtype)} (queries {_text(queries)}, "
        f"database {_text(database)}). Pass dtype=torch.float32 to round them."
    )


def largest_norm(features: Tensor, name: str, first: int = 0) -> float:
    """The largest L2 norm of rows, which are checked on the way.

    Args:
        features: [n, D].
        name: What they are, for the message.
        first: Number of the first row, for the message.

    Returns:
        The norm; 0 if there are no rows.

    Raises:
        OptionError: A row holds NaN or infinity, or numbers whose squares overflow float32.
    """
    if len(features) == 0:
        return 0.0
    norms = torch.linalg.vector_norm(features, dim=1, dtype=torch.float32)  # [n]
    largest = float(norms.max())  # NaN if one is
    if largest < float("inf"):
        return largest
    row = int((~norms.isfinite()).nonzero()[0])
    bad = features[row][~features[row].isfinite()]
    if len(bad):
        raise OptionError(
            f"Row {first + row} of the {name} holds {bad[0].item()} ({len(bad)} of its {features.shape[1]} features). "
            "Leave such rows out; if there are many, look for an overflow in what made them."
        )
    raise OptionError(
        f"Row {first + row} of the {name} has features up to {features[row].abs().max().item():.3g}: inner products "
        "would overflow float32. Scale the features, for example to unit length."
    )


def _text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
