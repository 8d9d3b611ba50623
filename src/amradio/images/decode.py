"""Files to pictures, safely and completely.

A picture is either decoded whole, upright and in RGB, or refused with an `ImageError` that says why. Nothing global is
changed: Pillow's switches are left as they are, and Pillow's own pixel limit (a global, which warns from whichever
thread comes first) is replaced by a budget that belongs to the call.

What is decided here:

* The content decides the format, never the file name, and only the formats of `FORMATS` are tried. Pillow knows many
  more, some of which run interpreters (EPS) or have had decompression bombs (FITS).
* The size in the header is checked against the budget before any pixel memory is allocated.
* The EXIF orientation is applied. EXIF data that cannot be parsed counts as "no orientation", as in every viewer.
* Transparency (alpha channel, palette entries, one transparent colour) is composed over a background, white by default.
* 16-bit samples keep their high byte, so that the full range maps to 0..255. Samples without a known white level
  (float, 32-bit integer) are refused.
* JPEG stores CMYK inverted when Adobe's marker is there, and plain otherwise; both come out right.
* A file that ends early is refused. One that was cut and then closed properly (a JPEG repaired with an end marker)
  looks whole to every decoder.
* Animations and multi-page files give their first frame. Embedded colour profiles are not applied, as in the
  preprocessing of every published backbone.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from PIL import (
    AvifImagePlugin,  # noqa: F401  importing a plugin registers its format
    BmpImagePlugin,  # noqa: F401
    GifImagePlugin,  # noqa: F401
    Image,
    ImageChops,
    ImageFile,
    Jpeg2KImagePlugin,  # noqa: F401
    JpegImagePlugin,  # noqa: F401
    PngImagePlugin,  # noqa: F401
    PpmImagePlugin,  # noqa: F401
    TiffImagePlugin,  # noqa: F401
    WebPImagePlugin,  # noqa: F401
)

from amradio.errors import ImageError

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "JPEG2000", "AVIF")
"""Pillow's names of the formats that are read; JPEG includes MPO, its form with several pictures."""

MAX_PIXELS = 178_956_970
"""Default pixel budget: the size at which Pillow itself stops (0.5 GB in RGB), above today's 150-megapixel cameras."""

WHITE = (255, 255, 255)

DecodeMode = Literal["full", "draft"]
"""How much of a picture is decoded that will be made smaller anyway.

``full``, the reference: every pixel is decoded, then resized. ``draft``: a JPEG is decoded at the smallest of its
whole, half, quarter and eighth size that still has `DRAFT_MARGIN` times the pixels in each direction that are needed;
faster, and not the same to the last digit. Other formats are decoded in full.
"""

DRAFT_MARGIN = 2.0
"""How much larger than needed a draft is: scaled by the decoder to just what is needed, it would lose detail."""

_EXIF_ORIENTATION = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)  # height and width change places
_UPRIGHT_SIZE = "amradio_upright_size"
_TIFF_BITS_PER_SAMPLE, _TIFF_PHOTOMETRIC = 258, 262
_TIFF_WHITE_IS_ZERO = 0


class _Signature(NamedTuple):
    offset: int
    magic: bytes
    what: str


# Only used to say what a refused file is.
_REFUSED_KINDS = (
    _Signature(0, b"%PDF", "a PDF document"),
    _Signature(0, b"8BPS", "a Photoshop file"),
    _Signature(0, b"%!PS", "a PostScript file"),
    _Signature(0, b"SIMPLE  =", "a FITS file"),
    _Signature(0, b"PK\x03\x04", "a ZIP archive"),
    _Signature(0, b"\x1f\x8b", "a gzip archive"),
    _Signature(4, b"ftyphei", "a HEIC picture (convert it to JPEG first)"),
    _Signature(4, b"ftypmif1", "a HEIF picture (convert it to JPEG first)"),
    _Signature(4, b"ftyp", "a video"),
    _Signature(0, b"version https://git-lfs", "a Git LFS pointer (run `git lfs pull`)"),
)


