"""SAM-COCO: how well SAM's decoder segments COCO's objects, given their boxes and a backbone's features.

The protocol of EfficientViT (Cai et al., ICCV 2023), by which RADIO's tables were made: each annotated box is a prompt,
one mask is taken, and its IoU with the annotated region is averaged over all objects.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from amradio.backbones.protocol import Backbone
from amradio.errors import DatasetError, ImageError, OptionError
from amradio.evals.report import EvalReport, Metric
from amradio.evals.runner import Measurement, Setup, model_record
from amradio.evals.streaming import own_part
from amradio.features.collect import Failure
from amradio.features.partition import check_same_set
from amradio.features.runner import FeatureRecord, is_out_of_memory
from amradio.images.resize import ResizePolicy
from amradio.sam import EncodedImage, MaskDecoder, SamPredictor
from amradio.sam.predictor import PreparedImage

if TYPE_CHECKING:
    from amradio.distributed import Group
    from amradio.images.segmentation.dataset import SegmentationSample
    from amradio.images.segmentation.objects import CocoInstances, Instance

SIZES = ("small", "medium", "large")
SMALL_BELOW, LARGE_FROM = 32**2, 96**2
"""Annotated areas, in pixels, that part COCO's sizes."""

_MAX_WORKERS = 8


@dataclass(frozen=True)
class SamCocoConfig:
    """What is counted.

    Attributes:
        protocol: ``clean``: regions of crowds are left out, as they are no single object. ``efficientvit``: as in the
            published script, crowds count, and an area right on the border of two sizes counts for both.
        mask: ``single``: the decoder gives one mask, as published; ``best``: of three, the one that it scores highest.
        sam: Where the decoder came from, for the report.
    """

    protocol: Literal["clean", "efficientvit"] = "clean"
    mask: Literal["single", "best"] = "single"
    sam: str = ""

    def wanted(self, instances: Sequence[Instance]) -> list[Instance]:
        """The objects of a picture that are asked for."""
        return [i for i in instances if self.protocol == "efficientvit" or not i.is_crowd]


class IouMeans:
    """Means of IoUs over objects, by class and by size, as objects come.

    Args:
        classes: How many there are.
        both_at_border: Whether an area right on the border of two sizes counts for both.
    """

    def __init__(self, classes: int, both_at_border: bool = False) -> None:
        self._both = both_at_border
        # Sums of IoUs and counts, of classes and of sizes.
        self._classes = torch.zeros(2, classes, dtype=torch.float64)
        self._sizes = torch.zeros(2, len(SIZES), dtype=torch.float64)

    def update(self, ious: Tensor, categories: Sequence[int], areas: Sequence[float]) -> None:
        """Add objects.

        Args:
            ious: [N] from 0 to 1.
            categories: Class of each.
            areas: Annotated area of each.
        """
        values = torch.stack([ious.double().cpu(), torch.ones(len(ious), dtype=torch.float64)])  # [2, N]
        self._classes.index_add_(1, torch.tensor(categories, dtype=torch.int64), values)
        area = torch.tensor(areas, dtype=torch.float64)
        if self._both:
            members = [area <= SMALL_BELOW, (area >= SMALL_BELOW) & (area <= LARGE_FROM), area >= LARGE_FROM]
        else:
            members = [area < SMALL_BELOW, (area >= SMALL_BELOW) & (area < LARGE_FROM), area >= LARGE_FROM]
        self._sizes += values @ torch.stack(members, 1).double()  # [2, 3]

    def reduce(self, group: Group | None) -> None:
        """Add up over processes."""
        if group is not None:
            self._classes, self._sizes = group.all_reduce_sum(self._classes), group.all_reduce_sum(self._sizes)

    @property
    def count(self) -> int:
        """Objects so far."""
        return int(self._classes[1].sum())

    @property
    def size_counts(self) -> dict[str, int]:
        """Objects of each size."""
        return {name: int(count) for name, count in zip(SIZES, self._sizes[1].tolist(), strict=True)}

    def class_means(self) -> dict[int, float]:
        """Mean IoU in percent of each class that occurs."""
        sums, counts = self._classes.tolist()
        return {i: 100 * s / n for i, (s, n) in enumerate(zip(sums, counts, strict=True)) if n}

    def metrics(self) -> dict[str, Metric]:
        """Mean over objects, over those of each size that occurs, and over classes."""
        sums, counts = self._sizes.tolist()
        of_sizes = {
            f"miou_{name}": Metric(100 * s / n, "%") for name, s, n in zip(SIZES, sums, counts, strict=True) if n
        }
        classes = self.class_means()
        return {
            "miou": Metric(100 * float(self._classes[0].sum()) / max(self.count, 1), "%"),
            **of_sizes,
            "miou_classes": Metric(sum(classes.values()) / max(len(classes), 1), "%"),
        }


