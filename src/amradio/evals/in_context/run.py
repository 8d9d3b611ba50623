"""In-context segmentation: how well pictures are segmented by looking up their patches among labelled ones.

The retrieval evaluation of Balazevic et al. 2023, "Towards In-context Scene Understanding" (arXiv 2306.01667), as
open-hummingbird-eval published it. Nothing is trained, so the number says something about the patch features alone.
"""

from __future__ import annotations

import dataclasses
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from amradio.backbones.protocol import Backbone
from amradio.errors import DatasetError, OptionError, ResolutionError
from amradio.evals.classification import class_labels
from amradio.evals.in_context.build import (
    MemoryBuilder,
    PassResult,
    check_capacity,
    check_filled,
    check_k,
    gathered,
    require_rows,
)
from amradio.evals.in_context.config import InContextConfig
from amradio.evals.in_context.forward import Forward
from amradio.evals.in_context.layers import LayerBackbone
from amradio.evals.in_context.loader import ReadOptions, ReadyPair
from amradio.evals.in_context.memory import MemoryBank, patches_per_picture
from amradio.evals.in_context.metrics import iou, match, renamed
from amradio.evals.in_context.score import Memory, Scorer, check_search, describe_search
from amradio.evals.in_context.sheets import Sheet, SheetMaker, SheetOptions
from amradio.evals.in_context.store import check_same, load_memory, save_memory
from amradio.evals.report import EvalReport
from amradio.evals.runner import (
    Measurement,
    Setup,
    built_record,
    fungi_record,
    model_record,
    options_record,
    policy_for,
)
from amradio.evals.streaming import own_part
from amradio.features.collect import Failure
from amradio.features.partition import check_same_set
from amradio.features.runner import FeatureRecord
from amradio.images.resize import ResizePolicy

if TYPE_CHECKING:
    from amradio.images.resize import ResizeMode
    from amradio.images.segmentation import SegmentationSet

_MAX_WORKERS = 8


def in_context_policy(
    backbone: Backbone,
    resolution: Sequence[int] = (),
    mode: ResizeMode | None = None,
    resize_multiple: int | None = None,
) -> ResizePolicy:
    """Decide to which sizes pictures are brought.

    Args:
        backbone: See `amradio.evals.runner.policy_for`.
        resolution: One number: a square of that side. (height, width). Pictures are stretched to it, so that all of
            each is scored. Empty: the backbone's preferred resolution.
        mode: Another meaning: ``shortest``, ``longest`` or ``nearest``.
        resize_multiple: What sides are rounded to multiples of; in the mode ``exact`` they must be.

    Raises:
        OptionError: There is no resolution, or the mode is ``crop``, which leaves out what is to be scored.
        ResolutionError: The backbone does not take pictures of this size.
    """
    if mode in (None, "exact"):
        size = tuple(resolution) or policy_for(backbone, (), None, resize_multiple).size
        policy = ResizePolicy.parse(size, "exact", resize_multiple or backbone.min_resolution_step)
    else:
        policy = policy_for(backbone, resolution, mode, resize_multiple)
    _check_policy(policy, backbone)
    return policy


def run_in_context(
    backbone: Backbone,
    train: SegmentationSet,
    val: SegmentationSet,
    config: InContextConfig | None = None,
    setup: Setup | None = None,
    *,
    memory_in: str | os.PathLike[str] | None = None,
    memory_out: str | os.PathLike[str] | None = None,
    sheets: SheetOptions | None = None,
    on_sheet: Callable[[Sheet], None] | None = None,
) -> list[EvalReport]:
    """Segment pictures by their neighbours among patches of labelled pictures, and score the result.

    Each picture goes through the backbone once, however many memory sizes there are. Under a group the processes share
    out the pictures; each holds the whole memory.

    Args:
        backbone: Its patch features are what is evaluated: any backbone, a view of an adaptor, or a wrapper such as
            `amradio.fungi.DenseFungiBackbone`. A ``similarity`` of its own is used in place of the cosine.
        train: The labelled pictures of which the memory is made.
        val: The pictures to segment.
        config: The protocol and its options.
        setup: Size of the pictures (`in_context_policy`), batch size, device, processes.
        memory_in: A file that `memory_out` wrote; training pictures are then not read.
        memory_out: Where the memory is written, with its protocol: the largest, if there are several.
        sheets: How many pictures get a contact sheet.
        on_sheet: Gets these sheets, each on the process that scored the picture; for each memory size.

    Returns:
        A report for each memory size, on every process.

    Raises:
        DatasetError: The classes of the two sets differ, the sets are the same, no picture could be used, or there is
            nothing but void.
        OptionError: Memory sizes, k, search or input do not fit together, or features are not finite.
        ResolutionError: The backbone does not take pictures of this size.
    """
    config = config or InContextConfig()
    setup = setup or Setup(in_context_policy(backbone))
    _check_sets(train, val)
    if config.layer is not None:
        backbone = LayerBackbone(backbone, config.layer, setup.options.device, norm=config.layer_norm)
    run = _Run(backbone, train, val, config, setup)
    run.measurement.notes += _overlap(train, val)
    bank = run.memory(memory_in)
    if memory_out is not None and setup.is_main:
        save_memory(bank, memory_out)
    return run.reports(run.sized(bank), sheets, on_sheet)


