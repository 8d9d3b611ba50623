"""Models of timm as backbones.

Everything is read from the model's own metadata: the number of class and register tokens (``num_prefix_tokens``), the
stride (``feature_info``), the statistics and size of its images (``pretrained_cfg``). The summary is what the model's
own pooling gives (``forward_head(pre_logits=True)``), features are ``forward_features`` without the prefix tokens.
Vision transformers take images of every multiple of their patch size if timm can resample their positions.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from amradio.backbones.adapter import Adapter, Geometry, map_to_tokens, without_prefix
from amradio.errors import CapabilityError, MissingDependencyError, OptionError, UnknownModelError, nearest_names
from amradio.hub import HubOptions
from amradio.models.configs import Resolution
from amradio.models.intermediates import take_indices
from amradio.models.output import RadioOutput, arrange, check_feature_fmt
from amradio.text.hub import translated_errors
from amradio.weights.checkpoint import Identity

LAYOUT = "timm"

_DYNAMIC = "dynamic_img_size"


class TimmBackbone(Adapter):
    """A model of timm.

    Args:
        network: The model, without classifier.
        geometry: Its sizes.
        identity: Where its weights came from.
        mean: Mean of each channel that images are standardised with.
        std: Standard deviation of each channel.
    """

    def __init__(
        self, network: Any, geometry: Geometry, identity: Identity, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__(geometry, identity, mean, std)
        self.network = network

    def _run(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self._read(self.network.forward_features(images), self._grid(images))

    def _read(self, features: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        summary: Tensor = self.network.forward_head(features, pre_logits=True)  # [B, C]
        if features.ndim == 3:
            return summary, without_prefix(features, self.network.num_prefix_tokens, grid, self.identity.source)
        if getattr(self.network, "output_fmt", "NCHW") == "NHWC":
            return summary, features.flatten(1, 2)  # [B, L, D]
        return summary, map_to_tokens(features)  # [B, L, D]

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Compute the features of intermediate blocks (or stages), by timm's own method.

        Args:
            images: [B, 3, H, W] in [0, 1].
            indices: n for the last n blocks, a sequence of block indices (negative ones count from the end), or None
                for all blocks.
            norm: Apply the model's final norm to each of them.
            output_fmt: ``NCHW`` or ``NLC``.
            intermediates_only: Leave the final output out.

        Returns:
            ``(final, intermediates)``, or only ``intermediates``: maps [B, D, h, w] or tokens [B, L, D], in the order
            asked for. Stages of a convolutional network have strides and widths of their own.

        Raises:
            OptionError: An option or index is not valid.
            ResolutionError: The image size is not supported.
        """
        check_feature_fmt(output_fmt, "output_fmt", ("NCHW", "NLC"))
        self.geometry.check(images, self.identity.source)
        order = take_indices(indices, len(self.network.feature_info))
        taken = sorted(set(order))
        final, maps = self.network.forward_intermediates(
            self._conditioned(images), indices=taken, norm=norm, output_fmt="NCHW", intermediates_only=False
        )
        found = dict(zip(taken, maps, strict=True))
        results = [found[i] if output_fmt == "NCHW" else map_to_tokens(found[i]) for i in order]
        if intermediates_only:
            return results
        grid = self._grid(images)
        summary, features = self._read(final, grid)
        return RadioOutput(summary, arrange(features, grid, output_fmt)), results


