"""Where downloads are kept, who may write there, and whether the network may be used."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from amradio.errors import AmradioError, DownloadError
from amradio.weights.trust import safe_name

_TRUE = frozenset({"1", "ON", "YES", "TRUE"})


def cache_root(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The directory below which downloads are kept.

    Args:
        cache_dir: Explicit choice; else the environment variable ``AMRADIO_CACHE``, else the Hugging Face cache.

    Returns:
        An absolute path; it need not exist.
    """
    from huggingface_hub import constants

    chosen = cache_dir or os.environ.get("AMRADIO_CACHE") or constants.HF_HUB_CACHE
    return Path(chosen).expanduser().absolute()


def offline_reason(local_files_only: bool = False) -> str | None:
    """Why nothing may be fetched, None if it may.

    Args:
        local_files_only: The caller's wish.

    Returns:
        Words that complete "..., and".
    """
    from huggingface_hub import constants

    if local_files_only:
        return "local_files_only=True"
    for name in ("AMRADIO_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name, "").upper() in _TRUE:
            return f"{name} is set"
    return "huggingface_hub is in offline mode" if constants.HF_HUB_OFFLINE else None


def make_directory(directory: Path) -> None:
    """Make a directory of the cache, and its parents.

    Args:
        directory: May exist.

    Raises:
        DownloadError: It cannot be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise DownloadError(
            f"The cache directory {directory} cannot be made: {e.strerror}. Choose another with cache_dir= or "
            "AMRADIO_CACHE."
        ) from e


@contextmanager
def locked(root: Path, key: str) -> Iterator[None]:
    """Hold a lock that other processes using the same cache respect. Waits as long as it takes.

    Args:
        root: Cache root.
        key: What is locked.

    Raises:
        DownloadError: Nothing can be written there, now or while the lock is held.
    """
    # Falls back to a plain lock file where the file system knows no locks, and says while it waits.
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    directory = root / "amradio" / "locks"
    make_directory(directory)
    try:
        with WeakFileLock(directory / f"{safe_name(key)}.lock"):
            yield
    except AmradioError:
        raise
    except OSError as e:
        raise DownloadError(
            f"The cache {root} cannot be written: {e}. Make room or allow writing, or choose another place with "
            "cache_dir= or AMRADIO_CACHE."
        ) from e