def sam_policy(backbone: Backbone, decoder: MaskDecoder) -> ResizePolicy:
    """To which size pictures are brought: the decoder and the backbone's patches leave no choice."""
    side = decoder.grid * backbone.patch_size
    return ResizePolicy("longest", (side,)) if decoder.placement == "pad" else ResizePolicy("exact", (side, side))


def run_sam_coco(
    backbone: Backbone,
    decoder: MaskDecoder,
    data: CocoInstances,
    config: SamCocoConfig | None = None,
    setup: Setup | None = None,
) -> EvalReport:
    """Ask for each object by its box, and compare with its region.

    Args:
        backbone: The image encoder: a view of a ``sam`` adaptor, `amradio.sam.SamVision`, or any other one whose
            features the decoder takes.
        decoder: See `amradio.sam.load_sam`; on the backbone's device.
        data: Pictures, boxes and regions (`amradio.images.segmentation.objects.open_coco_instances`).
        config: What is counted.
        setup: Batch size, device, precision of the backbone, processes; its policy is `sam_policy`.

    Returns:
        The report, on every process. ``miou`` is the mean over objects in percent.

    Raises:
        DatasetError: No picture could be used, or none has an object.
        OptionError: What the decoder gives is not finite, or options do not fit together.
        ResolutionError: The backbone does not take pictures of the size that the decoder asks for.
    """
    run = _Run(backbone, decoder, data, config or SamCocoConfig(), setup or Setup(sam_policy(backbone, decoder)))
    return run.report()


@dataclass
class _Sample:
    """A picture with what is asked of it, or the reason why it cannot be used.

    Attributes:
        position: In the set.
        source: Where it comes from.
        prepared: As the encoder is to see it.
        instances: What is asked for.
        truth: bool [N, H, W] their regions.
        empty: Objects whose region has no pixel, which are left out.
        reason: Why the picture is unusable; None if it is not.
    """

    position: int
    source: SegmentationSample
    prepared: PreparedImage | None = None
    instances: Sequence[Instance] = ()
    truth: Tensor | None = None
    empty: int = 0
    reason: str | None = None


