"""Dense FUNGI: patch features with the gradients of a contrastive loss beside them.

For each image: tokens are mapped to short latents by a random head; each token is contrasted with the other tokens of
the image and with neighbours of its tokens among patches of other pictures (InfoNCE); the gradient of the loss with
respect to the last attention's output projection, of each token by itself, is projected to the width of the features.
Both are scaled to length 1 and put side by side, so the cosine of two results is the mean of both cosines.

Simoncini et al. 2024 (arXiv 2407.10964), section 4.4; the settings of the published code are ``fungi-paper``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amradio.errors import CapabilityError, OptionError
from amradio.fungi.hashing import image_keys, uniform
from amradio.fungi.heads import Head
from amradio.fungi.losses import Denominator, LossDtype, info_nce
from amradio.fungi.pca import Pca
from amradio.fungi.projections import (
    ExactKernel,
    KernelSimilarity,
    Projection,
    check_projection,
    make_projection,
    unit,
)
from amradio.fungi.support import Negatives, SupportIndex
from amradio.fungi.tail import Split, make_splitter
from amradio.fungi.wrapper import Wrapper, settings_of, tensor_digest
from amradio.models.output import RadioOutput, arrange, check_feature_fmt

if TYPE_CHECKING:
    from amradio.features.runner import ExtractOptions
    from amradio.images.dataset import ImageSet
    from amradio.images.resize import ResizePolicy

FungiProtocol = Literal["clean", "fungi-paper"]
LossTokens = Literal["all", "no-registers", "patches"]


@dataclass(frozen=True, kw_only=True)
class DenseConfig:
    """How dense gradient features are made.

    Attributes:
        layer: Linear layer whose gradient is taken; None: the output projection of the last attention.
        latent_dim: Width of the latents that are contrasted.
        negatives_per_token: Neighbours of each token in the support index.
        keep: Share of these that are used, each drawn by itself, from numbers that belong to the image.
        temperature: Of InfoNCE.
        negatives: ``neighbours``, or ``interleaved`` as in the published code; see `SupportIndex.negatives`.
        denominator: ``tempered``, or ``raw`` as in the published code; see `amradio.fungi.losses.info_nce`.
        loss_dtype: ``float16`` rounds latents as the published code does.
        loss_tokens: Which tokens are contrasted: ``all``, ``no-registers`` (class tokens and patches) or ``patches``.
            Gradients of patches are what is returned in any case.
        projection: See `amradio.fungi.projections`.
        projection_dim: Its width; None: that of the features.
        seed: Of head, projection and masks.
    """

    layer: str | None = None
    latent_dim: int = 96
    negatives_per_token: int = 2
    keep: float = 0.5
    temperature: float = 0.07
    negatives: Negatives = "neighbours"
    denominator: Denominator = "tempered"
    loss_dtype: LossDtype = "float32"
    loss_tokens: LossTokens = "no-registers"
    projection: str = "sign"
    projection_dim: int | None = None
    seed: int = 42

    def __post_init__(self) -> None:
        for name in ("latent_dim", "negatives_per_token"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 < self.keep <= 1:
            raise OptionError(f"keep is a share above 0 and at most 1, got {self.keep}.")
        if not self.temperature > 0:
            raise OptionError(f"temperature must be above 0, got {self.temperature}.")
        for name, kind in (
            ("negatives", Negatives),
            ("denominator", Denominator),
            ("loss_dtype", LossDtype),
            ("loss_tokens", LossTokens),
        ):
            if getattr(self, name) not in get_args(kind):
                raise OptionError(f"{name} must be one of {list(get_args(kind))}, got {getattr(self, name)!r}.")
        check_projection(self.projection)

    @classmethod
    def of_protocol(cls, protocol: FungiProtocol = "clean", **changes: Any) -> DenseConfig:
        """The settings of a protocol.

        Args:
            protocol: ``clean``, or ``fungi-paper``: everything as in the code that published numbers come from.
            **changes: Fields to set otherwise.

        Returns:
            The settings.

        Raises:
            OptionError: There is no such protocol.
        """
        if protocol == "clean":
            return cls(**changes)
        if protocol == "fungi-paper":
            quirks: dict[str, Any] = {"negatives": "interleaved", "denominator": "raw", "loss_dtype": "float16"}
            return cls(**{**quirks, "loss_tokens": "all", **changes})
        raise OptionError(f"Unknown protocol {protocol!r} of FUNGI. Known: {', '.join(get_args(FungiProtocol))}.")


@dataclass(frozen=True)
class DenseGradients:
    """One pass over a batch, before the projection.

    Attributes:
        losses: float32 [B].
        summary: [B, C] the backbone's.
        patches: float32 [B, L, D] the backbone's features.
        inputs: [B, L, inputs] what the layer took, for each patch.
        upstream: float32 [B, L, H] the gradient of the image's loss at the layer's output.
        latents: float32 [B, T, d] of the tokens that are contrasted.
        negative_latents: float32 [B, T * n, d].
        kept: bool [B, T * n] which negatives were used.
    """

    losses: Tensor
    summary: Tensor
    patches: Tensor
    inputs: Tensor
    upstream: Tensor
    latents: Tensor
    negative_latents: Tensor
    kept: Tensor


class DenseFungiBackbone(Wrapper):
    """A backbone whose features have the gradients of a contrastive loss beside them.

    Its summary is that of the backbone inside. Features of an image depend on this image, the support index and the
    seed, and on nothing else in its batch.

    Args:
        backbone: Any backbone with attention layers; shared, never changed.
        config: How.
        support: Where negatives come from; or call `fit`.
        head: The map to latents; default drawn from the seed.
        projection: Default made from the config.

    Attributes:
        base: The backbone inside.
        config: See above.
        support: See above; None before `fit`.
        pca: Applied to the features at last, if set; see `fit_pca`.
        epoch: Part of what the masks depend on.

    Raises:
        CapabilityError: The backbone has no such layer.
        OptionError: The head or the support index is of another width than the features.
    """

    def __init__(
        self,
        backbone: Any,
        config: DenseConfig | None = None,
        *,
        support: SupportIndex | None = None,
        head: Head | None = None,
        projection: Projection | None = None,
    ) -> None:
        super().__init__(backbone)
        self.config = config or DenseConfig()
        self._split = make_splitter(self.base, self.config.layer)
        width = self.base.embed_dim
        self.head = head or Head.random(width, self.config.latent_dim, torch.Generator().manual_seed(self.config.seed))
        if self.head.weight.shape[1] != width:
            raise OptionError(f"The head takes {self.head.weight.shape[1]} features, and the backbone has {width}.")
        self._own_projection = projection is None
        self.projection = projection or make_projection(
            self.config.projection, self._split.shape, self.config.projection_dim or width, self.config.seed + 1
        )
        self.support: SupportIndex | None = None
        self.pca: Pca | None = None
        self.epoch = 0
        if support is not None:
            self.set_support(support)
        device = next(self.base.parameters()).device
        self.head.to(device)
        if isinstance(self.projection, nn.Module):
            self.projection.to(device)

    @property
    def embed_dim(self) -> int:
        """Width of the features: tokens and projected gradients, or what PCA left of them."""
        return self.pca.dim if self.pca is not None else self.base.embed_dim + self.projection.dim

    @property
    def layer(self) -> str:
        """Full name of the layer whose gradient is taken."""
        return self._split.layer

    @property
    def similarity(self) -> KernelSimilarity | None:
        """How features are compared, for `amradio.search.top_k`; None: by inner product."""
        if not isinstance(self.projection, ExactKernel):
            return None
        return KernelSimilarity(self.base.embed_dim, self._split.shape.outputs)

    @property
    def description(self) -> str:
        """What was added, in a few words for reports."""
        return f"dense FUNGI ({self.config.projection}, {self.config.negatives}, {self.config.denominator})"

    @property
    def record(self) -> dict[str, Any]:
        """See `amradio.fungi.wrapper.Wrapper.record`: settings, layer, and digests of support rows, head and PCA."""
        pca = self.pca
        return {
            "kind": "dense",
            **asdict(self.config),
            "layer": self.layer,
            "epoch": self.epoch,
            "embed_dim": self.embed_dim,
            "head": tensor_digest(self.head.weight, self.head.bias),
            # One that was made from the settings follows from them; at full width its digest would take seconds.
            "given_projection": None if self._own_projection else settings_of(self.projection),
            "support": None if self.support is None else self.support.record,
            "pca": None if pca is None else {"dim": pca.dim, "sha256": tensor_digest(pca.mean, pca.components)},
        }

    def set_support(self, support: SupportIndex) -> None:
        """Say where negatives come from.

        Raises:
            OptionError: The rows are of another width than the features.
        """
        if support.dim != self.base.embed_dim:
            raise OptionError(
                f"The support index has rows of {support.dim} features, and the backbone's have {self.base.embed_dim}: "
                f"it was made with another model or layer."
            )
        self.support = support

    def fit(
        self,
        data: ImageSet | Iterable[Any],
        *,
        patches_per_image: int | None = None,
        policy: ResizePolicy | None = None,
        options: ExtractOptions | None = None,
    ) -> DenseFungiBackbone:
        """Make the support index from patch features of pictures.

        Args:
            data: Pictures as `amradio.images.open_images` gives them, or batches of images [B, 3, H, W] in [0, 1], such
                as those of a data loader; of a batch that is a tuple, the first member.
            patches_per_image: How many patches of each picture are taken, chosen by numbers that belong to the picture;
                None: all.
            policy: For a set of pictures: to which size they are brought; default the backbone's preferred resolution.
            options: For a set of pictures: batch size, device and so on.

        Returns:
            This backbone.

        Raises:
            OptionError: There are no pictures, or some of their features are NaN or infinite.
        """
        from amradio.fungi.collect import support_rows

        rows = support_rows(self.base, data, patches_per_image, self.config.seed, policy, options)
        self.set_support(SupportIndex(rows, neighbours=min(SupportIndex.neighbours, len(rows))))
        return self

    def fit_pca(self, batches: Iterable[Any], dim: int) -> DenseFungiBackbone:
        """Reduce the features to their principal components.

        Args:
            batches: As for `fit`, batches of images; all their features are held.
            dim: Width of the features from now on.

        Returns:
            This backbone.

        Raises:
            CapabilityError: Features of exact-kernel are not compared by an inner product.
            OptionError: There are fewer features than components.
        """
        from amradio.fungi.collect import image_batches

        if self.similarity is not None:
            raise CapabilityError("PCA keeps inner products, and features of exact-kernel are not compared by them.")
        self.pca = None
        device = self.head.weight.device
        rows = [self(images.to(device)).features.flatten(0, 1).cpu() for images in image_batches(batches)]
        self.pca = Pca.fit(torch.cat(rows) if rows else torch.empty(0, self.embed_dim), dim)
        return self

    def forward(self, images: Tensor, feature_fmt: str = "NLC", *, uniforms: Tensor | None = None) -> RadioOutput:
        """Compute summary and features.

        Args:
            images: [B, 3, H, W] in [0, 1].
            feature_fmt: ``NLC``, ``NCHW`` or ``NHWC``.
            uniforms: [B, T * n] numbers in [0, 1] that decide which negatives are kept (those up to ``keep``), for T
                contrasted tokens with n negatives each, token by token; default from the images' contents.

        Returns:
            The backbone's summary, and features of length 1 in float32, of width `embed_dim`.

        Raises:
            OptionError: There is no support index yet, or features are NaN or infinite.
            ResolutionError: The image size is not supported.
        """
        check_feature_fmt(feature_fmt)
        found = self.gradients(images, uniforms)
        with torch.no_grad():
            features = self._features(found)  # [B, L, D]
            grid = (images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size)
            return RadioOutput(found.summary, arrange(features, grid, feature_fmt))

    def gradients(self, images: Tensor, uniforms: Tensor | None = None) -> DenseGradients:
        """Compute the factors of every patch's gradient; see `forward`."""
        if self.support is None:
            raise OptionError("Dense FUNGI needs a support index to draw negatives from: call fit() or set_support().")
        split = self._split(images)
        assert split.patches is not None
        with (
            torch.inference_mode(False),
            torch.autocast(images.device.type, enabled=False),
            torch.enable_grad(),
        ):
            prefix, patches = self._contrasted(split), split.patches
            self._check_finite(patches)
            tokens = torch.cat([prefix, patches], dim=1).detach().float().requires_grad_()  # [B, T, D]
            negatives, kept = self._negatives(images, tokens.detach(), uniforms)
            latents = self.head(tokens)  # [B, T, d]
            losses = info_nce(
                latents,
                negatives,
                kept,
                temperature=self.config.temperature,
                denominator=self.config.denominator,
                dtype=self.config.loss_dtype,
            )
            (gradient,) = torch.autograd.grad(losses.sum(), tokens)
            parts = gradient.split([prefix.shape[1], patches.shape[1]], dim=1)
            outputs = [(o, g) for o, g in ((prefix, parts[0]), (patches, parts[1])) if o.shape[1]]
            upstream = split.upstream([o for o, _ in outputs], [g for _, g in outputs])  # [B, T, H]
        count = patches.shape[1]
        return DenseGradients(
            losses=losses.detach(),
            summary=split.summary.detach(),
            patches=tokens.detach()[:, prefix.shape[1] :],
            inputs=split.inputs[:, -count:],
            upstream=upstream[:, -count:],
            latents=latents.detach(),
            negative_latents=negatives,
            kept=kept,
        )

    def project(self, found: DenseGradients) -> Tensor:
        """Project the gradients of patches: float32 [B, L, E]."""
        inputs = self._split.shape.augmented(found.inputs)  # [B, L, J]
        with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
            projected = self.projection(found.upstream.flatten(0, 1)[:, None], inputs.flatten(0, 1)[:, None])
        return projected.view(*inputs.shape[:2], -1)

    def _features(self, found: DenseGradients) -> Tensor:
        tokens = F.normalize(found.patches, dim=-1)
        projected = self.project(found)
        if self.similarity is not None:
            return torch.cat([tokens, projected], dim=-1)  # three unit vectors
        features = F.normalize(torch.cat([tokens, unit(projected)], dim=-1), dim=-1)
        return features if self.pca is None else self.pca.transform(features)

    def _contrasted(self, split: Split) -> Tensor:
        """Those of the prefix tokens that are contrasted: [B, P', D]."""
        assert split.patches is not None
        through, out = split.leaf.shape[1], split.prefix.shape[1] + split.patches.shape[1]
        if split.patches.shape[1] > through or (split.prefix.shape[1] and through != out):
            raise CapabilityError(
                f"{through} tokens go through the layer {self.layer}, and {out} come out of the backbone "
                f"({split.patches.shape[1]} of them features): they are not one and the same."
            )
        counts = {"all": split.prefix.shape[1], "no-registers": self._split.num_cls_tokens, "patches": 0}
        return split.prefix[:, : counts[self.config.loss_tokens]]

    def _negatives(self, images: Tensor, tokens: Tensor, uniforms: Tensor | None) -> tuple[Tensor, Tensor]:
        """Latents of negatives [B, T * n, d] and which of them are used [B, T * n]."""
        assert self.support is not None
        (b, t, _), n = tokens.shape, self.config.negatives_per_token
        with torch.no_grad():
            if uniforms is None:
                uniforms = uniform(image_keys(images, self.config.seed, self.epoch), t * n)
            if tuple(uniforms.shape) != (b, t * n):
                raise OptionError(f"uniforms must be [{b}, {t * n}] for these images, got {list(uniforms.shape)}.")
            kept = (uniforms <= self.config.keep).to(tokens.device).view(b, t, n)
            asked = kept.any(2)  # the search is the expensive part, so not for tokens whose negatives are all dropped
            rows, found = self.support.negatives(tokens[asked], n, self.config.negatives)  # [q, n, D], [q, n]
            latents = self.head.weight.new_zeros(b, t, n, self.head.weight.shape[0])
            latents[asked] = self.head(rows)
            kept = kept.clone()
            kept[asked] &= found
        return latents.flatten(1, 2), kept.flatten(1)

    def _check_finite(self, patches: Tensor) -> None:
        finite = torch.isfinite(patches.detach()).flatten(1).all(1)
        if not bool(finite.all()):
            first = int((~finite).nonzero()[0])
            raise OptionError(
                f"Features of image {first} of the batch are NaN or infinite, so it has no gradients. Half precision "
                f"overflows in some models: try bfloat16 or float32."
            )
