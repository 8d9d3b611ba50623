"""`load`: a RADIO model from a name, a file or a directory, in one call."""

from __future__ import annotations

import dataclasses
import functools
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from amradio.backbones.locate import Located, find_entry, locate
from amradio.errors import OptionError
from amradio.hub import HubOptions
from amradio.models.adaptors import Adaptor
from amradio.models.configs import PositionInterpolation, RadioConfig, Resolution, ViTConfig
from amradio.models.radio import Compat, RadioModel
from amradio.text.towers import has_text_side, load_text_tower
from amradio.weights.args import with_listed_positions
from amradio.weights.catalog import CatalogEntry
from amradio.weights.checkpoint import Checkpoint, KeyReport, build_model
from amradio.weights.layouts import read_checkpoint

InterpolationChoice = PositionInterpolation | Literal["published", "torch_hub"]


class NonCommercialWarning(UserWarning):
    """The licence of the loaded weights does not allow commercial use."""


class PortabilityWarning(UserWarning):
    """The device cannot run what was asked for as asked; the message says what is done instead."""


_licence_said: set[str] = set()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Overrides:
    """What to assume of a checkpoint, in place of what its file or the catalog says; None assumes nothing.

    Attributes:
        patch_size: Pixels.
        max_resolution: Pixels.
        preferred_resolution: (height, width) in pixels.
        vitdet_num_windowed: Windowed blocks between two global ones.
        vitdet_num_global: Number of global blocks.
        supports_vitdet: Whether windows may be switched on.
    """

    patch_size: int | None = None
    max_resolution: int | None = None
    preferred_resolution: Sequence[int] | None = None
    vitdet_num_windowed: int | None = None
    vitdet_num_global: int | None = None
    supports_vitdet: bool | None = None

    def given(self) -> dict[str, Any]:
        """The fields that are set, in the types of `RadioConfig`."""
        given = {k: v for k, v in vars(self).items() if v is not None}
        if "preferred_resolution" in given:
            size = tuple(given["preferred_resolution"])
            if len(size) != 2:
                raise OptionError(f"preferred_resolution must be (height, width), got {size}.")
            given["preferred_resolution"] = Resolution(*size)
        for name, least in (("patch_size", 1), ("vitdet_num_windowed", 0), ("vitdet_num_global", 1)):
            if name in given and given[name] < least:
                raise OptionError(f"{name} must be at least {least}, got {given[name]}.")
        return given


def load(
    version_or_path: str | os.PathLike[str] = "",
    adaptors: str | Sequence[str] | None = None,
    *,
    vitdet_window_size: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    position_interpolation: InterpolationChoice | None = None,
    strict: bool = True,
    patch_size: int | None = None,
    max_resolution: int | None = None,
    preferred_resolution: Sequence[int] | None = None,
    vitdet_num_windowed: int | None = None,
    vitdet_num_global: int | None = None,
    supports_vitdet: bool | None = None,
    compat: Compat = None,
    token: str | bool | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    progress: bool = True,
) -> RadioModel:
    """Load a RADIO model in evaluation mode.

    Args:
        version_or_path: A version key such as ``c-radio_v4-h``, a Hugging Face repository, a URL, or a file or
            directory in any layout that amradio reads. The empty string is the default version.
        adaptors: Names of the adaptors (teachers) to load besides the backbone.
        vitdet_window_size: Side in patches of ViTDet attention windows; None for global attention.
        device: Where to put the model.
        dtype: What to cast it to; default as published.
        position_interpolation: How the position grid is resized: ``half_pixel``, ``align_corners``, ``published`` (as
            when the published weights were evaluated) or ``torch_hub`` (as the official code does today, the default).
        strict: Whether a missing or unexpected tensor is an error; otherwise a warning names it.
        patch_size: Describes a checkpoint given by path: patch size in pixels.
        max_resolution: Describes a checkpoint given by path: largest recommended side in pixels.
        preferred_resolution: Describes a checkpoint given by path: (height, width) in pixels.
        vitdet_num_windowed: Describes a checkpoint given by path: windowed blocks between two global ones.
        vitdet_num_global: Describes a checkpoint given by path: number of global blocks.
        supports_vitdet: Describes a checkpoint given by path: whether windows may be switched on.
        compat: ``"official"`` reproduces numbers that the official code gets wrong; see the compatibility page of the
            docs.
        token: Hugging Face access token; None uses the one that is logged in.
        revision: Branch, tag or commit of a Hugging Face repository.
        cache_dir: Where downloads are kept.
        local_files_only: Never use the network.
        progress: Whether to show a progress bar while downloading.

    Returns:
        The model.

    Raises:
        UnknownModelError: No published model, file or directory has this name; the nearest names are listed.
        UnknownAdaptorError: The checkpoint has no such adaptor; the known ones are listed.
        OptionError: An option does not fit the model; where the catalog knows, before anything is downloaded.
        CheckpointError: The checkpoint is unsafe, damaged, or does not fit its own description.
        DownloadError: It cannot be fetched.
    """
    overrides = Overrides(
        patch_size=patch_size,
        max_resolution=max_resolution,
        preferred_resolution=preferred_resolution,
        vitdet_num_windowed=vitdet_num_windowed,
        vitdet_num_global=vitdet_num_global,
        supports_vitdet=supports_vitdet,
    )
    hub = HubOptions(
        token=token, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only, progress=progress
    )
    with torch.inference_mode(False):  # parameters made inside inference mode could never take part in training
        model, report = load_with_report(
            os.fspath(version_or_path),
            [adaptors] if isinstance(adaptors, str) else list(adaptors or ()),
            vitdet_window_size=vitdet_window_size,
            position_interpolation=position_interpolation,
            strict=strict,
            overrides=overrides,
            compat=compat,
            hub=hub,
        )
        if report:
            warnings.warn(report.describe(model.identity.source), stacklevel=2)
        return _placed(model, device, dtype)


