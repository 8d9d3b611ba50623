"""At which size a backbone sees a picture, as a rule that can be stated, saved and repeated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from amradio.errors import OptionError, ResolutionError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

Resizer = Literal["pillow", "torch"]
"""What resizes: ``pillow``, the reference, or ``torch``, faster and equal up to rounding. Under the mode ``crop``, it
is Pillow in either case, as torch cannot cut between two pixels."""

ResizeMode = Literal["shortest", "longest", "crop", "exact", "nearest"]
RESIZE_MODES: tuple[str, ...] = get_args(ResizeMode)

MAX_RESIZED_PIXELS = 2**25
"""Default bound on the result: 8192 x 4096. A 1 x 50,000 strip scaled by its shortest side would be 2.5 gigapixels."""


def scaled_size(
    height: int, width: int, size: Sequence[int], multiple: int = 1, *, inside: bool = False
) -> tuple[int, int]:
    """Scale a picture's size to a goal, keeping the aspect up to the rounding of each side to a multiple.

    The arithmetic of RADIO's evaluation tools, digit for digit: half-way cases go to the even multiple, and a side much
    thinner than the multiple rounds to 0 (`ResizePolicy` keeps it at one multiple).

    Args:
        height: Of the picture, in pixels.
        width: Of the picture, in pixels.
        size: One number: what the shortest side becomes. Two, (h, w): the smallest size that covers h x w.
        multiple: What both sides of the result are multiples of.
        inside: The longest side becomes the one number; the largest size that fits inside h x w.

    Returns:
        (height, width).
    """
    if len(size) == 1:
        goal = size[0]
        by_width = (width >= height) if inside else (width <= height)
    else:
        by_width = (height / width > size[0] / size[1]) != inside
        goal = size[1] if by_width else size[0]
    scaled = (goal / width * height, goal) if by_width else (goal, goal / height * width)
    return round(scaled[0] / multiple) * multiple, round(scaled[1] / multiple) * multiple


@dataclass(frozen=True)
class ResizePolicy:
    """How pictures are brought to sizes that a backbone accepts.

    Attributes:
        mode: ``shortest``: the shortest side becomes ``size[0]``, aspect kept. ``longest``: the longest side does.
            ``crop``: scaled to cover ``size`` = (h, w), then the centre is cut out. ``exact``: stretched to ``size``.
            ``nearest``: the picture's own size.
        size: One number or (height, width) in pixels, none for ``nearest``.
        multiple: Each side of the result is rounded to a multiple of this, half to even, and is at least one multiple.
        max_pixels: A result with more pixels than this is refused.

    Raises:
        OptionError: The numbers do not suit the mode.
    """

    mode: ResizeMode
    size: tuple[int, ...] = ()
    multiple: int = 1
    max_pixels: int = MAX_RESIZED_PIXELS

    def __post_init__(self) -> None:
        if self.mode not in RESIZE_MODES:
            raise OptionError(f"Unknown resize mode {self.mode!r}. Known modes: {', '.join(RESIZE_MODES)}.")
        wanted = {"shortest": 1, "longest": 1, "crop": 2, "exact": 2, "nearest": 0}[self.mode]
        if len(self.size) != wanted:
            meaning = {0: "no resolution", 1: "one number", 2: "two numbers, height and width"}[wanted]
            raise OptionError(f"Resize mode {self.mode!r} takes {meaning}, got {list(self.size)}.")
        if any(s < 1 for s in self.size) or self.multiple < 1 or self.max_pixels < 1:
            raise OptionError(
                f"Resolution, multiple and max_pixels must be at least 1, got {list(self.size)}, {self.multiple} and "
                f"{self.max_pixels}."
            )

    @classmethod
    def parse(
        cls,
        resolution: Sequence[int] | None,
        mode: ResizeMode | None = None,
        multiple: int = 1,
        max_pixels: int = MAX_RESIZED_PIXELS,
    ) -> ResizePolicy:
        """Make a policy from the numbers of a command line.

        Args:
            resolution: Nothing, one number or (height, width), in pixels.
            mode: Without one, nothing means ``nearest``, one number ``shortest`` and two ``crop``. With ``crop`` or
                ``exact``, one number stands for a square.
            multiple: What both sides of the result are multiples of.
            max_pixels: Bound on the result.

        Returns:
            The policy.

        Raises:
            OptionError: The numbers do not suit the mode.
        """
        size = tuple(resolution or ())
        if len(size) > 2:
            raise OptionError(f"A resolution is one number, or height and width, got {list(size)}.")
        if mode is None:
            by_count: tuple[ResizeMode, ...] = ("nearest", "shortest", "crop")
            mode = by_count[len(size)]
        if mode in ("crop", "exact") and len(size) == 1:
            size = size * 2
        return cls(mode, size, multiple, max_pixels)

    def __str__(self) -> str:
        size = " x ".join(map(str, self.size))
        text = {
            "shortest": f"shortest side {size}",
            "longest": f"longest side {size}",
            "crop": f"centre crop {size}",
            "exact": f"stretched to {size}",
            "nearest": "own size",
        }[self.mode]
        return text if self.multiple == 1 else f"{text}, to multiples of {self.multiple}"

    def target_size(self, height: int, width: int) -> tuple[int, int]:
        """Compute the size that a picture is brought to.

        Args:
            height: Of the picture, in pixels.
            width: Of the picture, in pixels.

        Returns:
            (height, width), each a positive multiple of `multiple`.

        Raises:
            ResolutionError: The result would have more than `max_pixels` pixels.
        """
        if self.mode in ("shortest", "longest"):
            target = scaled_size(height, width, self.size, self.multiple, inside=self.mode == "longest")
        else:
            h, w = self.size or (height, width)
            target = round(h / self.multiple) * self.multiple, round(w / self.multiple) * self.multiple
        h, w = (max(side, self.multiple) for side in target)
        if h * w > self.max_pixels:
            raise ResolutionError(
                f"A picture of {height} x {width} (height x width) would become {h} x {w} under the policy "
                f"{str(self)!r}, more than {self.max_pixels:,} pixels. Choose a smaller resolution, or the mode "
                "'longest', 'crop' or 'exact', which bound both sides."
            )
        return h, w

    def covering_size(self, margin: float) -> tuple[int, int] | None:
        """Say from which size of any picture the result can be made by scaling down.

        Args:
            margin: How much larger than the result, in each direction.

        Returns:
            (height, width), for `amradio.images.decode.decode` as ``at_least``; None for ``nearest``, which scales
            nothing.
        """
        if not self.size:
            return None
        height, width = self.size if len(self.size) == 2 else self.size * 2
        return round((height + self.multiple / 2) * margin), round((width + self.multiple / 2) * margin)

    def apply(self, image: Image, size: tuple[int, int] | None = None) -> Image:
        """Resize a picture with an antialiased bicubic filter.

        With ``crop``, the largest centred region of the goal's aspect is resampled in one step, at sub-pixel precision:
        no side is rounded before the cut, so nothing is distorted and nothing is ever padded.

        Args:
            image: The picture.
            size: (height, width) to use instead of `target_size`, when the backbone accepts fewer sizes than the
                multiple says.

        Returns:
            The resized picture; the picture itself if it has the right size already.

        Raises:
            ResolutionError: The result would have more than `max_pixels` pixels.
        """
        from PIL.Image import Resampling

        h, w = size or self.target_size(image.height, image.width)
        if (image.height, image.width) == (h, w):
            return image
        box = _centre_box(image.height, image.width, h, w) if self.mode == "crop" else None
        return image.resize((w, h), Resampling.BICUBIC, box=box)

    def pixels(self, image: Image, size: tuple[int, int] | None = None, resizer: Resizer = "pillow") -> Tensor:
        """Resize a picture, as a tensor.

        Args:
            image: The picture, in RGB.
            size: See `apply`.
            resizer: What does the work; see `Resizer`.

        Returns:
            uint8 [3, H, W].

        Raises:
            ResolutionError: The result would have more than `max_pixels` pixels.
            ImageError: The picture is not in RGB.
        """
        from amradio.images.decode import channels_first, to_uint8_tensor

        h, w = size or self.target_size(image.height, image.width)
        if resizer == "pillow" or (image.height, image.width) == (h, w):
            return to_uint8_tensor(self.apply(image, (h, w)))
        from torch.nn.functional import interpolate

        # Bytes, with the channels last in memory, take torch's fast path for pictures.
        pixels = channels_first(image)[None]  # [1, 3, H, W]
        if self.mode == "crop":  # to whole pixels, for torch knows no others: off by half a source pixel at most
            left, top, right, bottom = map(round, _centre_box(image.height, image.width, h, w))
            pixels = pixels[..., top:bottom, left:right]
        return interpolate(pixels, (h, w), mode="bicubic", antialias=True, align_corners=False)[0].contiguous()


def _centre_box(height: int, width: int, h: int, w: int) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of the largest centred region with the aspect of h x w."""
    scale = min(height / h, width / w)  # source pixels for one pixel of the result
    left, top = (width - w * scale) / 2, (height - h * scale) / 2
    # Not left + w * scale, which can exceed the picture by a rounding error, and Pillow refuses that.
    return max(left, 0.0), max(top, 0.0), min(width - left, float(width)), min(height - top, float(height))
