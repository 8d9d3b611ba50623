"""Reading a folder of embeddings, as much as is needed at a time."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from amradio.errors import OptionError
from amradio.features.collect import Failure
from amradio.features.manifest import MANIFEST_NAME, Manifest, read_manifest
from amradio.features.shards import table_path, tensors_path

if TYPE_CHECKING:
    import pyarrow as pa


def load_embeddings(folder: str | os.PathLike[str]) -> Embeddings:
    """Open a folder that `amradio.features.embed` wrote.

    Args:
        folder: With a manifest.

    Returns:
        The embeddings; nothing but the manifest is read yet.

    Raises:
        OptionError: The folder has no embeddings, or they are not complete.
    """
    path = Path(folder)
    manifest = read_manifest(path)
    if manifest is None:
        raise OptionError(f"There are no embeddings in {path}: it has no {MANIFEST_NAME}. `amradio embed` makes them.")
    if not manifest["complete"]:
        raise OptionError(
            f"The embeddings in {path} are not complete. The command that made them, given again, does the rest."
        )
    return Embeddings(path, manifest)


class ShardFeatures(NamedTuple):
    """The feature maps of n pictures, one after the other.

    Attributes:
        tokens: [T, D] features, row by row of each map.
        offsets: int64 [n + 1]: the first token of each picture, and T.
        grids: int [n, 2]: height and width of each map.
    """

    tokens: Tensor
    offsets: Tensor
    grids: Tensor


class Embeddings:
    """Embeddings of the pictures that worked, in the order of their set. Rows are counted from 0 over all shards.

    Args:
        folder: Where they are.
        manifest: Of a complete run.

    Attributes:
        folder: Where they are.
        manifest: See `amradio.features.manifest.new_manifest`.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._starts = np.concatenate([[0], np.cumsum(manifest["ok_of_shards"], dtype=np.int64)])  # [shards + 1]

    def __len__(self) -> int:
        return int(self._starts[-1])

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Outputs that are stored: ``backbone`` and adaptors. Empty if no picture worked."""
        filled = np.flatnonzero(np.diff(self._starts))
        if not len(filled):
            return ()
        with _opened(self.folder, int(filled[0])) as file:
            stored = file.keys()
        return tuple(sorted(n.removesuffix(".summary") for n in stored if n.endswith(".summary")))

    def summaries(self, name: str = "backbone") -> EmbeddingRows:
        """The summaries of an output, [N, C].

        Raises:
            OptionError: There is no such output.
        """
        self._check(name)
        return EmbeddingRows(self.folder, f"{name}.summary", self._starts)

    def pooled(self, name: str = "backbone") -> EmbeddingRows:
        """The features of an output, averaged over all positions, [N, D].

        Raises:
            OptionError: There is no such output, or they were not kept.
        """
        self._check(name, "pooled")
        return EmbeddingRows(self.folder, f"{name}.pooled", self._starts)

    def features(self, row: int, name: str = "backbone") -> Tensor:
        """The feature map of one picture.

        Args:
            row: Of the picture.
            name: Of the output.

        Returns:
            [D, h, w], as it was stored.

        Raises:
            OptionError: There is no such output, or feature maps were not kept.
            IndexError: There is no such row.
        """
        self._check(name, "all")
        position = range(len(self))[row]
        shard = int(np.searchsorted(self._starts, position, side="right")) - 1
        local = position - int(self._starts[shard])
        with _opened(self.folder, shard) as file:
            start, stop = file.get_slice(f"{name}.offsets")[local : local + 2].tolist()
            height, width = file.get_slice(f"{name}.grids")[local : local + 1][0].tolist()
            tokens: Tensor = file.get_slice(f"{name}.features")[start:stop]  # [h*w, D]
        return tokens.T.reshape(-1, height, width)  # [D, h, w]

    def shards_of_features(self, name: str = "backbone") -> Iterator[ShardFeatures]:
        """All feature maps of an output, a shard at a time, as they were stored.

        Raises:
            OptionError: There is no such output, or feature maps were not kept.
        """
        self._check(name, "all")
        for shard in np.flatnonzero(np.diff(self._starts)).tolist():
            with _opened(self.folder, shard) as file:
                tensors = (file.get_tensor(f"{name}.{part}") for part in ("features", "offsets", "grids"))
                yield ShardFeatures(*tensors)

    @cached_property
    def table(self) -> pa.Table:
        """The rows of the pictures that worked: position, id, path, label, class, and sizes; an Arrow table."""
        import pyarrow as pa
        import pyarrow.compute as pc

        tables = _tables(self.folder, range(len(self._starts) - 1))
        return pa.concat_tables(t.filter(pc.equal(t["status"], "ok")) for t in tables).drop_columns(
            ["status", "reason", "row"]
        )

    @property
    def ids(self) -> list[str]:
        """Id of each row's picture."""
        return list(self.table["id"].to_pylist())

    @property
    def paths(self) -> list[str]:
        """Path of each row's picture, or whatever tells where it is."""
        return list(self.table["path"].to_pylist())

    @property
    def labels(self) -> Tensor | None:
        """int64 [N], -1 where a picture has none; None if none has one."""
        column = self.table["label"]
        if column.null_count == len(column):
            return None
        return torch.from_numpy(column.fill_null(-1).to_numpy().copy())

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The name of each label, if they have names."""
        names = self.manifest["about"]["class_names"]
        return None if names is None else tuple(names)

    @property
    def failures(self) -> list[Failure]:
        """The pictures that did not work."""
        return list(read_failures(self.folder, range(len(self._starts) - 1)))

    def _check(self, name: str, keep: str | None = None) -> None:
        if name not in self.names:
            raise OptionError(f"{self.folder} has no output {name!r}, only {list(self.names)}.")
        kept = self.manifest["config"]["keep"]
        if keep is not None and kept != keep:
            raise OptionError(f"{self.folder} was made with keep={kept!r}; this needs keep={keep!r}.")


class EmbeddingRows:
    """Rows of one kind, read from the files when they are asked for, as stored.

    A slice, a list or a tensor of indices gives [n, C], one index gives [C].

    Args:
        folder: Of the embeddings.
        name: Of the tensor in each shard.
        starts: int64 [shards + 1]: the first row of each shard, and the number of rows.
    """

    def __init__(self, folder: Path, name: str, starts: np.ndarray) -> None:
        self._folder = folder
        self._name = name
        self._starts = starts

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, rows: slice | int | Sequence[int] | Tensor | np.ndarray, /) -> Tensor:
        if not isinstance(rows, slice):
            return self._chosen(rows)
        start, stop, step = rows.indices(len(self))
        if step != 1:
            raise OptionError(f"Rows are read in runs, with step 1, got {step}.")
        parts = list(self._parts(start, max(start, stop)))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _chosen(self, rows: Any) -> Tensor:
        """The rows of one index, or of several, each shard being opened once."""
        indices = np.asarray(rows)
        if not indices.size:
            return self[0:0]
        if indices.dtype.kind not in "iu" or indices.ndim > 1:
            raise OptionError(f"Rows are chosen by whole numbers or a slice, got {rows!r:.80}.")
        if ((indices < -len(self)) | (indices >= len(self))).any():
            raise IndexError(f"A row is outside the {len(self)} rows: {rows!r:.80}.")
        flat = np.where(indices < 0, indices + len(self), indices).reshape(-1)
        found: list[Tensor] = [torch.empty(0)] * len(flat)
        shards = np.searchsorted(self._starts, flat, side="right") - 1
        for shard in np.unique(shards):
            with _opened(self._folder, int(shard)) as file:
                part = file.get_slice(self._name)
                for i in np.flatnonzero(shards == shard):
                    local = int(flat[i] - self._starts[shard])
                    found[i] = part[local : local + 1][0]
        return torch.stack(found) if indices.ndim else found[0]

    def _parts(self, start: int, stop: int) -> Iterator[Tensor]:
        """Runs of rows, one from each shard; of no rows, an empty run that tells the width."""
        shard = min(int(np.searchsorted(self._starts, start, side="right")) - 1, self._last_filled)
        while True:
            first, end = int(self._starts[shard]), int(self._starts[shard + 1])
            if end > first:
                with _opened(self._folder, shard) as file:
                    yield file.get_slice(self._name)[start - first : min(stop, end) - first]
            start = end
            shard += 1
            if start >= stop:
                return

    @cached_property
    def _last_filled(self) -> int:
        return int(np.flatnonzero(np.diff(self._starts))[-1])


def read_failures(folder: Path, shards: Iterable[int], limit: int | None = None) -> list[Failure]:
    """Read which pictures did not work.

    Args:
        folder: Of the embeddings.
        shards: Where to look.
        limit: Most failures to return.
    """
    import pyarrow.compute as pc

    failures: list[Failure] = []
    for table in _tables(folder, shards):
        if limit is not None and len(failures) >= limit:
            break
        for row in table.filter(pc.equal(table["status"], "failed")).to_pylist():
            failures.append(Failure(row["position"], row["id"], row["path"], row["reason"]))
    return failures[:limit]


def _tables(folder: Path, shards: Iterable[int]) -> Iterator[pa.Table]:
    import pyarrow.parquet as pq

    return (pq.read_table(table_path(folder, shard)).replace_schema_metadata() for shard in shards)


def _opened(folder: Path, shard: int) -> Any:
    from safetensors import safe_open

    return safe_open(tensors_path(folder, shard), framework="pt")
