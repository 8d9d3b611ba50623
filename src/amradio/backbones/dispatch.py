"""`load_backbone`: any backbone from one string, or from a callable."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from amradio.backbones.callables import CallableBackbone
from amradio.backbones.load import load
from amradio.backbones.locate import find_entry
from amradio.backbones.protocol import Backbone
from amradio.errors import CapabilityError, OptionError, UnknownModelError, nearest_names
from amradio.hub import HubOptions
from amradio.weights.catalog import entries


class _Kind(NamedTuple):
    """A way to make a backbone.

    Attributes:
        make: Takes what follows the prefix, ``hub`` and its own options.
        form: How it is written, for people.
    """

    make: Callable[..., nn.Module]
    form: str


def load_backbone(
    spec: str | os.PathLike[str] | Callable[..., Any] = "",
    *,
    adaptor: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    progress: bool = True,
    **options: Any,
) -> Backbone:
    """Load any backbone in evaluation mode, without gradients for its parameters.

    Args:
        spec: What to load:

            - a RADIO name, path, URL or repository, as for `amradio.load`; ``radio:NAME`` says so explicitly;
            - a callable or module: see `amradio.backbones.callables.CallableBackbone` for the options. A backbone is
              taken as it is.
        adaptor: For RADIO: the adaptor whose summary and features are wanted, instead of the backbone's.
        device: Where to put it.
        dtype: What to cast it to; default as published.
        token: Hugging Face access token; None uses the one that is logged in.
        revision: Branch, tag or commit of a Hugging Face repository.
        cache_dir: Where downloads are kept.
        local_files_only: Never use the network.
        progress: Whether to show a progress bar while downloading.
        **options: What only this kind of backbone knows.

    Returns:
        The backbone, a `torch.nn.Module`.

    Raises:
        UnknownModelError: There is no such backbone; the nearest names and all forms are listed.
        OptionError: This kind of backbone has no such option.
        MissingDependencyError: It needs an optional package; the message names the extra.
        DownloadError: It cannot be fetched.
    """
    hub = HubOptions(
        token=token, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only, progress=progress
    )
    with torch.inference_mode(False):  # parameters made inside inference mode could never take part in training
        if callable(spec):
            return _from_callable(spec, adaptor, device, dtype, options)
        kind, name, make = _find(os.fspath(spec))
        if kind != "radio" and adaptor is not None:
            raise OptionError(f"adaptor={adaptor!r} is for RADIO models; {os.fspath(spec)!r} has no adaptors.")
        if kind == "radio":
            return cast(Backbone, _load_radio(name, hub, adaptor, device, dtype, options))
        _check_options(make, options, os.fspath(spec))
        return cast(Backbone, make(name, hub=hub, **options).eval().requires_grad_(False).to(device=device, dtype=dtype))


_KINDS: Mapping[str, _Kind] = {}
