"""Features to pictures. Nothing here runs a model."""

from amradio.viz.attention import TokenAttention, token_attention, token_name
from amradio.viz.contact_sheet import class_colours, contact_sheet
from amradio.viz.foreground import foreground_masks
from amradio.viz.grid import Cell, Legend, Sheet, draw_sheet, save_sheet
from amradio.viz.heat import colour_bar, heat_picture, heat_rgb, limits_of, overlay, spotlight
from amradio.viz.norms import norm_map
from amradio.viz.paint import PCAStyle, pca_pictures
from amradio.viz.pca import PCABasis, fit_basis, pca_rgb, side_by_side, to_picture
from amradio.viz.segments import kmeans_segments, segment_picture, spectral_segments
from amradio.viz.similarity import (
    Match,
    correspondences,
    draw_correspondences,
    mark,
    patch_of,
    shares,
    similarity_map,
)
from amradio.viz.upsample import Upsampling

__all__ = [
    "Cell",
    "Legend",
    "Match",
    "PCABasis",
    "PCAStyle",
    "Sheet",
    "TokenAttention",
    "Upsampling",
    "class_colours",
    "colour_bar",
    "contact_sheet",
    "correspondences",
    "draw_correspondences",
    "draw_sheet",
    "fit_basis",
    "foreground_masks",
    "heat_picture",
    "heat_rgb",
    "kmeans_segments",
    "limits_of",
    "mark",
    "norm_map",
    "overlay",
    "patch_of",
    "pca_pictures",
    "pca_rgb",
    "save_sheet",
    "segment_picture",
    "shares",
    "side_by_side",
    "similarity_map",
    "spectral_segments",
    "spotlight",
    "to_picture",
    "token_attention",
    "token_name",
]
