"""Bytes from a server into a file: resumable, patient, and careful with the disk.

`huggingface_hub` writes each download to a file name of its own and deletes it on failure, so a connection cut at 4.9
of 5 GB starts from zero in the next process. Here the partial file stays and the next attempt, in this process or a
later one, asks only for the rest. The HTTP client is still the one of `huggingface_hub`, so proxies, certificates and
``set_client_factory`` are honoured.
"""

from __future__ import annotations

import errno
import importlib
import io
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar
from urllib.parse import urlsplit

from amradio.errors import DownloadError
from amradio.weights.cache import make_directory

logger = logging.getLogger(__name__)

ATTEMPTS = 5
"""Failures in a row, without a byte gained in between, before giving up."""
BACKOFF_S = 0.5
"""Wait after the first failure; doubles with each further one."""
MAX_WAIT_S = 60.0
"""Longest wait that a server's Retry-After header can ask for."""
TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_DISK_FULL = frozenset({errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)})  # Windows knows no quota error

T = TypeVar("T")


class TransientError(Exception):
    """Something that another attempt may cure.

    Args:
        reason: What happened, without URLs or headers.
        retry_after_s: How long the server asks to wait, if it does.
    """

    def __init__(self, reason: str, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, kw_only=True)
class Source:
    """What to fetch.

    Attributes:
        url: Full address.
        name: What people call it; shown in messages and in the progress bar.
        headers: Sent along; an Authorization header is dropped on a redirect to another origin.
        size: Expected number of bytes, if known.
        immutable: Whether `url` can only ever mean one content (it names a commit). Otherwise a partial file is
            continued only if the server confirms, by If-Range, that the content is still the same.
    """

    url: str
    name: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    size: int | None = None
    immutable: bool = False


