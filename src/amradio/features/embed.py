"""Embeddings of a set of pictures in a folder: shards that many processes write, and a manifest; runs can be resumed.

```text
OUT/manifest.json                 what the embeddings were made with, and whether they are complete
OUT/embeddings-00000.parquet      the pictures; see `amradio.features.shards`
OUT/embeddings-00000.safetensors  their tensors
```

A shard holds pictures of fixed positions, and batches do not cross its borders, so its content does not depend on how
many processes there are, on which were killed, or on when a run was resumed. `amradio.features.embeddings` reads it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from amradio.errors import AmradioError, OptionError
from amradio.features.collect import Failure, together
from amradio.features.embeddings import read_failures
from amradio.features.extract import extract
from amradio.features.files import remove_temporary_files
from amradio.features.manifest import (
    MANIFEST_NAME,
    Manifest,
    StaleError,
    differences,
    new_manifest,
    read_manifest,
    write_manifest,
)
from amradio.features.partition import Partition, check_same_set
from amradio.features.runner import ExtractOptions, FeatureModel
from amradio.features.shards import ShardBuilder, ShardSummary, read_summary, shard_files, table_path, tensors_path
from amradio.features.timing import StageTimer

if TYPE_CHECKING:
    from amradio.distributed import Group
    from amradio.images.dataset import ImageSet
    from amradio.images.resize import ResizePolicy

STORE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_SHARD_SIZE = 1024
_SHARD_SIZE_OF_MAPS = 128  # of a large model at 512 pixels these are 0.7 GB, and a process holds two shards
_LISTED_FAILURES = 1000  # more are counted, but not listed


@dataclass(frozen=True)
class EmbedOptions:
    """What is written. `ExtractOptions.keep` says which features are.

    Attributes:
        store: Number format of the stored tensors: float32, float16 or bfloat16. Values that float16 cannot hold make
            the picture fail.
        shard_size: Pictures in a shard, which is held in memory, and lost if the process is killed; default 1024, or
            128 where whole feature maps are kept.
        overwrite: Begin anew in a folder that has embeddings.
    """

    store: torch.dtype = torch.float32
    shard_size: int | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.store not in STORE_DTYPES:
            raise OptionError(f"Embeddings are stored in float32, float16 or bfloat16, got {self.store}.")


def embed(
    images: ImageSet,
    model: FeatureModel,
    policy: ResizePolicy,
    folder: str | os.PathLike[str],
    options: ExtractOptions | None = None,
    embed_options: EmbedOptions | None = None,
    *,
    group: Group | None = None,
    on_progress: Callable[[int], object] | None = None,
) -> dict[str, Any]:
    """Compute embeddings of a set of pictures and write them to a folder.

    Shards that are there already, complete and made with the same settings, are kept. What may change between the runs
    is what changes no more than the last digits: batch size, device, number of processes and threads.

    Args:
        images: The pictures.
        model: In evaluation mode, on the device of the options.
        policy: To which sizes pictures are brought.
        folder: Where to write; made if missing. Under a group all processes must see the same folder.
        options: How to compute, and which features are kept.
        embed_options: What to write.
        group: The processes that share the work; all of them must call this. None = alone.
        on_progress: Called with how many pictures more are done: first those of an earlier run. Under a group what the
            others did is estimated by what this process did, as all have the same share.

    Returns:
        A record that can be saved as JSON: ``images``, ``ok``, ``failed``, ``failures`` (id, path and reason of the
        first 1000), ``resumed`` (pictures of an earlier run), ``shards``, ``fingerprint``, ``policy``, ``folder``, and
        what `StageTimer.record` says: wall time and speed of all processes together, stages and batch fill of this one.

    Raises:
        StaleError: The folder holds embeddings made with other settings; the message says which.
        OptionError: It holds other files of the names that would be written.
        OSError: The embeddings could not be written.
    """
    check_same_set(images, group)
    options, embed_options = options or ExtractOptions(), embed_options or EmbedOptions()
    size = embed_options.shard_size or (_SHARD_SIZE_OF_MAPS if options.keep == "all" else _SHARD_SIZE)
    partition = Partition(len(images), size)
    job = _Job(Path(folder), partition, new_manifest(images, model, policy, options, embed_options.store, partition))
    missing = _agreed(group, lambda: job.prepare(overwrite=embed_options.overwrite))
    rank, world_size = (0, 1) if group is None else (group.rank, group.world_size)
    resumed = len(images) - len(partition.stream(missing))
    progress = _Progress(len(images), on_progress)
    progress.advance(resumed)
    timer = StageTimer()
    with _ShardWriter(job, timer) as writer:
        own = missing[rank::world_size]
        positions = partition.stream(own)
        shards = iter(own)
        builder: ShardBuilder | None = None
        sources = (images[int(i)] for i in positions)
        with closing(extract(sources, model, policy, options, timer, partition.size)) as records:
            for found in records:
                position = int(positions[found.position])
                if builder is None:
                    builder = ShardBuilder(next(shards), options.keep, embed_options.store, images.class_names)
                label = -1 if images.labels is None else int(images.labels[position])
                builder.add(replace(found, position=position), None if label < 0 else label)
                if len(builder) == len(partition.positions(builder.shard)):
                    writer.write(builder)
                    builder = None
                progress.advance(world_size)
    timing = timer.record(options.batch_size)
    if group is not None:
        timing = together(timing, timer, group)  # which waits for all of them
    progress.advance(len(images))
    return {**_agreed(group, job.finish), "resumed": resumed, "policy": str(policy), **timing}


class _Job:
    """The folder of a run: what is in it before, and what is said about it after. Only the main process calls this."""

    def __init__(self, folder: Path, partition: Partition, manifest: Manifest) -> None:
        self.folder = folder
        self.partition = partition
        self.manifest = manifest

    @property
    def fingerprint(self) -> str:
        return str(self.manifest["fingerprint"])

    def prepare(self, *, overwrite: bool) -> list[int]:
        """Make the folder ready and find which shards are missing."""
        if self.folder.exists() and not self.folder.is_dir():
            raise OptionError(f"The output {self.folder} is a file; name a folder.")
        self.folder.mkdir(parents=True, exist_ok=True)
        earlier = read_manifest(self.folder, any_version=overwrite)
        if earlier is None:
            self._refuse_foreign_files()
        elif overwrite:
            # In this order: killed in between, this leaves a run of the new kind that can be resumed.
            write_manifest(self.folder, self.manifest)
            for path in shard_files(self.folder):
                path.unlink(missing_ok=True)
        elif earlier["fingerprint"] != self.fingerprint:
            changed = differences(earlier["config"], self.manifest["config"])
            raise StaleError(
                f"The folder {self.folder} holds embeddings made with other settings: {'; '.join(changed)}. Choose "
                "another folder, use the same settings to resume, or say that it may be overwritten."
            )
        remove_temporary_files(self.folder)
        missing = [shard for shard in range(len(self.partition)) if self._summary(shard) is None]
        if missing:
            write_manifest(self.folder, self.manifest)
        return missing

    def finish(self) -> dict[str, Any]:
        """Write the manifest of a complete run."""
        found = [self._summary(shard) for shard in range(len(self.partition))]
        summaries = [s for s in found if s is not None]
        if len(summaries) < len(found):
            first = next(i for i, s in enumerate(found) if s is None)
            raise OptionError(
                f"{len(found) - len(summaries)} of {len(found)} shards are not in {self.folder}, "
                f"{tensors_path(self.folder, first).name} for one. All processes must write to one folder that all of "
                "them see, and nothing else may change it."
            )
        self._remove_left_over_shards()
        ok, failed = sum(s.ok for s in summaries), sum(s.failed for s in summaries)
        totals = {"complete": True, "ok": ok, "failed": failed, "ok_of_shards": [s.ok for s in summaries]}
        write_manifest(self.folder, {**self.manifest, **totals})
        with_failures = [s.shard for s in summaries if s.failed]
        return {
            "images": self.partition.count,
            "ok": ok,
            "failed": failed,
            "failures": [_as_json(f) for f in read_failures(self.folder, with_failures, _LISTED_FAILURES)],
            "shards": len(self.partition),
            "fingerprint": self.fingerprint,
            "folder": str(self.folder),
        }

    def _refuse_foreign_files(self) -> None:
        foreign = shard_files(self.folder)
        if foreign:
            raise OptionError(
                f"The folder {self.folder} holds {foreign[0].name} but no {MANIFEST_NAME}, so nobody knows what it is. "
                "Choose another folder, or move such files away."
            )

    def _remove_left_over_shards(self) -> None:
        """Those of a larger run that was being overwritten when the process was killed."""
        own = {
            path
            for i in range(len(self.partition))
            for path in (table_path(self.folder, i), tensors_path(self.folder, i))
        }
        for path in shard_files(self.folder):
            if path not in own:
                path.unlink(missing_ok=True)

    def _summary(self, shard: int) -> ShardSummary | None:
        return read_summary(self.folder, shard, self.fingerprint, len(self.partition.positions(shard)))


class _Progress:
    """Never says that more is done than there is, as the others' part is estimated only."""

    def __init__(self, total: int, on_progress: Callable[[int], object] | None) -> None:
        self._left = total
        self._on_progress = on_progress

    def advance(self, count: int) -> None:
        step = min(count, self._left)
        self._left -= step
        if step and self._on_progress is not None:
            self._on_progress(step)


