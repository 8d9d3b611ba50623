"""What all protocols share: sizes, features of labelled pictures under a group, identities, the finished report."""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch

from amradio.backbones.adapter import Adapter
from amradio.backbones.protocol import Backbone, HasIdentity
from amradio.errors import DatasetError, OptionError
from amradio.evals.report import EvalReport, Metric
from amradio.features.collect import Failure, FeatureTable, collect
from amradio.features.manifest import describe_model, weights_digest
from amradio.features.runner import ExtractOptions, FeatureRecord
from amradio.fungi.wrapper import Wrapper, public_settings
from amradio.images.resize import ResizeMode, ResizePolicy
from amradio.models.view import RadioView

if TYPE_CHECKING:
    from amradio.distributed import Group
    from amradio.images.dataset import ImageSet

ClassRule = Literal["same", "subset", "numbers"]
"""How the classes of two sets must agree: ``same``: as many; ``subset``: those of the second occur in the first;
``numbers``: as ``subset``, and the numbers of classes count even where their names say otherwise."""

_SPEED_OPTIONS = ("batch_size", "look_ahead", "workers", "compile")  # of ExtractOptions: not part of a protocol
_LISTED_FAILURES = 1000  # more are counted, but not listed


@dataclass(frozen=True)
class Setup:
    """How pictures go through a backbone, and on which processes; every protocol takes one beside its own config.

    Attributes:
        policy: To which sizes pictures are brought; see `policy_for`.
        options: Batch size, device, precision.
        group: The processes that share the evaluation; None = alone.
        on_record: Called for each picture of this process; for a progress bar.
    """

    policy: ResizePolicy
    options: ExtractOptions = field(default_factory=ExtractOptions)
    group: Group | None = None
    on_record: Callable[[FeatureRecord], None] | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.group is None or self.group.is_main


def policy_for(
    backbone: Backbone,
    resolution: Sequence[int] = (),
    mode: ResizeMode | None = None,
    resize_multiple: int | None = None,
) -> ResizePolicy:
    """Decide to which sizes pictures are brought.

    Args:
        backbone: Knows what sizes must be multiples of, and which size suits it.
        resolution: One number: shortest side, aspect kept. (height, width): scaled to cover it, centre cut out. Empty:
            the backbone's preferred resolution, as a centre crop.
        mode: Another meaning of the numbers; see `ResizePolicy.parse`.
        resize_multiple: What sides are rounded to multiples of; default `min_resolution_step` of the backbone.

    Returns:
        The policy.

    Raises:
        OptionError: The numbers do not suit the mode, or there is no resolution and the backbone has no preferred one.
    """
    multiple = resize_multiple or backbone.min_resolution_step
    if not resolution and mode in (None, "crop"):
        if backbone.preferred_resolution is None:
            raise OptionError(
                f"{model_record(backbone)['name']} does not say which resolution suits it. Choose one: one number for "
                "the shortest side, or height and width for a centre crop."
            )
        resolution = tuple(backbone.preferred_resolution)
    return ResizePolicy.parse(resolution, mode, multiple)


