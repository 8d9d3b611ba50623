"""Pictures from sources to tensors of a supported size, in threads: Pillow decodes and resizes without the GIL."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from torch import Tensor

from amradio.errors import ImageError, ResolutionError
from amradio.features.timing import StageTimer
from amradio.images.decode import DRAFT_MARGIN, DecodeMode, upright_size
from amradio.images.resize import ResizePolicy, Resizer
from amradio.images.sources import ImageSource


@dataclass(frozen=True)
class DecodeOptions:
    """How pictures are read.

    Attributes:
        policy: To which size pictures are brought.
        snap: Maps (height, width) to the nearest size that the model supports.
        max_pixels: Budget of one picture; larger ones fail.
        background: RGB colour 0..255 behind transparent parts.
        mode: How much of a JPEG is decoded that will be made smaller anyway.
        resizer: What resizes.
    """

    policy: ResizePolicy
    snap: Callable[[int, int], tuple[int, int]]
    max_pixels: int
    background: tuple[int, int, int]
    mode: DecodeMode = "full"
    resizer: Resizer = "pillow"

    @property
    def at_least(self) -> tuple[int, int] | None:
        """(height, width) that a picture decoded smaller must cover; None: it is decoded in full."""
        return self.policy.covering_size(DRAFT_MARGIN) if self.mode == "draft" else None


@dataclass(frozen=True)
class LoadedPicture:
    """A picture on its way to the model, or the reason why it is not.

    Attributes:
        position: In the stream, from 0.
        source: Where it came from.
        size: (height, width) of the upright original; None if it failed before that was known.
        pixels: uint8 [3, H, W] at the size for the model; None if it failed.
        reason: Why it failed; None if it did not.
    """

    position: int
    source: ImageSource
    size: tuple[int, int] | None = None
    pixels: Tensor | None = None
    reason: str | None = None


def load_picture(position: int, source: ImageSource, options: DecodeOptions) -> LoadedPicture:
    """Decode and resize one picture.

    Args:
        position: In the stream.
        source: The picture.
        options: How.

    Returns:
        The picture. What is wrong with one picture is noted in it; other errors are raised.
    """
    size = None
    try:
        image = source.decode(max_pixels=options.max_pixels, background=options.background, at_least=options.at_least)
        size = upright_size(image)  # of the original, which rules the size for the model
        target = options.snap(*options.policy.target_size(*size))
        pixels = options.policy.pixels(image, target, options.resizer)  # [3, H, W]
    except (ImageError, ResolutionError) as error:
        return LoadedPicture(position, source, size, reason=str(error))
    return LoadedPicture(position, source, size, pixels)


def load_pictures(
    sources: Iterable[ImageSource], options: DecodeOptions, workers: int, look_ahead: int, timer: StageTimer
) -> Generator[LoadedPicture, None, None]:
    """Load pictures ahead of their use.

    Args:
        sources: Read lazily.
        options: How each is loaded.
        workers: Threads.
        look_ahead: How many pictures at most are loaded, or being loaded, before they are asked for.
        timer: Gets the decode stage's seconds.

    Yields:
        One `LoadedPicture` for each source, in order.
    """

    def load(position: int, source: ImageSource) -> LoadedPicture:
        with timer.busy("decode"):
            return load_picture(position, source, options)

    numbered = enumerate(sources)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="amradio-decode")
    try:
        pending: deque[Future[LoadedPicture]] = deque()
        while True:
            with timer.waiting("decode"):
                for position, source in itertools.islice(numbered, look_ahead - len(pending)):
                    pending.append(pool.submit(load, position, source))
                if not pending:
                    return
                picture = pending.popleft().result()
            yield picture
    finally:  # also when the consumer stops early
        pool.shutdown(wait=True, cancel_futures=True)