def load_timm(name: str, *, hub: HubOptions | None = None, pretrained: bool = True) -> TimmBackbone:
    """Load a model of timm.

    Args:
        name: As for ``timm.create_model``: ``vit_small_patch16_dinov3.lvd1689m``, ``hf-hub:ORGANISATION/NAME`` or
            ``local-dir:FOLDER``.
        hub: How to reach the hub.
        pretrained: Whether to load the published weights; otherwise they are random.

    Returns:
        The backbone.

    Raises:
        MissingDependencyError: timm is not installed, or cannot be imported.
        UnknownModelError: timm has no such model, or no weights for it.
        CapabilityError: The model does not say how its output is laid out.
        OptionError: An option of the hub that timm has no way to follow.
        DownloadError: The weights cannot be fetched.
    """
    hub = hub or HubOptions()
    timm = _import_timm()
    _check_hub(hub, name)
    _check_name(timm, name)
    with translated_errors(name, hub, "the weights"):
        network = _create(timm, name, pretrained=pretrained, num_classes=0, cache_dir=str(hub.cache_root))
    described = network.pretrained_cfg
    geometry = _geometry(network, described, name)
    version = ".".join(part for part in (described.get("architecture"), described.get("tag")) if part)
    identity = Identity(
        source=f"timm:{name}",
        layout=LAYOUT,
        version=(version or name) if pretrained else None,
        license=described.get("license") if pretrained else None,
    )
    return TimmBackbone(network, geometry, identity, described["mean"], described["std"])


def _import_timm() -> Any:
    try:
        return importlib.import_module("timm")
    except (ImportError, RuntimeError) as e:  # a torchvision that does not fit torch is a RuntimeError
        raise MissingDependencyError(
            f"This backbone needs the package timm, which cannot be imported: {e}. Install it with "
            f"`pip install 'amradio[timm]'`; it needs a torchvision that fits the installed torch."
        ) from e


def _check_hub(hub: HubOptions, name: str) -> None:
    """Refuse what timm would silently not do."""
    if hub.token is not None:
        raise OptionError("timm takes no token=. Log in with `hf auth login` instead.")
    if hub.revision is not None:
        raise OptionError(f"timm takes no revision=. Write 'timm:hf-hub:ORGANISATION/NAME@{hub.revision}' instead.")
    if hub.local_files_only:
        raise OptionError(f"timm takes no local_files_only= for {name!r}. Set HF_HUB_OFFLINE=1, or use local-dir:.")


def _check_name(timm: Any, name: str) -> None:
    if ":" not in name and not timm.is_model(name):
        raise UnknownModelError(
            f"timm {timm.__version__} has no model {name!r}. {nearest_names(name, timm.list_models())}"
        )


def _create(timm: Any, name: str, **options: Any) -> Any:
    """Build the model, with positions for every image size where its class can do that."""
    try:
        return timm.create_model(name, **{_DYNAMIC: True}, **options)
    except TypeError as e:
        if _DYNAMIC not in str(e):
            raise
        return timm.create_model(name, **options)
    except RuntimeError as e:
        if "pretrained" not in str(e).lower():
            raise
        raise UnknownModelError(
            f"timm {timm.__version__} has no such weights: {e} Pass pretrained=False for random ones. "
            f"{nearest_names(name, timm.list_pretrained())}"
        ) from e


def _geometry(network: nn.Module, described: Any, name: str) -> Geometry:
    info = getattr(network, "feature_info", None)
    # Hiera and its like give tokens too, but reorder them and do not say so; they have no count of prefix tokens.
    tokens = isinstance(getattr(network, "num_prefix_tokens", None), int)
    maps = hasattr(network, "forward_intermediates") and not hasattr(network, "pos_embed")
    if not info or not (tokens or maps):
        raise CapabilityError(
            f"The timm model {name!r} ({type(network).__name__}) does not say which part of its output are features "
            f"(it has no feature_info or no num_prefix_tokens). Give load_backbone a callable that returns "
            f"(summary, features) instead."
        )
    stride, width = int(info[-1]["reduction"]), int(network.num_features)  # type: ignore[arg-type]
    size = Resolution(*described["input_size"][1:])
    return Geometry(
        patch_size=stride,
        embed_dim=width,
        summary_dim=int(getattr(network, "head_hidden_size", None) or width),
        min_resolution_step=stride,
        preferred_resolution=size,
        fixed=bool(described.get("fixed_input_size")) and not getattr(network, _DYNAMIC, False),
    )
