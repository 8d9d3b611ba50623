"""The options of gradient features (FUNGI), for patches and for whole pictures, and what they make of a backbone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from amradio.errors import OptionError

if TYPE_CHECKING:
    from torch import Tensor

    from amradio.backbones.protocol import Backbone
    from amradio.evals.in_context import InContextConfig, MemoryBank
    from amradio.evals.runner import Setup
    from amradio.fungi import DenseConfig
    from amradio.images.dataset import ImageSet
    from amradio.images.segmentation import SegmentationSet

_TORCH_SUFFIXES = (".pth", ".pt")


@dataclass(frozen=True, kw_only=True)
class ImageFungiOptions:
    """FUNGI of whole pictures. A base class of commands: each field is an option."""

    fungi: tyro.conf.UseAppendAction[tuple[Literal["kl", "dino", "simclr", "deepcluster"], ...]] = ()
    """Put the gradients of this self-supervised loss beside the summary. Repeat the option for several."""
    fungi_preset: Literal["clean", "fungivision", "fungi-paper"] = "clean"
    """Whose settings of these losses."""
    fungi_projection: str = "sign"
    """How gradients are made as wide as the summary: sign, rank-one-4, tensor-sketch, ..."""
    fungi_only: bool = False
    """Leave the summary out, and evaluate the gradients alone."""

    def check_fungi(self) -> None:
        """Refuse what cannot be, before anything is read.

        Raises:
            OptionError: There are no gradients to evaluate alone.
        """
        if self.fungi_only and not self.fungi:
            raise OptionError("--fungi-only evaluates gradients alone, and no --fungi says which.")

    def with_image_gradients(self, backbone: Backbone, images: ImageSet, seed: int) -> Backbone:
        """The backbone, with gradients in its summaries if asked for.

        Args:
            backbone: The one to wrap.
            images: What objectives that need other pictures are fitted to.
            seed: Of heads, projection, crops and the choice of these pictures.

        Raises:
            OptionError: The projection is unknown, or there are not enough pictures.
            CapabilityError: The backbone has no layer to take gradients of.
        """
        if not self.fungi:
            return backbone
        from amradio.fungi import FungiWrapper, ImageConfig

        config = ImageConfig(
            preset=self.fungi_preset,
            projection=self.fungi_projection,
            include_embedding=not self.fungi_only,
            seed=seed,
        )
        return FungiWrapper(backbone, self.fungi, config).fit(images)


@dataclass(frozen=True, kw_only=True)
class DenseFungiOptions:
    """Dense FUNGI. A base class of commands: each field is an option."""

    fungi: bool = False
    """Put the gradients of a contrastive loss beside the features of each patch (FUNGI). Measure with and without: this
    gains with DINO, and costs amradio-tiny, as other distilled models perhaps, 3 to 5 points of mIoU."""
    fungi_layer: str | None = None
    """Linear layer whose gradients are taken; default the output projection of the last attention."""
    fungi_latent_dim: int = 96
    """Width of the latents that are contrasted."""
    fungi_negatives: int = 2
    """Negatives of each token: its nearest neighbours among the patches of the memory."""
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
        *,
        search: str = "exact",
        search_options: Mapping[str, Any] | None = None,
    ) -> Backbone:
        """Wrap a backbone.

        Args:
            backbone: The one to wrap.
            train: The pictures of the memory; the support index is made of the same ones, in the same way.
            config: Of the memory.
            setup: Size of the pictures, device, processes.
            search: How negatives are found in the support index; see `amradio.search.build_index`.
            search_options: Of that search.

        Raises:
            OptionError: Options contradict each other, or the support index does not fit the backbone.
            CapabilityError: The backbone has no such layer.
            MissingDependencyError: The search needs a package that is not installed.
        """
        from amradio.fungi import DenseFungiBackbone, SupportIndex

        wrapped = DenseFungiBackbone(backbone, self._dense(config.protocol.name, config.seed))
        rows = self._rows(backbone, train, config, setup)
        neighbours = min(self.fungi_support_neighbours, len(rows))
        if search == "exact":
            support = SupportIndex(rows.to(setup.options.device), neighbours=neighbours)
        else:
            from amradio.search import build_index

            options = dict(search_options or {})
            index = build_index(rows, search, **options)
            named = f"{search} {options}" if options else search
            support = SupportIndex(rows, search=index.search, neighbours=neighbours, search_name=named)
        wrapped.set_support(support)
        return wrapped

    def support_passes(self, train: int) -> int:
        """How many pictures go through the backbone to make the support index; for progress bars.

        Args:
            train: How many go through it to make the memory.
        """
        return train if self.fungi and self.fungi_support is None else 0

    def check_gradients(self, protocol: str) -> None:
        """Refuse what cannot be, before anything is read.

        Args:
            protocol: Of the evaluation.

        Raises:
            OptionError: There are options of gradients but no --fungi, or an option is out of its range.
        """
        if not self.fungi:
            changed = [f.name for f in fields(DenseFungiOptions) if getattr(self, f.name) != f.default]
            if changed:
                names = ", ".join(f"--{name.replace('_', '-')}" for name in changed)
                raise OptionError(f"Without --fungi there are no gradients for {names}. Add --fungi.")
            return
        for name in ("fungi_support_size", "fungi_support_neighbours"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"--{name.replace('_', '-')} must be at least 1, got {value}.")
        dense = self._dense(protocol, 0)
        if dense.negatives == "interleaved" and dense.negatives_per_token > self.fungi_support_neighbours:
            raise OptionError(
                f"--fungi-negatives {dense.negatives_per_token} is more than the {self.fungi_support_neighbours} "
                f"neighbours that negatives are mixed from under {protocol}. Choose fewer, or a larger "
                "--fungi-support-neighbours."
            )

    def _dense(self, protocol: str, seed: int) -> DenseConfig:
        from amradio.fungi import DenseConfig

        return DenseConfig.of_protocol(
            "fungi-paper" if protocol == "fungi-paper" else "clean",
            layer=self.fungi_layer,
            latent_dim=self.fungi_latent_dim,
            negatives_per_token=self.fungi_negatives,
            keep=self.fungi_keep,
            projection=self.fungi_projection,
            seed=seed,
        )

    def _rows(self, backbone: Backbone, train: SegmentationSet, config: InContextConfig, setup: Setup) -> Tensor:
        from amradio.evals.in_context import build_memory, load_memory

        if self.fungi_support is not None:
            if self.fungi_support.suffix in _TORCH_SUFFIXES:
                return load_rows(self.fungi_support)
            bank = load_memory(self.fungi_support)
            _check_support(bank, backbone, self.fungi_support)
            return bank.features
        sizes = config.memory_sizes if self.fungi_support_size is None else (self.fungi_support_size,)
        own = replace(config, memory_sizes=sizes, layer=None, k=1)
        return build_memory(backbone, train, own, setup).features


def _check_support(bank: MemoryBank, backbone: Backbone, path: Path) -> None:
    """Refuse a memory of other features, which would have neighbours as well, only meaningless ones."""
    from amradio.evals.in_context.store import check_same
    from amradio.evals.runner import built_record, model_record

    own, made = model_record(backbone), bank.about.get("model", {})
    same = all(own.get(name) == made.get(name) for name in ("adaptor", "sha256", "sha256_of_weights"))
    layer, gradients = bank.about.get("layer"), bank.about.get("fungi")
    if not same or layer is not None or gradients is not None:
        what = made.get("name") if layer is None else f"block {layer} of {made.get('name')}"
        raise OptionError(
            f"The memory {path} holds features of {what}, and the support index of {own['name']} needs this model's "
            "own, of the same weights. Make it with --memory-out, without --fungi and --layer."
        )
    check_same(bank, {"built": built_record(backbone)}, path)  # precision, windows, positions, ...


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
