"""The options of dense gradient features (FUNGI), and what they make of a backbone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amradio.errors import OptionError

if TYPE_CHECKING:
    from torch import Tensor

    from amradio.backbones.protocol import Backbone
    from amradio.evals.in_context import InContextConfig
    from amradio.evals.runner import Setup
    from amradio.images.segmentation import SegmentationSet

_TORCH_SUFFIXES = (".pth", ".pt")


@dataclass(frozen=True, kw_only=True)
class DenseFungiOptions:
    """Dense FUNGI. A base class of commands: each field is an option."""

    fungi: bool = False
    """Put the gradients of a contrastive loss beside the features of each patch (FUNGI)."""
    fungi_layer: str | None = None
    """Linear layer whose gradients are taken; default the output projection of the last attention."""
    fungi_latent_dim: int = 96
    """Width of the latents that are contrasted."""
    fungi_negatives: int = 2
    """Negatives of each token: its nearest neighbours among patches of other pictures."""
    fungi_keep: float = 0.5
    """Share of the negatives that is used, chosen by numbers that belong to the picture."""
    fungi_projection: str = "sign"
    """How gradients are made as wide as features: sign (as published), rank-one-4, tensor-sketch, exact-kernel."""
    fungi_support_size: int | None = None
    """Patches among which negatives are found; default as many as the largest memory has."""
    fungi_support_neighbours: int = 5
    """Neighbours that the published index gives, all of which its negatives are mixed from (fungi-paper only)."""
    fungi_support: Path | None = None
    """Take these from a memory that --memory-out wrote without --fungi, or from a .pth file of rows."""

    def with_gradients(
        self,
        backbone: Backbone,
        train: SegmentationSet,
        config: InContextConfig,
        setup: Setup,
    ) -> Backbone:
        """Wrap a backbone.

        Args:
            backbone: The one to wrap.
            train: The pictures of the memory; the support index is made of the same ones, in the same way.
            config: Of the memory.
            setup: Size of the pictures, device, processes.

        Raises:
            OptionError: Options contradict each other, or the support index does not fit the backbone.
            CapabilityError: The backbone has no such layer.
        """
        from amradio.fungi import DenseConfig, DenseFungiBackbone, SupportIndex

        paper = config.protocol.name == "fungi-paper"
        dense = DenseConfig.of_protocol(
            "fungi-paper" if paper else "clean",
            layer=self.fungi_layer,
            latent_dim=self.fungi_latent_dim,
            negatives_per_token=self.fungi_negatives,
            keep=self.fungi_keep,
            projection=self.fungi_projection,
            seed=config.seed,
        )
        wrapped = DenseFungiBackbone(backbone, dense)
        rows = self._rows(backbone, train, config, setup)
        neighbours = min(max(self.fungi_support_neighbours, self.fungi_negatives), len(rows))
        wrapped.set_support(SupportIndex(rows.to(setup.options.device), neighbours=neighbours))
        return wrapped

    def _rows(self, backbone: Backbone, train: SegmentationSet, config: InContextConfig, setup: Setup) -> Tensor:
        from amradio.evals.in_context import build_memory, load_memory

        if self.fungi_support is not None:
            if self.fungi_support.suffix in _TORCH_SUFFIXES:
                return load_rows(self.fungi_support)
            return load_memory(self.fungi_support).features
        sizes = config.memory_sizes if self.fungi_support_size is None else (self.fungi_support_size,)
        own = replace(config, memory_sizes=sizes, layer=None, k=1)
        return build_memory(backbone, train, own, setup).features


def load_rows(path: Path) -> Tensor:
    """Read the rows [M, D] of a support index from a file of torch.

    Raises:
        OptionError: There is no such file, or it holds something else.
    """
    import torch

    from amradio.weights.pickles import load_pickle

    if not path.is_file():
        raise OptionError(f"There is no support index {path}: make it first, with create_memory_bank.py.")
    rows: Any = load_pickle(path)
    if not isinstance(rows, torch.Tensor) or rows.ndim != 2 or not rows.is_floating_point():
        raise OptionError(f"{path} holds no rows of features [M, D].")
    return rows
