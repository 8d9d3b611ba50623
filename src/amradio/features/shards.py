"""One shard of embeddings: a table of its pictures and a file of their tensors.

```text
embeddings-00000.parquet      one row a picture, failed ones included; `row` counts in the tensors
embeddings-00000.safetensors  of N pictures that worked, for `backbone` and each adaptor:
    backbone.summary   [N, C]
    backbone.pooled    [N, D]    keep="pooled"
    backbone.features  [T, D]    keep="all": positions of all pictures, row-major, one picture after the other; T is the
                                 sum of all h * w
    backbone.offsets   [N + 1]   where each picture's positions begin, int64
    backbone.grids     [N, 2]    h and w, int64
```

The tensors are written first and the table, which holds their size and the fingerprint of the run, last: a shard with a
table is complete.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from amradio.features.files import UnstorableError, printable, storable, write_atomically
from amradio.features.runner import FeatureRecord, Keep

if TYPE_CHECKING:
    import pyarrow as pa

_METADATA_KEY = b"amradio"


@dataclass(frozen=True)
class ShardSummary:
    """What the table of a shard says about it.

    Attributes:
        fingerprint: Of the run; see `amradio.features.manifest`.
        shard: Its number.
        ok: Pictures that worked.
        failed: Pictures that did not.
        tensor_bytes: Size of the file of tensors.
    """

    fingerprint: str
    shard: int
    ok: int
    failed: int
    tensor_bytes: int


def table_path(folder: Path, shard: int) -> Path:
    """Where the table of a shard is."""
    return folder / f"embeddings-{shard:05d}.parquet"


def tensors_path(folder: Path, shard: int) -> Path:
    """Where the tensors of a shard are."""
    return folder / f"embeddings-{shard:05d}.safetensors"


def shard_files(folder: Path) -> list[Path]:
    """All files of shards in a folder."""
    return sorted(p for ending in ("parquet", "safetensors") for p in folder.glob(f"embeddings-*.{ending}"))


def read_summary(folder: Path, shard: int, fingerprint: str, count: int) -> ShardSummary | None:
    """Look at a shard without reading its data.

    Args:
        folder: Of the run.
        shard: Its number.
        fingerprint: That it must have.
        count: Of pictures that it must have.

    Returns:
        What is known of it, or None if it is missing, incomplete, or of another run.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(table_path(folder, shard))
        summary = ShardSummary(**json.loads(metadata.metadata[_METADATA_KEY]))
        tensor_bytes = tensors_path(folder, shard).stat().st_size
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
        return None  # whatever is wrong with it, the shard is made again
    fits = (summary.fingerprint, summary.shard, summary.tensor_bytes) == (fingerprint, shard, tensor_bytes)
    return summary if fits and metadata.num_rows == count == summary.ok + summary.failed else None


@dataclass
class ShardBuilder:
    """Takes the records of one shard, in order, and writes them.

    Attributes:
        shard: Its number.
        keep: Which features are stored.
        store: Number format of the stored tensors.
        class_names: Names of the labels, if they have any.
    """

    shard: int
    keep: Keep
    store: torch.dtype
    class_names: Sequence[str] | None = None
    _rows: list[dict[str, Any]] = field(default_factory=list)
    _tensors: dict[str, list[Tensor]] = field(default_factory=dict)
    _grids: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    _ok: int = 0

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, record: FeatureRecord, label: int | None) -> None:
        """Take the next record, and its label if there is one."""
        reason = record.reason
        if reason is None:
            try:
                self._add_outputs(record)
            except UnstorableError as error:
                reason = str(error)
        row: dict[str, Any] = {
            "position": record.position,
            "id": record.source.id,
            "path": printable(record.source.location),
            "label": label,
            "class": self.class_names[label] if self.class_names and label is not None else None,
            "status": "ok" if reason is None else "failed",
            "reason": None if reason is None else printable(reason),
            "row": self._ok if reason is None else None,
        }
        if record.size is not None:
            row["height"], row["width"] = record.size
        if record.image is not None:
            row["input_height"], row["input_width"] = record.image.shape[-2:]
        self._rows.append(row)
        self._ok += reason is None

    def write(self, folder: Path, fingerprint: str) -> None:
        """Write both files.

        Raises:
            OSError: They cannot be written.
        """
        import pyarrow.parquet as pq
        from safetensors.torch import save_file

        tensors = self._joined()
        target = tensors_path(folder, self.shard)
        write_atomically(target, lambda path: save_file(tensors, path), durable=True)
        failed = len(self._rows) - self._ok
        summary = ShardSummary(fingerprint, self.shard, self._ok, failed, target.stat().st_size)
        table = self._table(json.dumps(asdict(summary)).encode())
        write_atomically(table_path(folder, self.shard), lambda path: pq.write_table(table, path), durable=True)

    def _add_outputs(self, record: FeatureRecord) -> None:
        # All are checked before any is taken, so that a picture is stored whole or not at all.
        checked: dict[str, Tensor] = {}
        for name, output in record.outputs.items():
            checked[f"{name}.summary"] = storable(output.summary, self.store, f"{name}.summary")
            if self.keep == "pooled":
                checked[f"{name}.pooled"] = storable(output.features, self.store, f"{name}.pooled")
            elif self.keep == "all":
                tokens = output.features.flatten(1).T  # [h*w, D]
                checked[f"{name}.features"] = storable(tokens, self.store, f"{name}.features")
        for name, tensor in checked.items():
            self._tensors.setdefault(name, []).append(tensor)
        if self.keep == "all":
            for name, output in record.outputs.items():
                height, width = output.features.shape[-2:]
                self._grids.setdefault(name, []).append((height, width))

    def _joined(self) -> dict[str, Tensor]:
        joined = {}
        for name in list(self._tensors):
            parts = self._tensors.pop(name)
            joined[name] = torch.cat(parts) if name.endswith(".features") else torch.stack(parts)  # [T, D] or [N, C]
        for name, sizes in self._grids.items():
            grids = torch.tensor(sizes, dtype=torch.int64)  # [N, 2]
            ends = grids.prod(1).cumsum(0)  # [N]
            joined[f"{name}.offsets"] = torch.cat([ends.new_zeros(1), ends])  # [N + 1]
            joined[f"{name}.grids"] = grids
        return joined

    def _table(self, metadata: bytes) -> pa.Table:
        import pyarrow as pa

        kinds = {
            "position": pa.int64(),
            **dict.fromkeys(("id", "path"), pa.string()),
            "label": pa.int64(),
            **dict.fromkeys(("class", "status", "reason"), pa.string()),
            **dict.fromkeys(("height", "width", "input_height", "input_width", "row"), pa.int32()),
        }
        schema = pa.schema(list(kinds.items()), metadata={_METADATA_KEY: metadata})
        return pa.table({name: [row.get(name) for row in self._rows] for name in kinds}, schema=schema)
