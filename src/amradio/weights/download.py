"""Fetch weight files: from the Hugging Face hub or any http(s) address, once, and the same bytes ever after.

The first fetch of a file records its digest and, on the hub, its commit (`amradio.weights.trust`). From then on the
name means that content: while the file is in the cache no server is asked, and when it has to be fetched again it must
match. Cache root: ``cache_dir``, else the environment variable ``AMRADIO_CACHE``, else the Hugging Face cache
(``HF_HUB_CACHE``, ``HF_HOME``).
Offline mode: ``local_files_only``, ``AMRADIO_OFFLINE`` or ``HF_HUB_OFFLINE``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from amradio.errors import DownloadError, IntegrityError, OfflineError, OptionError
from amradio.hub import cache_root, offline_reason
from amradio.weights import hub
from amradio.weights.cache import locked, make_directory
from amradio.weights.transfer import Source, discard, public_url, transfer
from amradio.weights.trust import Claim, TrustRecord, TrustStore, check, safe_name, safe_stem, sha256_of


@dataclass(frozen=True, kw_only=True)
class FetchedFile:
    """A file on this machine, with its content checked.

    Attributes:
        path: Where it lies. On the hub this is the path in the snapshot, beside the other files of the commit.
        sha256: Digest of the content, in hex.
        source: Where it comes from, without credentials.
        size: In bytes.
        revision: Full commit on the hub; None for other addresses.
        etag: The server's entity tag, if it gave one.
        from_cache: Whether nothing had to be fetched.
    """

    path: Path
    sha256: str
    source: str
    size: int
    revision: str | None = None
    etag: str | None = None
    from_cache: bool


def fetch_url(
    url: str,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    progress: bool = True,
    sha256: str | None = None,
) -> FetchedFile:
    """Fetch the file at an address, or find it in the cache.

    Addresses on the hub are treated as `fetch_hub_file` does. Others are stored as they are.

    Args:
        url: ``https://`` or ``http://``; no user name or password in it.
        cache_dir: Cache root; see the module's documentation for the default.
        token: For the hub only; see `fetch_hub_file`. It is never sent anywhere else.
        revision: For the hub only: overrides the revision in the address.
        local_files_only: Fetch nothing.
        progress: Whether to show a progress bar.
        sha256: Digest that the file must have, if known.

    Returns:
        The file, its content checked.

    Raises:
        IntegrityError: The content is not what was recorded, announced or asked for.
        OfflineError: It is not in the cache and may not be fetched.
        GatedRepoError: The hub wants a login.
        DownloadError: It cannot be fetched.
        OptionError: The address is not one, or an option does not apply to it.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise OptionError(f"{public_url(url)!r} is not an http(s) address.")
    if parts.username or parts.password:
        raise OptionError(
            f"The address of {public_url(url)} contains a user name or password, which would end up in logs. Fetch the "
            "file by other means and give its path."
        )
    file = hub.parse_url(url)
    if file is not None:
        return fetch_hub_file(
            file.repo, file.filename, revision=revision or file.revision, token=token, cache_dir=cache_dir,
            local_files_only=local_files_only, progress=progress, sha256=sha256,
        )  # fmt: skip
    if token or revision:
        raise OptionError(f"token= and revision= are for the Hugging Face hub, and {public_url(url)} is not on it.")
    return _fetch_plain(url, cache_root(cache_dir), offline_reason(local_files_only), progress, sha256)