class _Run:
    """One evaluation on its way."""

    def __init__(
        self, backbone: Backbone, decoder: MaskDecoder, data: CocoInstances, config: SamCocoConfig, setup: Setup
    ) -> None:
        options = setup.options
        if options.decode != "full" or options.resizer != "pillow":
            raise OptionError(
                "Pictures and regions must match pixel by pixel, so SAM-COCO decodes in full (--decode full) and "
                "resizes with Pillow (--resizer pillow)."
            )
        check_same_set(data.pictures.images, setup.group)
        self.backbone, self.decoder, self.data, self.config, self.setup = backbone, decoder, data, config, setup
        self.predictor = SamPredictor(backbone, decoder, autocast=options.autocast)
        self.measurement = Measurement(backbone, setup)
        self.means = IouMeans(len(data.category_names), both_at_border=config.protocol == "efficientvit")
        self._failures: list[Failure] = []
        self._empty = 0

    def report(self) -> EvalReport:
        """Measure."""
        group, start = self.setup.group, time.perf_counter()
        with self.measurement.stage("evaluate"):
            batch: list[_Sample] = []
            for sample in self._samples():
                batch.append(sample)
                if len(batch) == self.setup.options.batch_size:
                    self._score(batch)
                    batch = []
            self._score(batch)
        self.means.reduce(group)
        failures, empty = self._failures, self._empty
        if group is not None:
            parts = group.all_gather_objects((failures, empty))
            failures, empty = [f for part, _ in parts for f in part], sum(n for _, n in parts)
        seconds = time.perf_counter() - start
        images = self.data.pictures.images
        ordered = sorted(failures, key=lambda f: f.position)
        self.measurement.record("eval", images, ordered, {"wall_s": seconds}, seconds)
        if not self.means.count:
            raise DatasetError(f"The pictures of {images.name} that could be used have no objects to ask for.")
        if empty:
            self.measurement.notes.append(f"{empty} annotated objects have no pixel, and were left out.")
        names = self.data.category_names
        return self.measurement.report(
            task="sam-coco",
            protocol=self._words(),
            config=self.config,
            metrics=self.means.metrics(),
            per_class={names[i]: value for i, value in self.means.class_means().items()},
            details={"instances": self.means.count, "instances_of_size": self.means.size_counts},
        )

    def _samples(self) -> Iterator[_Sample]:
        """The pictures of this process that have objects, in order; the others are noted."""
        options = self.setup.options
        ahead = options.look_ahead or 2 * options.batch_size
        workers = options.workers or min(os.cpu_count() or 1, _MAX_WORKERS)
        pool = ThreadPoolExecutor(workers, thread_name_prefix="amradio-sam")
        try:
            pending: deque[Future[_Sample]] = deque()
            for position in own_part(len(self.data), self.setup.group).tolist():
                pending.append(pool.submit(self._load, position))
                if len(pending) > ahead:
                    yield from self._noted(pending.popleft().result())
            while pending:
                yield from self._noted(pending.popleft().result())
        finally:  # also when the consumer stops early
            pool.shutdown(wait=True, cancel_futures=True)

    def _noted(self, sample: _Sample) -> Iterator[_Sample]:
        self._empty += sample.empty
        if sample.reason is not None:
            image = sample.source.image
            self._failures.append(Failure(sample.position, sample.source.id, image.location, sample.reason))
        if sample.truth is not None:
            yield sample
        else:
            self._seen(sample)

    def _load(self, position: int) -> _Sample:
        source, options = self.data.pictures[position], self.setup.options
        instances = self.config.wanted(self.data.instances[self.data.pictures.names[position]])
        try:
            picture, _ = source.load(max_pixels=options.max_pixels, background=options.background)
            drawn = [(i, i.mask(picture.height, picture.width)) for i in instances]
        except (ImageError, DatasetError) as error:
            return _Sample(position, source, reason=str(error))
        except (KeyError, TypeError, ValueError) as error:
            return _Sample(position, source, reason=f"its annotations are damaged: {error}")
        kept = [(i, mask) for i, mask in drawn if mask.any()]
        sample = _Sample(position, source, empty=len(drawn) - len(kept))
        if kept:
            sample.prepared = self.predictor.prepare(picture)
            sample.instances = [i for i, _ in kept]
            sample.truth = torch.from_numpy(np.stack([mask for _, mask in kept]))
        return sample

    def _score(self, batch: Sequence[_Sample]) -> None:
        if not batch:
            return
        encoded = self._encoded([s.prepared for s in batch if s.prepared is not None])
        for sample, image in zip(batch, encoded, strict=True):
            boxes = [i.box for i in sample.instances]
            found = self.predictor.predict(image, boxes=boxes, multimask=self.config.mask == "best")
            if not torch.isfinite(found.scores).all():
                raise OptionError(
                    f"The masks for {sample.source.image.location} are not finite numbers, so "
                    f"{model_record(self.backbone)['name']} does not work in this precision. Choose float32, or "
                    f"bfloat16 instead of float16."
                )
            assert sample.truth is not None
            truth = sample.truth.to(found.masks.device)
            ious = mask_ious(found.best().masks[:, 0], truth)
            self.means.update(ious, [i.category for i in sample.instances], [i.area for i in sample.instances])
            self._seen(sample)

    def _encoded(self, pictures: Sequence[PreparedImage]) -> list[EncodedImage]:
        """Encode together, or in halves when memory runs out."""
        try:
            return self.predictor.encode_batch(pictures)
        except (RuntimeError, MemoryError) as error:
            if len(pictures) == 1 or not is_out_of_memory(error):
                raise
        middle = len(pictures) // 2
        return [*self._encoded(pictures[:middle]), *self._encoded(pictures[middle:])]

    def _seen(self, sample: _Sample) -> None:
        if self.setup.on_record is not None:
            self.setup.on_record(FeatureRecord(sample.position, sample.source.image, None, reason=sample.reason))

    def _words(self) -> str:
        config, side = self.config, self.setup.policy.size[0]
        placed = f"longest side {side}, padded" if self.decoder.placement == "pad" else f"stretched to {side} x {side}"
        crowds = "crowds included" if config.protocol == "efficientvit" else "crowds left out"
        mask = "one mask" if config.mask == "single" else "of three masks the one that is scored highest"
        return (
            f"SAM-COCO, {config.protocol}: boxes of the annotations as prompts for the decoder of {self.decoder.name}, "
            f"{mask}; IoU with the annotated regions at the size of the pictures, mean over objects; {crowds}; {placed}"
        )


def mask_ious(masks: Tensor, truth: Tensor) -> Tensor:
    """Intersection over union of masks with regions one by one.

    Args:
        masks: bool [N, H, W].
        truth: bool [N, H, W]; no region is empty.

    Returns:
        float32 [N] from 0 to 1.
    """
    shared, either = (masks & truth).flatten(1).sum(1), (masks | truth).flatten(1).sum(1)
    return shared / either
