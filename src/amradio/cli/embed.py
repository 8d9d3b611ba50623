"""``amradio embed``."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from amradio.cli.arguments import Size
from amradio.cli.common import (
    DEFAULT_MODEL,
    PictureOptions,
    check_counts,
    check_share,
    device_of,
    dtype_of,
    exit_code,
    first_on_machine,
    print_failures,
    progress_bar,
    split_names,
)
from amradio.errors import OptionError

if TYPE_CHECKING:
    from amradio.distributed import Group
    from amradio.images import ImageSet


@dataclass(frozen=True, kw_only=True)
class Embed(PictureOptions):
    """Compute embeddings of a whole set of pictures and write them to a folder, in shards.

    A run that was killed goes on where it was when the same command is given again. torchrun starts it on several
    processes, also on several machines with a common folder. A broken picture is recorded and skipped; the exit code is
    then 3. The folder gets manifest.json and, for each shard, a Parquet table of its pictures and a safetensors file.
    """

    source: tyro.conf.Positional[tuple[str, ...]]
    """Folder, pattern, list file, tar shards, Parquet, or Hugging Face dataset."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder to write to."""
    split: str | None = None
    """Part of the set; needed where there are several."""
    model: Annotated[str, tyro.conf.arg(aliases=["-m"])] = DEFAULT_MODEL
    """Backbone: version key, repository, path, timm:NAME, hf:REPO, ...; amradio-tiny comes with the package."""
    adaptors: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(aliases=["-a"])] = ()
    """Adaptor to run besides the backbone. Repeat the option, or separate names by commas."""
    resolution: Size = ()
    """One number: shortest side, aspect kept. Two: scaled to cover height and width, centre cut out. Default: the
    model's preferred resolution, as a centre crop."""
    keep: Literal["summary", "pooled", "all"] = "summary"
    """What is stored: summaries; also the features averaged over all positions; also whole feature maps."""
    store: Literal["float32", "float16", "bfloat16"] = "float32"
    """Number format of what is stored."""
    shard_size: int | None = None
    """Pictures in a shard: what is held in memory, and lost when a process is killed. Default 1024, or 128 with whole
    feature maps."""
    limit: int | None = None
    """Take only the first so many pictures; after shuffling, if asked for."""
    shuffle: int | None = None
    """Take the pictures in random order, with this seed."""
    label_column: str | None = None
    """Of tables and Hugging Face datasets; default the one that has labels."""
    image_column: str | None = None
    """Of tables and Hugging Face datasets; default the one that has images."""
    overwrite: bool = False
    """Begin anew in a folder that has embeddings."""
    json: bool = False
    """Print one JSON object instead of text, and no progress bar."""

    def run(self) -> int:
        """Compute and write; returns the exit code."""
        from amradio.distributed import init_group

        with init_group(None if self.device == "auto" else device_of(self.device)) as group, warnings.catch_warnings():
            is_main = group is None or group.is_main
            if not is_main:  # the main process says the same
                warnings.simplefilter("ignore")
            result = self._embed(group, bar=is_main and not self.json)
        if is_main:
            print(json.dumps(result, indent=2)) if self.json else _print(result)
        return exit_code(result["images"], result["failed"], self.max_failed)

    def _embed(self, group: Group | None, bar: bool) -> dict[str, Any]:
        from amradio.evals.runner import policy_for
        from amradio.features import EmbedOptions, embed

        check_counts(limit=self.limit, shard_size=self.shard_size)
        check_share("max_failed", self.max_failed)
        _refuse_output_in_source(self.output, self.source)
        images = self._open()
        device = device_of(self.device) if group is None else group.device
        with first_on_machine(group):
            model = self.load_model(self.model, split_names(self.adaptors), device, progress=bar)
        mode = None if self.mode == "auto" else self.mode
        policy = policy_for(model, self.resolution, mode, self.resize_multiple)
        options = replace(self.extract_options(device), keep=self.keep)
        embed_options = EmbedOptions(store=dtype_of(self.store), shard_size=self.shard_size, overwrite=self.overwrite)
        with progress_bar(len(images), "embed", enabled=bar) as advance:
            return embed(images, model, policy, self.output, options, embed_options, group=group, on_progress=advance)

    def _open(self) -> ImageSet:
        from amradio.images import open_images

        images = open_images(
            self.source[0] if len(self.source) == 1 else self.source,
            self.split,
            cache_dir=self.cache_dir,
            local_files_only=self.offline,
            label_column=self.label_column,
            image_column=self.image_column,
        )
        if self.shuffle is not None:
            images = images.shuffled(self.shuffle)
        return images if self.limit is None else images.head(self.limit)


def _refuse_output_in_source(output: Path, sources: tuple[str, ...]) -> None:
    """Refuse to write among the pictures: the next run would find the embeddings there."""
    target = output.resolve()
    for source in map(Path, sources):
        if source.is_dir() and (source.resolve() == target or source.resolve() in target.parents):
            raise OptionError(f"The output {output} is inside the folder of pictures {source}; choose another place.")


def _print(result: dict[str, Any]) -> None:
    print_failures(result["failures"], result["failed"])
    resumed = f", {result['resumed']} were done earlier" if result["resumed"] else ""
    print(
        f"{result['ok']} of {result['images']} pictures worked{resumed}; {result['wall_s']:.1f} s "
        f"({result['images_per_s']:.1f} images/s), {result['policy']}"
    )
    if result["batch_fill"] is not None:
        print(f"slowest stage: {result['bottleneck']}; batches were {result['batch_fill']:.0%} full")
    print(f"embeddings are in {result['folder']}, in {result['shards']} shard{'s' if result['shards'] != 1 else ''}")