def build_memory(
    backbone: Backbone, train: SegmentationSet, config: InContextConfig | None = None, setup: Setup | None = None
) -> MemoryBank:
    """Make the memory of `run_in_context` alone, such as to draw FUNGI's negatives from.

    Args:
        backbone: See `run_in_context`.
        train: The labelled pictures.
        config: The protocol and its options; of several memory sizes the largest is made.
        setup: Size of the pictures, batch size, device, processes.

    Returns:
        The memory, on every process.

    Raises:
        DatasetError: No picture could be used, or there is nothing but void.
        OptionError: The memory is smaller than the number of pictures, or features are not finite.
        ResolutionError: The backbone does not take pictures of this size.
    """
    run = _Run(backbone, train, train, config or InContextConfig(), setup or Setup(in_context_policy(backbone)))
    bank = run.memory(None)
    return max((run.limited(bank, size) for size in run.config.memory_sizes), key=len)


class _Run:
    """One resolution."""

    def __init__(
        self,
        backbone: Backbone,
        train: SegmentationSet,
        val: SegmentationSet,
        config: InContextConfig,
        setup: Setup,
    ) -> None:
        self.backbone = backbone
        self.train = train
        self.val = val
        self.config = config
        self.setup = setup
        self.similarity = getattr(backbone, "similarity", None)
        _check_options(config, setup, backbone, self.similarity)
        for images in (train, val):
            check_same_set(images.images, setup.group)
        self.measurement = Measurement(backbone, setup)
        self.patches = self._patches()
        self.measurement.notes += check_capacity(config, len(train), self.patches)
        self.forward = Forward(backbone, setup.options, config.protocol)
        options = setup.options
        self.read = ReadOptions(
            setup.policy,
            backbone.get_nearest_supported_resolution,
            backbone.patch_size,
            options.max_pixels,
            options.background,
            options.workers or min(os.cpu_count() or 1, _MAX_WORKERS),
            options.look_ahead or 2 * options.batch_size,
        )
        self._datasets: dict[str, dict[str, Any]] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage; a GPU is waited for, so that its work counts where it was asked for."""
        with self.measurement.stage(name):
            yield
            if self.setup.options.device.type == "cuda":
                torch.cuda.synchronize(self.setup.options.device)

    def seen(self, pair: ReadyPair, reason: str | None) -> None:
        """Show progress."""
        if self.setup.on_record is not None:
            self.setup.on_record(FeatureRecord(pair.position, pair.sample.image, pair.size, reason=reason))

    def memory(self, path: str | os.PathLike[str] | None) -> MemoryBank:
        """The largest memory that is needed, computed or read."""
        about = self._about()
        if path is not None:
            bank = load_memory(path)
            check_same(bank, {k: v for k, v in about.items() if k not in ("per_picture", "ranked")}, path)
            self._check_enough(bank, path)
            self.measurement.notes.append(f"The memory was read from {os.fspath(path)}.")
            return bank
        group, count = self.setup.group, len(self.train) * self.config.augmentation_epochs
        builder = MemoryBuilder(
            self.train, self.config, self.forward, self.read, self.patches, self.similarity is None, self
        )
        own = own_part(count, group)
        start = time.perf_counter()
        part, result = builder.build(range(int(own[0]), int(own[-1]) + 1) if len(own) else range(0))
        self._finish("train", self.train, result, time.perf_counter() - start, self.config.augmentation_epochs)
        bank = dataclasses.replace(gathered(part, group), about=about)
        require_rows(bank, self.train)
        if self.patches is None:
            self.measurement.notes += check_filled(self.config, bank, len(self.train), self.backbone.patch_size)
        return bank

    def sized(self, bank: MemoryBank) -> list[Memory]:
        """The memories that were asked for, ready to be searched."""
        memories = []
        for size in self.config.memory_sizes:
            found = self.limited(bank, size)
            with self.stage("index"):
                memories.append(Memory(size, found, self.config, self.similarity, self.setup.options.device))
        return memories

    def limited(self, bank: MemoryBank, size: int | None) -> MemoryBank:
        """The part of the largest memory that is one of a size."""
        found = bank
        if size is not None:
            share = self._share(size)
            found = bank.limited(share)
            if self.config.protocol.spare_rows == "zeros" and (self.patches is None or share <= self.patches):
                found = found.padded(size)
        check_k(self.config.k, len(found))
        return found

    def reports(
        self, memories: list[Memory], sheets: SheetOptions | None, on_sheet: Callable[[Sheet], None] | None
    ) -> list[EvalReport]:
        """Score the evaluation set with each memory."""
        maker = None
        if sheets is not None and on_sheet is not None:
            maker = SheetMaker(sheets, self.train, self.config.protocol, self.read, on_sheet)
        scorer = Scorer(self.val, self.config, self.forward, self.read, memories, self, maker)
        own = own_part(len(self.val), self.setup.group)
        start = time.perf_counter()
        result = scorer.score(range(int(own[0]), int(own[-1]) + 1) if len(own) else range(0))
        self._finish("eval", self.val, result, time.perf_counter() - start)
        if len(memories) > 1:
            self.measurement.notes.append(f"Times are for all {len(memories)} memory sizes together.")
        return [self._report(memory) for memory in memories]

    def _report(self, memory: Memory) -> EvalReport:
        config, confusion = self.config, memory.confusion
        confusion.reduce(self.setup.group)
        names = class_labels(len(self.val.class_names), self.val.class_names)
        metrics = confusion.metrics(config.protocol.miou)
        values = iou(renamed(confusion.counts, match(confusion.counts, config.protocol.miou)))
        occurring = confusion.present.nonzero()[:, 0].tolist()
        pairs = confusion.counts.nonzero().tolist()
        report = self.measurement.report(
            task="in-context",
            protocol=self._words(memory),
            config=config,
            metrics={**metrics, "memory_patches": memory.metric},
            per_class={names[i]: 100 * float(values[i]) for i in occurring},
            details={
                "confusion": {
                    "classes": names,
                    "true_predicted_count": [[i, j, int(confusion.counts[i, j])] for i, j in pairs],
                },
                "memory_bytes": memory.bank.nbytes,
            },
        )
        own = {"memory_size": memory.size, "memory_rows": len(memory.bank)}
        datasets = {role: {**record, **self._datasets[role]} for role, record in report.dataset.items()}
        return dataclasses.replace(report, config={**report.config, **own}, dataset=datasets)

    def _words(self, memory: Memory) -> str:
        config = self.config
        size = "all patches" if memory.size is None else f"{memory.size:,} patches"
        epochs = f", {config.augmentation_epochs} epochs" if config.augmentation_epochs > 1 else ""
        how = "pictures as they are" if config.augmentation == "none" else "random crops and colours"
        at = "the size of the masks" if config.score_at == "original" else "the evaluated size"
        return (
            f"in-context segmentation: the {config.k} nearest patches of the memory vote with softmax(cosine / "
            f"{config.temperature:g}); memory of {size} of {len(self.train)} pictures{epochs}, {how}; search "
            f"{describe_search(config)}; scored at {at}; protocol {config.used_protocol}"
        )

    def _patches(self) -> int | None:
        """P, if all pictures have as many."""
        if self.setup.policy.mode != "exact":
            return None
        height, width = self.setup.policy.target_size(1, 1)
        return (height // self.backbone.patch_size) * (width // self.backbone.patch_size)

    def _share(self, size: int) -> int:
        return patches_per_picture(size, len(self.train), self.patches, self.config.augmentation_epochs)

    def _about(self) -> dict[str, Any]:
        """What a memory depends on."""
        config, policy, model = self.config, self.setup.policy, model_record(self.backbone)
        shares = [None if size is None else self._share(size) for size in config.memory_sizes]
        numbers = [share for share in shares if share is not None]
        return {
            "protocol": dataclasses.asdict(config.used_protocol),
            "model": {key: model.get(key) for key in ("name", "adaptor", "source", "sha256", "sha256_of_weights")},
            "built": built_record(self.backbone),
            "fungi": fungi_record(self.backbone),
            "options": options_record(self.setup.options),
            "layer": config.layer,
            "layer_norm": config.layer_norm,
            "embed_dim": self.backbone.embed_dim,
            "patch_size": self.backbone.patch_size,
            "resize": {"mode": policy.mode, "size": list(policy.size), "multiple": policy.multiple},
            "classes": list(self.train.class_names),
            "train": self.train.fingerprint,
            "pictures": len(self.train),
            "augmentation": config.augmentation,
            "augmentation_epochs": config.augmentation_epochs,
            "seed": config.seed,
            "storage": config.storage,
            "per_picture": max(numbers) if len(numbers) == len(shares) else None,
            "ranked": config.limited or not config.protocol.is_stream,
        }

    def _check_enough(self, bank: MemoryBank, path: str | os.PathLike[str]) -> None:
        held = bank.about.get("per_picture")
        for size in self.config.memory_sizes:
            wanted = None if size is None else self._share(size)
            enough = held is None or (wanted is not None and wanted <= held)
            if not enough or (wanted is not None and not bank.about.get("ranked")):
                has = "all patches, unordered" if held is None else f"{held} patches of each picture"
                asked = "all patches" if wanted is None else f"{wanted} patches of each picture"
                raise OptionError(
                    f"The memory {os.fspath(path)} holds {has}, and {asked} were asked for. Make a larger memory, or "
                    "choose a smaller size."
                )

    def _finish(self, role: str, images: SegmentationSet, result: PassResult, seconds: float, epochs: int = 1) -> None:
        """Note what happened in all processes.

        Raises:
            DatasetError: No picture could be used.
            OptionError: Features are not finite.
        """
        group = self.setup.group
        parts = [result] if group is None else group.all_gather_objects(result)
        failures: dict[int, Failure] = {f.position: f for part in parts for f in part.failures}
        ordered = [failures[position] for position in sorted(failures)]
        timing = {"wall_s": seconds, "passes": epochs}
        self.measurement.record(role, images.images, ordered, timing, seconds / epochs)
        self._datasets[role] = {
            "classes": len(images.class_names),
            "fingerprint": images.fingerprint,
            "layout": images.layout,
            "ignore_index": images.ignore_index,
        }
        bad = sorted({name for part in parts for name in part.not_finite})
        if bad:
            raise OptionError(
                f"The features of {len(bad)} of {len(images)} pictures of {images.name} are NaN or infinite, first "
                f"those of {bad[0]}, so {model_record(self.backbone)['name']} does not work in this precision. Choose "
                "float32, or bfloat16 instead of float16."
            )


def _check_policy(policy: ResizePolicy, backbone: Backbone) -> None:
    """Refuse sizes that would silently become others, and crops."""
    if policy.mode == "crop":
        raise OptionError(
            "A centre crop leaves out what is to be scored. Choose the mode exact, shortest, longest or nearest."
        )
    if policy.mode != "exact":
        return
    height, width = policy.size
    nearest = backbone.get_nearest_supported_resolution(*policy.target_size(height, width))
    if tuple(nearest) != (height, width):
        raise ResolutionError(
            f"Pictures of {height} x {width} (height x width) do not consist of whole patches: this backbone takes "
            f"multiples of {max(policy.multiple, backbone.min_resolution_step)}. Nearest: {nearest[0]} x {nearest[1]}."
        )


def _check_options(config: InContextConfig, setup: Setup, backbone: Backbone, similarity: object) -> None:
    _check_policy(setup.policy, backbone)
    if setup.options.decode != "full" or setup.options.resizer != "pillow":
        raise OptionError(
            "Pictures and masks must match pixel by pixel, so in-context segmentation decodes in full (--decode full) "
            "and resizes with Pillow (--resizer pillow)."
        )
    if config.protocol.is_stream and setup.policy.mode != "exact":
        raise OptionError(
            f"The protocol {config.protocol.name} needs one size for all pictures: mode 'exact', got "
            f"{setup.policy.mode!r}."
        )
    check_search(config)
    if similarity is not None and config.search != "exact":
        raise OptionError(
            f"The features of this backbone are not compared by an inner product, which is all that {config.search!r} "
            "can do. Use the exact search."
        )


def _check_sets(train: SegmentationSet, val: SegmentationSet) -> None:
    if len(train.class_names) != len(val.class_names) or train.class_names != val.class_names:
        pairs = zip(train.class_names, val.class_names, strict=False)
        first = next((f": class {i} is {a!r} and {b!r}" for i, (a, b) in enumerate(pairs) if a != b), "")
        raise DatasetError(
            f"The classes of {train.name} ({len(train.class_names)}) and {val.name} ({len(val.class_names)}) are not "
            f"the same{first}."
        )
    if not len(train) or not len(val):
        raise DatasetError(f"{(train if not len(train) else val).name} has no pictures.")
    if train.fingerprint == val.fingerprint:
        raise DatasetError(
            f"The train and the evaluation set are the same {len(train)} pictures of {train.name}, so each would be "
            "found in itself. Choose another split."
        )


def _overlap(train: SegmentationSet, val: SegmentationSet) -> list[str]:
    """Notes for the report if pictures are in both sets; each is warned of as well."""
    learnt = {train.images[i].location for i in range(len(train))}
    shared = [i for i in range(len(val)) if val.images[i].location in learnt]
    if not shared:
        return []
    note = (
        f"{len(shared)} of the {len(val)} pictures to segment are in the memory too, first {val[shared[0]].id}: their "
        "patches find themselves there, so the score is too good."
    )
    warnings.warn(note, stacklevel=3)
    return [note]