def fetch_hub_file(
    repo: str,
    filename: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    progress: bool = True,
    sha256: str | None = None,
) -> FetchedFile:
    """Fetch one file of a model repository on the hub, or find it in the cache.

    Args:
        repo: ``organisation/name``.
        filename: Path in the repository.
        revision: Branch, tag or commit; None for ``main``.
        token: Access token; None for the one that the machine is logged in with, False for none.
        cache_dir: Cache root; see the module's documentation for the default.
        local_files_only: Fetch nothing.
        progress: Whether to show a progress bar.
        sha256: Digest that the file must have, if known.

    Returns:
        The file, its content checked.

    Raises:
        IntegrityError: The content is not what was recorded, announced or asked for.
        OfflineError: It is not in the cache and may not be fetched.
        GatedRepoError: The hub wants a login.
        DownloadError: It cannot be fetched.
    """
    file = hub.HubFile(repo=repo, filename=filename, revision=revision or hub.DEFAULT_REVISION)
    root, offline = cache_root(cache_dir), offline_reason(local_files_only)
    trusted = _Trusted(TrustStore(root), file.key, sha256)
    # What has been used before stays what it was: a branch that has moved since does not change what the name means.
    record = trusted.record
    pinned = file.at(record.commit) if record is not None and record.commit is not None else file
    found = hub.find_cached(root, pinned)
    if found is not None and (record is not None or offline):
        path, commit = found
        return trusted.accept(
            path, source=file.at(commit).url(), commit=commit, announced=None if record else hub.announced_sha256(path)
        )
    if offline is not None:
        raise OfflineError(
            f"{file.filename!r} of {repo} at revision {pinned.revision!r} is not in the cache, and {offline}. Looked "
            f"in {hub.snapshot_path(root, file, pinned.revision).parent}. Fetch it once with a connection, or give the "
            "path of a file."
        )
    headers = hub.request_headers(token)
    try:
        metadata = hub.fetch_metadata(pinned, headers)
    except hub.RevisionNotFoundError:
        if pinned == file:
            raise
        metadata = hub.fetch_metadata(file, headers)  # history was rewritten; the record still decides on the content
    return _fetch_from_hub(file, metadata, headers, root, progress, sha256)


def fetch_hub_model(
    repo: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    progress: bool = True,
) -> Path:
    """Fetch ``config.json`` and the safetensors of a model repository, all of one commit.

    Args:
        repo: ``organisation/name``.
        revision: Branch, tag or commit; None for ``main``.
        token: Access token; None for the one that the machine is logged in with, False for none.
        cache_dir: Cache root; see the module's documentation for the default.
        local_files_only: Fetch nothing.
        progress: Whether to show progress bars.

    Returns:
        The directory of the snapshot. It holds ``config.json`` and ``model.safetensors``, or
        ``model.safetensors.index.json`` and the shards that it names; possibly other files that other programs fetched.

    Raises:
        DownloadError: As for `fetch_hub_file`, or the repository has no safetensors.
    """

    def get(filename: str, at: str | None) -> FetchedFile:
        return fetch_hub_file(
            repo, filename, revision=at, token=token, cache_dir=cache_dir, local_files_only=local_files_only,
            progress=progress,
        )  # fmt: skip

    config = get("config.json", revision)
    commit = config.revision
    try:
        get("model.safetensors", commit)
    except (hub.FileNotInRepoError, OfflineError) as single_file_error:
        try:
            index = get("model.safetensors.index.json", commit)
        except (hub.FileNotInRepoError, OfflineError) as e:
            if isinstance(e, OfflineError):
                raise single_file_error from None
            raise DownloadError(
                f"{repo} at commit {commit} has neither 'model.safetensors' nor 'model.safetensors.index.json'. "
                "Pickled weights (pytorch_model.bin) are not read from repositories."
            ) from e
        for shard in _shards(index.path):
            get(shard, commit)
    return config.path.parent


