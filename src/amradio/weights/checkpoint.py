"""A checkpoint in memory, and a model built from it with every tensor accounted for."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from amradio.errors import AmradioError, CheckpointError, CheckpointKeyError, CheckpointShapeError
from amradio.models.configs import ERadioConfig, RadioConfig
from amradio.models.radio import Compat, RadioModel

_SHOWN = 20
_MAX_ARGUMENTS, _MAX_NESTING = 1_000_000, 100


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Where weights came from, for reports.

    Attributes:
        source: Path, URL or hub repository.
        layout: Name of the layout it was read from.
        version: Key in the catalog, if known.
        sha256: Digest of the weight file, if known.
        revision: Commit of the hub repository, if known.
        license: Name of the licence of the weights, if known.
    """

    source: str
    layout: str
    version: str | None = None
    sha256: str | None = None
    revision: str | None = None
    license: str | None = None


@dataclass
class Checkpoint:
    """A model's description and weights, independent of the file layout that they came from.

    Attributes:
        config: What to build.
        tensors: Weights by the names of `RadioModel.state_dict` with all adaptors. Names that no part of the model
            knows are kept, so that building can report them.
        unused: Tensors that official layouts store by design though no model reads them, by their official names.
        identity: Where it came from.
    """

    config: RadioConfig
    tensors: dict[str, Tensor]
    identity: Identity
    unused: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, model: RadioModel) -> Checkpoint:
        """The checkpoint of a model in memory; tensors are shared, not copied.

        Args:
            model: Any model.

        Returns:
            Its description, restricted to the adaptors that are loaded, and its weights.
        """
        kept = {name: config for name, config in model.config.adaptors.items() if name in model.adaptors}
        dtype = str(model.dtype).removeprefix("torch.")
        config = dataclasses.replace(model.config, adaptors=kept, dtype=dtype)
        tensors = {k: v for k, v in model.state_dict().items() if k != "summary_idxs"}
        if "input_conditioner.norm_mean" not in tensors:
            raise CheckpointError(
                "The model's input conditioner was taken out by make_preprocessor_external(), so it cannot be saved "
                "whole. "
                "Assign it back to model.input_conditioner first."
            )
        identity = model.identity if isinstance(model.identity, Identity) else None
        return cls(config, tensors, identity or Identity(source="memory", layout="memory"))


@dataclass(frozen=True)
class KeyReport:
    """The difference between what a model needs and what a checkpoint has.

    Attributes:
        missing: Tensors that the model needs, by the model's names.
        unexpected: Tensors that nothing reads.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected)

    def describe(self, source: str) -> str:
        """Name every tensor in question.

        Args:
            source: Where the checkpoint came from.

        Returns:
            A message for an error or a warning.
        """
        lines = [f"The tensors in {source} do not fit the model that it describes."]
        if self.missing:
            lines.append(f"Missing ({len(self.missing)}): {', '.join(self.missing)}.")
        if self.unexpected:
            lines.append(f"Unexpected ({len(self.unexpected)}): {', '.join(self.unexpected)}.")
        return "\n".join(lines)


def build_model(
    checkpoint: Checkpoint,
    adaptors: Sequence[str] = (),
    *,
    strict: bool = True,
    compat: Compat = None,
) -> tuple[RadioModel, KeyReport]:
    """Build a model in evaluation mode and fill it with a checkpoint's weights.

    The model is laid out on the meta device and all shapes are compared before any memory is taken.

    Args:
        checkpoint: What to build from.
        adaptors: Which adaptors to build.
        strict: Whether a missing or unexpected tensor is an error.
        compat: See `RadioModel`.

    Returns:
        The model, and the difference of keys (empty if `strict`).

    Raises:
        CheckpointKeyError: Tensors are missing or unexpected, and `strict`.
        CheckpointShapeError: A tensor's shape contradicts the description.
        UnknownAdaptorError: The checkpoint has no such adaptor.
    """
    model, report = lay_out(checkpoint, adaptors, compat)
    if report and strict:
        raise CheckpointKeyError(
            f"{report.describe(checkpoint.identity.source)}\nPass strict=False to load what fits, with missing tensors "
            f"at their initial values."
        )
    have = checkpoint.tensors
    filled = {k: have[k].to(dtype=v.dtype, copy=True) for k, v in model.state_dict().items() if k in have}
    if report.missing:
        fresh = RadioModel(checkpoint.config, adaptors, compat)
        _cast(fresh, checkpoint.config.dtype)
        initial = fresh.state_dict()
        filled |= {k: initial[k] for k in report.missing}
    filled["summary_idxs"] = torch.tensor(checkpoint.config.summary_idxs, dtype=torch.int64, device="cpu")
    model.load_state_dict(filled, strict=True, assign=True)
    model.identity = checkpoint.identity
    return model.eval(), report


def lay_out(checkpoint: Checkpoint, adaptors: Sequence[str], compat: Compat = None) -> tuple[RadioModel, KeyReport]:
    """Build a checkpoint's model without memory for its weights, and compare the two.

    Args:
        checkpoint: What to build from.
        adaptors: Which adaptors to build; the tensors of the others are not unexpected.
        compat: See `RadioModel`.

    Returns:
        The model on the meta device, in its published dtypes, and the difference of keys.

    Raises:
        CheckpointShapeError: A tensor's shape contradicts the description, or the description is impossible.
        UnknownAdaptorError: The checkpoint has no such adaptor.
    """
    _check_depth(checkpoint)
    model = _on_meta(checkpoint, adaptors, compat)
    _cast(model, checkpoint.config.dtype)
    wanted = {k: v for k, v in model.state_dict().items() if k != "summary_idxs"}
    have = checkpoint.tensors
    _check_stored(have, checkpoint.identity.source)
    _check_shapes(wanted, have, checkpoint.identity.source)
    left_out = tuple(f"adaptors.{name}." for name in checkpoint.config.adaptors if name not in adaptors)
    report = KeyReport(
        missing=tuple(k for k in wanted if k not in have),
        unexpected=tuple(k for k in have if k not in wanted and not k.startswith(left_out)),
    )
    return model, report


def _on_meta(checkpoint: Checkpoint, adaptors: Sequence[str], compat: Compat) -> RadioModel:
    """The model without memory for its weights."""
    try:
        with torch.device("meta"):
            return RadioModel(checkpoint.config, adaptors, compat)
    except (RuntimeError, TypeError, OverflowError) as e:
        if isinstance(e, AmradioError):
            raise
        raise CheckpointShapeError(
            f"{checkpoint.identity.source} describes a model of impossible sizes: {str(e).splitlines()[0][:300]}"
        ) from e


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a name such as ``float32`` or ``torch.bfloat16``.

    Raises:
        CheckpointError: There is no such floating point dtype.
    """
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise CheckpointError(f"{name!r} is not a floating point dtype; use float32, bfloat16 or float16.")
    return dtype


