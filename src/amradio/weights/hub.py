"""The Hugging Face hub: addresses, metadata, cache layout, and its errors in our words.

Files are kept in the hub's own cache layout (``models--org--name/{blobs,snapshots,refs}``), so that one copy serves
this package, ``transformers`` and the ``hf`` command alike.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NoReturn
from urllib.parse import unquote, urlsplit

from amradio.errors import DownloadError, GatedRepoError, OptionError
from amradio.weights.transfer import (
    TRANSIENT_STATUS,
    TransientError,
    describe_transport_error,
    http_library,
    retry_after_s,
    with_retries,
)
from amradio.weights.trust import write_atomically

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

DEFAULT_REVISION = "main"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SAFE_ETAG = re.compile(r"[0-9A-Za-z][0-9A-Za-z_.-]*")
_HUB_PATH = re.compile(r"/(?P<repo>[^/]+/[^/]+)/(?:resolve|blob)/(?P<revision>[^/]+)/(?P<filename>.+)")
_NOT_REPOS = ("datasets/", "spaces/", "api/")


class FileNotInRepoError(DownloadError):
    """The repository exists and has no such file at this revision."""


class RevisionNotFoundError(DownloadError):
    """The repository exists and has no such branch, tag or commit."""


@dataclass(frozen=True, kw_only=True)
class HubFile:
    """A file in a model repository.

    Attributes:
        repo: ``organisation/name``.
        filename: Path in the repository, with forward slashes.
        revision: Branch, tag or commit.
    """

    repo: str
    filename: str
    revision: str = DEFAULT_REVISION

    def __post_init__(self) -> None:
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

        try:
            validate_repo_id(self.repo)
        except HFValidationError as e:
            raise OptionError(f"{self.repo!r} is not a Hugging Face repository id (organisation/name): {e}") from e
        for what, value in (("file name", self.filename), ("revision", self.revision)):
            parts = value.replace("\\", "/").split("/")
            if not value or any(p in ("", ".", "..") or ":" in p for p in parts) or "\\" in value:
                raise OptionError(f"{value!r} is not a {what} that can lie inside a Hugging Face repository.")

    @property
    def key(self) -> str:
        """Identifies the file in the trust records, whichever mirror serves it."""
        return f"hub:{self.repo}@{self.revision}/{self.filename}"

    def at(self, revision: str) -> HubFile:
        """The same file at another revision.

        Args:
            revision: Branch, tag or commit.
        """
        return HubFile(repo=self.repo, filename=self.filename, revision=revision)

    def url(self) -> str:
        """Address at the endpoint in use (``HF_ENDPOINT`` names a mirror)."""
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.repo, self.filename, revision=self.revision, endpoint=endpoint())


@dataclass(frozen=True, kw_only=True)
class HubMetadata:
    """What the hub says about a file before it is fetched.

    Attributes:
        commit: Full commit that the revision means now.
        etag: Entity tag; for large files the SHA-256 of the content.
        size: In bytes, if told.
    """

    commit: str
    etag: str
    size: int | None

    @property
    def sha256(self) -> str | None:
        """The announced digest; None for small files, whose tag is a git hash."""
        return self.etag if _SHA256.fullmatch(self.etag) else None


def endpoint() -> str:
    """The hub in use, without a final slash."""
    from huggingface_hub import constants

    return (os.environ.get("HF_ENDPOINT") or str(constants.ENDPOINT)).rstrip("/")


def parse_url(url: str) -> HubFile | None:
    """Recognise the address of a file on the hub.

    Args:
        url: Any URL; the ``resolve`` and the ``blob`` form are understood, a query (``?download=true``) is ignored.

    Returns:
        The file, or None if the address is not one of a model file on the hub or its configured mirror.
    """
    parts = urlsplit(url)
    hosts = {"huggingface.co", "hf.co", urlsplit(endpoint()).netloc.lower()}
    match = _HUB_PATH.fullmatch(parts.path)
    if parts.netloc.lower() not in hosts or match is None or parts.path[1:].startswith(_NOT_REPOS):
        return None
    return HubFile(repo=match["repo"], filename=unquote(match["filename"]), revision=unquote(match["revision"]))


def request_headers(token: str | bool | None) -> dict[str, str]:
    """Headers for the hub, with the token if there is one.

    Args:
        token: A token; None for the one that the machine is logged in with, if any; True to insist on that one; False
            for none.

    Raises:
        OptionError: ``token=True`` and the machine is not logged in.
    """
    from huggingface_hub.errors import LocalTokenNotFoundError
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    try:
        return dict(build_hf_headers(token=token, library_name="amradio"))
    except LocalTokenNotFoundError as e:
        raise OptionError("token=True needs a saved token: run 'hf auth login' or set HF_TOKEN.") from e


def fetch_metadata(file: HubFile, headers: dict[str, str]) -> HubMetadata:
    """Ask the hub about a file.

    Args:
        file: Which.
        headers: From `request_headers`.

    Returns:
        Commit, entity tag and size.

    Raises:
        GatedRepoError: The repository is private or gated.
        FileNotInRepoError: It has no such file.
        RevisionNotFoundError: It has no such revision.
        DownloadError: Anything else, after retries where they can help.
    """
    return with_retries(lambda: _metadata_once(file, headers), what=f"Asking {endpoint()} about {file.repo}")


def _metadata_once(file: HubFile, headers: dict[str, str]) -> HubMetadata:
    from huggingface_hub import get_hf_file_metadata
    from huggingface_hub.errors import HfHubHTTPError

    try:
        found = get_hf_file_metadata(file.url(), token=False, headers=headers, endpoint=endpoint())
    except HfHubHTTPError as e:
        _raise_refusal(file, e, "authorization" in headers)
    except http_library().TransportError as e:
        raise TransientError(describe_transport_error(e)) from e
    if not (_COMMIT.fullmatch(found.commit_hash or "") and _SAFE_ETAG.fullmatch(found.etag or "")):
        raise DownloadError(
            f"{endpoint()} does not answer like a Hugging Face hub: commit {found.commit_hash!r}, entity tag "
            f"{found.etag!r} for {file.filename} of {file.repo}. Check HF_ENDPOINT, the proxy and the firewall."
        )
    return HubMetadata(commit=str(found.commit_hash), etag=str(found.etag), size=found.size)


def _raise_refusal(file: HubFile, error: HfHubHTTPError, token_sent: bool) -> NoReturn:
    """Translate an HTTP error of the hub. Its own text is not repeated: it is long and names the request."""
    from huggingface_hub import errors as hub_errors

    status = error.response.status_code
    where = f"{file.repo} at revision {file.revision!r}"
    if status in TRANSIENT_STATUS:
        raise TransientError(f"the hub answered {status}", retry_after_s(error.response.headers)) from error
    if isinstance(error, hub_errors.RemoteEntryNotFoundError):
        raise FileNotInRepoError(f"{where} has no file {file.filename!r} (HTTP {status}). Check the name.") from error
    if isinstance(error, hub_errors.RevisionNotFoundError):
        raise RevisionNotFoundError(
            f"{file.repo} has no revision {file.revision!r} (HTTP {status}), so {file.filename!r} cannot be fetched. "
            f"Check the branches and commits at {endpoint()}/{file.repo}/commits/main."
        ) from error
    if status in (401, 403):
        raise _gated(file, status, token_sent) from error
    if isinstance(error, hub_errors.RepositoryNotFoundError) or status == 404:
        raise DownloadError(
            f"There is no repository {where} with a file {file.filename!r} at {endpoint()} (HTTP {status}). Check the "
            "spelling; for a private repository a token is needed (token=, HF_TOKEN or 'hf auth login')."
        ) from error
    raise DownloadError(f"{endpoint()} answered {status} for {file.filename!r} of {where}.") from error


def _gated(file: HubFile, status: int, token_sent: bool) -> GatedRepoError:
    sent = "a token was sent, but it does not give access" if token_sent else "no token was sent"
    page = f"{endpoint()}/{file.repo}"
    return GatedRepoError(
        f"{file.repo} refuses {file.filename!r} (HTTP {status}): {sent}. The repository is gated, private or does not "
        "exist.\n"
        f"  1. Open {page} in a browser, log in and, if it asks, accept its conditions.\n"
        f"  2. Make a token with read access at {endpoint()}/settings/tokens.\n"
        "  3. Run 'hf auth login', set HF_TOKEN, or pass token=.\n"
        "A file fetched in the browser can be given by its path instead."
    )


def _folder(root: Path, repo: str) -> Path:
    return root / "--".join(("models", *repo.split("/")))


def blob_path(root: Path, file: HubFile, etag: str) -> Path:
    """Where the content of a file lies in the cache.

    Args:
        root: Cache root.
        file: Which.
        etag: From `HubMetadata`.
    """
    return _folder(root, file.repo) / "blobs" / etag


def snapshot_path(root: Path, file: HubFile, commit: str) -> Path:
    """Where a file of one commit is found by name in the cache.

    Args:
        root: Cache root.
        file: Which.
        commit: Full commit.
    """
    return _folder(root, file.repo) / "snapshots" / commit / PurePosixPath(file.filename)


def find_cached(root: Path, file: HubFile) -> tuple[Path, str] | None:
    """Look a file up in the cache, whoever put it there.

    Args:
        root: Cache root.
        file: Which; a branch or tag means the commit that it meant when it was last asked for.

    Returns:
        Path of the file in its snapshot and its commit, or None.
    """
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(file.repo, file.filename, cache_dir=root, revision=file.revision)
    if not isinstance(found, str):
        return None
    path = Path(found)
    return path, path.relative_to(_folder(root, file.repo) / "snapshots").parts[0]


def announced_sha256(path: Path) -> str | None:
    """The digest that a cached file has in its name: large files are stored under the SHA-256 that the hub announced.

    Args:
        path: In a snapshot.
    """
    name = path.resolve().name
    return name if _SHA256.fullmatch(name) else None


def publish(root: Path, file: HubFile, metadata: HubMetadata) -> Path:
    """Make a fetched blob visible in its snapshot, and remember which commit the revision meant.

    Args:
        root: Cache root.
        file: Which.
        metadata: Its commit and entity tag; the blob exists.

    Returns:
        Path in the snapshot: a relative link to the blob, or the file itself where links cannot be made (Windows).
    """
    blob = blob_path(root, file, metadata.etag)
    path = snapshot_path(root, file, metadata.commit)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # a link to a blob that is gone, or to another one
    try:
        path.symlink_to(os.path.relpath(blob, path.parent))
    except OSError:
        os.replace(blob, path)
    if file.revision != metadata.commit:
        write_atomically(_folder(root, file.repo) / "refs" / file.revision, metadata.commit)
    return path
