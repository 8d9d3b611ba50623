"""One decoded frame of a video to a picture: colours, transparency, rotation, the shape of its pixels."""

from __future__ import annotations

import struct
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from amradio.images.decode import WHITE

if TYPE_CHECKING:
    from PIL.Image import Image, Transpose

EXACT = 0x2 | 0x2000 | 0x40000  # SWS_BILINEAR, SWS_FULL_CHR_H_INT, SWS_ACCURATE_RND, which older PyAV does not name
"""How colours are converted. FFmpeg's fast way is one level too dark on average; this takes as long as decoding."""

_HD_LINES = 720
_UNSPECIFIED = 2  # AVCOL_SPC_UNSPECIFIED


def upright_picture(picture: Any, size: tuple[int, int], turn: Transpose | None) -> Image:
    """A frame as a picture.

    Args:
        picture: An `av.VideoFrame`.
        size: (height, width) of the video, upright: players too scale frames that come in another one.
        turn: See `turn_of`.

    Returns:
        Upright, in RGB, of that size.
    """
    from PIL.Image import Resampling

    image = _rgb(picture)
    image = image if turn is None else image.transpose(turn)
    height, width = size
    return image if image.size == (width, height) else image.resize((width, height), Resampling.BICUBIC)


def upright_size(picture: Any, stream: Any, turn: Transpose | None) -> tuple[int, int]:
    """(height, width) of a frame, turned as it should be, with square pixels.

    Args:
        picture: An `av.VideoFrame`.
        stream: The `av.VideoStream` that it is from.
        turn: See `turn_of`.
    """
    from PIL.Image import Transpose

    height, width = picture.height, picture.width
    aspect = _pixel_aspect(stream)
    width, height = (round(width * aspect), height) if aspect > 1 else (width, round(height / aspect))
    sideways = (Transpose.ROTATE_90, Transpose.ROTATE_270, Transpose.TRANSPOSE, Transpose.TRANSVERSE)
    return (width, height) if turn in sideways else (height, width)


def _pixel_aspect(stream: Any) -> Fraction:
    """Width of a pixel over its height; 1 where the file says nothing, or nothing that can be."""
    aspect = stream.sample_aspect_ratio
    return Fraction(aspect) if aspect and Fraction(1, 4) <= aspect <= 4 else Fraction(1)


def turn_of(picture: Any) -> Transpose | None:
    """How the frames of a video must be turned or mirrored to be upright; None for not at all.

    To be asked of one frame: PyAV ties a frame whose side data was looked at into a cycle, so that its memory is only
    freed by the garbage collector, hundreds of frames later.

    Args:
        picture: An `av.VideoFrame`.
    """
    from PIL.Image import Transpose

    matrix = picture.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return None
    a, b, _, c, d = struct.unpack("=9i", bytes(matrix))[:5]
    signs = tuple((value > 0) - (value < 0) for value in (a, b, c, d))
    return {
        (0, 1, -1, 0): Transpose.ROTATE_270,
        (-1, 0, 0, -1): Transpose.ROTATE_180,
        (0, -1, 1, 0): Transpose.ROTATE_90,
        (-1, 0, 0, 1): Transpose.FLIP_LEFT_RIGHT,
        (1, 0, 0, -1): Transpose.FLIP_TOP_BOTTOM,
        (0, 1, 1, 0): Transpose.TRANSPOSE,
        (0, -1, -1, 0): Transpose.TRANSVERSE,
    }.get(signs)


def _rgb(picture: Any) -> Image:
    """The pixels of a frame, as they are stored."""
    from PIL import Image

    transparent = any(component.is_alpha for component in picture.format.components)
    guessed = picture.colorspace == _UNSPECIFIED and picture.height >= _HD_LINES
    pixels = picture.reformat(
        format="rgba" if transparent else "rgb24",
        src_colorspace="ITU709" if guessed else None,
        src_color_range=int(picture.color_range),
        interpolation=EXACT,
        threads=1,
    ).to_ndarray()
    image = Image.fromarray(pixels)
    if not transparent:
        return image
    canvas = Image.new("RGB", image.size, WHITE)
    canvas.paste(image, mask=image.getchannel("A"))
    return canvas
