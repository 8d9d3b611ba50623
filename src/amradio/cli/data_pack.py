"""``amradio data pack``."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from amradio.cli.common import progress_bar

_MOST_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class Pack:
    """Make pictures smaller and put them into tar shards of bounded size, with their labels.

    To carry a training set to another machine: pictures at the size that training needs, in files that any transfer
    takes. Exit code 3 if some pictures could not be read; they are left out.
    """

    source: tyro.conf.Positional[str]
    """Pictures: a folder, tar shards, a list, parquet files, a data set."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o", "--out"])]
    """Folder for the shards."""
    split: str | None = None
    """Which part of the set."""
    limit: int | None = None
    """Take so many pictures, drawn at random."""
    short_side: int = 256
    """What a larger picture's short side becomes, in pixels; smaller ones keep their size."""
    quality: int = 90
    """Of JPEG."""
    shard_mib: float = 16.0
    """Bound of each shard."""
    workers: int = 4
    """Threads."""
    json: bool = False
    """Print one JSON object, and no progress bar."""

    def run(self) -> int:
        """Pack and say what was written; returns the exit code."""
        from amradio.images import open_images
        from amradio.images.pack import MIB, PackOptions, pack_images

        options = PackOptions(
            short_side=self.short_side,
            quality=self.quality,
            shard_bytes=int(self.shard_mib * MIB),
            workers=self.workers,
        )
        images = open_images(self.source, self.split)
        if self.limit is not None:
            images = images.shuffled(0).head(self.limit)
        with progress_bar(len(images), "packing", enabled=not self.json and sys.stderr.isatty()) as advance:
            packed = pack_images(images, self.output, options, lambda: advance(1))
        if self.json:
            failed = [{"path": path, "reason": reason} for path, reason in packed.failures]
            record = {"shards": [str(p) for p in packed.shards], "pictures": packed.count, "bytes": packed.size}
            print(json.dumps({**record, "failed": failed}, indent=2))
        else:
            for path, reason in packed.failures[:_MOST_SHOWN]:
                print(f"left out: {path}: {reason}", file=sys.stderr)
            more = f", {len(packed.failures):,} could not be read" if packed.failures else ""
            shards = f"{len(packed.shards):,} shards of {packed.size / MIB:,.1f} MiB in all"
            print(f"packed {packed.count:,} pictures into {shards} in {self.output}{more}")
        return 3 if packed.failures else 0
