"""Trust on first use: what a file's content was when it was first fetched.

The official checkpoints come without published digests. So the first fetch writes one small JSON record for each file,
and every later use must match it, the way ``known_hosts`` works for ssh. The record also remembers the size and the
modification time of the file when its digest was last computed, so that a load of several gigabytes does not hash them
again while both are unchanged. That finds damaged, truncated and replaced files; it is no defence against
someone who can write to the cache, who could rewrite the records as well.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from amradio.errors import IntegrityError

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True, kw_only=True)
class TrustRecord:
    """What is known of one file since its first use.

    Attributes:
        source: Where the file comes from, without credentials.
        sha256: Digest of the content, in hex.
        digest_from: Whether the digest was announced by the hub (and confirmed) or is only our own.
        size: In bytes.
        mtime_ns: Modification time of the cached file when its digest was last computed.
        commit: The hub's full commit hash, None outside the hub.
        etag: The server's entity tag, if it gave one.
        first_use: ISO 8601 time in UTC.
    """

    source: str
    sha256: str
    digest_from: Literal["hub", "computed"]
    size: int
    mtime_ns: int
    commit: str | None = None
    etag: str | None = None
    first_use: str = dataclasses.field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))

    def still_describes(self, path: Path) -> bool:
        """Whether a file has the size and modification time that it had when its digest was computed."""
        stat = path.stat()
        return (stat.st_size, stat.st_mtime_ns) == (self.size, self.mtime_ns)


class TrustStore:
    """The records below one cache root, one file each.

    Args:
        root: Cache root; the records lie in ``amradio/trust`` under it.
    """

    def __init__(self, root: Path) -> None:
        self.directory = root / "amradio" / "trust"

    def path(self, key: str) -> Path:
        """Where the record of a source lies.

        Args:
            key: Identifies the source.

        Returns:
            A path whose name is safe on every file system.
        """
        return self.directory / f"{safe_name(key)}.json"

    def read(self, key: str) -> TrustRecord | None:
        """The record of a source, None before its first use.

        Args:
            key: Identifies the source.

        Raises:
            IntegrityError: There is a record but it cannot be read. It is not taken for "never seen".
        """
        path = self.path(key)
        try:
            return TrustRecord(**json.loads(path.read_text(encoding="utf-8")))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, TypeError) as e:
            raise IntegrityError(
                f"The trust record {path} cannot be read ({e}). It says what {key} contained when it was first "
                "fetched. If you know why it is damaged, delete it: the next fetch then counts as the first one."
            ) from e

    def write(self, key: str, record: TrustRecord) -> None:
        """Keep a record, atomically. A cache that cannot be written (a shared read-only one) is logged, not an error.

        Args:
            key: Identifies the source.
            record: What to keep.
        """
        text = json.dumps(dataclasses.asdict(record), indent=1)
        try:
            write_atomically(self.path(key), text)
        except OSError as e:
            logger.warning("The trust record of %s cannot be written (%s); the next use counts as a first one.", key, e)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Somebody says what a file's digest is.

    Attributes:
        sha256: The digest, in hex.
        by: Who says so, to complete "sha256 ...".
        advice: What a difference means when the file has just been fetched.
    """

    sha256: str
    by: str
    advice: str

    @classmethod
    def asked_for(cls, sha256: str) -> Claim:
        """The caller knows the digest."""
        return cls(
            sha256=sha256.lower(),
            by="was asked for",
            advice="Either the digest belongs to other content or the file is not the one that was meant.",
        )

    @classmethod
    def recorded(cls, record: TrustRecord, path: Path) -> Claim:
        """An earlier use has recorded it."""
        return cls(
            sha256=record.sha256,
            by=f"was recorded at its first use ({record.first_use})",
            advice="It was changed upstream, or the connection is not to be trusted. Nothing was kept. If you know "
            f"that the change is right, delete the record {path} and run again; to go on with the first content, use "
            "a copy of it.",
        )

    @classmethod
    def announced(cls, sha256: str) -> Claim:
        """The hub has announced it."""
        return cls(
            sha256=sha256,
            by="was announced by the hub",
            advice="The transfer was damaged. Nothing was kept; run again.",
        )


def check(found: str, how: str, name: str, claims: Iterable[Claim], advice: str | None = None) -> None:
    """Compare a digest with everything that is said about it.

    Args:
        found: The digest, in hex.
        how: Where it comes from, for the message.
        name: Of the file.
        claims: Who says what.
        advice: What to do, if not what the claim advises.

    Raises:
        IntegrityError: A claim differs; the message names both digests.
    """
    for claim in claims:
        if claim.sha256 != found:
            raise IntegrityError(
                f"{name} is not what it should be: sha256 {found} ({how}), but {claim.sha256} {claim.by}. "
                f"{advice or claim.advice}"
            )


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in hex, read in chunks.

    Args:
        path: Any readable file.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def safe_name(key: str) -> str:
    """A file name for a key: readable, unique by a digest, at most 93 characters, legal on Windows too.

    Args:
        key: Any text.

    Returns:
        Letters, digits, ``.``, ``_`` and ``-`` only.
    """
    return f"{safe_stem(key)}.{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def safe_stem(text: str) -> str:
    """The end of a text, reduced to characters that are legal in file names everywhere.

    Args:
        text: Any text.

    Returns:
        At most 76 letters, digits, ``.``, ``_`` and ``-``; possibly none.
    """
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text)[-76:].strip("-.")


def write_atomically(path: Path, text: str) -> None:
    """Write a small text file so that readers see the old content or the new, never a part.

    Args:
        path: Target; its directory is made.
        text: Content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
