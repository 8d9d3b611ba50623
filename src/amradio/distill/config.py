"""What a distillation run is, as plain data: teachers, student, data, optimisation.

A run is described by a YAML file. It is read strictly: an unknown key is an error that names the nearest known ones, so
that a misspelt setting can never be ignored.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from amradio.distill.crops import CropOptions
from amradio.errors import ConfigError, OptionError, nearest_names
from amradio.models.configs import from_json, to_json

SUFFIX = ".yaml"
_FLOAT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")

SummaryLoss = Literal["cosine", "balanced-angle", "mse"]
FeatureLoss = Literal["mse", "cosine", "smooth-l1", "cosine-smooth-l1"]
BalancingKind = Literal["none", "global", "per-channel", "pca", "zca", "hadamard", "phi-s"]
Match = Literal["student", "teacher", "smaller", "larger"]


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One set of pictures.

    Attributes:
        path: Anything that `amradio.images.open_images` opens.
        split: Which part of it.
        limit: Take only the first so many pictures.
        repeat: How often each picture counts in an epoch.
    """

    path: str
    split: str | None = None
    limit: int | None = None
    repeat: int = 1


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Pictures and what is cut out of them.

    Attributes:
        sources: Where pictures are; all together are one set.
        crops: How a view of a picture is drawn.
        fixed_views: Number of views of each picture that are ever shown; None draws new ones for ever. Targets of fixed
            views can be cached.
        cache_dir: Where targets of fixed views are kept; None keeps none.
        workers: Decoding threads in each process.
        decode: ``draft`` decodes large JPEGs at a fraction of their size.
    """

    sources: tuple[SourceConfig, ...]
    crops: CropOptions = field(default_factory=CropOptions)
    fixed_views: int | None = None
    cache_dir: str | None = None
    workers: int = 4
    decode: Literal["full", "draft"] = "draft"

    def __post_init__(self) -> None:
        if not self.sources:
            raise ConfigError("data.sources is empty: name at least one set of pictures.")
        if self.fixed_views is not None and self.fixed_views < 1:
            raise ConfigError(f"data.fixed_views must be at least 1, got {self.fixed_views}.")
        if self.cache_dir is not None and self.fixed_views is None:
            raise ConfigError("data.cache_dir needs data.fixed_views: only targets of fixed views can be cached.")


@dataclass(frozen=True, kw_only=True)
class HeadSizes:
    """Size of an adaptor head.

    Attributes:
        version: ``v1``, ``v2`` or ``attn`` (spatial heads only), see `amradio.models.adaptors`.
        hidden_dim: Width inside; None: the student's width.
        num_inner: Inner blocks.
    """

    version: Literal["v1", "v2", "attn"] = "v2"
    hidden_dim: int | None = None
    num_inner: int = 0


@dataclass(frozen=True, kw_only=True)
class SummaryTarget:
    """How a teacher's summary is matched.

    Attributes:
        loss: See `amradio.distill.losses`.
        weight: Factor of the loss.
        in_backbone: Whether this teacher's class token is a part of the student's own summary.
        head: Size of the summary head.
    """

    loss: SummaryLoss = "cosine"
    weight: float = 1.0
    in_backbone: bool = True
    head: HeadSizes = HeadSizes()


@dataclass(frozen=True, kw_only=True)
class FeatureTarget:
    """How a teacher's features are matched.

    Attributes:
        loss: See `amradio.distill.losses`.
        weight: Factor of the loss.
        balancing: How targets are standardised, see `amradio.distill.balancing`.
        match: Which grid is interpolated where student and teacher differ: ``student`` or ``teacher`` is brought to the
            other's, or both meet on the ``smaller`` or ``larger`` one.
        upsample: Rows and columns that the spatial head makes of each student patch.
        head: Size of the spatial head.
    """

    loss: FeatureLoss = "mse"
    weight: float = 1.0
    balancing: BalancingKind = "phi-s"
    match: Match = "smaller"
    upsample: int = 1
    head: HeadSizes = HeadSizes()


@dataclass(frozen=True, kw_only=True)
class TeacherShape:
    """What is known of a teacher without loading it, so that costs can be computed without its weights.

    Attributes:
        summary_dim: Width C of its summary.
        embed_dim: Width D of its features.
        vit: Fields of the `amradio.models.configs.ViTConfig` that computes as much.
        window: Side in patches of its attention windows; None: global attention.
    """

    summary_dim: int
    embed_dim: int
    vit: Mapping[str, Any]
    window: int | None = None


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """A teacher and what is learned from it.

    Attributes:
        name: Of the adaptor that will imitate it.
        backbone: What `amradio.load_backbone` loads.
        adaptor: Of a RADIO teacher: whose output is meant.
        options: Further options of `load_backbone`.
        dtype: What the teacher computes in; None: as published.
        resolution: Side in pixels of the square pictures that it sees; None: what the student sees.
        mosaic: Side k of a mosaic: k x k pictures share one teacher input (RADIOv2.5, section 4). Such a teacher has
            no summary.
        weight: Factor of all its losses.
        summary: How its summary is matched; None leaves it out.
        features: How its features are matched; None leaves them out.
        licence: For the model card, where the weights do not say it themselves.
        shape: For cost estimates where the weights are not at hand.
        text: What texts are embedded with in this teacher's space: ``type`` and ``model`` as
            `amradio.text.load_text_tower` takes them; the student's adaptor gets that text side.
    """

    name: str
    backbone: str
    adaptor: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    resolution: int | None = None
    mosaic: int = 1
    weight: float = 1.0
    summary: SummaryTarget | None = SummaryTarget()
    features: FeatureTarget | None = FeatureTarget()
    licence: str | None = None
    shape: TeacherShape | None = None
    text: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        where = f"The teacher {self.name!r}"
        if self.summary is None and self.features is None:
            raise ConfigError(f"{where} teaches nothing: give it a summary, features, or both.")
        if self.mosaic < 1:
            raise ConfigError(f"{where} has mosaic={self.mosaic}; 1 means none.")
        if self.mosaic > 1 and self.summary is not None:
            raise ConfigError(f"{where} sees mosaics of several pictures and has no summary of one: set summary: null.")
        if "." in self.name or not self.name:
            raise ConfigError(f"A teacher's name must not be empty or have dots, got {self.name!r}.")


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """The student.

    Attributes:
        architecture: A published name such as ``vit_base_patch16_224`` (`amradio.models.architectures`).
        model_kwargs: Overrides of the architecture in timm's terms.
        max_size: Side in pixels of the position grid: the largest size that positions are learned for.
        registers: Register tokens.
        model: Instead of an architecture: the fields of a `amradio.models.configs.RadioConfig`. Class tokens, summary,
            and adaptors follow from the teachers where they are not given.
        init: A checkpoint to start from: a path, version key or repository. Without `architecture` and `model` the
            student is what the checkpoint describes. ``efficientnet-lite0`` fills the convolutional stem of that name
            (`amradio.models.stem`) with a teacher's weights.
        frozen_stem: Keep the weights of a convolutional stem as they are, which makes a step two to three times
            cheaper; what follows the convolutions is trained.
        mean: Of each channel, that pictures are standardised with; None: CLIP's, or the checkpoint's.
        std: Likewise.
        spectral: Spectral reparametrisation of all linear layers of the blocks (arXiv 2303.06296).
        damp: Standard deviation of DAMP's multiplicative weight noise (arXiv 2402.17863); None: none.
        checkpointing: Recompute activations in the backward pass.
        compile: Compile the blocks.
        ema: Decay of the moving average of weights for each step; None keeps none.
    """

    architecture: str | None = None
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    max_size: int = 2048
    registers: int = 0
    model: Mapping[str, Any] | None = None
    init: str | None = None
    frozen_stem: bool = False
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    spectral: bool = False
    damp: float | None = None
    checkpointing: bool = False
    compile: bool = False
    ema: float | None = None

    def __post_init__(self) -> None:
        if self.architecture is not None and self.model is not None:
            raise ConfigError("student.architecture and student.model exclude each other.")
        if self.architecture is None and self.model is None and self.init is None:
            raise ConfigError("The student is not described: give student.architecture, student.model or student.init.")
        if (self.mean is None) != (self.std is None):
            raise ConfigError("student.mean and student.std go together.")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ConfigError(f"student.ema must be between 0 and 1, got {self.ema}.")


@dataclass(frozen=True, kw_only=True)
class PartitionConfig:
    """A part of every training step: pictures of one size for some of the teachers.

    Attributes:
        name: For reports.
        sizes: Sides in pixels of the student's square pictures; each step draws one.
        batch_size: Pictures in a step, over all processes.
        teachers: Which teachers take part; None: all.
        windows: Sides of ViTDet windows in patches, of which each step draws one; 0 means global attention. Sizes that
            a window does not divide are run globally.
        weight: Factor of this partition's loss.
    """

    name: str = "main"
    sizes: tuple[int, ...]
    batch_size: int
    teachers: tuple[str, ...] | None = None
    windows: tuple[int, ...] = (0,)
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.sizes or min(self.sizes) < 1 or self.batch_size < 1 or not self.windows or min(self.windows) < 0:
            raise ConfigError(
                f"The partition {self.name!r} needs sizes and a batch_size of at least 1 and windows of at least 0, "
                f"got {list(self.sizes)}, {self.batch_size} and {list(self.windows)}."
            )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How weights are updated.

    Attributes:
        kind: ``adamw`` or ``lamb``.
        lr: Peak learning rate.
        betas: Of both kinds.
        eps: Of both kinds.
        weight_decay: Decoupled; norms, biases, tokens and positions have none.
        layer_decay: Factor of the learning rate from one block to the one before it; None: none.
        clip: Bound on the gradient's norm; None: none.
    """

    kind: Literal["adamw", "lamb"] = "adamw"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.02
    layer_decay: float | None = None
    clip: float | None = 1.0


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over time: a linear warm-up, then half a cosine.

    Attributes:
        steps: Optimiser steps in all.
        warmup: Steps until the peak.
        floor: The last learning rate, as a share of the peak.
    """

    steps: int
    warmup: int = 0
    floor: float = 0.01

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 <= self.warmup <= self.steps:
            raise ConfigError(
                f"A schedule needs at least 1 step and a warm-up within it, got {self.steps} and {self.warmup}."
            )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How the machine runs it.

    Attributes:
        accumulate: Micro-batches that each partition's batch is cut into.
        precision: ``bfloat16`` computes the student in mixed precision.
        parallel: ``ddp`` copies the student to every process, ``fsdp`` shards it (FSDP2).
        teacher_dropping: Probability that a teacher's loss on a picture is left out; the largest loss of each picture
            never is (UNIC, arXiv 2408.05088).
        loss_balancing: Scale each loss by its running magnitude.
        shift: Largest shift between what student and teacher see, in student patches (C-RADIOv4, arXiv 2601.17237).
        statistics: Pictures from which distributions of targets are estimated before training.
        checkpoint_minutes: Time between two saved states.
        checkpoint_steps: Steps between two saved states; None: by time only.
        keep: Saved states that are kept.
        log_steps: Steps between two lines of the log.
        tensorboard: Write TensorBoard files, if it is installed.
        wandb: Project of Weights & Biases to log to; None: no connection is made.
    """

    accumulate: int = 1
    precision: Literal["float32", "bfloat16"] = "float32"
    parallel: Literal["ddp", "fsdp"] = "ddp"
    teacher_dropping: float = 0.0
    loss_balancing: bool = False
    shift: int = 0
    statistics: int = 1024
    checkpoint_minutes: float = 30.0
    checkpoint_steps: int | None = None
    keep: int = 2
    log_steps: int = 10
    tensorboard: bool = True
    wandb: str | None = None

    def __post_init__(self) -> None:
        for name in ("accumulate", "statistics", "keep", "log_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"run.{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.teacher_dropping < 1 or self.shift < 0:
            raise ConfigError(
                f"run.teacher_dropping must be in [0, 1) and run.shift at least 0, got {self.teacher_dropping} and "
                f"{self.shift}."
            )


@dataclass(frozen=True, kw_only=True)
class HookConfig:
    """Something that is done to the student now and then, such as an evaluation.

    Attributes:
        kind: What; the command line knows ``knn``, ``zero-shot`` and ``pca``.
        name: For reports; default the kind.
        every: Steps between two times; it is also done at the end.
        options: Of the kind.
    """

    kind: str
    name: str | None = None
    every: int
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """A whole run.

    Attributes:
        name: Of the student.
        seed: Of everything random.
        data: Pictures.
        student: What is trained.
        teachers: What it is trained from.
        partitions: What a step consists of.
        optimizer: How weights are updated.
        schedule: How long.
        run: How the machine runs it.
        hooks: What is done now and then.
        licence: Of the student's weights, for the model card.
        notes: For the model card.
    """

    name: str
    seed: int = 0
    data: DataConfig
    student: StudentConfig
    teachers: tuple[TeacherConfig, ...]
    partitions: tuple[PartitionConfig, ...]
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig
    run: RunConfig = RunConfig()
    hooks: tuple[HookConfig, ...] = ()
    licence: str | None = None
    notes: str = ""

    def __post_init__(self) -> None:
        _check_unique("teacher", [t.name for t in self.teachers])
        _check_unique("partition", [p.name for p in self.partitions])
        known = [t.name for t in self.teachers]
        if not known or not self.partitions:
            raise ConfigError("A run needs at least one teacher and one partition.")
        for partition in self.partitions:
            for name in partition.teachers or ():
                if name not in known:
                    raise ConfigError(
                        f"The partition {partition.name!r} has the unknown teacher {name!r}. "
                        f"{nearest_names(name, known)}"
                    )
        taught = {t.name for p in self.partitions for t in self.teachers_of(p)}
        for name in known:
            if name not in taught:
                raise ConfigError(f"The teacher {name!r} is in no partition.")
        if self.data.cache_dir is not None:
            for teacher in self.teachers:
                if teacher.resolution is None or teacher.mosaic > 1 or self.run.shift:
                    raise ConfigError(
                        f"data.cache_dir: the targets of {teacher.name!r} cannot be cached. A cached teacher needs a "
                        "resolution of its own, no mosaic, and run.shift: 0."
                    )

    def teachers_of(self, partition: PartitionConfig) -> tuple[TeacherConfig, ...]:
        """The teachers that take part in a partition, in the order of the run."""
        return tuple(t for t in self.teachers if partition.teachers is None or t.name in partition.teachers)

    @property
    def identity(self) -> dict[str, str]:
        """A digest of each part that a saved state depends on, by name; a state is resumed only if all are equal."""
        run = {
            name: getattr(self.run, name)
            for name in ("accumulate", "precision", "teacher_dropping", "loss_balancing", "shift", "statistics")
        }
        elsewhere = ("sources", "workers", "cache_dir")  # pictures are compared by their number and names
        data = {k: v for k, v in to_json(self.data).items() if k not in elsewhere}
        teachers = [dataclasses.replace(t, shape=None, licence=None) for t in self.teachers]
        student = dataclasses.replace(self.student, checkpointing=False, compile=False)
        optimizer = {"kind": self.optimizer.kind}
        parts = {
            "seed": self.seed,
            "data": data,
            "student": to_json(student),
            "teachers": [to_json(t) for t in teachers],
            "partitions": [to_json(p) for p in self.partitions],
            "optimizer.kind": optimizer,
            "run": run,
        }
        return {name: digest(part) for name, part in parts.items()}


def digest(value: Any) -> str:
    """SHA-256, in hexadecimal, of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def config_names() -> list[str]:
    """The names of the configurations that the package carries, sorted."""
    folder = resources.files("amradio") / "configs"
    return sorted(f.name.removesuffix(SUFFIX) for f in folder.iterdir() if f.name.endswith(SUFFIX))


def load_config(name_or_path: str, overrides: Sequence[str] = ()) -> DistillConfig:
    """Read a configuration.

    Args:
        name_or_path: One of `config_names`, or a path that ends in ``.yaml``.
        overrides: Settings such as ``schedule.steps=100`` or ``teachers.0.weight=2``; values are YAML.

    Returns:
        The configuration.

    Raises:
        OptionError: There is no such configuration, or an override names no setting.
        ConfigError: The file is not YAML, or a setting is unknown, missing or has an impossible value.
    """
    import yaml

    text = _text_of(name_or_path)
    try:
        data = _parsed_yaml(text)
        settings = [(key, _parsed_yaml(value)) for key, value in map(_split_override, overrides)]
    except yaml.YAMLError as e:
        raise ConfigError(f"{name_or_path} is not YAML: {e}") from e
    if not isinstance(data, dict):
        raise ConfigError(f"{name_or_path} must hold settings by name, got {type(data).__name__}.")
    for key, value in settings:
        _override(data, key, value)
    return parse_config(data, name_or_path)


def parse_config(data: Mapping[str, Any], where: str = "config") -> DistillConfig:
    """Build a configuration from nested mappings, strictly.

    Args:
        data: What a YAML file holds.
        where: Name in messages.

    Raises:
        ConfigError: A setting is unknown, missing or has an impossible value.
    """
    for problem in _unknown_keys(DistillConfig, data, ""):
        raise ConfigError(f"{where}: {problem}")
    try:
        return from_json(DistillConfig, data, "")
    except ConfigError as e:
        raise ConfigError(f"{where}: {str(e).removeprefix('.')}") from e


def _parsed_yaml(text: str) -> Any:
    """YAML in which ``1e-3`` is a number, as everybody expects; YAML 1.1 wants a dot in it."""
    import yaml

    class Loader(yaml.SafeLoader):
        """A safe loader of our own, so that no other user of the library is affected."""

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))
    return yaml.load(text, Loader)


def _text_of(name_or_path: str) -> str:
    path = Path(name_or_path).expanduser()
    if path.suffix == SUFFIX or path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except OSError as e:
            raise OptionError(f"The configuration {path} cannot be read: {e.strerror}.") from e
    names = config_names()
    if name_or_path not in names:
        raise OptionError(
            f"There is no configuration {name_or_path!r}. {nearest_names(name_or_path, names)} A file of your own must "
            f"end in {SUFFIX}."
        )
    return (resources.files("amradio") / "configs" / f"{name_or_path}{SUFFIX}").read_text(encoding="utf-8")


def _split_override(word: str) -> tuple[str, str]:
    key, equals, value = word.partition("=")
    if not equals or not key:
        raise OptionError(f"A setting is written KEY=VALUE, such as schedule.steps=100, got {word!r}.")
    return key, value


def _override(data: Any, key: str, value: Any) -> None:
    """Set ``a.b.0.c``; mappings on the way are made, lists must be long enough."""
    *parents, last = key.split(".")
    for part in parents:
        data = data.setdefault(part, {}) if isinstance(data, dict) else _item(data, part, key)
    if isinstance(data, list):
        _item(data, last, key)
        data[int(last)] = value
    elif isinstance(data, dict):
        data[last] = value
    else:
        raise OptionError(f"{key} cannot be set: what is before {last!r} has no settings.")


def _item(data: Any, part: str, key: str) -> Any:
    if not isinstance(data, list) or not part.isdigit() or int(part) >= len(data):
        what = f"a list of {len(data)}" if isinstance(data, list) else "no list"
        raise OptionError(f"{key} cannot be set: {part!r} is no position in {what}.")
    return data[int(part)]


def _unknown_keys(hint: Any, data: Any, where: str) -> Iterator[str]:
    """What is misspelt, at any depth."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        kinds = [a for a in typing.get_args(hint) if a is not type(None)]
        hint = kinds[0] if len(kinds) == 1 else Any
    if typing.get_origin(hint) is tuple and isinstance(data, (list, tuple)):
        for i, item in enumerate(data):
            yield from _unknown_keys(typing.get_args(hint)[0], item, f"{where}.{i}" if where else str(i))
    if not dataclasses.is_dataclass(hint) or not isinstance(data, Mapping):
        return
    hints = typing.get_type_hints(hint)
    for key, value in data.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in hints:
            yield f"There is no setting {path!r}. {nearest_names(str(key), hints)}"
        else:
            yield from _unknown_keys(hints[key], value, path)


def _check_unique(what: str, names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"There are {names.count(name)} {what}s named {name!r}.")