class _ShardWriter:
    """Writes shards in a thread, one at a time, while the next one is computed."""

    def __init__(self, job: _Job, timer: StageTimer) -> None:
        self._job = job
        self._timer = timer
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="amradio-write")
        self._last: Future[None] | None = None

    def write(self, builder: ShardBuilder) -> None:
        """Hand over a shard; waits for the one before, so that two are held at most.

        Raises:
            OSError: The shard before could not be written.
        """
        self._wait()
        self._last = self._pool.submit(self._write, builder)

    def __enter__(self) -> _ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._wait()
        finally:
            self._pool.shutdown(wait=True)

    def _wait(self) -> None:
        last, self._last = self._last, None
        if last is not None:
            with self._timer.waiting("write"):
                last.result()

    def _write(self, builder: ShardBuilder) -> None:
        with self._timer.busy("write"):
            builder.write(self._job.folder, self._job.fingerprint)


def _agreed(group: Group | None, work: Callable[[], Any]) -> Any:
    """Let the main process do something, and give its result, or its error, to all."""
    if group is None:
        return work()
    result, failure = None, None
    if group.is_main:
        try:
            result = work()
        except (AmradioError, OSError) as error:  # otherwise the others would wait for what never comes
            failure = error
    result, failure = group.all_gather_objects((result, failure))[0]
    if failure is not None:
        raise failure
    return result


def _as_json(failure: Failure) -> dict[str, Any]:
    return {"id": failure.id, "path": failure.location, "reason": failure.reason}
