"""From a teacher's record to its text tower."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from amradio.errors import CapabilityError, ConfigError, MissingDependencyError, UnknownModelError, nearest_names
from amradio.hub import HubOptions
from amradio.text.hf_tower import HFTextTower, import_transformers, load_hf_tower
from amradio.text.open_clip_tower import OpenClipTextTower, import_open_clip, load_open_clip_tower
from amradio.text.protocol import TextTower
from amradio.text.sentence import NAME as SENTENCE_MODEL
from amradio.text.sentence import SentenceTower

TEXT_TYPES = ("open_clip", "siglip2", "siglip", "hf", "sentence")
"""Teacher types with a text side. Published RADIO checkpoints have the first two; ``siglip`` and ``hf`` name a model of
transformers, ``sentence`` the one of `amradio.text.sentence`."""

_SIGLIP2_REPOS = {
    "siglip2-g-384": "google/siglip2-giant-opt-patch16-384",
    "siglip2-so400m": "google/siglip2-so400m-patch16-naflex",
}


class _SameWeights(NamedTuple):
    """A transformers repository with the weights of an open_clip model.

    Attributes:
        repo: ``organisation/name``.
        hidden_act: The activation that open_clip uses with these weights, which is what the teacher was.
    """

    repo: str
    hidden_act: str


_SAME_WEIGHTS = {
    ("ViT-H-14-378-quickgelu", "dfn5b"): _SameWeights("apple/DFN5B-CLIP-ViT-H-14-378", "quick_gelu"),
    # Google's own description has the tanh approximation of GELU; open_clip runs its "webli" copy with the exact one.
    ("ViT-SO400M-14-SigLIP-384", "webli"): _SameWeights("google/siglip-so400m-patch14-384", "gelu"),
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def load_text_tower(
    teacher: Mapping[str, Any],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> TextTower:
    """Load the text side of a teacher; its image side is not kept, and as a rule neither built nor read.

    Where the weights come from, first match:

    1. ``pretrained`` or ``model`` is a local directory in the layout of transformers, or ``model`` is a repository on
       the hub (``organisation/name``): that, through transformers. config.json says which kind of model it is, not the
       teacher's type.
    2. Type ``siglip2``: the repository behind the model's name, through transformers.
    3. Type ``open_clip``: open_clip, if it can be imported; else transformers, for teachers whose weights are known to
       be published in its layout too (``dfn5b`` and ``webli`` of the released RADIO models). The tokenizers of the two
       libraries differ in one thing: open_clip's also repairs broken encodings and resolves HTML entities.

    Args:
        teacher: Record from a RADIO checkpoint: ``type`` and ``model``, and where needed ``pretrained`` and ``name``.
        device: Where to put the tower; None for the CPU.
        dtype: Parameter dtype; None for the stored one (float32 through open_clip).
        token: Access token for the hub; None for the stored one.
        revision: Branch, tag or commit of the repository with the weights.
        cache_dir: Cache root; None for ``AMRADIO_CACHE``, else the Hugging Face cache.
        local_files_only: Never ask the network.

    Returns:
        The tower, frozen and in evaluation mode.

    Raises:
        CapabilityError: Teachers of this type, or models of this kind, have no text side.
        ConfigError: The record has no type or no model.
        UnknownModelError: The name is neither known nor a directory nor a repository.
        MissingDependencyError: An optional package is not installed or cannot be imported.
        CheckpointError: The weights do not fit.
        DownloadError: Files cannot be fetched; `OfflineError` and `GatedRepoError` are special cases.
    """
    kind, model, pretrained = _read_record(teacher)
    options = HubOptions(token=token, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only)
    tower: SentenceTower | HFTextTower | OpenClipTextTower
    if kind == "sentence":
        tower = SentenceTower(options)
    else:
        source = _transformers_source(kind, model, pretrained)
        tower = load_hf_tower(source, options) if source else _load_open_clip(model, pretrained, options)
    return tower.to(device=device, dtype=dtype).eval().requires_grad_(False)


def has_text_side(teacher: Mapping[str, Any]) -> bool:
    """Whether `load_text_tower` can be asked for this teacher.

    Args:
        teacher: Record from a RADIO checkpoint.
    """
    return teacher.get("type") in TEXT_TYPES


def _read_record(teacher: Mapping[str, Any]) -> tuple[str, str, str]:
    name = teacher.get("name", "?")
    kind = teacher.get("type")
    if not kind:
        raise ConfigError(
            f"The record of teacher {name!r} has no type; it has {', '.join(map(str, teacher)) or 'nothing'}."
        )
    if kind not in TEXT_TYPES:
        raise CapabilityError(
            f"Teacher {name!r} has no text side: its type is {kind!r}. Types with one: {', '.join(TEXT_TYPES)}."
        )
    if not teacher.get("model"):
        raise ConfigError(f"The record of teacher {name!r} (type {kind}) names no model.")
    if kind == "sentence" and teacher["model"] != SENTENCE_MODEL:
        raise UnknownModelError(
            f"Teacher {name!r} is in the space of {teacher['model']!r}; the only model for sentences is "
            f"{SENTENCE_MODEL!r}."
        )
    return str(kind), str(teacher["model"]), str(teacher.get("pretrained") or "")


def _transformers_source(kind: str, model: str, pretrained: str) -> str | None:
    """The directory or repository to give to transformers; None for a name that open_clip has to explain."""
    for place in (pretrained, model):
        if place and Path(place).expanduser().is_dir():
            return place
    if model in _SIGLIP2_REPOS and kind != "open_clip":
        return _SIGLIP2_REPOS[model]
    if _HUB_ID.fullmatch(model):
        return model
    if kind == "open_clip":
        return None
    hint = nearest_names(model, _SIGLIP2_REPOS) if kind == "siglip2" else ""
    raise UnknownModelError(
        f"There is no text tower {model!r}: it is not a local directory and not a repository (organisation/name)."
        f" {hint}".rstrip()
    )


def _load_open_clip(model: str, pretrained: str, options: HubOptions) -> HFTextTower | OpenClipTextTower:
    try:
        open_clip = import_open_clip()
    except MissingDependencyError as broken:
        same = _SAME_WEIGHTS.get((model, pretrained))
        if same is None:
            known = "; ".join(f"{m} / {p}" for m, p in _SAME_WEIGHTS)
            raise MissingDependencyError(
                f"The text side of {model} / {pretrained or 'no weights named'} needs open_clip. {broken} "
                f"The other way, through transformers, is known for {known} only; for any model in its layout, give "
                "the path of a local directory as `pretrained`."
            ) from broken
        try:
            import_transformers()
        except MissingDependencyError as absent:
            raise MissingDependencyError(
                f"The text side of {model} / {pretrained} needs open_clip or transformers. {broken} {absent}"
            ) from absent
        return load_hf_tower(same.repo, options, hidden_act=same.hidden_act)
    return load_open_clip_tower(open_clip, model, pretrained, options)
