"""Numbers to colours: heat maps, alone or over their photo, and the bar that says what the colours mean."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from amradio.errors import MissingDependencyError, OptionError, nearest_names
from amradio.viz.pca import to_picture
from amradio.viz.upsample import Upsampling, upsample

if TYPE_CHECKING:
    from PIL.Image import Image

DEFAULT_COLOUR_MAP = "ember"
"""From dark blue over red to light yellow, with evenly rising lightness: it also reads in grey, and needs nothing."""

_BUILT_IN = {
    # Lightness, and place in the plane of colours, in OKLab (Ottosson 2020); in between, linear.
    DEFAULT_COLOUR_MAP: (
        (0.14, 0.00, -0.05),
        (0.28, 0.06, -0.14),
        (0.42, 0.15, -0.08),
        (0.56, 0.19, 0.03),
        (0.70, 0.13, 0.13),
        (0.84, 0.02, 0.16),
        (0.97, -0.02, 0.08),
    ),
    "grey": ((0.0, 0.0, 0.0), (1.0, 0.0, 0.0)),
}
_COLOURS = 256


def limits_of(maps: Iterable[Tensor]) -> tuple[float, float]:
    """The smallest and the largest value of some maps, so that they can share one scale.

    Raises:
        OptionError: There is no map, or a value is not finite.
    """
    ends = [(float(m.min()), float(m.max())) for m in maps if m.numel()]
    if not ends or not np.isfinite(ends).all():
        raise OptionError("A scale of colours needs finite values, and at least one.")
    return min(low for low, _ in ends), max(high for _, high in ends)


def heat_rgb(values: Tensor, colour_map: str = DEFAULT_COLOUR_MAP, limits: tuple[float, float] | None = None) -> Tensor:
    """Colour numbers.

    Args:
        values: Any shape [...].
        colour_map: ``ember`` or ``grey``, or the name of one of matplotlib's, if that is installed.
        limits: The values of the first and the last colour; what is outside gets one of these. Default the extremes.

    Returns:
        float32 [..., 3] in [0, 1]. If both limits are equal, the colour is that of the middle.

    Raises:
        OptionError: The colour map is unknown, values are not finite, or the limits are in the wrong order.
        MissingDependencyError: The colour map needs matplotlib.
    """
    low, high = limits_of([values]) if limits is None else limits
    if not (np.isfinite((low, high)).all() and low <= high and bool(values.isfinite().all())):
        raise OptionError(f"Heat maps need finite values and limits in rising order, got the limits {low} and {high}.")
    share = (values.double() - low) / (high - low) if high > low else torch.full(values.shape, 0.5).double()
    index = (share.clamp(0, 1) * (_COLOURS - 1)).round().long().cpu()
    return torch.from_numpy(colour_table(colour_map))[index]


def heat_picture(
    values: Tensor,
    size: tuple[int, int],
    *,
    colour_map: str = DEFAULT_COLOUR_MAP,
    limits: tuple[float, float] | None = None,
    method: Upsampling = "bilinear",
    guide: Image | None = None,
) -> Image:
    """Draw a heat map at the size of its photo; values are interpolated, then coloured.

    Args:
        values: [h, w].
        size: (height, width) in pixels.
        colour_map: See `heat_rgb`.
        limits: See `heat_rgb`; default the extremes of the map.
        method: See `amradio.viz.upsample.upsample`.
        guide: See `amradio.viz.upsample.upsample`.

    Returns:
        A picture in RGB.

    Raises:
        OptionError: See `heat_rgb` and `amradio.viz.upsample.upsample`.
        MissingDependencyError: See `heat_rgb`.
    """
    fine = upsample(values[..., None], size, method, guide)[..., 0]  # [H, W]
    return to_picture(heat_rgb(fine, colour_map, limits_of([values]) if limits is None else limits))


def overlay(photo: Image, heat: Image, opacity: float = 0.6) -> Image:
    """Lay a heat map over its photo, whose colours are taken out so that they cannot be mistaken for heat.

    Args:
        photo: In RGB.
        heat: In RGB, of the same size.
        opacity: Of the heat, from 0 to 1.

    Returns:
        A picture in RGB.

    Raises:
        OptionError: Sizes differ, or the opacity is not from 0 to 1.
    """
    from PIL import Image

    if photo.size != heat.size:
        raise OptionError(f"The photo is {photo.size} pixels (width, height), and the heat map {heat.size}.")
    if not 0 <= opacity <= 1:
        raise OptionError(f"opacity is from 0 to 1, got {opacity:g}.")
    return Image.blend(photo.convert("L").convert("RGB"), heat, opacity)


def spotlight(photo: Image, values: Tensor, limits: tuple[float, float], method: Upsampling = "bilinear") -> Image:
    """Show the photo where values are high, and darken it where they are low.

    Args:
        photo: In RGB.
        values: [h, w].
        limits: The values of full darkness and of full light.
        method: See `amradio.viz.upsample.upsample`; the photo is the guide.

    Returns:
        A picture in RGB.
    """
    from PIL import Image

    light = heat_picture(
        values, (photo.height, photo.width), colour_map="grey", limits=limits, method=method, guide=photo
    )
    return Image.composite(photo, Image.new("RGB", photo.size), light.convert("L"))


def colour_bar(colour_map: str = DEFAULT_COLOUR_MAP, size: tuple[int, int] = (12, 160)) -> Image:
    """The colours of a map from left to right.

    Args:
        colour_map: See `heat_rgb`.
        size: (height, width) in pixels.

    Returns:
        A picture in RGB.
    """
    return to_picture(heat_rgb(torch.linspace(0, 1, size[1]).expand(*size), colour_map, (0.0, 1.0)))


@functools.cache
def colour_table(name: str) -> np.ndarray:
    """The colours of a colour map: float32 [256, 3] in [0, 1].

    Raises:
        OptionError: There is no such colour map.
        MissingDependencyError: It needs matplotlib.
    """
    if name in _BUILT_IN:
        anchors = np.array(_BUILT_IN[name])
        at = np.linspace(0, len(anchors) - 1, _COLOURS)
        lab = np.stack([np.interp(at, np.arange(len(anchors)), anchors[:, i]) for i in range(3)], axis=-1)
        table: np.ndarray = _oklab_to_rgb(lab).astype(np.float32)
        return table
    try:
        from matplotlib import colormaps
    except ImportError as e:
        raise MissingDependencyError(
            f"The colour map {name!r} is not one of {', '.join(_BUILT_IN)}; those of matplotlib need "
            "`pip install 'amradio[viz]'`."
        ) from e
    if name not in colormaps:
        known = [*_BUILT_IN, *(n for n in colormaps if not re.search(r"_r$", n))]
        raise OptionError(f"There is no colour map {name!r}. {nearest_names(name, known)}")
    return np.asarray(colormaps[name](np.linspace(0, 1, _COLOURS)), np.float32)[:, :3]


def _oklab_to_rgb(lab: np.ndarray) -> np.ndarray:
    """OKLab [..., 3] to sRGB in [0, 1], clipped where a colour cannot be shown."""
    to_cones = np.array([[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728],
                         [1, -0.0894841775, -1.2914855480]])  # fmt: skip
    to_linear = np.array([[4.0767416621, -3.3077115913, 0.2309699292], [-1.2684380046, 2.6097574011, -0.3413193965],
                          [-0.0041960863, -0.7034186147, 1.7076147010]])  # fmt: skip
    linear = ((lab @ to_cones.T) ** 3 @ to_linear.T).clip(0, 1)
    rgb: np.ndarray = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return rgb
