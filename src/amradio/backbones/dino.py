"""Official DINO and DINOv2 weights in this package's own trunk, without any code of theirs."""

from __future__ import annotations

from pathlib import Path

from amradio.errors import UnknownModelError, nearest_names
from amradio.hub import HubOptions
from amradio.models.radio import RadioModel
from amradio.weights.checkpoint import Identity, build_model
from amradio.weights.dino import LAYOUT, describe_entry, describe_tensors, read_dino, to_checkpoint
from amradio.weights.dino_catalog import DINO_MODELS, DinoEntry


def load_dino(name: str, *, hub: HubOptions | None = None) -> RadioModel:
    """Load a DINO or DINOv2 backbone.

    The summary is the class token after the final norm, the features are the patch tokens after it.

    Args:
        name: A published name such as ``dino_vits16`` or ``dinov2_vitb14_reg``, or the path of a state dict in the
            official names.
        hub: How to reach the publishers' files.

    Returns:
        The model, with `RadioModel.forward_intermediates` and everything else that a RADIO trunk can do.

    Raises:
        UnknownModelError: There is neither such a published model nor such a file.
        CheckpointError: The file is unsafe, damaged or holds another kind of model.
        DownloadError: It cannot be fetched.
    """
    hub = hub or HubOptions()
    path = Path(name).expanduser()
    if name in DINO_MODELS:
        return _load_published(DINO_MODELS[name], hub)
    if not path.is_file():
        raise UnknownModelError(
            f"{name!r} is neither a published DINO or DINOv2 model nor a file. {nearest_names(name, DINO_MODELS)} "
            f"Published are: {', '.join(DINO_MODELS)}."
        )
    tensors = read_dino(path)
    trunk = describe_tensors(tensors, str(path))
    model, _ = build_model(to_checkpoint(tensors, trunk, Identity(source=str(path), layout=LAYOUT)))
    return model


def _load_published(entry: DinoEntry, hub: HubOptions) -> RadioModel:
    from amradio.weights.download import fetch_url

    fetched = fetch_url(
        entry.url,
        cache_dir=hub.cache_dir,
        token=hub.token,
        revision=hub.revision,
        local_files_only=hub.local_files_only,
        progress=hub.progress,
    )
    identity = Identity(
        source=entry.url, layout=LAYOUT, version=entry.name, sha256=fetched.sha256, license=entry.license.name
    )
    checkpoint = to_checkpoint(
        read_dino(fetched.path), describe_entry(entry), identity, preferred_resolution=entry.preferred_resolution
    )
    model, _ = build_model(checkpoint)
    return model
