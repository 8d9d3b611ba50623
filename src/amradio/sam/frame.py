"""Where a picture lies in the square that an image encoder sees: coordinates go there, masks come back.

SAM scales a picture so that its longest side fills the square, and pads at the bottom and at the right (Kirillov et
al., arXiv 2304.02643, appendix A); SAM 3 stretches it. Coordinates count in pixels of the picture, x to the right and y
down. As in SAM, they are scaled as they are, and the prompt encoder adds half a pixel of the square.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from amradio.errors import OptionError

Placement = Literal["pad", "stretch"]
"""``pad``: the longest side fills the square, the rest is padded. ``stretch``: both sides fill it."""


@dataclass(frozen=True)
class Frame:
    """The place of one picture.

    Attributes:
        size: (height, width) of the picture in pixels.
        inner: (height, width) of the picture in the square, from the top left corner.
        side: Of the square, in pixels of the encoder's input.
        placement: How the picture came there.
    """

    size: tuple[int, int]
    inner: tuple[int, int]
    side: int
    placement: Placement = "pad"

    @classmethod
    def of(cls, height: int, width: int, side: int, placement: Placement = "pad") -> Frame:
        """Place a picture.

        Args:
            height: Of the picture, in pixels.
            width: Of the picture, in pixels.
            side: Of the square.
            placement: See `Placement`.

        Raises:
            OptionError: A number is below 1.
        """
        if min(height, width, side) < 1:
            raise OptionError(f"A picture of {height} x {width} (height x width) has no place in a square of {side}.")
        if placement == "stretch":
            return cls((height, width), (side, side), side, placement)
        scale = side / max(height, width)
        # Rounded half up, as SAM does; a picture thinner than half a pixel there keeps one.
        inner = max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)
        return cls((height, width), inner, side, placement)

    def to_square(self, xy: Tensor, prompt_side: int) -> Tensor:
        """Map coordinates of the picture to the square.

        Args:
            xy: [..., 2] x and y in pixels of the picture, on the CPU.
            prompt_side: Side of the square in the units of the prompt encoder.

        Returns:
            float32 [..., 2] in these units. Computed in float64, as a picture may be large.
        """
        (h, w), (inner_h, inner_w) = self.size, self.inner
        unit = prompt_side / self.side
        scale = torch.tensor([inner_w / w * unit, inner_h / h * unit], dtype=torch.float64)
        return (xy.double() * scale).float()

    def restore(self, logits: Tensor) -> Tensor:
        """Bring masks of the square to the picture: scale up, cut the padding off, scale to the picture's size.

        Args:
            logits: [..., m, m], of the whole square.

        Returns:
            float32 [..., height, width]. Both steps are bilinear with half-pixel centres, as published: thresholds are
            applied afterwards.
        """
        maps = logits.float().flatten(0, -3)[:, None]  # [K, 1, m, m]
        if self.placement == "pad":
            maps = _resized(maps, (self.side, self.side))[..., : self.inner[0], : self.inner[1]]
        maps = _resized(maps, self.size)  # [K, 1, height, width]
        return maps.reshape(*logits.shape[:-2], *self.size)


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    if not len(maps):  # which `interpolate` refuses
        return maps.new_zeros(0, maps.shape[1], *size)
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)