def load_with_report(
    name: str,
    adaptors: Sequence[str],
    *,
    vitdet_window_size: int | None,
    position_interpolation: InterpolationChoice | None,
    strict: bool,
    overrides: Overrides,
    compat: Compat,
    hub: HubOptions,
) -> tuple[RadioModel, KeyReport]:
    """As `load`, but returns missing and unexpected tensors instead of warning of them.

    Args:
        name: See `load`.
        adaptors: See `load`.
        vitdet_window_size: See `load`.
        position_interpolation: See `load`.
        strict: See `load`.
        overrides: What to assume of the checkpoint.
        compat: See `load`.
        hub: How to reach the hub.

    Returns:
        The model on the CPU in its published dtype, and the key report.
    """
    entry = find_entry(name)
    if entry is not None:
        _check_vitdet(
            vitdet_window_size, overrides.given().get("supports_vitdet", entry.supports_vitdet), entry.version
        )
    located = locate(name, with_adaptors=bool(adaptors), hub=hub)
    checkpoint = read_located(located, overrides, position_interpolation)
    _check_vitdet(vitdet_window_size, checkpoint.config.supports_vitdet, name)
    if compat == "official":
        checkpoint = dataclasses.replace(checkpoint, config=with_listed_positions(checkpoint.config))
    model, report = build_model(checkpoint, adaptors, strict=strict, compat=compat)
    if vitdet_window_size is not None:
        model.set_vitdet(vitdet_window_size)
    attach_text(model, hub)
    if located.entry is not None:
        say_licence(located.entry)
    return model, report


def read_located(
    located: Located, overrides: Overrides | None = None, interpolation: InterpolationChoice | None = None
) -> Checkpoint:
    """Read a checkpoint, with all that its file, the catalog and the caller know of it.

    Args:
        located: Where it is, and which published model it is.
        overrides: What the caller says; wins.
        interpolation: The caller's choice of position interpolation.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: It is unsafe, damaged or in no known layout.
        OptionError: What the caller says does not fit.
    """
    checkpoint = read_checkpoint(located.path)
    config = configured(checkpoint.config, located.entry, overrides or Overrides(), interpolation)
    return dataclasses.replace(checkpoint, config=config, identity=_identity(checkpoint, located))


