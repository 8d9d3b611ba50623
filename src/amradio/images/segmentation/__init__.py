"""Pictures with masks that give each pixel a class: data sets in their published layouts, from folders and archives."""

from amradio.images.segmentation.check import DataReport, check_segmentation
from amradio.images.segmentation.dataset import SegmentationSample, SegmentationSet
from amradio.images.segmentation.masks import VOID, MaskError, MaskSource
from amradio.images.segmentation.open import open_segmentation, segmentation_splits

__all__ = [
    "VOID",
    "DataReport",
    "MaskError",
    "MaskSource",
    "SegmentationSample",
    "SegmentationSet",
    "check_segmentation",
    "open_segmentation",
    "segmentation_splits",
]
