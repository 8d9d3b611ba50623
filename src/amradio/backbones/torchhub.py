"""Entries of a ``hubconf.py`` as backbones.

Such an entry is code of somebody else, which is executed with all rights of the user. It runs only if the caller says
``trust_remote_code=True``, be it from GitHub or from a local folder. Official DINO, DINOv2 and RADIO weights need
none of it: they are loaded by their names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from amradio.backbones.callables import CallableBackbone
from amradio.backbones.protocol import Backbone
from amradio.errors import CapabilityError, DownloadError, MissingDependencyError, OptionError, UnknownModelError
from amradio.hub import HubOptions
from amradio.weights.checkpoint import Identity
from amradio.weights.dino_catalog import DINO_MODELS

LAYOUT = "torchhub"


def load_torchhub(
    name: str,
    *,
    hub: HubOptions | None = None,
    trust_remote_code: bool = False,
    entry_options: Mapping[str, Any] | None = None,
    patch_size: int | None = None,
    min_resolution_step: int | None = None,
    preferred_resolution: Sequence[int] | None = None,
    num_prefix_tokens: int = 0,
    map_fmt: str = "NCHW",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:
    """Load an entry of a repository or folder with a ``hubconf.py``.

    The module is called with images and read as `CallableBackbone` says; one with a ``forward_features`` that returns
    DINOv2's dict is called through that. A backbone is taken as it is.

    Args:
        name: ``OWNER/REPO:ENTRY``, ``OWNER/REPO:BRANCH:ENTRY`` or ``FOLDER:ENTRY``.
        hub: Where downloads are kept and whether they are allowed.
        trust_remote_code: Whether the code of the repository or folder may be executed.
        entry_options: Keyword arguments of the entry, such as ``{"pretrained": False}``.
        patch_size: See `CallableBackbone`; default the module's own.
        min_resolution_step: See `CallableBackbone`.
        preferred_resolution: See `CallableBackbone`.
        num_prefix_tokens: See `CallableBackbone`.
        map_fmt: See `CallableBackbone`.
        mean: See `CallableBackbone`. Nearly every such model needs it.
        std: See `CallableBackbone`.

    Returns:
        The backbone.

    Raises:
        OptionError: `trust_remote_code` is not given, or an option does not apply.
        UnknownModelError: There is no such folder or entry.
        CapabilityError: The entry does not return a module, or one that cannot be seen as a backbone.
        DownloadError: The repository cannot be fetched.
    """
    hub = hub or HubOptions()
    place, colon, entry = name.rpartition(":")
    if not (colon and place and entry):
        raise UnknownModelError(
            f"'torchhub:{name}' names no entry: write torchhub:OWNER/REPO:ENTRY or torchhub:FOLDER:ENTRY."
        )
    if not trust_remote_code:
        native = f" The same weights are loaded without it by the name {entry!r}." if entry in DINO_MODELS else ""
        raise OptionError(
            f"torchhub:{name} executes the hubconf.py of {place} with all your rights. Pass trust_remote_code=True if "
            f"you trust it.{native}"
        )
    for option in ("token", "revision", "cache_dir"):
        if getattr(hub, option) is not None:
            raise OptionError(
                f"torch.hub takes no {option}=. A branch or tag is written OWNER/REPO:BRANCH:ENTRY, downloads are kept "
                f"where the environment variable TORCH_HOME says."
            )
    module = _called(place, entry, dict(entry_options or {}), hub)
    identity = Identity(source=f"torchhub:{name}", layout=LAYOUT)
    if isinstance(module, Backbone):
        return module  # type: ignore[return-value]
    if not isinstance(module, nn.Module):
        raise CapabilityError(f"torchhub:{name} returned a {type(module).__name__} and not a torch.nn.Module.")
    return CallableBackbone(
        _ForwardFeatures(module) if _has_dino_features(module) else module,
        patch_size=patch_size,
        min_resolution_step=min_resolution_step,
        preferred_resolution=preferred_resolution,
        num_prefix_tokens=num_prefix_tokens,
        map_fmt=map_fmt,
        mean=mean,
        std=std,
        name=identity.source,
        identity=identity,
    )


class _ForwardFeatures(nn.Module):
    """A DINOv2 type module, called through ``forward_features``."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module
        self.patch_size = module.patch_size

    def forward(self, images: torch.Tensor) -> Any:
        return self.module.forward_features(images)


def _has_dino_features(module: nn.Module) -> bool:
    """Whether a module is of the DINOv2 type, by what it calls its parts."""
    return callable(getattr(module, "forward_features", None)) and hasattr(module, "num_register_tokens")


def _called(place: str, entry: str, options: dict[str, Any], hub: HubOptions) -> Any:
    folder = Path(place).expanduser()
    local = folder.is_dir()
    if not local and place.startswith((".", "/", "~")):
        raise UnknownModelError(f"There is no folder {place}.")
    if not local and hub.offline_reason:
        raise DownloadError(f"{place} would be fetched from GitHub, and {hub.offline_reason}. Give a local folder.")
    try:
        if local:
            return torch.hub.load(str(folder), entry, source="local", **options)
        return torch.hub.load(place, entry, source="github", trust_repo=True, verbose=hub.progress, **options)
    except FileNotFoundError as e:
        raise UnknownModelError(f"{place} has no hubconf.py that can be read: {e}.") from e
    except OSError as e:
        raise DownloadError(f"torchhub:{place}:{entry} cannot be fetched: {e}") from e
    except RuntimeError as e:
        if "Cannot find callable" in str(e):
            raise UnknownModelError(f"The hubconf.py of {place} has no entry {entry!r}.") from e
        if "Missing dependencies" in str(e):
            raise MissingDependencyError(
                f"The hubconf.py of {place} needs packages that are not installed: {e}."
            ) from e
        raise