def configured(
    config: RadioConfig,
    entry: CatalogEntry | None,
    overrides: Overrides,
    interpolation: InterpolationChoice | None = None,
) -> RadioConfig:
    """Complete a checkpoint's description by what the catalog and the caller know.

    Args:
        config: As read from the file.
        entry: The published model that it is, if known.
        overrides: What the caller says; wins.
        interpolation: The caller's choice of position interpolation.

    Returns:
        The completed description.
    """
    known: dict[str, Any] = {}
    if entry is not None:
        known = {
            "version": entry.version,
            "patch_size": entry.patch_size,
            "max_resolution": entry.max_resolution,
            "preferred_resolution": entry.preferred_resolution,
            "supports_vitdet": entry.supports_vitdet,
            "vitdet_num_windowed": entry.vitdet_num_windowed,
            "vitdet_num_global": entry.vitdet_num_global,
            "position_interpolation": entry.position_interpolation_torch_hub,
        }
        known = {k: v for k, v in known.items() if v is not None}  # what the catalog does not know, the file may
    known |= overrides.given()
    if interpolation in ("published", "torch_hub"):
        if entry is None:
            raise OptionError(
                f"position_interpolation={interpolation!r} needs a model loaded by its published name; for a file "
                f"choose "
                f"'half_pixel' or 'align_corners'."
            )
        published = interpolation == "published"
        interpolation = entry.position_interpolation_published if published else entry.position_interpolation_torch_hub
    if interpolation is not None:
        if interpolation not in ("half_pixel", "align_corners"):
            raise OptionError(
                f"position_interpolation must be 'half_pixel', 'align_corners', 'published' or 'torch_hub', got "
                f"{interpolation!r}."
            )
        known["position_interpolation"] = interpolation
    trunk = config.backbone.patch_size if isinstance(config.backbone, ViTConfig) else None
    if trunk is not None and known.get("patch_size", trunk) != trunk:
        raise OptionError(f"patch_size={known['patch_size']} contradicts the checkpoint, whose patches are {trunk} px.")
    return dataclasses.replace(config, **known)


def _check_vitdet(window_size: int | None, supported: bool, name: str) -> None:
    if window_size is not None and not supported:
        raise OptionError(
            f"vitdet_window_size is not supported for {name}. Set it to None, or use a version that supports it; "
            f"`amradio models` shows which."
        )


def _identity(checkpoint: Checkpoint, located: Located) -> Any:
    entry = located.entry
    return dataclasses.replace(
        checkpoint.identity,
        source=located.source,
        version=entry.version if entry else checkpoint.identity.version or checkpoint.config.version,
        sha256=located.sha256 or checkpoint.identity.sha256,
        revision=located.revision or checkpoint.identity.revision,
        license=entry.license.name if entry else checkpoint.identity.license,
    )


def attach_text(model: RadioModel, hub: HubOptions) -> None:
    """Tell each adaptor whose teacher has a text side how to load it; nothing is loaded here.

    Args:
        model: Changed in place.
        hub: How to reach the hub then.
    """
    teachers: dict[str, Mapping[str, Any]] = {}
    for teacher in model.config.teachers:
        teachers.setdefault(teacher["name"], teacher)
    for name, adaptor in model.adaptors.items():
        assert isinstance(adaptor, Adaptor)
        if name in teachers and has_text_side(teachers[name]):
            adaptor.attach_text(functools.partial(_load_text, teachers[name], hub))


def _load_text(teacher: Mapping[str, Any], hub: HubOptions, device: torch.device) -> Any:
    return load_text_tower(
        teacher, device=device, token=hub.token, cache_dir=hub.cache_dir, local_files_only=hub.local_files_only
    )


def say_licence(entry: CatalogEntry) -> None:
    """Warn, once a process and version, of weights that do not allow commercial use.

    Args:
        entry: The published model.
    """
    if entry.commercial or entry.version in _licence_said:
        return
    _licence_said.add(entry.version)
    warnings.warn(
        f"The weights of {entry.version} are under the {entry.license.name}: research or evaluation only, no "
        f"commercial use. "
        f"The c-radio models allow commercial use.",
        NonCommercialWarning,
        stacklevel=4,
    )


def _placed(model: RadioModel, device: torch.device | str | None, dtype: torch.dtype | None) -> RadioModel:
    """Move and cast the model, with a fallback that is said where the device cannot compute in the dtype."""
    wanted = dtype or model.dtype
    if device is not None and wanted == torch.bfloat16 and not _has_bfloat16(torch.device(device)):
        dtype = torch.float32
        warnings.warn(
            f"{torch.device(device)} has no bfloat16 hardware (it needs an Ampere GPU or newer), so the model runs in "
            f"float32. "
            f"Pass dtype=torch.float16 for speed if its activations fit that range.",
            PortabilityWarning,
            stacklevel=3,
        )
    return model.to(device=device, dtype=dtype)


def _has_bfloat16(device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    return torch.cuda.get_device_capability(device)[0] >= 8