class Measurement:
    """One evaluation on its way: runs the backbone over sets of pictures, takes times, makes the report.

    Args:
        backbone: What is evaluated.
        setup: How.
    """

    def __init__(self, backbone: Backbone, setup: Setup) -> None:
        self.backbone = backbone
        self.setup = setup
        self.notes: list[str] = []
        self._start = time.perf_counter()
        self._datasets: dict[str, dict[str, Any]] = {}
        self._timing: dict[str, Any] = {}
        self._pictures = 0
        self._feature_s = 0.0

    def features(self, role: str, images: ImageSet, *, gather: bool = True) -> FeatureTable:
        """Compute the summaries of a set of pictures.

        Args:
            role: What the set is for: ``train``, ``eval``, ...
            images: The pictures.
            gather: Under a group: whether every process gets all rows, or only its own.

        Returns:
            The rows of the pictures that worked. The summaries are in ``summaries["backbone"]``, float32 on the CPU.

        Raises:
            DatasetError: No picture worked.
            OptionError: A summary is not finite.
        """
        options = self.setup.options
        group = self.setup.group
        start = time.perf_counter()
        table = collect(
            images, self.backbone, self.setup.policy, options, group=group, gather=gather,
            on_record=self.setup.on_record,
        )  # fmt: skip
        seconds = time.perf_counter() - start
        failures = _all_failures(table, group)
        self.record(role, images, failures, table.timing, seconds)
        finite = table.summaries["backbone"].isfinite().all(1)  # [N]
        bad = _total(int((~finite).sum()), group)
        if bad:
            raise OptionError(
                f"{bad} of {len(images)} summaries of {images.name} are not finite numbers, so the model does not work "
                f"in {_dtype_name(options.autocast or _dtype_of(self.backbone))}. Choose float32, or bfloat16 instead "
                "of float16."
            )
        return table

    def record(
        self, role: str, images: ImageSet, failures: Sequence[Failure], timing: Mapping[str, Any], seconds: float
    ) -> None:
        """Note for the report that a set of pictures went through the backbone.

        `features` does this by itself; protocols that run the backbone in their own way call it. A role that is
        recorded again, as by several draws, adds up.

        Args:
            role: What the set is for.
            images: The pictures.
            failures: Those of all processes.
            timing: Of the stages.
            seconds: Of wall time.

        Raises:
            DatasetError: No picture worked.
        """
        if len(failures) == len(images):
            first = f" The first one, {failures[0].location}: {failures[0].reason}" if failures else ""
            raise DatasetError(f"None of the {len(images)} pictures of {images.name} could be used.{first}")
        self._datasets[role] = _merged(self._datasets.get(role), dataset_record(images, failures))
        self._timing[f"{role}_features"] = dict(timing)
        self._pictures += len(images) - len(failures)
        self._feature_s += seconds

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a part of the evaluation; appears as ``NAME_s`` in the report, added up over calls."""
        start = time.perf_counter()
        try:
            yield
        finally:
            key = f"{name}_s"
            self._timing[key] = self._timing.get(key, 0.0) + time.perf_counter() - start

    def report(
        self,
        *,
        task: str,
        protocol: str,
        config: object,
        metrics: Mapping[str, Metric],
        per_class: Mapping[str, float] | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> EvalReport:
        """Finish.

        Args:
            task: See `EvalReport`.
            protocol: See `EvalReport`.
            config: The protocol's dataclass.
            metrics: See `EvalReport`.
            per_class: See `EvalReport`.
            details: See `EvalReport`.

        Returns:
            The report, with everything that this measurement knows. Under a group it is made on every process; one of
            them writes it.
        """
        options, policy = self.setup.options, self.setup.policy
        resize = {"mode": policy.mode, "size": list(policy.size), "multiple": policy.multiple}
        own = dataclasses.asdict(cast(Any, config))
        gradients = fungi_record(self.backbone)
        if gradients is not None:
            own["fungi"] = gradients
        return EvalReport(
            task=task,
            protocol=protocol,
            metrics=dict(metrics),
            config={**own, "resize": resize, **options_record(options)},
            model=model_record(self.backbone),
            dataset=dict(self._datasets),
            environment=environment(self.backbone, options, self.setup.group),
            wall_s=time.perf_counter() - self._start,
            images_per_s=self._pictures / max(self._feature_s, 1e-9),
            timing=dict(self._timing),
            per_class=None if per_class is None else dict(per_class),
            notes=tuple(self.notes),
            details=dict(details or {}),
        )


def model_record(backbone: Backbone) -> dict[str, Any]:
    """Identity of a backbone: name, adaptor, source, digest, licence, sizes."""
    known = backbone.identity if isinstance(backbone, HasIdentity) else None  # None: a model that was never saved
    identity = {} if known is None else dataclasses.asdict(known)
    adaptor = backbone.name if isinstance(backbone, RadioView) and backbone.name != "backbone" else None
    source = str(identity.get("source") or type(backbone).__name__)
    if not any(identity.get(name) for name in ("sha256", "revision")) and isinstance(backbone, torch.nn.Module):
        identity["sha256_of_weights"] = weights_digest(backbone)
    return {
        "name": identity.get("version") or source,
        "adaptor": adaptor,
        **identity,
        "patch_size": backbone.patch_size,
        "summary_dim": backbone.summary_dim,
        "embed_dim": backbone.embed_dim,
        "min_resolution_step": backbone.min_resolution_step,
    }


def fungi_record(backbone: Backbone) -> dict[str, Any] | None:
    """With which settings gradients were put beside features, as JSON can hold it; None if there are none."""
    return json.loads(json.dumps(backbone.record)) if isinstance(backbone, Wrapper) else None


def built_record(backbone: Backbone) -> dict[str, Any]:
    """How a backbone was built: configuration, windows, interpolation of positions, precision, digest of its weights.

    Two backbones of one file can differ in all but the last. Of a wrapper that of the backbone inside is returned; see
    `fungi_record` for what it adds.
    """
    inner: Any = backbone
    while isinstance(getattr(inner, "base", None), Backbone):
        inner = inner.base
    options = public_settings(inner) if isinstance(inner, Adapter) else {}
    return {**describe_model(inner), **({"options": options} if options else {})}


def dataset_record(images: ImageSet, failures: Sequence[Failure]) -> dict[str, Any]:
    """Identity of a set of pictures, and which of them could not be used."""
    return {
        "name": images.name,
        "split": images.split,
        "count": len(images),
        "failed": len(failures),
        "classes": class_count(images) if images.labels is not None else None,
        "fingerprint": images.fingerprint,
        "failures": [{"path": f.location, "reason": f.reason} for f in failures[:_LISTED_FAILURES]],
    }


def options_record(options: ExtractOptions) -> dict[str, Any]:
    """The options that numbers may depend on, as JSON can hold them."""
    return {name: value for name, value in _plain(options).items() if name not in _SPEED_OPTIONS}


def environment(backbone: Backbone, options: ExtractOptions, group: Group | None) -> dict[str, Any]:
    """What the evaluation ran on."""
    from amradio import __version__

    device = options.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "amradio": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device.type,
        "device_name": name,
        "dtype": _dtype_name(_dtype_of(backbone)),
        "world_size": 1 if group is None else group.world_size,
        **{name: value for name, value in _plain(options).items() if name in _SPEED_OPTIONS},
    }


def labels_of(images: ImageSet) -> np.ndarray:
    """The labels of a set of which each picture must have one.

    Returns:
        int64 [N].

    Raises:
        DatasetError: Pictures without labels.
    """
    labels = images.labels
    missing = len(images) if labels is None else int((labels < 0).sum())
    if labels is None or missing:
        split = f", split {images.split!r}," if images.split else ""
        raise DatasetError(
            f"{missing} of {len(images)} pictures of {images.name}{split} have no label, and this evaluation needs the "
            "label of each. Give a folder with a folder for each class, or a list with labels. If this is a test "
            "split, whose labels are often kept secret, choose another."
        )
    return labels


def class_count(images: ImageSet) -> int:
    """How many classes a set has: as many as names, else one more than the largest label."""
    if images.class_names is not None:
        return len(images.class_names)
    return int(images.labels.max(initial=-1)) + 1 if images.labels is not None else 0


@dataclass(frozen=True)
class Pair:
    """Two sets whose classes agree.

    Attributes:
        evaluation: The set to classify, its labels under the numbers of the other set.
        num_classes: Of both together.
        notes: For the report.
    """

    evaluation: ImageSet
    num_classes: int
    notes: tuple[str, ...] = ()


def check_pair(train: ImageSet, evaluation: ImageSet, rule: ClassRule = "same") -> Pair:
    """Check that a set can be evaluated with the labels of another.

    Classes are told by their names where both sets have names, and where those of the second are among those of the
    first; otherwise by their numbers.

    Args:
        train: The labelled pictures to learn from.
        evaluation: The pictures to classify.
        rule: How their classes must agree.

    Returns:
        The set to classify under the right numbers, the number of classes, and notes for the report.

    Raises:
        DatasetError: Labels are missing, the classes do not agree, or both sets are the same pictures.
    """
    labels_of(train), labels_of(evaluation)
    if train.fingerprint == evaluation.fingerprint:
        raise DatasetError(
            f"The train and the evaluation set are the same {len(train)} pictures ({_named(train)}), so each would be "
            "found in what was learned from it. Choose another evaluation set or split."
        )
    classes, others = class_count(train), class_count(evaluation)
    if rule == "same" and classes != others:
        raise DatasetError(
            f"{_named(train)} has {classes} classes and {_named(evaluation)} has {others}, so their labels may not "
            "mean the same. If the evaluation set has some of the train set's classes, say classes='subset' "
            "(--classes subset)."
        )
    notes: list[str] = []
    if rule != "numbers":
        evaluation, notes = _by_name(train, evaluation)
    unknown = np.setdiff1d(labels_of(evaluation), labels_of(train))
    if len(unknown):
        shown = ", ".join(map(str, unknown[:5])) + (" ..." if len(unknown) > 5 else "")
        raise DatasetError(
            f"{len(unknown)} classes of {_named(evaluation)} have no picture in {_named(train)}: {shown}. No answer "
            "for them could be right."
        )
    shared = evaluation.shared_with(train)
    if shared:
        notes.append(
            f"{shared} of the {len(evaluation)} pictures to classify are in the train set too, and are found there."
        )
    return Pair(evaluation, classes, tuple(notes))


def _by_name(train: ImageSet, evaluation: ImageSet) -> tuple[ImageSet, list[str]]:
    """The evaluation set under the train set's numbers of classes, where names tell; and notes."""
    names, others = train.class_names, evaluation.class_names
    if names is None or others is None or names[: len(others)] == others:
        return evaluation, []
    number = {name: i for i, name in enumerate(names)}
    if len(number) == len(names) and set(others) <= set(number):
        mapped = np.array([number[name] for name in others], dtype=np.int64)[labels_of(evaluation)]
        return evaluation.relabelled(mapped, names), ["The classes of the two sets were matched by their names."]
    common = [name for name in others if name in number and others.index(name) != number[name]]
    if common:
        raise DatasetError(
            f"{_named(train)} and {_named(evaluation)} share some names of classes under other numbers: {common[0]!r} "
            f"is class {number[common[0]]} of the one and class {others.index(common[0])} of the other. Name the "
            "classes alike; or say classes='numbers' (--classes numbers) if only the numbers count."
        )
    i = next((i for i, (a, b) in enumerate(zip(names, others, strict=False)) if a != b), 0)
    return evaluation, [
        f"Train and evaluation set name their classes differently: class {i} is {names[i]!r} and {others[i]!r}. The "
        "numbers of the classes were used."
    ]