def decode(
    source: str | os.PathLike[str] | bytes,
    *,
    max_pixels: int = MAX_PIXELS,
    background: tuple[int, int, int] = WHITE,
    at_least: tuple[int, int] | None = None,
    name: str | None = None,
) -> Image.Image:
    """Decode one picture completely.

    Args:
        source: A path, or the content of a file.
        max_pixels: Pixel budget; a header that promises more is refused before any pixel is decoded.
        background: RGB colour, 0..255, that shows through transparent parts.
        at_least: (height, width) that the picture must still cover if it is decoded smaller, which saves time (see
            `DecodeMode`); None decodes every pixel.
        name: What messages call the source; default its path.

    Returns:
        An upright RGB picture that holds no reference to the file. `upright_size` tells how large its original is.

    Raises:
        ImageError: The source is missing, not a picture in one of `FORMATS`, too large, broken or cut short. The
            message names the source and the reason.
    """
    name = name or ("the given bytes" if isinstance(source, bytes) else os.fspath(source))
    try:
        if ImageFile.LOAD_TRUNCATED_IMAGES:
            raise ImageError(
                "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is switched on by other code in this process, so that a half-read "
                "picture could not be told from a whole one; set it to False"
            )
        if isinstance(source, bytes):
            return _decode_stream(io.BytesIO(source), len(source), max_pixels, background, at_least)
        with open_regular_file(source) as file:
            return _decode_stream(file, os.fstat(file.fileno()).st_size, max_pixels, background, at_least)
    except ImageError as error:
        raise ImageError(f"Cannot decode {name}: {error}.") from error.__cause__


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Say how large the original of a picture is.

    Args:
        image: As `decode` returned it.

    Returns:
        (height, width) in pixels, upright: more than the picture's own if it was decoded smaller.
    """
    height, width = image.info.get(_UPRIGHT_SIZE, (image.height, image.width))
    return int(height), int(width)


def to_uint8_tensor(image: Image.Image) -> Tensor:
    """Turn an RGB picture into uint8 [3, H, W].

    Raises:
        ImageError: The picture is not in RGB.
    """
    return channels_first(image).contiguous()


def channels_first(image: Image.Image) -> Tensor:
    """See the pixels of an RGB picture as uint8 [3, H, W]; in memory, the three values of a pixel stand together.

    Raises:
        ImageError: The picture is not in RGB.
    """
    import torch

    if image.mode != "RGB":
        raise ImageError(f"Expected an RGB picture as `decode` returns it, got mode {image.mode!r}.")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)  # [3, H, W]


def to_tensor(image: Image.Image) -> Tensor:
    """Turn an RGB picture into float32 [3, H, W] in [0, 1].

    Raises:
        ImageError: The picture is not in RGB.
    """
    return to_uint8_tensor(image).float().div_(255)


def open_regular_file(path: str | os.PathLike[str]) -> IO[bytes]:
    """Open a file without ever blocking on a pipe or a device.

    Raises:
        ImageError: It cannot be opened, or is no file. The message has no name in it.
    """
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise ImageError("it is a folder")
        if not stat.S_ISREG(mode):
            raise ImageError("it is not a regular file")
        return open(path, "rb")
    except FileNotFoundError:
        reason = "it is a link to a file that does not exist" if os.path.islink(path) else "no such file"
        raise ImageError(reason) from None
    except (OSError, ValueError) as error:
        raise ImageError(getattr(error, "strerror", None) or str(error)) from error


def _decode_stream(
    stream: IO[bytes],
    size: int,
    max_pixels: int,
    background: tuple[int, int, int],
    at_least: tuple[int, int] | None,
) -> Image.Image:
    if size == 0:
        raise ImageError("the file is empty (0 bytes)")
    name, factory = _recognise(stream)
    # Plugins raise whatever their parsing runs into (struct.error, SyntaxError, zlib.error, KeyError, ...), so nothing
    # narrower than Exception covers a hostile file.
    try:
        # `Image.open` would call the factory too, but checks the size against a process-wide limit, by a warning.
        with factory(stream, "") as image:
            _check_budget(image.size, max_pixels)
            samples = _stored_samples(image)
            stored_size = image.size
            if at_least is not None:
                _decode_smaller(image, at_least)
            image.load()
            orientation = _orientation(image)
            rgb = _flatten(_scaled_to_8_bits(image, samples), samples, background)
    except ImageError:
        raise
    except Exception as error:
        detail = str(error) if type(error) in (OSError, ValueError) else f"{type(error).__name__}: {error}"
        raise ImageError(
            f"the {name} data is broken, cut short or of an unsupported kind ({detail.rstrip('.')})"
        ) from error
    upright = rgb.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else rgb
    if rgb.size != stored_size:
        width, height = stored_size
        upright.info[_UPRIGHT_SIZE] = (width, height) if orientation in _SIDEWAYS else (height, width)
    return upright


def _decode_smaller(image: ImageFile.ImageFile, at_least: tuple[int, int]) -> None:
    """Have the JPEG decoder compute half, quarter or eighth the size, as long as that covers what is asked."""
    if image.format in ("JPEG", "MPO"):
        height, width = at_least[::-1] if _orientation(image) in _SIDEWAYS else at_least
        image.draft(None, (width, height))


def _recognise(stream: IO[bytes]) -> tuple[str, Callable[..., ImageFile.ImageFile]]:
    """Find the format by the first bytes, and rewind the stream."""
    prefix = stream.read(32)
    stream.seek(0)
    for name in FORMATS:
        factory, accept = Image.OPEN[name]
        accepted = accept is None or accept(prefix[:16])
        if isinstance(accepted, str):  # Pillow was built without this codec, and says so
            raise ImageError(accepted[:1].lower() + accepted[1:].rstrip("."))
        if accepted:
            return name, factory
    raise ImageError(f"it is {_what_it_is(prefix)}; formats read: {', '.join(FORMATS)}")


def _what_it_is(prefix: bytes) -> str:
    for offset, magic, what in _REFUSED_KINDS:
        if prefix.startswith(magic, offset):
            return what
    text = prefix.decode("utf-8", errors="ignore")
    if b"\0" not in prefix and len(text.encode()) >= len(prefix) - 3 and not any(ord(c) < 9 for c in text):
        return f"text, not a picture (it begins with {text[:16]!r})"
    return f"not in a picture format (it begins with bytes {prefix[:8].hex(' ')})"


def _check_budget(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"its header says {width} x {height} pixels, so it is empty")
    if width * height > max_pixels:
        raise ImageError(
            f"its header says {width} x {height} = {width * height:,} pixels, more than the budget of {max_pixels:,} "
            "(raise max_pixels if the file is trusted)"
        )


class _Samples(NamedTuple):
    """What a file says about its samples and Pillow's mode does not."""

    bits: int = 8
    white_is_zero: bool = False


