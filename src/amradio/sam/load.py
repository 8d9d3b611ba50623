"""SAM's weights, from a folder or from the hub, through `transformers`."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

from amradio.errors import (
    CapabilityError,
    CheckpointError,
    CheckpointKeyError,
    CheckpointShapeError,
    LayoutError,
    MissingDependencyError,
    UnknownModelError,
)
from amradio.hub import HubOptions
from amradio.sam.decoder import MaskDecoder, Sam3Decoder, SamDecoder
from amradio.sam.encoder import SamVision
from amradio.text.hub import fetch_description, fetch_first
from amradio.weights.tensorfiles import INDEX, WEIGHTS, read_directory

_SAM3_TYPES = ("sam3_tracker", "sam3_tracker_video", "sam3_video")


class LoadedSam(NamedTuple):
    """A SAM in two parts.

    Attributes:
        decoder: Prompt encoder and mask decoder.
        vision: Its own image encoder; let go of it where another one takes its place, and its memory is free.
    """

    decoder: MaskDecoder
    vision: SamVision


def load_sam(source: str | os.PathLike[str], *, hub: HubOptions | None = None) -> LoadedSam:
    """Load SAM or SAM 3. No code of the repository is executed, and weights are read as safetensors only.

    Args:
        source: A folder that ``save_pretrained`` wrote, or a repository on the hub, such as ``facebook/sam-vit-huge``,
            the one that RADIO's ``sam`` adaptors imitate, or ``facebook/sam3`` for ``sam3``.
        hub: How to reach the hub.

    Returns:
        Both parts, on the CPU, in float32, in evaluation mode.

    Raises:
        MissingDependencyError: transformers is not installed.
        UnknownModelError: There is no such folder, and it is no repository name.
        CapabilityError: The model is no SAM or SAM 3.
        CheckpointError: The weights do not fit, or are not there as safetensors.
        DownloadError: Files cannot be fetched.
    """
    name = os.fspath(source)
    transformers = import_transformers()
    directory = _directory(name, hub or HubOptions())
    try:
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise LayoutError(f"The config.json of {name} cannot be read: {error!s:.300}") from error
    if config.model_type == "sam":
        model = _weights(transformers.SamModel, config, directory, name)
        return LoadedSam(SamDecoder(model), SamVision(model, name))
    if config.model_type in _SAM3_TYPES:
        if not hasattr(transformers, "Sam3TrackerModel"):
            raise MissingDependencyError(
                f"{name} is a SAM 3, which transformers {transformers.__version__} does not know. Install a newer one: "
                f"`pip install -U 'amradio[hf]'`."
            )
        model = _weights(transformers.Sam3TrackerModel, config, directory, name)
        return LoadedSam(Sam3Decoder(model), SamVision(model, name))
    raise CapabilityError(
        f"{name} is a model of type {config.model_type!r}; here are the decoders of SAM (sam) and of SAM 3 "
        f"({', '.join(_SAM3_TYPES)}). Those of SAM 2 and SAM-HQ read features that no RADIO adaptor imitates."
    )


def import_transformers() -> Any:
    """The package ``transformers``.

    Raises:
        MissingDependencyError: It is not installed, or cannot be imported.
    """
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise MissingDependencyError(
            f"SAM's decoder comes from the package transformers, which cannot be imported: {error}. Install it with "
            f"`pip install 'amradio[hf]'`."
        ) from error


def _directory(name: str, hub: HubOptions) -> str:
    place = os.path.expanduser(name)
    if os.path.isdir(place):
        if not os.path.isfile(os.path.join(place, "config.json")):
            raise LayoutError(f"{name} has no config.json: it is no model that save_pretrained wrote.")
        return place
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UnknownModelError(f"{name!r} is neither a folder nor a repository on the hub (organisation/name).")
    directory = fetch_description(name, hub)
    # The same commit for the weights, even if the branch moves meanwhile.
    commit = HubOptions(**{**vars(hub), "revision": directory.name})
    found = fetch_first(name, (WEIGHTS, INDEX), commit)
    if found.suffix == ".json":
        for shard in sorted(set(json.loads(found.read_text(encoding="utf-8"))["weight_map"].values())):
            fetch_first(name, [shard], commit)
    return str(directory)


def _weights(kind: Any, config: Any, directory: str, name: str) -> Any:
    """A model with its weights.

    Names are brought to those of the model here: transformers 5.23 leaves the decoder of SAM 3 at random values when it
    loads it out of the whole model (``sam3_video``).
    """
    tensors = {_name(stored): tensor for stored, tensor in read_directory(Path(directory)).items()}
    try:
        model, info = kind.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are reported; they are refused below
        )
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"The weights of {name} cannot be used: {error!s:.300}") from error
    if info["mismatched_keys"]:
        key, stored, expected = sorted(info["mismatched_keys"])[0]
        raise CheckpointShapeError(
            f"The weights of {name} contradict its config.json: {key} has shape {list(stored)}, and should have "
            f"{list(expected)} ({len(info['mismatched_keys'])} tensors of a wrong shape)."
        )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise CheckpointKeyError(
            f"The weights of {name} lack {len(missing)} tensors of {kind.__name__}, such as {', '.join(missing[:3])}. "
            f"They belong to another model."
        )
    return model


def _name(stored: str) -> str:
    """The name of a tensor in the model, from that in a file of SAM, or of SAM 3 as a whole or in part."""
    name = stored.removeprefix("tracker_model.").removeprefix("detector_model.")
    return f"vision_encoder.neck.{name.removeprefix('tracker_neck.')}" if name.startswith("tracker_neck.") else name