def _shards(index: Path) -> list[str]:
    """File names in a safetensors index, each once; from outside, so only names in the same directory are allowed."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise DownloadError(f"{index} is not an index of safetensors shards: {type(e).__name__}: {e}.") from e
    wrong = [n for n in names if not isinstance(n, str) or not n.endswith(".safetensors") or "/" in n or "\\" in n]
    if wrong or not names:
        raise DownloadError(f"{index} names {wrong or 'no shards'}; only '*.safetensors' beside it are allowed.")
    return names


class _Trusted:
    """What is said about the digest of one file, and the record kept of it.

    Args:
        store: Records of the cache.
        key: Of the file.
        sha256: Digest that the caller asks for.
    """

    def __init__(self, store: TrustStore, key: str, sha256: str | None) -> None:
        self.store, self.key = store, key
        self.record = store.read(key)
        self.claims = [] if sha256 is None else [Claim.asked_for(sha256)]
        if self.record is not None:
            self.claims.append(Claim.recorded(self.record, store.path(key)))

    def accept(
        self, path: Path, *, source: str, commit: str | None = None, etag: str | None = None,
        announced: str | None = None,
    ) -> FetchedFile:  # fmt: skip
        """Check a file that is in the cache, without hashing it again if it has not been touched since."""
        record = self.record
        untouched = record is not None and record.still_describes(path)
        digest = record.sha256 if record is not None and untouched else sha256_of(path)
        claims = [*self.claims, *([] if announced is None else [Claim.announced(announced)])]
        advice = f"Delete {path.resolve()} and run again to fetch it anew."
        check(digest, f"in the cache at {path}", source, claims, advice)
        return self.keep(path, digest, source=source, commit=commit, etag=etag, announced=announced, from_cache=True)

    def keep(
        self, path: Path, digest: str, *, source: str, commit: str | None = None, etag: str | None = None,
        announced: str | None = None, from_cache: bool = False,
    ) -> FetchedFile:  # fmt: skip
        """Record a file that has been checked; the record of its first use stays the record."""
        stat = path.stat()
        first = self.record or TrustRecord(
            source=source, sha256=digest, digest_from="hub" if announced else "computed", size=stat.st_size,
            mtime_ns=stat.st_mtime_ns, commit=commit, etag=etag,
        )  # fmt: skip
        # The same content may be found under another commit, once history has been rewritten.
        record = dataclasses.replace(first, mtime_ns=stat.st_mtime_ns, commit=commit or first.commit)
        if record != self.record:
            self.store.write(self.key, record)
        return FetchedFile(
            path=path, sha256=digest, source=record.source, size=record.size, revision=record.commit, etag=record.etag,
            from_cache=from_cache,
        )  # fmt: skip


def _fetch_from_hub(
    file: hub.HubFile,
    metadata: hub.HubMetadata,
    headers: dict[str, str],
    root: Path,
    progress: bool,
    sha256: str | None,
) -> FetchedFile:
    source = Source(
        url=file.at(metadata.commit).url(), name=f"{file.repo}/{file.filename}", headers=headers, size=metadata.size,
        immutable=True,
    )  # fmt: skip
    announced = metadata.sha256
    blob = hub.blob_path(root, file, metadata.etag)
    path = hub.snapshot_path(root, file, metadata.commit)
    with locked(root, f"{file.repo}-{metadata.etag}"):
        trusted = _Trusted(TrustStore(root), file.key, sha256)  # read now: another process may have been first
        if announced is not None:  # refuse before fetching gigabytes
            check(announced, f"announced by {hub.endpoint()}", source.name, trusted.claims)
        if not path.exists() and blob.exists():
            hub.publish(root, file, metadata)
        if path.exists():
            return trusted.accept(
                path, source=source.url, commit=metadata.commit, etag=metadata.etag, announced=announced
            )
        claims = [*trusted.claims, *([] if announced is None else [Claim.announced(announced)])]
        digest, _ = _transfer_checked(source, blob, root, claims, progress)
        hub.publish(root, file, metadata)
        return trusted.keep(
            path, digest, source=source.url, commit=metadata.commit, etag=metadata.etag, announced=announced
        )


def _fetch_plain(url: str, root: Path, offline: str | None, progress: bool, sha256: str | None) -> FetchedFile:
    source = public_url(url)
    name = safe_stem(unquote(urlsplit(url).path).rpartition("/")[2]) or "file"
    identity = hashlib.sha256(url.encode()).hexdigest()[:16]  # the query tells files apart, but may hold secrets
    key = f"url:{source}#{identity}"
    target = root / "amradio" / "files" / identity / name
    trusted = _Trusted(TrustStore(root), key, sha256)
    if target.exists() and (trusted.record is not None or offline):
        return trusted.accept(target, source=source)
    if offline is not None:
        raise OfflineError(
            f"{source} is not in the cache, and {offline}. Looked for {target}. Fetch it once with a connection, or "
            "give the path of a file."
        )
    with locked(root, key):
        trusted = _Trusted(TrustStore(root), key, sha256)  # read again: another process may have been first
        if target.exists() and trusted.record is not None:
            return trusted.accept(target, source=source)
        digest, etag = _transfer_checked(Source(url=url, name=name), target, root, trusted.claims, progress)
        return trusted.keep(target, digest, source=source, etag=etag)


def _transfer_checked(
    source: Source, target: Path, root: Path, claims: Iterable[Claim], progress: bool
) -> tuple[str, str | None]:
    """Fetch into a partial file, check it, move it to its place. Returns the digest and the entity tag."""
    part = root / "amradio" / "partial" / f"{safe_name(target.relative_to(root).as_posix())}.part"
    resumed = part.exists()
    etag = transfer(source, part, progress=progress)
    digest = sha256_of(part)
    try:
        check(digest, "fetched", source.name, claims)
    except IntegrityError:
        discard(part)
        if not resumed:
            raise
        # The part left by an earlier run may have been the damaged one: one more try, from the beginning.
        return _transfer_checked(source, target, root, claims, progress)
    make_directory(target.parent)
    os.replace(part, target)
    discard(part)
    return digest, etag