def _stored_samples(image: ImageFile.ImageFile) -> _Samples:
    """Read before the pixels are loaded, which is when Pillow forgets it."""
    if image.format == "TIFF":
        tags: Any = getattr(image, "tag_v2", {})
        bits = tags.get(_TIFF_BITS_PER_SAMPLE, (1,))[0]
        return _Samples(bits, tags.get(_TIFF_PHOTOMETRIC) == _TIFF_WHITE_IS_ZERO)
    is_wide = image.mode.startswith("I;16") or (
        image.format == "PNG" and any("16" in str(tile.args) for tile in image.tile)
    )
    return _Samples(16 if is_wide else 8)


def _scaled_to_8_bits(image: Image.Image, stored: _Samples) -> Image.Image:
    """Bring samples to 8 bits without clipping, and CMYK into Pillow's sense of it."""
    if image.mode.startswith("I;16"):
        samples = np.asarray(image).astype(np.uint16)  # [H, W]
        gray = Image.fromarray((samples >> (stored.bits - 8)).astype(np.uint8))
        if stored.white_is_zero:
            gray = ImageChops.invert(gray)
        transparent = image.info.get("transparency")
        if transparent is not None:
            opaque = Image.fromarray(np.where(samples == transparent, 0, 255).astype(np.uint8))
            return Image.merge("LA", (gray, opaque))
        return gray
    if image.mode == "I" and image.format == "PPM":  # whose plugin scales every maximum above 255 to 65535
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        what = "32-bit float" if image.mode == "F" else "signed or 32-bit integer"
        raise ImageError(f"its samples are {what}, which have no known white level; convert it to 8 or 16 bits first")
    if image.mode == "CMYK" and image.format in ("JPEG", "MPO") and "adobe" not in image.info:
        # Pillow takes every CMYK JPEG for an inverted one; without Adobe's marker it is not.
        return ImageChops.invert(image)
    return image


def _flatten(image: Image.Image, stored: _Samples, background: tuple[int, int, int]) -> Image.Image:
    """To RGB, with transparent parts composed over the background."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    transparent = image.info.get("transparency")
    if stored.bits == 16 and isinstance(transparent, tuple):  # Pillow keeps 16 bits of this colour, and 8 of the pixels
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    rgba = image.convert("RGBA")
    canvas = Image.new("RGB", rgba.size, background)
    canvas.paste(rgba, mask=rgba.getchannel("A"))
    return canvas


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # whatever the parser stumbled over; the pixels are whole
        return 1
