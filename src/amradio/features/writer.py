"""Features to disk: one file a picture and one index over all.

```text
OUT/index.parquet              one row a picture, in input order, failed ones included
OUT/features/<id>.safetensors  backbone.summary [C], backbone.features [D, h, w], <adaptor>.summary, ...
OUT/<name>/<id>.png            pictures made from the features, e.g. pca
```

Every file appears complete or not at all (written beside its place, then renamed). The index is written when the writer
closes, also on an exception, and once a minute before, so that the work done so far is found again.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from amradio.errors import OptionError
from amradio.features.files import UnstorableError, printable, remove_temporary_files, storable, write_atomically
from amradio.features.runner import FeatureRecord
from amradio.features.timing import StageTimer

if TYPE_CHECKING:
    from PIL.Image import Image

INDEX_NAME = "index.parquet"
INDEX_INTERVAL_S = 60.0

Draw = Callable[[FeatureRecord], "Image"]


@dataclass(frozen=True)
class WriterOptions:
    """What is written.

    Attributes:
        dtype: Of the stored tensors, float32 or float16. Values that float16 cannot hold make the picture fail.
        file_format: ``safetensors`` or ``npz``.
        draw: Folder name to a function that draws a picture of a record, e.g. ``{"pca": draw_pca}``.
        workers: Writing threads.
        overwrite: Replace the index of an earlier run in the same folder.
    """

    dtype: torch.dtype = torch.float32
    file_format: Literal["safetensors", "npz"] = "safetensors"
    draw: Mapping[str, Draw] = field(default_factory=dict)
    workers: int = 2
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in (torch.float32, torch.float16):
            raise OptionError(f"Features are stored in float32 or float16, got {self.dtype}.")
        if self.file_format not in ("safetensors", "npz"):
            raise OptionError(f"Unknown file format {self.file_format!r}. Must be 'safetensors' or 'npz'.")
        if self.workers < 1:
            raise OptionError(f"workers must be at least 1, got {self.workers}.")
        if "features" in self.draw:
            raise OptionError("The folder 'features' holds the feature files; give the drawings another name.")


class FeatureWriter:
    """Writes records in background threads. A context manager; one writer a folder at a time.

    Args:
        folder: Where to write; made if missing. Temporary files of an interrupted run are removed.
        options: What to write.
        timer: Gets the seconds of the stage ``write``.

    Raises:
        OptionError: The folder holds an earlier run and `WriterOptions.overwrite` is off, or is a file.
    """

    def __init__(
        self, folder: str | os.PathLike[str], options: WriterOptions | None = None, timer: StageTimer | None = None
    ) -> None:
        self.folder = Path(folder)
        self.options = options or WriterOptions()
        self.timer = timer or StageTimer()
        self.ok = 0
        self.failed = 0
        self._rows: dict[int, dict[str, Any]] = {}
        self._ids: set[str] = set()
        self._lock = threading.Lock()
        self._pending: set[Future[None]] = set()
        self._index_time = time.monotonic()
        self._prepare()
        self._pool = ThreadPoolExecutor(self.options.workers, thread_name_prefix="amradio-write")
        # Twice the threads: enough that none idles, few enough that memory stays small.
        self._slots = threading.BoundedSemaphore(2 * self.options.workers)

    def write(self, record: FeatureRecord) -> None:
        """Hand a record to the writing threads; waits while they are behind.

        Raises:
            OSError: An earlier record could not be written, e.g. because the disk is full.
        OptionError: Another record had the same id.
        """
        if record.source.id in self._ids:
            raise OptionError(f"Two pictures have the id {record.source.id!r}; one would overwrite the other.")
        self._ids.add(record.source.id)
        with self.timer.waiting("write"):
            self._raise_first_error()
            self._slots.acquire()
            future = self._pool.submit(self._write_one, record)
            future.add_done_callback(lambda _: self._slots.release())
            self._pending.add(future)
        if time.monotonic() - self._index_time > INDEX_INTERVAL_S:
            self._write_index()

    def close(self) -> None:
        """Finish all writing and write the index.

        Raises:
            OSError: Something could not be written; the index is written all the same.
        """
        with self.timer.waiting("write"), ExitStack() as stack:
            stack.callback(self._remove_temporary_files)
            stack.callback(self._write_index)
            self._pool.shutdown(wait=True)
            self._raise_first_error()

    def __enter__(self) -> FeatureWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # An error of closing is raised with the error that ended the block as its context, so that both are shown.
        self.close()

    def _prepare(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise OptionError(f"The output {self.folder} is a file; name a folder.")
        if (self.folder / INDEX_NAME).exists() and not self.options.overwrite:
            raise OptionError(
                f"The folder {self.folder} already holds the features of an earlier run ({INDEX_NAME}). Choose another "
                "folder, or say that it may be overwritten."
            )
        for name in ("features", *self.options.draw):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self._remove_temporary_files()

    def _remove_temporary_files(self) -> None:
        for folder in (self.folder, *(self.folder / name for name in ("features", *self.options.draw))):
            remove_temporary_files(folder)

    def _raise_first_error(self) -> None:
        done = [f for f in self._pending if f.done()]
        self._pending.difference_update(done)
        for future in done:
            future.result()

    def _write_one(self, record: FeatureRecord) -> None:
        row: dict[str, Any] = {
            "id": record.source.id,
            "path": printable(record.source.location),
            "status": "failed",
            "reason": None if record.reason is None else printable(record.reason),
        }
        if record.size is not None:
            row["height"], row["width"] = record.size
        if record.image is not None:
            row["input_height"], row["input_width"] = record.image.shape[-2:]
        with self.timer.busy("write"):
            if record.ok:
                row |= self._write_outputs(record)
        with self._lock:
            self._rows[record.position] = row
            self.ok += row["status"] == "ok"
            self.failed += row["status"] == "failed"

    def _write_outputs(self, record: FeatureRecord) -> dict[str, Any]:
        """Write the files of one picture and return what the index says about them."""
        try:
            tensors = {
                f"{name}.{part}": storable(tensor, self.options.dtype, f"{name}.{part}")
                for name, output in record.outputs.items()
                for part, tensor in output._asdict().items()
            }
        except UnstorableError as error:
            return {"reason": str(error)}
        file = f"features/{record.source.id}.{self.options.file_format}"
        write_atomically(self.folder / file, lambda path: _save(tensors, path, self.options.file_format))
        for name, draw in self.options.draw.items():
            image = draw(record)
            target = self.folder / name / f"{record.source.id}.png"
            write_atomically(target, lambda path, image=image: image.save(path, format="PNG"))  # type: ignore[misc]
        main = record.outputs.get("backbone") or next(iter(record.outputs.values()))
        grid_height, grid_width = main.features.shape[-2:]
        return {"status": "ok", "grid_height": grid_height, "grid_width": grid_width, "file": file}

    def _write_index(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        text = ("id", "path", "status", "reason")
        sizes = ("width", "height", "input_width", "input_height", "grid_width", "grid_height")
        schema = pa.schema(
            [*((n, pa.string()) for n in text), *((n, pa.int32()) for n in sizes), ("file", pa.string())]
        )
        with self._lock:
            rows = [self._rows[position] for position in sorted(self._rows)]
        table = pa.table({name: [row.get(name) for row in rows] for name in schema.names}, schema=schema)
        write_atomically(self.folder / INDEX_NAME, lambda path: pq.write_table(table, path))
        self._index_time = time.monotonic()


def _save(tensors: dict[str, Tensor], path: Path, file_format: str) -> None:
    if file_format == "npz":
        import numpy as np

        with open(path, "wb") as file:  # given a path, numpy would append its own ending
            np.savez(file, allow_pickle=False, **{name: t.numpy() for name, t in tensors.items()})
    else:
        from safetensors.torch import save_file

        save_file(tensors, path)
