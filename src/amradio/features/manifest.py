"""What a folder of embeddings was made with: written beside them, and compared before more are added."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from amradio.errors import OptionError
from amradio.features.files import write_atomically
from amradio.features.partition import Partition
from amradio.features.runner import ExtractOptions, FeatureModel
from amradio.models.configs import to_json
from amradio.models.radio import RadioModel
from amradio.models.view import RadioView

if TYPE_CHECKING:
    from amradio.images.dataset import ImageSet
    from amradio.images.resize import ResizePolicy

MANIFEST_NAME = "manifest.json"
FORMAT = "amradio embeddings"
FORMAT_VERSION = 1

Manifest = dict[str, Any]
"""See `new_manifest`."""

_SHOWN_DIFFERENCES = 8


def new_manifest(
    images: ImageSet,
    model: FeatureModel,
    policy: ResizePolicy,
    options: ExtractOptions,
    store: torch.dtype,
    partition: Partition,
) -> Manifest:
    """Describe a run before it begins.

    Returns:
        A JSON object: ``format`` and ``format_version``; ``config``: everything that decides what is stored, and its
        ``fingerprint``; ``about``: names of model, licence and data, for people, and the names of classes; ``count`` of
        pictures and ``shard_size``; ``complete``.
    """
    from amradio import __version__

    config = {
        "amradio": __version__,
        "model": describe_model(model),
        "resize": {"mode": policy.mode, "size": list(policy.size), "multiple": policy.multiple},
        "dtype": _dtype_name(options.dtype),
        "autocast": None if options.autocast is None else _dtype_name(options.autocast),
        "compile": options.compile,
        "decode": options.decode,
        "resizer": options.resizer,
        "max_pixels": options.max_pixels,
        "background": list(options.background),
        "keep": options.keep,
        "store": _dtype_name(store),
        "shard_size": partition.size,
        "dataset": {"fingerprint": images.fingerprint, "count": len(images), "split": images.split},
    }
    identity = getattr(model, "identity", None)
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "complete": False,
        "fingerprint": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
        "count": partition.count,
        "shard_size": partition.size,
        "about": {
            "model": dataclasses.asdict(identity) if dataclasses.is_dataclass(identity) else None,  # type: ignore[arg-type]
            "dataset": images.name,
            "split": images.split,
            "class_names": None if images.class_names is None else list(images.class_names),
        },
        "config": config,
    }


def describe_model(model: Any) -> dict[str, Any]:
    """What decides a model's outputs: its kind, configuration, number format, and a digest of its weights.

    The digest is of the weights in memory, not of a file, so that it holds for any model, wherever it came from.

    Args:
        model: Any `FeatureModel`. Of one that is no `torch.nn.Module` only the name is known.
    """
    inner = model.radio if isinstance(model, RadioView) else model
    described: dict[str, Any] = {"kind": getattr(inner, "__qualname__", type(inner).__qualname__)}
    for name in ("config", "geometry"):
        value = getattr(inner, name, None)
        if dataclasses.is_dataclass(value):
            # Arguments of the published training are kept with a model; nothing is computed from them.
            described[name] = {key: v for key, v in to_json(value).items() if key != "args"}
    if isinstance(model, RadioView):
        described["view"] = model.name
    if isinstance(inner, RadioModel):
        described["vitdet_window_size"] = inner.window_size  # may be switched at any time, so the config has none
    if isinstance(inner, nn.Module):
        described["dtype"] = next((_dtype_name(p.dtype) for p in inner.parameters()), None)
        described["adaptors"] = list(getattr(inner, "adaptors", ()))
        described["weights_sha256"] = weights_digest(inner)
    return described


def weights_digest(model: nn.Module) -> str:
    """SHA-256, in hexadecimal, of the names, dtypes, shapes and contents of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):  # extra state of foreign modules
            digest.update(f"{name} {tensor!r};".encode())
            continue
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class StaleError(OptionError):
    """There are embeddings, but of other pictures, made with other settings or by another version."""


def read_manifest(folder: Path, *, any_version: bool = False) -> Manifest | None:
    """Read the manifest of a folder.

    Args:
        folder: Of the embeddings.
        any_version: Whether one is also taken that this version cannot understand.

    Returns:
        The manifest; None if there is none.

    Raises:
        OptionError: The file is something else.
        StaleError: It is of another version.
    """
    path = folder / MANIFEST_NAME
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise OptionError(f"{path} is not a manifest of embeddings: it is no JSON ({error}).") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise OptionError(f"{path} is not a manifest of embeddings.")
    if manifest.get("format_version") != FORMAT_VERSION and not any_version:
        raise StaleError(
            f"{path} has the format version {manifest.get('format_version')}, and this version of amradio reads "
            f"version {FORMAT_VERSION}. Make the embeddings again, or use the amradio that made them "
            f"({manifest.get('config', {}).get('amradio', 'unknown')})."
        )
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a folder, atomically."""
    text = json.dumps(manifest, indent=2) + "\n"
    write_atomically(folder / MANIFEST_NAME, lambda path: _write_text(path, text), durable=True)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Say what differs between two configurations, one sentence part a value.

    Args:
        old: The ``config`` of a manifest.
        new: Another one.

    Returns:
        Such as ``resize.size was [224, 224] and is [378] now``, in the order of the fields; at most 8, then how many
        more.
    """
    before, after = dict(_flat(old)), dict(_flat(new))
    found = []
    for name in dict.fromkeys([*before, *after]):
        was, now = before.get(name, "absent"), after.get(name, "absent")
        if was != now:
            found.append(f"{name} was {_short(was)} and is {_short(now)} now")
    more = len(found) - _SHOWN_DIFFERENCES
    return found if more <= 0 else [*found[:_SHOWN_DIFFERENCES], f"{more} more"]


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
