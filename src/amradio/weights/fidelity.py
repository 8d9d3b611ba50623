"""What a checkpoint loses in a layout, found by comparing it with what the layout gives back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from amradio.errors import LayoutError
from amradio.models.configs import ERadioConfig, RadioConfig, to_json
from amradio.weights.checkpoint import Checkpoint

CATALOG_FIELDS = (
    "version",
    "max_resolution",
    "preferred_resolution",
    "supports_vitdet",
    "vitdet_num_windowed",
    "vitdet_num_global",
)
"""Fields that recommend or name and change no number; layouts without a place for them rely on the catalog."""

WHOLE = "native holds everything, huggingface everything that RADIO models have"


def without_heads(checkpoint: Checkpoint) -> Checkpoint:
    """The backbone alone: no adaptors, no statistics for features.

    Args:
        checkpoint: Any checkpoint; it is left as it is.

    Returns:
        What `backbone_only` means in every layout.
    """
    config = dataclasses.replace(checkpoint.config, adaptors={}, feature_normalizer=False, inter_normalizer=None)
    dropped = ("adaptors.", "feature_normalizer.", "inter_feature_normalizer.")
    return dataclasses.replace(
        checkpoint,
        config=config,
        tensors={k: v for k, v in checkpoint.tensors.items() if not k.startswith(dropped)},
        unused={k: v for k, v in checkpoint.unused.items() if k.startswith("base_model.")},
    )


def differences(before: RadioConfig, after: RadioConfig, ignore: Iterable[str] = ()) -> list[str]:
    """Where two descriptions differ in what a model computes.

    Args:
        before: The description as it is.
        after: The description as a layout gives it back.
        ignore: Top-level fields to leave out besides `CATALOG_FIELDS` and ``args``.

    Returns:
        One phrase for each field, with both values.
    """
    left_out = {*CATALOG_FIELDS, "args", *ignore}
    a, b = (_flat({k: v for k, v in _effective(c).items() if k not in left_out}) for c in (before, after))
    return [f"{k} is {_shown(a.get(k))}, read back as {_shown(b.get(k))}" for k in a | b if a.get(k) != b.get(k)]


def require_same(checkpoint: Checkpoint, after: RadioConfig, layout: str, ignore: Iterable[str] = ()) -> None:
    """Refuse to write what would be read back differently.

    Args:
        checkpoint: What is to be written.
        after: The description as `layout` gives it back.
        layout: Its name, for the message.
        ignore: See `differences`.

    Raises:
        LayoutError: The descriptions differ; each field is named.
    """
    found = differences(checkpoint.config, after, ignore)
    if found:
        hint = ""
        if any(f.startswith("position_interpolation") for f in found):
            hint = " Load it with position_interpolation='half_pixel' first, or write the native layout."
        raise LayoutError(
            f"The {layout} layout cannot hold {checkpoint.identity.source} as it is: {'; '.join(found)}.{hint}"
        )


def unusual_parts(config: RadioConfig) -> list[str]:
    """What sets a trunk apart from the plain C-RADIO vision transformers that other libraries implement.

    Args:
        config: Any model's description.

    Returns:
        A name for each such part; empty for C-RADIO v2, v3 and v4.
    """
    b = config.backbone
    if isinstance(b, ERadioConfig):
        return ["the E-RADIO trunk"]
    present = {
        f"the stem {b.stem!r}": b.stem != "patch",
        "a norm inside the MLP": b.mlp_norm,
        "a SwiGLU MLP": b.mlp == "swiglu",
        "DyT norms": b.norm == "dyt",
        "scaled norms": b.scaled_norm,
        "a final norm": b.final_norm,
        "a bias in the patch embedding": b.patch_bias,
        "a norm after the patch embedding": b.patch_norm,
        f"position embeddings of the kind {b.position!r}": b.position != "cpe",
        "a position grid that is not square": b.position_grid[0] != b.position_grid[1],
        "mean pooling": b.pool == "avg",
        "no class token": b.num_cls_tokens == 0,
    }
    return [name for name, is_present in present.items() if is_present]


def require_plain(config: RadioConfig, source: str, layout: str) -> None:
    """Refuse a model that a library for plain C-RADIO trunks cannot compute.

    Raises:
        LayoutError: It has unusual parts; each is named.
    """
    parts = unusual_parts(config)
    if parts:
        raise LayoutError(
            f"The {layout} layout cannot represent {source}: it is for C-RADIO vision transformers, and this model has "
            f"{', '.join(parts)}. Choose another layout: {WHOLE}."
        )


def require_nothing_lost(lost: list[str], source: str, layout: str) -> None:
    """Refuse to drop parts of a model without being asked to.

    Args:
        lost: What would be dropped.
        source: Where the model came from.
        layout: Name of the layout.

    Raises:
        LayoutError: Something would be dropped.
    """
    if lost:
        raise LayoutError(
            f"The {layout} layout has no place for parts of {source}: {'; '.join(lost)}. Pass backbone_only=True "
            f"(--backbone-only on the command line) to leave them out, or choose another layout: {WHOLE}."
        )


def heads_of(config: RadioConfig) -> list[str]:
    """The parts that `without_heads` would remove, as phrases."""
    lost = []
    if config.adaptors:
        lost.append(f"the adaptors {', '.join(config.adaptors)}")
    if config.feature_normalizer:
        lost.append("the feature normalizer")
    if config.inter_normalizer is not None:
        lost.append("the normalizer of intermediate features")
    return lost


def _effective(config: RadioConfig) -> dict[str, Any]:
    values = to_json(config)
    values["patch_size"] = config.patch_size or config.backbone.patch_size
    return values


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        elif value not in ({}, None):
            flat[prefix + key] = value
    return flat


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
