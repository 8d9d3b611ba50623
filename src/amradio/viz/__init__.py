"""Features to pictures. Nothing here runs a model."""

from amradio.viz.contact_sheet import class_colours, contact_sheet
from amradio.viz.pca import PCABasis, fit_basis, pca_rgb, side_by_side, to_picture

__all__ = ["PCABasis", "class_colours", "contact_sheet", "fit_basis", "pca_rgb", "side_by_side", "to_picture"]
