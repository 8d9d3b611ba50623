"""Pictures with masks, read and prepared in threads, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from amradio.errors import DatasetError, ImageError, ResolutionError
from amradio.evals.linear_seg.augment import augmented, scaled
from amradio.evals.linear_seg.config import LinearSegProtocol
from amradio.images.decode import to_uint8_tensor
from amradio.images.resize import ResizePolicy

if TYPE_CHECKING:
    from PIL.Image import Image

    from amradio.images.segmentation import SegmentationSample

IMAGENET_MEAN = (0.485, 0.456, 0.406)


@dataclass(frozen=True)
class Sample:
    """A picture as the backbone is to see it, or the reason why not.

    Attributes:
        position: In its set.
        sample: Where it comes from.
        views: uint8 [3, H, W]: the picture at each size that is asked for.
        mask: uint8 [H', W'].
        size: (height, width) of the file.
        reason: Why it is unusable; None if it is not.
    """

    position: int
    sample: SegmentationSample
    views: tuple[Tensor, ...] = ()
    mask: Tensor | None = None
    size: tuple[int, int] | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Reader:
    """Reads pictures for one protocol.

    Attributes:
        policy: The resolution; see `amradio.evals.linear_seg.linear_seg_policy`.
        snap: Maps (height, width) to the nearest size that the backbone supports.
        protocol: About sizes, padding and augmentation.
        max_pixels: Budget of one picture.
        background: RGB colour 0..255 behind transparent parts.
        workers: Threads.
        ahead: Pictures that are held ready.
    """

    policy: ResizePolicy
    snap: Callable[[int, int], tuple[int, int]]
    protocol: LinearSegProtocol
    max_pixels: int
    background: tuple[int, int, int]
    workers: int
    ahead: int

    @property
    def fill(self) -> tuple[float, float, float]:
        """RGB colour 0..1 of what is added to pictures."""
        return (0.0, 0.0, 0.0) if self.protocol.padding == "black" else IMAGENET_MEAN

    def target(self, size: tuple[int, int], scale: float = 1.0) -> tuple[int, int]:
        """The size (height, width) at which a picture of another size is seen."""
        if self.protocol.snapped:
            height, width = self.policy.target_size(*size)
            return self.snap(round(height * scale), round(width * scale))
        return scaled(size, self.policy.size[0] * scale, self.protocol.longest)

    def evaluated(
        self, samples: Iterable[tuple[int, SegmentationSample]], scales: tuple[float, ...], *, original: bool
    ) -> Iterator[Sample]:
        """Read pictures as they are evaluated.

        Args:
            samples: Positions and pictures.
            scales: One view for each.
            original: Whether masks keep their size; otherwise they get that of the view at scale 1.
        """

        def prepare(picture: Image, mask: np.ndarray, _: int) -> dict[str, Any]:
            size = (mask.shape[0], mask.shape[1])
            views = tuple(_resized(picture, self.target(size, scale)) for scale in scales)
            truth = mask if original else _nearest(mask, self.target(size))
            return {"views": views, "mask": torch.from_numpy(truth), "size": size}

        yield from self._read(((0, *item) for item in samples), prepare)

    def crops(self, samples: Iterable[tuple[int, int, SegmentationSample]], seed: int) -> Iterator[Sample]:
        """Read pictures as they are trained on, each varied at random.

        Args:
            samples: Places in the training, positions and pictures.
            seed: What is drawn depends on it and on the place, not on threads or processes.
        """
        options = self.protocol.augmentation
        assert options is not None
        side = self.policy.size[0]
        red, green, blue = (round(255 * c) for c in self.fill)

        def prepare(picture: Image, mask: np.ndarray, place: int) -> dict[str, Any]:
            rng = np.random.default_rng((seed, place))
            pixels, truth = augmented(picture, mask, side, options, (red, green, blue), rng)
            view = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()  # [3, side, side]
            return {"views": (view,), "mask": torch.from_numpy(truth), "size": (mask.shape[0], mask.shape[1])}

        yield from self._read(samples, prepare)

    def _read(
        self,
        samples: Iterable[tuple[int, int, SegmentationSample]],
        prepare: Callable[[Image, np.ndarray, int], dict[str, Any]],
    ) -> Iterator[Sample]:
        def load(place: int, position: int, sample: SegmentationSample) -> Sample:
            try:
                picture, mask = sample.load(max_pixels=self.max_pixels, background=self.background)
                return Sample(position, sample, **prepare(picture, mask, place))
            except (ImageError, DatasetError, ResolutionError) as error:
                return Sample(position, sample, reason=str(error))

        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="amradio-masks")
        try:
            pending: deque[Future[Sample]] = deque()
            for item in samples:
                pending.append(pool.submit(load, *item))
                if len(pending) > self.ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:  # also when the consumer stops early
            pool.shutdown(wait=True, cancel_futures=True)


def _resized(picture: Image, size: tuple[int, int]) -> Tensor:
    from PIL.Image import Resampling

    return to_uint8_tensor(picture.resize((size[1], size[0]), Resampling.BILINEAR))


def _nearest(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    from PIL import Image
    from PIL.Image import Resampling

    return np.array(Image.fromarray(mask).resize((size[1], size[0]), Resampling.NEAREST))
