"""Pictures: which files, safe decoding, and the sizes at which a backbone sees them."""

from amradio.images.decode import MAX_PIXELS, WHITE, decode, to_tensor, to_uint8_tensor
from amradio.images.resize import ResizePolicy, scaled_size
from amradio.images.sources import PICTURE_SUFFIXES, ImageFile, ImageSource, expand

__all__ = [
    "MAX_PIXELS",
    "PICTURE_SUFFIXES",
    "WHITE",
    "ImageFile",
    "ImageSource",
    "ResizePolicy",
    "decode",
    "expand",
    "scaled_size",
    "to_tensor",
    "to_uint8_tensor",
]
