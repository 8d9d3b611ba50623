"""Pictures: sets of them from many kinds of source, safe decoding, and the sizes at which a backbone sees them."""

from amradio.images.dataset import ImageSet
from amradio.images.decode import MAX_PIXELS, WHITE, DecodeMode, decode, to_tensor, to_uint8_tensor, upright_size
from amradio.images.files import expand
from amradio.images.open import open_images
from amradio.images.resize import ResizePolicy, scaled_size
from amradio.images.segmentation import SegmentationSample, SegmentationSet, open_segmentation
from amradio.images.sources import PICTURE_SUFFIXES, EncodedImage, ImageFile, ImageSource

__all__ = [
    "MAX_PIXELS",
    "PICTURE_SUFFIXES",
    "WHITE",
    "DecodeMode",
    "EncodedImage",
    "ImageFile",
    "ImageSet",
    "ImageSource",
    "ResizePolicy",
    "SegmentationSample",
    "SegmentationSet",
    "decode",
    "expand",
    "open_images",
    "open_segmentation",
    "scaled_size",
    "to_tensor",
    "to_uint8_tensor",
    "upright_size",
]
