"""The directories and locks of the download cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from amradio.errors import AmradioError, DownloadError
from amradio.weights.trust import safe_name


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
