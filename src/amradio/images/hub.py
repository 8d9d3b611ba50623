"""Pictures in datasets on the Hugging Face Hub: of one split, only the Parquet files are fetched, and read in place.

The library ``datasets`` would download every split and write all pictures a second time, in its own format: 150 GB
twice for the 6 GB of ImageNet's validation set. It is used only for repositories without Parquet files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from amradio.errors import DatasetError, DownloadError, GatedRepoError, MissingDependencyError, OfflineError
from amradio.hub import HubOptions
from amradio.images.dataset import ImageSet
from amradio.images.hf import open_with_datasets
from amradio.images.names import natural_key
from amradio.images.parquet import open_parquet
from amradio.images.splits import SPLIT_NAMES, find_split, no_such_split, several_splits, split_in_file_name

CONVERTED = "refs/convert/parquet"
"""The branch where the Hub keeps its conversion of a dataset to Parquet."""

_TIMEOUT_S = 60
_PARTIAL = "partial-"  # how that branch calls a split of which it holds only the beginning
_NUMBERED = re.compile(r"(.+?)-(\d+)-of-(\d+)(?:-\w+)?\.parquet")


@dataclass(frozen=True)
class KnownDataset:
    """Where a dataset is that is known by a short name.

    Attributes:
        repo: Its repository on the Hub.
        revision: Where its Parquet files are; None is the default branch.
        counts: How many pictures its splits have, so that an incomplete copy is noticed.
    """

    repo: str
    revision: str | None = None
    counts: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))


KNOWN_DATASETS: Mapping[str, KnownDataset] = MappingProxyType(
    {
        "imagenet-1k": KnownDataset(
            "ILSVRC/imagenet-1k", counts={"train": 1_281_167, "validation": 50_000, "test": 100_000}
        ),
        # This repository holds a loading script, which the library `datasets` refuses since its version 4, and a ZIP.
        "imagenet_sketch": KnownDataset("songweig/imagenet_sketch", CONVERTED, counts={"train": 50_889}),
        "food101": KnownDataset("ethz/food101", counts={"train": 75_750, "validation": 25_250}),
    }
)
"""Datasets by the names that published commands use; their repositories have since got owners in their names."""


def open_hub(
    spec: str,
    name: str,
    split: str | None,
    options: HubOptions,
    image_column: str | None = None,
    label_column: str | None = None,
) -> ImageSet:
    """Open a split of a dataset on the Hub.

    Parquet files are looked for in the revision asked for, then in the branch where the Hub keeps its own conversion.
    Where there are none, the library ``datasets`` loads what it can; loading scripts are never run.

    Args:
        spec: A key of `KNOWN_DATASETS`, or ``owner/name``; with ``:config`` behind it, one of its configurations.
        name: What the set is called.
        split: Which split; may be left out if there is only one.
        options: How to reach the Hub.
        image_column: See `amradio.images.parquet.open_parquet`.
        label_column: See `amradio.images.parquet.open_parquet`.

    Raises:
        DatasetError: There is no such dataset, configuration or split, or the copy is incomplete.
        DownloadError: It cannot be fetched; `GatedRepoError` if its terms must be accepted, `OfflineError` if it is not
            in the cache and nothing may be fetched.
        MissingDependencyError: It has no Parquet files, and the extra ``amradio[datasets]`` is not installed.
    """
    repo, _, config = spec.partition(":")
    known = next((k for key, k in KNOWN_DATASETS.items() if repo in (key, k.repo)), KnownDataset(repo))
    revisions = [options.revision] if options.revision else list(dict.fromkeys([known.revision, CONVERTED]))
    for revision in revisions:
        chosen = replace(options, revision=revision)
        table = _table_files(known.repo, chosen, may_lack=options.revision is None and revision == CONVERTED)
        if table:
            part, files = _choose_split(_choose_config(table, config, known.repo), split, known.repo)
            images = open_parquet(_fetch(known.repo, files, chosen), name, part, image_column, label_column)
            return _complete(images, known)
    try:
        images = open_with_datasets(known.repo, config, name, split, options, image_column, label_column)
    except (DatasetError, MissingDependencyError) as error:
        if options.offline_reason:
            raise _offline(known.repo, options) from error
        raise
    return _complete(images, known)


@dataclass(frozen=True)
class _TableFile:
    """A Parquet file of a repository, and what its path says about it."""

    path: str
    config: str
    split: str

    @classmethod
    def of(cls, path: str, *, converted: bool) -> _TableFile:
        """Read ``data/train-00000-of-00002.parquet``, ``config/test/0000.parquet`` and the like."""
        *folders, file = path.split("/")
        is_split_folder = bool(folders) and (converted or folders[-1].lower() in SPLIT_NAMES)
        if is_split_folder:
            split = folders.pop()
        else:
            numbered = _NUMBERED.fullmatch(file)
            split = numbered[1] if numbered else split_in_file_name(file) or file.removesuffix(".parquet")
        return cls(path, "/".join(f for f in folders if f != "data"), split)


def _table_files(repo: str, options: HubOptions, *, may_lack: bool) -> list[_TableFile]:
    """List the Parquet files of a revision; none if the revision may lack and does."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RevisionNotFoundError

    with _our_errors(repo, options):
        try:
            if options.offline_reason:
                folder = Path(snapshot_download(repo, allow_patterns=["*.parquet"], **_arguments(options)))
                paths = [p.relative_to(folder).as_posix() for p in folder.rglob("*.parquet")]
            else:
                # Not list_repo_files, which repeats for half a minute what no repetition cures, such as a wrong name.
                info = HfApi(token=options.token).dataset_info(repo, revision=options.revision, timeout=_TIMEOUT_S)
                paths = [sibling.rfilename for sibling in info.siblings or ()]
        except LocalEntryNotFoundError:
            if options.offline_reason:  # there may be another revision, or a copy by the library datasets
                return []
            raise
        except RevisionNotFoundError:
            if may_lack:
                return []
            raise
    found = sorted((p for p in paths if p.endswith(".parquet")), key=natural_key)
    return [_TableFile.of(p, converted=options.revision == CONVERTED) for p in found]