def public_url(url: str) -> str:
    """A URL that may be shown: without user, password, query and fragment, which may carry secrets.

    Args:
        url: Any URL.

    Returns:
        Scheme, host, port and path.
    """
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def with_retries(action: Callable[[], T], *, what: str, progress_made: Callable[[], int] = lambda: 0) -> T:
    """Repeat an action while it fails in ways that may pass.

    Args:
        action: Does the work; raises `TransientError` to be called again.
        what: What is being done, to begin the error message with.
        progress_made: A number that grows with progress; growth resets the count of failures.

    Returns:
        What `action` returns.

    Raises:
        DownloadError: `ATTEMPTS` failures in a row.
    """
    failures, before = 0, progress_made()
    while True:
        try:
            return action()
        except TransientError as e:
            now = progress_made()
            failures = 1 if now > before else failures + 1
            before = now
            if failures >= ATTEMPTS:
                raise DownloadError(
                    f"{what} failed {failures} times in a row: {e}. Check the connection and, if there is one, the "
                    "proxy (HTTPS_PROXY, HTTP_PROXY, NO_PROXY); what has been fetched is kept and the next try "
                    "continues from it. A file fetched by other means can be given by its path."
                ) from e
            wait_s = e.retry_after_s if e.retry_after_s is not None else BACKOFF_S * 2 ** (failures - 1)
            logger.info("%s: %s; next try in %.1f s", what, e, wait_s)
            time.sleep(min(wait_s, MAX_WAIT_S))


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait, None if it does not say so in seconds.

    Args:
        headers: Of the response.
    """
    value = headers.get("Retry-After", "")
    return float(value) if value.isdigit() else None


def transfer(source: Source, part: Path, *, progress: bool = True) -> str | None:
    """Fetch a source completely into a partial file, continuing what is there.

    Args:
        source: What to fetch.
        part: The partial file. It stays when the transfer fails; the caller moves it to its place when it succeeds.
        progress: Whether to show a progress bar.

    Returns:
        The server's entity tag, if it gave one.

    Raises:
        DownloadError: The server refuses, the connection keeps failing, or the disk is full.
    """
    make_directory(part.parent)
    return with_retries(
        lambda: _attempt(source, part, progress),
        what=f"Fetching {source.name}",
        progress_made=lambda: part.stat().st_size if part.exists() else 0,
    )


def discard(part: Path) -> None:
    """Delete a partial file and what is remembered about it.

    Args:
        part: The partial file; it need not exist.
    """
    part.unlink(missing_ok=True)
    _validator_path(part).unlink(missing_ok=True)


def _attempt(source: Source, part: Path, progress: bool) -> str | None:
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    http = http_library()
    offset = part.stat().st_size if part.exists() else 0
    if source.immutable and offset and offset == source.size:
        return None
    headers, offset = _range_headers(source, part, offset)
    try:
        with get_session().stream(
            "GET", source.url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT, follow_redirects=True
        ) as response:
            start = _check_response(source, response, part, offset)
            total = _total_bytes(source, response, start)
            if total is not None:
                check_free_space(part.parent, total - start, source.name)
            _receive(source, response, part, start, total, progress)
            return response.headers.get("ETag")
    except http.TransportError as e:
        raise TransientError(describe_transport_error(e)) from e
    except (http.TooManyRedirects, http.DecodingError, http.InvalidURL) as e:
        raise DownloadError(f"Fetching {source.name} failed: {type(e).__name__} at {public_url(source.url)}.") from e


def http_library() -> ModuleType:
    """The HTTP library that `huggingface_hub` speaks: httpx in 1.x, its successor httpx2 in 2.x; same names in both."""
    from huggingface_hub.errors import HfHubHTTPError

    base = next(c for c in HfHubHTTPError.__mro__ if c.__name__ == "HTTPError")
    return importlib.import_module(base.__module__.partition(".")[0])


def describe_transport_error(error: Exception) -> str:
    """A transport failure in words: the kind first, since the library's own text is often empty.

    Args:
        error: From the HTTP client.
    """
    return f"{type(error).__name__}{f' ({error})' if str(error) else ''}"


def _range_headers(source: Source, part: Path, offset: int) -> tuple[dict[str, str], int]:
    """Headers of the request, and the offset from which it can continue."""
    headers = {**source.headers, "Accept-Encoding": "identity"}  # a compressed body could not be continued
    if not offset:
        return headers, 0
    if not source.immutable:
        validator = _read_validator(part)
        if validator is None:
            return headers, 0
        headers["If-Range"] = validator
    headers["Range"] = f"bytes={offset}-"
    return headers, offset


def _check_response(source: Source, response: Any, part: Path, offset: int) -> int:
    """Refuse what is not the file; otherwise the position in the file at which the body starts."""
    status = response.status_code
    if source.url.startswith("https:") and response.url.scheme == "http":
        raise DownloadError(f"{source.name} redirects from https to unencrypted http; refused.")
    if status in TRANSIENT_STATUS:
        raise TransientError(f"the server answered {status}", retry_after_s(response.headers))
    if status == 416:  # the partial file is as long as the content or longer, so it is not its beginning
        discard(part)
        raise TransientError("the server has nothing after the part that was fetched before")
    if status not in (200, 206):
        hint = " It wants a login." if status in (401, 403) else ""
        raise DownloadError(f"Fetching {source.name} failed: {public_url(source.url)} answered {status}.{hint}")
    if status == 200:
        _write_validator(part, response.headers)
        return 0
    wanted = f"bytes {offset}-"
    if not response.headers.get("Content-Range", "").startswith(wanted) or _is_encoded(response):
        discard(part)
        raise TransientError("the server sent another range than the one asked for")
    return offset


def _is_encoded(response: Any) -> bool:
    return bool(response.headers.get("Content-Encoding", "identity") != "identity")


def _total_bytes(source: Source, response: Any, start: int) -> int | None:
    """Size of the complete file in bytes, if the server or the source says it."""
    length = response.headers.get("Content-Length", "")
    if _is_encoded(response) or not length.isdigit():
        return source.size
    total = start + int(length)
    if source.size is not None and total != source.size:
        raise DownloadError(f"{source.name} should have {source.size} bytes, but the server sends {total}.")
    return total


def check_free_space(directory: Path, needed_bytes: int, name: str) -> None:
    """Refuse a download that cannot fit.

    Args:
        directory: Where it would go; exists.
        needed_bytes: How much is still to come.
        name: Of the file, for the message.

    Raises:
        DownloadError: Less than that is free; both numbers are named.
    """
    free_bytes = shutil.disk_usage(directory).free
    if needed_bytes > free_bytes:
        raise DownloadError(
            f"{name} needs {needed_bytes} more bytes but {directory} has only {free_bytes} free. Free some space, or "
            "choose another place with cache_dir= or the environment variable AMRADIO_CACHE."
        )


def _receive(source: Source, response: Any, part: Path, start: int, total: int | None, progress: bool) -> None:
    from tqdm import tqdm

    with (
        _open_at(part, start) as file,
        tqdm(total=total, initial=start, desc=source.name, unit="B", unit_scale=True, disable=not progress) as bar,
    ):
        # As received: with a chunk size the client would collect first, and lose that when the connection is cut.
        for chunk in response.iter_bytes():
            _write(file, chunk, part, total)
            bar.update(len(chunk))
        os.fsync(file.fileno())
        end = file.tell()
    if total is not None and end != total:
        if end > total:
            discard(part)
        raise TransientError(f"the body ended at byte {end} of {total}")


def _open_at(part: Path, start: int) -> io.FileIO:
    # Unbuffered, so that a full disk shows where it is handled and not when the file is closed.
    try:
        file = part.open("r+b" if start else "wb", buffering=0)
    except OSError as e:
        raise DownloadError(f"{part} cannot be written: {e.strerror}.") from e
    file.seek(start)
    return file


def _write(file: io.FileIO, chunk: bytes, part: Path, total: int | None) -> None:
    view = memoryview(chunk)
    try:
        while view:
            view = view[file.write(view) :]
    except OSError as e:
        if e.errno not in _DISK_FULL:
            raise DownloadError(f"{part} cannot be written: {e.strerror}.") from e
        fetched = file.tell()
        missing = "an unknown number of" if total is None else str(total - fetched)
        free_bytes = shutil.disk_usage(part.parent).free
        raise DownloadError(
            f"The disk is full: {missing} bytes are still needed at {part.parent}, {free_bytes} are free. The "
            f"{fetched} bytes fetched so far are kept in {part.name}; free some space and run again, and the download "
            "continues."
        ) from e


def _validator_path(part: Path) -> Path:
    return part.with_name(part.name + ".validator")


def _read_validator(part: Path) -> str | None:
    try:
        return _validator_path(part).read_text(encoding="utf-8") or None
    except FileNotFoundError:
        return None


def _write_validator(part: Path, headers: Mapping[str, str]) -> None:
    """Keep what identifies the content, for If-Range. A weak entity tag does not (RFC 9110, 13.1.5)."""
    etag = headers.get("ETag", "")
    validator = etag if etag.startswith('"') else headers.get("Last-Modified", "")
    _validator_path(part).write_text(validator, encoding="utf-8")
