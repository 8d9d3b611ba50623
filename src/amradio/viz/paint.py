"""Feature maps of one or several photos as colours that can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from amradio.viz.foreground import foreground_masks
from amradio.viz.pca import fit_basis, to_picture
from amradio.viz.upsample import Upsampling, upsample

if TYPE_CHECKING:
    from PIL.Image import Image

BACKGROUND = 0.08
"""Grey value of what is not foreground."""


@dataclass(frozen=True)
class PCAStyle:
    """How features become colours.

    Attributes:
        joint: One basis for all maps, so that equal colours mean similar features; otherwise one for each, which shows
            more of a single photo.
        skip: Leading components to leave out.
        foreground: Fit the colours to the foreground alone and leave the rest dark, see
            `amradio.viz.foreground.foreground_masks`.
        robust: Leave outliers out of the range of colours.
        upsample: How maps are brought to the size of their photos.
    """

    joint: bool = True
    skip: int = 0
    foreground: bool = False
    robust: bool = True
    upsample: Upsampling = "bilinear"


def pca_pictures(maps: Sequence[Tensor], photos: Sequence[Image], style: PCAStyle | None = None) -> list[Image]:
    """Draw the principal components of feature maps.

    Args:
        maps: [h, w, C] each, of one width C.
        photos: One for each map, in RGB; pictures are as large as they are.
        style: How.

    Returns:
        A picture in RGB for each map.

    Raises:
        OptionError: See `amradio.viz.fit_basis`.
    """
    style = style or PCAStyle()
    if style.joint:
        return _painted(maps, photos, style)
    return [_painted([one], [photo], style)[0] for one, photo in zip(maps, photos, strict=True)]


def _painted(maps: Sequence[Tensor], photos: Sequence[Image], style: PCAStyle) -> list[Image]:
    masks = foreground_masks(maps) if style.foreground else None
    shown = maps if masks is None else [m[mask] for m, mask in zip(maps, masks, strict=True) if mask.any()]
    basis = fit_basis(shown, skip=style.skip, robust=style.robust)
    pictures = []
    for i, (features, photo) in enumerate(zip(maps, photos, strict=True)):
        size = (photo.height, photo.width)
        rgb = upsample(basis.rgb(features), size, style.upsample, photo)  # [H, W, 3]
        if masks is not None:
            # Not guided: each speck of the photo would get a border of its own.
            method: Upsampling = "nearest" if style.upsample == "nearest" else "bilinear"
            inside = upsample(masks[i][..., None].float(), size, method) > 0.5  # [H, W, 1]
            rgb = torch.where(inside, rgb, BACKGROUND)
        pictures.append(to_picture(rgb))
    return pictures