def _choose_config(files: list[_TableFile], config: str, repo: str) -> list[_TableFile]:
    configs = list(dict.fromkeys(f.config for f in files))
    wanted = config or (configs[0] if len(configs) == 1 else next((c for c in ("default", "") if c in configs), None))
    if wanted is None or wanted not in configs:
        which = f"has no configuration {config!r}" if config else "has several configurations"
        shown = ", ".join(f"{repo}:{c}" for c in configs if c)
        raise DatasetError(f"The dataset {repo} {which}. Name one: {shown or repo}.")
    return [f for f in files if f.config == wanted]


def _choose_split(files: list[_TableFile], split: str | None, repo: str) -> tuple[str, list[str]]:
    where, splits = f"The dataset {repo}", list(dict.fromkeys(f.split for f in files))
    if split is None and len(splits) > 1:
        raise several_splits(where, splits)
    name = splits[0] if split is None else find_split(splits, split)
    if name is None and split is not None and f"{_PARTIAL}{split}" in splits:
        name = f"{_PARTIAL}{split}"
    if name is None:
        raise no_such_split(where, split or "", splits)
    if name.startswith(_PARTIAL):
        raise DatasetError(
            f"The Hub's conversion of {repo} to Parquet holds only the beginning of the split "
            f"{name.removeprefix(_PARTIAL)!r}, because the dataset is large. Download the original files and "
            "give their folder."
        )
    paths = [f.path for f in files if f.split == name]
    _refuse_gaps(paths, repo)
    return name, paths


def _refuse_gaps(paths: list[str], repo: str) -> None:
    """In a cache, the files of a split may have been fetched in part."""
    numbers = [(m[2], m[3]) for p in paths if (m := _NUMBERED.fullmatch(p.rpartition("/")[2]))]
    expected = int(numbers[0][1]) if numbers else 0
    if len(numbers) == len(paths) and len(paths) != expected:
        raise DatasetError(f"Only {len(paths)} of the {expected} files of {repo} are there, such as {paths[0]}.")


def _fetch(repo: str, files: list[str], options: HubOptions) -> list[str]:
    from huggingface_hub import snapshot_download

    with _our_errors(repo, options):
        folder = snapshot_download(repo, allow_patterns=files, **_arguments(options))
    paths = [os.path.join(folder, *f.split("/")) for f in files]
    missing = [p for p in paths if not os.path.isfile(p)]
    if missing:  # without a connection, the client returns what the cache has
        raise DownloadError(f"{len(missing)} of {len(paths)} files of {repo} cannot be fetched, such as {missing[0]}.")
    return paths


def _complete(images: ImageSet, known: KnownDataset) -> ImageSet:
    expected = known.counts.get(images.split or "")
    if expected is None or len(images) == expected:
        return images
    raise DatasetError(
        f"This copy of {known.repo} is not whole: its split {images.split!r} has {len(images):,} pictures, and the "
        f"dataset has {expected:,}. Download the original files, and give their folder."
    )


def _arguments(options: HubOptions) -> dict[str, Any]:
    return {
        "repo_type": "dataset",
        "token": options.token,
        "revision": options.revision,
        "cache_dir": str(options.cache_root),
        "local_files_only": options.offline_reason is not None,
    }


@contextmanager
def _our_errors(repo: str, options: HubOptions) -> Iterator[None]:
    """Say in our words what `huggingface_hub` ran into."""
    from huggingface_hub import errors

    page = f"https://huggingface.co/datasets/{repo}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise GatedRepoError(
            f"The dataset {repo} is gated: accept its terms on {page}, then log in (`hf auth login`) or pass a token."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise DatasetError(f"The dataset {repo} has no revision {options.revision!r}. See {page}.") from error
    except errors.RepositoryNotFoundError as error:
        raise DatasetError(
            f"There is no file or folder {repo} here, and no dataset of this name on the Hugging Face Hub, unless it "
            "is private: then log in (`hf auth login`) or pass a token."
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        if options.offline_reason is None:
            raise DownloadError(f"The dataset {repo} cannot be fetched: {error}") from error
        raise _offline(repo, options) from error
    except DownloadError:
        raise
    except Exception as error:  # the HTTP client's errors have other names in each of its versions
        if not any(isinstance(e, (OSError, errors.HfHubHTTPError)) for e in _chain(error)):
            raise
        raise DownloadError(
            f"There is no file or folder {repo} here, and the dataset of this name cannot be fetched from the Hugging "
            f"Face Hub: {str(error) or type(error).__name__}. HF_HUB_OFFLINE=1 uses what is in the cache."
        ) from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it was raised because of."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _offline(repo: str, options: HubOptions) -> OfflineError:
    return OfflineError(
        f"The dataset {repo} is not in {options.cache_root}, and {options.offline_reason}. There is no file or "
        "folder of this name either."
    )