def _cast(model: RadioModel, dtype_name: str) -> None:
    """Give the trunk and the normalizers the published dtype; adaptors stay float32."""
    dtype = torch_dtype(dtype_name)
    for part in (model.model, model.feature_normalizer, model.inter_feature_normalizer):
        if part is not None:
            part.to(dtype)
    model.adaptors.to(torch.float32)  # whatever torch.get_default_dtype() is


def _check_depth(checkpoint: Checkpoint) -> None:
    """Refuse a description with more blocks than there are tensors, before thousands of modules are built."""
    backbone = checkpoint.config.backbone
    depths = backbone.depths if isinstance(backbone, ERadioConfig) else (backbone.depth,)
    heads = [h.num_inner for a in checkpoint.config.adaptors.values() for h in (a.summary, a.features)]
    depth = sum(map(abs, (*depths, *heads)))
    if depth > len(checkpoint.tensors):
        raise CheckpointShapeError(
            f"{checkpoint.identity.source} describes a model of {depth} blocks but has only {len(checkpoint.tensors)} "
            f"tensors; it is damaged or not what it says."
        )


def _check_stored(have: Mapping[str, Tensor], source: str) -> None:
    """Refuse tensors that repeat a few stored numbers: a small file could ask for any amount of memory."""
    for name, t in have.items():
        stored = t.untyped_storage().nbytes()
        if t.numel() * t.element_size() > stored and t.device.type != "meta":
            raise CheckpointShapeError(
                f"{name} in {source} is {list(t.shape)} but only {stored:,} bytes of it are stored; the file is "
                "damaged or made to exhaust memory. Nothing was allocated."
            )


def _check_shapes(wanted: Mapping[str, Tensor], have: Mapping[str, Tensor], source: str) -> None:
    wrong = [
        f"{k} is {list(have[k].shape)}, expected {list(v.shape)}"
        for k, v in wanted.items()
        if k in have and have[k].shape != v.shape
    ]
    if wrong:
        more = f", and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise CheckpointShapeError(
            f"{len(wrong)} tensors in {source} contradict the description in the same checkpoint: "
            f"{'; '.join(wrong[:_SHOWN])}{more}. The file is damaged, or was edited inconsistently."
        )


def jsonable(value: Any) -> Any:
    """Turn training arguments into JSON: dtypes become their names, tuples lists, anything else its ``str``.

    Raises:
        CheckpointError: They are nested deeper, or have more values, than any training run's. A few bytes of a pickle
            can stand for billions of values, or contain themselves.
    """
    return _jsonable(value, itertools.count(), 0)


def _jsonable(value: Any, counter: Iterator[int], depth: int) -> Any:
    if next(counter) > _MAX_ARGUMENTS or depth > _MAX_NESTING:
        raise CheckpointError(
            f"The training arguments have more than {_MAX_ARGUMENTS:,} values or are nested more than {_MAX_NESTING} "
            "deep; the file is damaged or made to exhaust memory."
        )
    if isinstance(value, Mapping):
        return {str(k): _jsonable(v, counter, depth + 1) for k, v in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_jsonable(v, counter, depth + 1) for v in value]
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if hasattr(value, "__dict__"):
        return _jsonable(vars(value), counter, depth + 1)
    return str(value)


def with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries whose names begin with `prefix`, with it stripped."""
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}


def names_in(tensors: Iterable[str], prefix: str) -> set[str]:
    """The distinct first name parts that follow `prefix`."""
    return {k[len(prefix) :].split(".", 1)[0] for k in tensors if k.startswith(prefix)}
