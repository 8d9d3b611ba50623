"""Features to pictures. Nothing here runs a model."""

from amradio.viz.pca import PCABasis, fit_basis, pca_rgb, side_by_side, to_picture

__all__ = ["PCABasis", "fit_basis", "pca_rgb", "side_by_side", "to_picture"]
