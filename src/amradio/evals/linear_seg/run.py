"""Linear segmentation probe: what a linear map on frozen patch features can tell of the class of every pixel."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from amradio.backbones.protocol import Backbone
from amradio.errors import DatasetError, OptionError
from amradio.evals.classification import class_labels
from amradio.evals.differences import differences
from amradio.evals.in_context.memory import patch_counts
from amradio.evals.in_context.metrics import Confusion, iou
from amradio.evals.linear_seg.checkpoint import Checkpoint
from amradio.evals.linear_seg.config import LinearSegConfig, LinearSegProtocol
from amradio.evals.linear_seg.data import Reader, Sample
from amradio.evals.linear_seg.head import BatchNormLinear, LinearMap
from amradio.evals.linear_seg.inference import pixel_scores, segment, sliding_scores
from amradio.evals.linear_seg.maps import FeatureFile, FrozenMaps
from amradio.evals.linear_seg.ridge import HOLDOUT, RidgeSums, fit_ridge
from amradio.evals.linear_seg.store import load_head, save_head
from amradio.evals.linear_seg.train import Batch, batches_of, train_head
from amradio.evals.report import EvalReport
from amradio.evals.runner import Measurement, Setup, model_record, policy_for
from amradio.evals.streaming import own_part
from amradio.features.bucketing import batches_by_shape
from amradio.features.collect import Failure
from amradio.features.partition import check_same_set
from amradio.features.runner import FeatureRecord
from amradio.images.resize import ResizePolicy

if TYPE_CHECKING:
    from amradio.distributed import Group
    from amradio.images.resize import ResizeMode
    from amradio.images.segmentation import SegmentationSample, SegmentationSet

_MAX_WORKERS = 8


def linear_seg_policy(
    backbone: Backbone,
    resolution: Sequence[int] = (),
    mode: ResizeMode | None = None,
    resize_multiple: int | None = None,
) -> ResizePolicy:
    """Decide to which sizes pictures are brought.

    Args:
        backbone: See `amradio.evals.runner.policy_for`.
        resolution: One number: the shortest side. (height, width): pictures are stretched to it. Empty: the shortest
            side of the backbone's preferred resolution.
        mode: Another meaning: ``longest``, ``exact`` or ``nearest``.
        resize_multiple: What sides are rounded to multiples of.

    Raises:
        OptionError: There is no resolution, or the mode is ``crop``, which leaves out what is to be scored.
    """
    if mode == "crop":
        raise OptionError(
            "A centre crop leaves out what is to be scored. Choose the mode shortest, longest, exact or nearest."
        )
    size = tuple(resolution) or (min(policy_for(backbone, (), None, resize_multiple).size),)
    mode = mode or ("shortest" if len(size) == 1 else "exact")
    return ResizePolicy.parse(size, mode, resize_multiple or backbone.min_resolution_step)


def run_linear_seg(
    backbone: Backbone,
    train: SegmentationSet,
    val: SegmentationSet,
    config: LinearSegConfig | None = None,
    setup: Setup | None = None,
    *,
    head_in: str | os.PathLike[str] | None = None,
    head_out: str | os.PathLike[str] | None = None,
    cache: str | os.PathLike[str] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> EvalReport:
    """Fit a linear head on frozen patch features, and score what it makes of other pictures.

    Args:
        backbone: Its patch features are what is evaluated.
        train: The pictures to learn from.
        val: The pictures to segment.
        config: The protocol and its options.
        setup: Size of the pictures (`linear_seg_policy`), batch size, device, processes.
        head_in: A head that `head_out` wrote; nothing is fitted.
        head_out: Where the head is written.
        cache: Folder in which the features of `train` are kept for another run, under protocols that see every picture
            always alike; without it they lie in a temporary folder.
        checkpoint: File in which the state of the training is kept every few hundred steps. If it is there, training
            goes on from it.
        on_step: Gets number and loss of each training step.

    Returns:
        The report, on every process.

    Raises:
        DatasetError: The classes of the two sets differ, no picture could be used, or there is nothing but void.
        OptionError: Options do not fit together, or features are not finite.
        ResolutionError: The backbone does not take pictures of this size.
    """
    config = config or LinearSegConfig()
    setup = setup or Setup(linear_seg_policy(backbone))
    run = _Run(backbone, train, val, config, setup)
    if head_in is not None:
        head, details = run.read(head_in)
    else:
        head, details = run.fit(cache, checkpoint, on_step)
    if head_out is not None and setup.is_main:
        save_head(head, run.about(), head_out)
    return run.score(head, details)


class _Run:
    """One backbone at one resolution."""

    def __init__(
        self,
        backbone: Backbone,
        train: SegmentationSet,
        val: SegmentationSet,
        config: LinearSegConfig,
        setup: Setup,
    ) -> None:
        _check_sets(train, val)
        self.protocol = self.fitted = config.resolved()
        _check_options(config, setup, backbone)
        for images in (train, val):
            check_same_set(images.images, setup.group)
        self.backbone, self.train, self.val, self.config, self.setup = backbone, train, val, config, setup
        self.measurement = Measurement(backbone, setup)
        options = setup.options
        self.device = options.device
        self.maps = FrozenMaps(backbone, options, config.layers, layer_norm=config.layer_norm)
        self.reader = Reader(
            setup.policy,
            backbone.get_nearest_supported_resolution,
            self.protocol,
            options.max_pixels,
            options.background,
            options.workers or min(os.cpu_count() or 1, _MAX_WORKERS),
            options.look_ahead or 2 * options.batch_size,
        )
        self._failures: list[Failure] = []

    def about(self) -> dict[str, Any]:
        """What a head depends on."""
        model, policy, options = model_record(self.backbone), self.setup.policy, self.setup.options
        return {
            "protocol": dataclasses.asdict(self.protocol),
            "model": {key: model.get(key) for key in ("name", "adaptor", "sha256", "sha256_of_weights")},
            "layers": list(self.config.layers),
            "layer_norm": self.config.layer_norm,
            "resize": {"mode": policy.mode, "size": list(policy.size), "multiple": policy.multiple},
            "dtype": str(options.dtype),
            "autocast": str(options.autocast),
            "background": list(options.background),
            "classes": list(self.train.class_names),
        }

    def read(self, path: str | os.PathLike[str]) -> tuple[LinearMap, dict[str, Any]]:
        """Take a head from a file; returns it and where it comes from."""
        head, stored = load_head(path, self.about())
        self.fitted = LinearSegProtocol.of_record(stored["protocol"])
        notes = self.measurement.notes
        notes.append(f"The head was read from {os.fspath(path)}.")
        if different := list(differences("resize", stored.get("resize"), self.about()["resize"])):
            notes.append(f"It was fitted at another size: {'; '.join(different)}.")
        return head, {"head": os.fspath(path), "head_about": stored}

    def fit(
        self,
        cache: str | os.PathLike[str] | None,
        checkpoint: str | os.PathLike[str] | None,
        on_step: Callable[[int, float], None] | None,
    ) -> tuple[LinearMap, dict[str, Any]]:
        """Fit the head; returns it and what is worth knowing about the fit."""
        if self.protocol.solver == "ridge":
            return self._ridge()
        state = None if checkpoint is None else self._checkpoint(Path(checkpoint))
        with self._stage("fit"):
            if self.protocol.augmentation is not None:
                return self._trained(lambda first: self._crops(first, state), on_step, state)
            with _folder(cache) as folder:
                file = self._features(folder)
                return self._trained(lambda first: self._stored(file, first), on_step, state)

    def _checkpoint(self, path: Path) -> Checkpoint:
        about = {**self.about(), "train": self.train.fingerprint, "seed": self.config.seed}
        return Checkpoint(path, about, self.setup.group)

    def score(self, head: LinearMap, details: dict[str, Any]) -> EvalReport:
        """Segment the evaluation set."""
        config, val = self.config, self.val
        confusion = Confusion(len(val.class_names), val.ignore_index)
        start, self._failures = time.perf_counter(), []
        own = own_part(len(val), self.setup.group).tolist()
        samples = ((i, val[i]) for i in own)
        fitted = head.to(self.device)
        original = config.score_at == "original"
        with self._stage("evaluate"):
            for sample in self._usable(self.reader.evaluated(samples, config.scales, original=original)):
                assert sample.mask is not None
                views = [view.to(self.device).float() / 255 for view in sample.views]
                truth = sample.mask.to(self.device)
                size = (truth.shape[0], truth.shape[1])
                confusion.update(truth, segment(views, lambda v: self._scores(v, fitted), size, config.flip))
                self._seen(sample)
        self._finish("eval", val, time.perf_counter() - start)
        confusion.reduce(self.setup.group)
        names = class_labels(len(val.class_names), val.class_names)
        values, occurring = iou(confusion.counts), confusion.present.nonzero()[:, 0].tolist()
        return self.measurement.report(
            task="linear-seg",
            protocol=self._words(),
            config=config,
            metrics=confusion.metrics("present"),
            per_class={names[i]: 100 * float(values[i]) for i in occurring},
            details=details,
        )

    def _scores(self, image: Tensor, head: LinearMap) -> Tensor:
        """Scores [C, H, W] of the pixels of an image [3, H, W]."""

        def patches(images: Tensor) -> Tensor:
            return head(self.maps(images)).permute(0, 3, 1, 2)  # [B, C, h, w]

        def pixels(images: Tensor) -> Tensor:
            return pixel_scores(images, patches, self._multiple, self.reader.fill)

        if self.protocol.inference == "whole":
            return pixels(image[None])[0]
        side = round(self.setup.policy.size[0] * self.protocol.window)
        stride = max(int(side * self.protocol.stride), 1)
        return sliding_scores(image, side, stride, pixels, self.setup.options.batch_size)

    @property
    def _multiple(self) -> int:
        return max(self.setup.policy.multiple, self.backbone.min_resolution_step)

    def _pictures(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Position, features [P, D] and counts [P, C] of the training pictures of this process."""
        own = own_part(len(self.train), self.setup.group).tolist()
        start, self._failures = time.perf_counter(), []
        samples = self.reader.evaluated(((i, self.train[i]) for i in own), (1.0,), original=False)
        options = self.setup.options
        usable = self._usable(samples)
        ahead = options.look_ahead or 2 * options.batch_size
        for batch in batches_by_shape(usable, lambda s: s.views[0].shape, options.batch_size, ahead):
            maps = self.maps(torch.stack([s.views[0] for s in batch]))  # [B, h, w, D]
            masks = torch.stack([s.mask for s in batch if s.mask is not None])  # [B, H, W]
            counts = patch_counts(masks, masks.shape[1] // maps.shape[1], len(self.train.class_names))  # [B, P, C]
            for sample, features, found in zip(batch, maps.flatten(1, 2), counts, strict=True):
                yield sample.position, features, found
                self._seen(sample)
        self._finish("train", self.train, time.perf_counter() - start)

    def _ridge(self) -> tuple[LinearMap, dict[str, Any]]:
        classes = len(self.train.class_names)
        parts: list[RidgeSums] | None = None
        every = min(HOLDOUT, len(self.train))
        with self._stage("features"):
            for position, features, counts in self._pictures():
                if parts is None:
                    parts = [RidgeSums(features.shape[1], classes, self.device) for _ in range(2)]
                parts[position % every == every - 1 and every > 1].add(features, counts.to(self.device))
        if parts is None:  # this process has no picture
            parts = [RidgeSums(self._dim(), classes, self.device) for _ in range(2)]
        for part in parts:
            part.reduce(self.setup.group)
        if parts[0].weight + parts[1].weight == 0:
            raise DatasetError(f"All masks of {self.train.name} are void, so there is nothing to learn from.")
        with self._stage("fit"):
            found = fit_ridge(parts[0], parts[1], self.config.ridge)
        if not found.errors and len(self.config.ridge) > 1:
            self.measurement.notes.append(
                f"No picture could be held out to choose the regularisation on, so {found.strength:g} was taken."
            )
        errors = dict(zip(map(str, self.config.ridge), found.errors, strict=False))
        return found.head, {"ridge": found.strength, "held_out_error": errors}

    def _trained(
        self,
        batches: Callable[[int], Iterator[Batch]],
        on_step: Callable[[int, float], None] | None,
        checkpoint: Checkpoint | None,
    ) -> tuple[LinearMap, dict[str, Any]]:
        head = BatchNormLinear(self._dim(), len(self.train.class_names), self.config.seed).to(self.device)
        losses = train_head(head, batches, self.protocol, self.setup.group, on_step, checkpoint)
        return head.folded(), {"loss": losses}

    def _features(self, folder: Path) -> FeatureFile:
        """The features of this process's training pictures, computed or found in the folder."""
        group = self.setup.group
        about = {
            **self.about(),
            "train": self.train.fingerprint,
            "part": None if group is None else [group.rank, group.world_size],
        }
        del about["protocol"]
        name = "features" if group is None else f"features-{group.rank}"
        file = FeatureFile(folder / name, about)
        start, is_there = time.perf_counter(), file.load()
        if group is not None:
            is_there = all(group.all_gather_objects(is_there))
        if is_there:
            own = own_part(len(self.train), group).tolist()
            self._failures = [
                Failure(i, self.train[i].id, self.train[i].image.location, "not in the stored features")
                for i in own
                if i not in file.positions
            ]
            self.measurement.notes.append(f"The features of the training pictures were read from {folder}.")
            self._finish("train", self.train, time.perf_counter() - start)
            return file
        with self._stage("features"):
            file.write(self._pictures())
        return file

    def _stored(self, file: FeatureFile, first: int) -> Iterator[Batch]:
        dim, classes = self._dim(), len(self.train.class_names)
        for positions in batches_of(len(self.train), self.protocol, self.config.seed, first):
            found = [file.read(p) for p in positions if p in file.positions]
            features = torch.cat([torch.zeros(0, dim), *(f for f, _ in found)])  # [N, D]
            counts = torch.cat([torch.zeros(0, classes, dtype=torch.int32), *(c for _, c in found)])  # [N, C]
            yield Batch(features.to(self.device), counts.to(self.device))

    def _crops(self, first: int, checkpoint: Checkpoint | None) -> Iterator[Batch]:
        group, size = self.setup.group, self.protocol.batch_size
        rank, world = (0, 1) if group is None else (group.rank, group.world_size)
        start = time.perf_counter()
        failed: dict[int, Failure] = {}
        if checkpoint is not None:  # pictures that failed before a run was killed are in the report of the next
            failed = {f["position"]: Failure(**f) for f in checkpoint.found or ()}
            checkpoint.notes = lambda: [dataclasses.asdict(f) for f in _everyones(list(failed.values()), group)]

        def own() -> Iterator[tuple[int, int, SegmentationSample]]:
            for step, batch in enumerate(batches_of(len(self.train), self.protocol, self.config.seed, first), first):
                yield from ((step * size + k, batch[k], self.train[batch[k]]) for k in range(rank, size, world))

        stream = self.reader.crops(own(), self.config.seed)
        for _ in range(first, self.protocol.iterations):
            samples = [next(stream) for _ in range(rank, size, world)]
            failed |= {f.position: f for s in samples if (f := _failure(s)) is not None}
            yield self._batch([s for s in samples if s.reason is None])
        self._failures = list(failed.values())
        self._finish("train", self.train, time.perf_counter() - start)

    def _batch(self, samples: list[Sample]) -> Batch:
        side = self.setup.policy.size[0]
        if not samples:
            empty = torch.zeros(0, self._dim(), device=self.device)
            return Batch(empty, masks=torch.zeros(0, side, side, dtype=torch.uint8), grid=(1, 1))
        parts = []
        step = self.setup.options.batch_size
        for start in range(0, len(samples), step):
            parts.append(self.maps(torch.stack([s.views[0] for s in samples[start : start + step]])))
        maps = torch.cat(parts)  # [B, h, w, D]
        masks = torch.stack([s.mask for s in samples if s.mask is not None]).to(self.device)  # [B, S, S]
        return Batch(maps.flatten(0, 2), masks=masks, grid=(maps.shape[1], maps.shape[2]))

    def _dim(self) -> int:
        return self.backbone.embed_dim * max(len(self.config.layers), 1)

    def _usable(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        for sample in samples:
            failure = _failure(sample)
            if failure is None:
                yield sample
            else:
                self._failures.append(failure)
                self._seen(sample)

    def _seen(self, sample: Sample) -> None:
        if self.setup.on_record is not None:
            record = FeatureRecord(sample.position, sample.sample.image, sample.size, reason=sample.reason)
            self.setup.on_record(record)

    def _finish(self, role: str, images: SegmentationSet, seconds: float) -> None:
        failures = _everyones(self._failures, self.setup.group)
        self.measurement.record(role, images.images, failures, {"wall_s": seconds}, seconds)

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        with self.measurement.stage(name):
            yield
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)

    def _words(self) -> str:
        config = self.config
        at = "the size of the mask files" if config.score_at == "original" else "the evaluated size"
        published = self.fitted.is_published and self.protocol.is_published
        layers = f"; layers {list(config.layers)}" if config.layers else ""
        scales = f"; scales {list(config.scales)}" if config.scales != (1.0,) else ""
        return (
            f"linear segmentation probe, {self.fitted.name}: {self.fitted.how}; {self.protocol.where}{layers}{scales}"
            f"{'; mirrored too' if config.flip else ''}; masks scored at {at}; mIoU over classes that occur"
            f"{'' if published else '; not as published: options were changed'}"
        )


@contextmanager
def _folder(cache: str | os.PathLike[str] | None) -> Iterator[Path]:
    if cache is not None:
        yield Path(cache)
        return
    with tempfile.TemporaryDirectory(prefix="amradio-linear-seg-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def _everyones(failures: list[Failure], group: Group | None) -> list[Failure]:
    """The failures of all processes, in the order of pictures, each once."""
    parts = [failures] if group is None else group.all_gather_objects(failures)
    found = {f.position: f for part in parts for f in part}
    return [found[position] for position in sorted(found)]


def _failure(sample: Sample) -> Failure | None:
    if sample.reason is None:
        return None
    return Failure(sample.position, sample.sample.id, sample.sample.image.location, sample.reason)


def _check_options(config: LinearSegConfig, setup: Setup, backbone: Backbone) -> None:
    options, protocol, policy = setup.options, config.resolved(), setup.policy
    if options.decode != "full" or options.resizer != "pillow":
        raise OptionError(
            "Pictures and masks must match pixel by pixel, so the linear segmentation probe decodes in full (--decode "
            "full) and resizes with Pillow (--resizer pillow)."
        )
    if policy.mode == "crop":
        raise OptionError("A centre crop leaves out what is to be scored. Choose the mode shortest or exact.")
    needs_side = protocol.augmentation is not None or protocol.inference == "slide" or not protocol.snapped
    if needs_side and (policy.mode != "shortest" or len(policy.size) != 1):
        raise OptionError(
            f"The protocol {protocol.name} scales pictures by their shortest side and cuts out squares of it: give one "
            f"number as the resolution, in the mode shortest; got {policy}."
        )
    step = max(policy.multiple, backbone.min_resolution_step)
    if needs_side and policy.size[0] % step:
        nearest = max(round(policy.size[0] / step), 1) * step
        raise OptionError(
            f"Crops of {policy.size[0]} pixels do not consist of whole patches: this backbone takes multiples of "
            f"{step}. Nearest: {nearest}."
        )


def _check_sets(train: SegmentationSet, val: SegmentationSet) -> None:
    if train.class_names != val.class_names:
        raise DatasetError(
            f"The classes of {train.name} ({len(train.class_names)}) and {val.name} ({len(val.class_names)}) are not "
            "the same."
        )
    for images in (train, val):
        if not len(images):
            raise DatasetError(f"{images.name} has no pictures.")
    if train.fingerprint == val.fingerprint:
        raise DatasetError(f"{train.name} is both what is learnt from and what is scored. Name two different parts.")