def _named(images: ImageSet) -> str:
    return f"{images.name} ({images.split})" if images.split else images.name


def _all_failures(table: FeatureTable, group: Group | None) -> list[Failure]:
    """The failures of all processes, each once, in the order of the pictures."""
    parts = [table.failures] if group is None else group.all_gather_objects(table.failures)
    return [f for _, f in sorted({f.position: f for part in parts for f in part}.items())]


def _total(count: int, group: Group | None) -> int:
    return count if group is None else int(group.all_reduce_sum(torch.tensor(count)))


def _merged(before: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """Add up what several draws from one set did; a single fingerprint then tells nothing, so they are listed."""
    if before is None:
        return new
    fingerprints = before.get("fingerprints", [before["fingerprint"]])
    return {
        **before,
        "count": before["count"] + new["count"],
        "failed": before["failed"] + new["failed"],
        "fingerprint": None,
        "fingerprints": [*fingerprints, new["fingerprint"]],
        "failures": [*before["failures"], *new["failures"]][:_LISTED_FAILURES],
    }


def _plain(options: ExtractOptions) -> dict[str, Any]:
    """Options as JSON can hold them, but for the device and for what is kept, which the protocol decides."""
    values = {f.name: getattr(options, f.name) for f in dataclasses.fields(options) if f.name not in ("device", "keep")}
    return {name: _dtype_name(v) if isinstance(v, torch.dtype) else v for name, v in values.items()}


def _dtype_of(backbone: Any) -> torch.dtype:
    dtype = getattr(backbone, "dtype", None)
    if isinstance(dtype, torch.dtype):
        return dtype
    parameters: Any = backbone.parameters() if isinstance(backbone, torch.nn.Module) else ()
    return next((p.dtype for p in parameters if p.is_floating_point()), torch.float32)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
