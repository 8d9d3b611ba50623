"""Feature maps as colour pictures: the first three principal components become red, green and blue.

The recipe is that of RADIO's visualiser (features are centred for the fit, the colours are scaled between the extremes
of what is not an outlier), with an exact solver in float64 and a fixed sign, so that the same features always give the
same picture. Similar colours mean similar features within one basis; colours of different bases cannot be compared,
which is why one basis can be fitted over several maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from amradio.errors import OptionError
from amradio.viz.upsample import Upsampling, upsample

if TYPE_CHECKING:
    from PIL.Image import Image

OUTLIER_RATIO = 2.0
"""Values that deviate from the median by this many median deviations do not take part in the scaling of colours."""

CHANNELS = 3


@dataclass(frozen=True)
class PCABasis:
    """Three directions in feature space and the range of values that spans black to full colour.

    Attributes:
        matrix: [C, 3] float64, orthonormal columns; each column's entry of largest magnitude is positive.
        minimum: [3] float64: the projection that becomes 0.
        maximum: [3] float64: the projection that becomes 1.
    """

    matrix: Tensor
    minimum: Tensor
    maximum: Tensor

    def rgb(self, features: Tensor) -> Tensor:
        """Colour features.

        Args:
            features: [..., C].

        Returns:
            float32 [..., 3] in [0, 1]. A channel without any variation is 0.5 everywhere.

        Raises:
            OptionError: The features have another width than the basis.
        """
        if features.shape[-1] != len(self.matrix):
            raise OptionError(
                f"The basis was fitted on features of width {len(self.matrix)}, got shape {list(features.shape)}; "
                "channels come last."
            )
        colours = features.to(self.matrix) @ self.matrix  # [..., 3]
        extent = self.maximum - self.minimum
        scaled = (colours - self.minimum) / extent.where(extent > 0, 1.0)
        return scaled.where(extent > 0, 0.5).clamp(0, 1).float()


def fit_basis(features: Tensor | Sequence[Tensor], *, skip: int = 0, robust: bool = True) -> PCABasis:
    """Fit the colours of one or several feature maps.

    Args:
        features: [..., C], or several of these with the same C, at the same or different sizes.
        skip: Leading components to leave out; the first often only tells the object from the background.
        robust: Scale the colours between the extremes of what is not an outlier (`colour_range`); otherwise between the
            extremes of all values.

    Returns:
        The basis. With fewer than ``3 + skip`` positions or channels the missing directions are zero.

    Raises:
        OptionError: There is no feature, widths differ, or values are not finite.
    """
    if skip < 0:
        raise OptionError(f"skip must be at least 0, got {skip}.")
    x = feature_rows(features)
    directions = principal_directions(x, skip + CHANNELS)[:, skip:]  # [C, <= 3]
    matrix = F.pad(directions, (0, CHANNELS - directions.shape[1]))  # [C, 3]
    colours = x @ matrix  # [N, 3]
    minimum, maximum = colour_range(colours) if robust else (colours.amin(dim=0), colours.amax(dim=0))
    return PCABasis(matrix, minimum, maximum)


def pca_rgb(features: Tensor, basis: PCABasis | None = None, *, skip: int = 0) -> Tensor:
    """Colour one feature map.

    Args:
        features: [h, w, C] or any [..., C].
        basis: To use one basis for several maps; fitted on this map if not given.
        skip: See `fit_basis`.

    Returns:
        float32 [..., 3] in [0, 1].

    Raises:
        OptionError: See `fit_basis` and `PCABasis.rgb`.
    """
    return (basis or fit_basis(features, skip=skip)).rgb(features)


def colour_range(colours: Tensor) -> tuple[Tensor, Tensor]:
    """Find the extremes of each channel, outliers left out.

    A value is an outlier when its distance from the channel's median is at least `OUTLIER_RATIO` times the median of
    these distances. Of an even number of values, the median is the lower of the two in the middle, as in the published
    recipe.

    Args:
        colours: [N, 3].

    Returns:
        Minimum and maximum, [3] each. Where the median distance is 0, all values count.
    """
    distance = (colours - colours.median(dim=0).values).abs()
    typical = distance.median(dim=0).values
    kept = (distance < OUTLIER_RATIO * typical) | (typical == 0)  # [N, 3]
    return (
        colours.where(kept, torch.inf).amin(dim=0),
        colours.where(kept, -torch.inf).amax(dim=0),
    )


def to_picture(
    rgb: Tensor,
    size: tuple[int, int] | None = None,
    interpolation: Upsampling = "bilinear",
    guide: Image | None = None,
) -> Image:
    """Turn colours into a picture, enlarged to the size of the photo they belong to.

    Args:
        rgb: [h, w, 3] in [0, 1].
        size: (height, width) in pixels; one pixel for each position if not given.
        interpolation: See `amradio.viz.upsample.Upsampling`; ``nearest`` shows the true grid.
        guide: For ``guided``: the photo, of this size.

    Returns:
        A picture in RGB.

    Raises:
        OptionError: See `amradio.viz.upsample.upsample`.
    """
    from PIL import Image

    maps = rgb.float().cpu() if size is None else upsample(rgb.cpu(), size, interpolation, guide)  # [H, W, 3]
    pixels = (maps.clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.contiguous().numpy())


def side_by_side(pictures: Sequence[Image], gap: int = 8, background: tuple[int, int, int] = (255, 255, 255)) -> Image:
    """Join pictures horizontally, tops aligned.

    Args:
        pictures: At least one, in RGB.
        gap: Pixels between two of them.
        background: Colour of gaps, and below pictures that are lower than the highest.

    Returns:
        One picture.

    Raises:
        OptionError: There is no picture.
    """
    from PIL import Image

    if not pictures:
        raise OptionError("There are no pictures to join.")
    width = sum(p.width for p in pictures) + gap * (len(pictures) - 1)
    canvas = Image.new("RGB", (width, max(p.height for p in pictures)), background)
    left = 0
    for picture in pictures:
        canvas.paste(picture, (left, 0))
        left += picture.width + gap
    return canvas


def feature_rows(features: Tensor | Sequence[Tensor]) -> Tensor:
    """All positions of all maps as float64 [N, C].

    Raises:
        OptionError: There is no feature, widths differ, or values are not finite.
    """
    maps = [features] if isinstance(features, Tensor) else list(features)
    if not maps or any(m.ndim < 1 or m.numel() == 0 for m in maps):
        raise OptionError("There are no features to fit colours on.")
    widths = sorted({m.shape[-1] for m in maps})
    if len(widths) > 1:
        raise OptionError(f"One basis needs features of one width, got widths {widths}; channels come last.")
    x = torch.cat([m.detach().double().flatten(0, -2) if m.ndim > 1 else m.detach().double()[None] for m in maps])
    if not x.isfinite().all():
        raise OptionError(
            f"{int((~x.isfinite()).sum())} of {x.numel()} feature values are not finite; a model in float16 may have "
            "overflowed: run it in bfloat16 or float32."
        )
    return x  # [N, C]


def principal_directions(x: Tensor, count: int) -> Tensor:
    """The directions of largest variance of float64 [N, C]: [C, k], k = min(count, N, C), those without variance zero.

    The sign of each is fixed: its entry of largest magnitude is positive.

    Exact eigen-decomposition of whichever is smaller, the covariance or the Gram matrix; the error of squaring the
    condition number only touches directions whose variance is 1e-16 of the largest.
    """
    centred = x - x.mean(dim=0)
    count = min(count, *x.shape)
    if x.shape[0] < x.shape[1]:
        values, left = torch.linalg.eigh(centred @ centred.T)  # ascending
        directions = centred.T @ left[:, -count:].flip(1)  # [C, k], of length sqrt(value)
    else:
        values, right = torch.linalg.eigh(centred.T @ centred)
        directions = right[:, -count:].flip(1)  # [C, k]
    significant = values[-count:].flip(0) > values[-1] * x.shape[0] * torch.finfo(x.dtype).eps
    directions = F.normalize(directions, dim=0) * significant  # a direction without variance is noise: none at all
    largest = directions.abs().argmax(dim=0, keepdim=True)
    signs = torch.where(directions.gather(0, largest) < 0, -1.0, 1.0)
    oriented: Tensor = directions * signs
    return oriented
