"""Where downloads are kept, and whether the network may be used: the rules that weights and text towers share."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_TRUE = frozenset({"1", "ON", "YES", "TRUE"})
_OFFLINE_VARIABLES = ("AMRADIO_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


@dataclass(frozen=True, kw_only=True)
class HubOptions:
    """How to reach the places that files come from.

    Attributes:
        token: Access token for gated or private repositories; None uses the one that is logged in.
        revision: Branch, tag or commit; None is the catalog's pin or the default branch.
        cache_dir: Where downloads are kept; see `cache_root`.
        local_files_only: Use only what is already in the cache.
        progress: Whether to show a progress bar.
    """

    token: str | bool | None = None
    revision: str | None = None
    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool = False
    progress: bool = True

    @property
    def offline_reason(self) -> str | None:
        """Why nothing may be fetched, None if it may."""
        return offline_reason(self.local_files_only)

    @property
    def cache_root(self) -> Path:
        """The directory below which downloads are kept."""
        return cache_root(self.cache_dir)


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
    for name in _OFFLINE_VARIABLES:
        if os.environ.get(name, "").upper() in _TRUE:
            return f"{name} is set"
    return "huggingface_hub is in offline mode" if constants.HF_HUB_OFFLINE else None
