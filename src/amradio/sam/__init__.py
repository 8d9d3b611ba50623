"""SAM with other image encoders: masks for points, boxes and earlier masks, or for everything in a picture."""

from amradio.sam.automatic import AutomaticMask, AutomaticOptions, automatic_masks
from amradio.sam.decoder import MaskDecoder, Sam3Decoder, SamDecoder
from amradio.sam.encoder import BackboneEncoder, ImageEncoder, SamVision
from amradio.sam.frame import Frame
from amradio.sam.load import LoadedSam, load_sam
from amradio.sam.predictor import EncodedImage, MaskPrediction, SamPredictor

__all__ = [
    "AutomaticMask",
    "AutomaticOptions",
    "BackboneEncoder",
    "EncodedImage",
    "Frame",
    "ImageEncoder",
    "LoadedSam",
    "MaskDecoder",
    "MaskPrediction",
    "Sam3Decoder",
    "SamDecoder",
    "SamPredictor",
    "SamVision",
    "automatic_masks",
    "load_sam",
]
