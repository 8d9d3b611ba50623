"""From what a user typed to a file or directory on this machine."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from amradio.errors import UnknownModelError
from amradio.hub import HubOptions
from amradio.weights.catalog import CatalogEntry, is_catalog_name, resolve

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
_URL = re.compile(r"^https?://")


@dataclass(frozen=True, kw_only=True)
class Located:
    """A checkpoint on this machine.

    Attributes:
        path: File or directory.
        entry: The published model that it is, if it was asked for by name.
        source: Path, URL or repository, for messages and reports.
        sha256: Digest of the file, if it was downloaded.
        revision: Commit of the repository, if known.
    """

    path: Path
    source: str
    entry: CatalogEntry | None = None
    sha256: str | None = None
    revision: str | None = None


PACKAGED = {"amradio-tiny": "amradio-tiny.safetensors"}
"""Models whose weights come with this package, and their files."""


def packaged_model(name: str) -> Path:
    """The file of a model that comes with this package."""
    return Path(str(resources.files("amradio.weights") / "data" / PACKAGED[name]))


def find_entry(name: str) -> CatalogEntry | None:
    """The published model of a name, unless the name is a local path, a URL or a foreign repository.

    Args:
        name: What the user typed.

    Returns:
        Its catalog entry, or None.

    Raises:
        UnknownModelError: The name can be nothing else and is not published.
    """
    if name in PACKAGED or (name and (_is_local(name) or _URL.match(name))):
        return None
    if is_catalog_name(name) or not _HUB_ID.match(name):
        return resolve(name)
    return None


def locate(name: str, *, with_adaptors: bool = False, hub: HubOptions | None = None) -> Located:
    """Find a checkpoint, downloading it if needed.

    A local path wins over a name. A version key means the file that the official code loads; a repository name means
    the repository's safetensors, unless adaptors are asked for: the repositories of published models do not hold any.

    Args:
        name: Version key, Hugging Face repository, URL or path; the empty string is the default version.
        with_adaptors: Whether adaptors will be needed.
        hub: How to reach the hub.

    Returns:
        Where it is.

    Raises:
        UnknownModelError: There is no such file and no such published model.
        DownloadError: It cannot be fetched.
    """
    hub = hub or HubOptions()
    if name in PACKAGED:
        return Located(path=packaged_model(name), source=name)
    if name and _is_local(name):
        path = Path(os.path.expanduser(name))
        if not os.path.exists(path):
            raise UnknownModelError(f"{name} looks like a path, but there is no such file or directory.")
        return Located(path=path, source=str(path))
    if _URL.match(name):
        return _from_url(name, None, hub)
    entry = find_entry(name)
    by_repo = bool(_HUB_ID.match(name))
    if entry is None:
        return _from_repo(name, None, hub)
    if entry.url is None or (by_repo and not with_adaptors):
        assert entry.hf_repo is not None  # every entry has a URL, a repository or both
        return _from_repo(entry.hf_repo, entry, hub)
    return _from_url(entry.url, entry, hub)


def _is_local(name: str) -> bool:
    path = Path(os.path.expanduser(name))
    looks_like_path = name.startswith((".", "~", os.sep)) or path.is_absolute() or "\\" in name
    return looks_like_path or os.path.exists(path) or path.suffix in (".tar", ".safetensors", ".pth", ".pt")


def _from_url(url: str, entry: CatalogEntry | None, hub: HubOptions) -> Located:
    from amradio.weights.download import fetch_url

    fetched = fetch_url(
        url,
        cache_dir=hub.cache_dir,
        token=hub.token,
        revision=hub.revision,
        local_files_only=hub.local_files_only,
        progress=hub.progress,
        sha256=entry.sha256 if entry else None,
    )
    return Located(path=fetched.path, source=url, entry=entry, sha256=fetched.sha256, revision=fetched.revision)


def _from_repo(repo: str, entry: CatalogEntry | None, hub: HubOptions) -> Located:
    from amradio.weights.download import fetch_hub_model

    path = fetch_hub_model(
        repo,
        revision=hub.revision or (entry.revision if entry else None),
        cache_dir=hub.cache_dir,
        token=hub.token,
        local_files_only=hub.local_files_only,
        progress=hub.progress,
    )
    return Located(path=path, source=repo, entry=entry)
