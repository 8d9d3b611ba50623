"""Fetch the files of a text tower from the Hugging Face hub, with errors in our words."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from amradio.errors import DownloadError, GatedRepoError, OfflineError
from amradio.hub import HubOptions

# Configuration and tokenizer. Python files are never fetched, so no repository can bring code along.
_DESCRIPTION = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
)


def _arguments(options: HubOptions) -> dict[str, Any]:
    """Keyword arguments of ``huggingface_hub`` functions."""
    return {
        "token": options.token,
        "revision": options.revision,
        "cache_dir": str(options.cache_root),
        "local_files_only": options.offline_reason is not None,
    }


def fetch_description(repo: str, options: HubOptions, also: Sequence[str] = ()) -> Path:
    """Fetch configuration and tokenizer of a repository.

    Args:
        repo: ``organisation/name``.
        options: How to ask.
        also: Names of other small files that are wanted where the repository has them.

    Returns:
        The directory with the files; its name is the commit.

    Raises:
        DownloadError: They cannot be had; see `translated_errors`.
    """
    from huggingface_hub import snapshot_download

    with translated_errors(repo, options):
        directory = Path(snapshot_download(repo, allow_patterns=[*_DESCRIPTION, *also], **_arguments(options)))
    if not (directory / "config.json").is_file():  # without a connection the hub client returns what the cache has
        if options.offline_reason:
            raise _offline(repo, "the configuration", options)
        raise DownloadError(
            f"{repo} has no config.json that could be fetched: it is not a repository in the layout of transformers."
        )
    return directory


def fetch_first(repo: str, filenames: Sequence[str], options: HubOptions) -> Path:
    """Fetch the first of several files that a repository has.

    Args:
        repo: ``organisation/name``.
        filenames: Candidates, the preferred one first.
        options: How to ask.

    Returns:
        Path of the file.

    Raises:
        DownloadError: None of them can be had; see `translated_errors`.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

    for filename in filenames:
        with translated_errors(repo, options, filename):
            try:
                return Path(hf_hub_download(repo, filename, **_arguments(options)))
            except RemoteEntryNotFoundError:
                continue
            except LocalEntryNotFoundError:
                if options.offline_reason is None:
                    raise
    if options.offline_reason:
        raise _offline(repo, " or ".join(filenames), options)
    raise DownloadError(f"{repo} has none of the weight files {', '.join(filenames)}.")


@contextlib.contextmanager
def translated_errors(repo: str, options: HubOptions, what: str = "the configuration") -> Iterator[None]:
    """Turn errors of ``huggingface_hub`` (and what was raised because of them) into ours.

    Args:
        repo: Repository or library entry that is being fetched.
        options: How the hub is asked.
        what: What is being fetched, for the message.

    Raises:
        GatedRepoError: The owners' licence must be accepted first.
        OfflineError: It is not in the cache and nothing may be fetched.
        DownloadError: Anything else that went wrong on the way.
    """
    from huggingface_hub import errors

    try:
        yield
    except (DownloadError, errors.RemoteEntryNotFoundError):
        raise
    except Exception as e:
        chain = list(_chain(e))
        if any(isinstance(c, errors.GatedRepoError) for c in chain):
            raise GatedRepoError(
                f"{repo} is gated: its owners ask for an accepted licence. Accept it on https://huggingface.co/{repo}, "
                f"then log in (`hf auth login`) or pass token=."
            ) from e
        if any(isinstance(c, errors.RevisionNotFoundError) for c in chain):
            raise DownloadError(
                f"{repo} has no revision {options.revision!r}: name a branch, a tag or a commit of it."
            ) from e
        if any(isinstance(c, errors.RepositoryNotFoundError) for c in chain):
            raise DownloadError(
                f"There is no repository {repo} on the Hugging Face hub, or it is private and the token has no access. "
                "Check the name, log in (`hf auth login`) or pass token=."
            ) from e
        if options.offline_reason and any(
            isinstance(c, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)) for c in chain
        ):
            raise _offline(repo, what, options) from e
        if any(isinstance(c, (OSError, errors.HfHubHTTPError, errors.LocalEntryNotFoundError)) for c in chain):
            raise DownloadError(
                f"Fetching {what} of {repo} failed: {str(chain[-1]) or type(chain[-1]).__name__}"
            ) from e
        raise


def _offline(repo: str, what: str, options: HubOptions) -> OfflineError:
    return OfflineError(
        f"There is no copy of {what} of {repo} in the cache ({options.cache_root}), and "
        f"{options.offline_reason}. "
        f"Fetch it once with a connection (`hf download {repo}`), or give the path of a local directory instead."
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__
