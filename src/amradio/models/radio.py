"""The model that people call: conditioner, trunk, summary, features, adaptors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from amradio.errors import CapabilityError, ConfigError, OptionError, ResolutionError, UnknownAdaptorError
from amradio.models.adaptors import Adaptor
from amradio.models.configs import ERadioConfig, RadioConfig, Resolution, ViTConfig
from amradio.models.eradio import ERadio
from amradio.models.intermediates import IntermediatesOptions, collect_intermediates, take_indices
from amradio.models.normalizers import FeatureNormalizer, InputConditioner, InterFeatureNormalizer
from amradio.models.output import HiddenStates, RadioOutput, arrange, check_feature_fmt
from amradio.models.vit import Tokens, VisionTransformer

Compat = Literal["official"] | None


class RadioModel(nn.Module):
    """An agglomerative backbone with any number of adaptors.

    Args:
        config: What to build; weights are random.
        adaptors: Names of the adaptors to build, out of ``config.adaptors``.
        compat: ``"official"`` reproduces what the official code gets wrong (see the compatibility page of the docs).

    Attributes:
        model: The trunk.
        adaptors: Adaptors by teacher name.
        summary_idxs: Prefix tokens that make up the backbone summary (int64 buffer).
        input_conditioner: Standardises images; the identity after `make_preprocessor_external`.
        feature_normalizer: Standardises the final features; the identity without stored statistics.
        inter_feature_normalizer: Standardises intermediate features; None without stored statistics.

    Raises:
        UnknownAdaptorError: The checkpoint has no such adaptor.
        ConfigError: The description is inconsistent.
    """

    summary_idxs: Tensor

    def __init__(self, config: RadioConfig, adaptors: Sequence[str] = (), compat: Compat = None) -> None:
        super().__init__()
        self.config = config
        self.compat = compat
        self.identity: Any = None
        self.input_conditioner: nn.Module = InputConditioner()
        self.model = build_trunk(config)
        self.register_buffer("summary_idxs", torch.tensor(config.summary_idxs, dtype=torch.int64))
        self._summary_idxs = tuple(config.summary_idxs)
        self.register_load_state_dict_post_hook(_take_summary_idxs)  # type: ignore[no-untyped-call]
        for name in (n for n in adaptors if "." in n):
            raise ConfigError(f"The adaptor name {name!r} has a dot, which names of torch modules cannot have.")
        self.adaptors = nn.ModuleDict({name: Adaptor(name, _adaptor_config(config, name)) for name in adaptors})
        self.feature_normalizer: nn.Module = (
            FeatureNormalizer(self.embed_dim) if config.feature_normalizer else nn.Identity()
        )
        self.inter_feature_normalizer = (
            InterFeatureNormalizer(self.embed_dim, config.inter_normalizer) if config.inter_normalizer else None
        )
        self._check_tokens()

    # ---- what the model is ----

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self.config.patch_size or self.model.patch_size

    @property
    def embed_dim(self) -> int:
        """Width D of the backbone features."""
        return self.model.embed_dim

    @property
    def summary_dim(self) -> int:
        """Width C of the backbone summary."""
        return self.embed_dim * (len(self._summary_idxs) if self._has_token_summary else 1)

    @property
    def max_resolution(self) -> int | None:
        """Largest side in pixels that the publishers recommend; nothing enforces it."""
        return self.config.max_resolution

    @property
    def preferred_resolution(self) -> Resolution | None:
        """(height, width) that suits summaries best, if known."""
        return self.config.preferred_resolution

    @property
    def window_size(self) -> int | None:
        """Side of the ViTDet windows in patches, None for global attention."""
        return self.model.window_size if isinstance(self.model, VisionTransformer) else None

    @property
    def min_resolution_step(self) -> int:
        """What both image sides must be multiples of, in pixels: patch size times window size."""
        return self.patch_size * (self.window_size or 1)

    @property
    def num_summary_tokens(self) -> int:
        """All prefix tokens, class and register."""
        if isinstance(self.model, VisionTransformer) and self.model.config.pool == "avg":
            return 0
        return self.model.num_prefix_tokens

    @property
    def num_cls_tokens(self) -> int:
        """Class tokens, counting up to the highest one that an adaptor reads."""
        return max([self.model.num_cls_tokens, *(a.head_idx + 1 for a in self._adaptors())])

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks.

        Raises:
            CapabilityError: The trunk is not a vision transformer.
        """
        return self._vit("blocks").blocks

    @property
    def num_video_frames(self) -> int | None:
        """Frames that share a position crop in training, None outside `cpe_video_mode`."""
        return self._vit("cpe_video_mode").patch_generator.num_video_frames

    def get_nearest_supported_resolution(self, height: int, width: int) -> Resolution:
        """Round a size to the nearest one that the model accepts.

        Args:
            height: Pixels.
            width: Pixels.

        Returns:
            (height, width), each a multiple of the resolution step, at least one step. A side half-way between two
            multiples goes to the even one.
        """
        step = max(self.min_resolution_step, self.model.input_multiple)
        return Resolution(*(max(round(side / step) * step, step) for side in (height, width)))

    # ---- running it ----

    def forward(self, images: Tensor, feature_fmt: str = "NLC") -> RadioOutput | dict[str, RadioOutput]:
        """Compute summary and features.

        Args:
            images: [B, 3, H, W] in [0, 1]; H and W are multiples of `min_resolution_step`.
            feature_fmt: ``NLC``: features [B, L, D]; ``NCHW``: [B, D, h, w]; ``NHWC``: [B, h, w, D].

        Returns:
            A `RadioOutput` in the model's dtype. With adaptors a dict of them: ``backbone`` and one for each adaptor,
            the latter in float32.

        Raises:
            OptionError: `feature_fmt` is unknown.
            ResolutionError: The image size is not supported; the message names the nearest one that is.
        """
        check_feature_fmt(feature_fmt)
        self._check_size(images)
        x = self._conditioned(images)
        if isinstance(self.model, ERadio):
            summary, features = self.model(x)
            return self._output(summary, summary, features, images, feature_fmt)
        return self._output_of_tokens(self.model(x), images, feature_fmt)

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        aggregation: Literal["sparse", "dense"] = "sparse",
        norm_alpha_scheme: Literal["none", "pre-alpha", "post-alpha"] = "post-alpha",
    ) -> Any:
        """Compute the features of intermediate blocks, with timm's signature and semantics.

        Args:
            images: [B, 3, H, W] in [0, 1].
            indices: n for the last n blocks, a sequence of block indices (negative ones count from the end), or None
                for all blocks. The order of the results is the order asked for.
            return_prefix_tokens: Return a `RadioOutput` for each block, whose summary is made of its class tokens.
            norm: Apply the trunk's final norm to the intermediates.
            stop_early: Do not run blocks after the last one asked for; the final output is then that block's.
            output_fmt: ``NCHW`` or ``NLC``.
            intermediates_only: Leave the final output out.
            aggregation: ``sparse``: each block's own features; ``dense``: the mean over all blocks since the previous
                index.
            norm_alpha_scheme: How the stored statistics, if any, scale features: ``none`` leaves features as they are;
                ``pre-alpha`` scales each block before a dense mean, ``post-alpha`` scales the mean.

        Returns:
            ``(final, intermediates)``, or only ``intermediates``. ``final`` is what `forward` returns. Each
            intermediate is [B, D, h, w] (``NCHW``) or [B, L, D] (``NLC``). E-RADIO gives one map a stage, each at its
            own stride.

        Raises:
            OptionError: An option or index is not valid.
            ResolutionError: The image size is not supported.
        """
        options = IntermediatesOptions(
            indices=indices,
            prefix_tokens=return_prefix_tokens,
            norm=norm,
            stop_early=stop_early,
            output_fmt=output_fmt,
            aggregation=aggregation,
            norm_alpha_scheme=norm_alpha_scheme,
            official=self.compat == "official",
        )
        options.check()
        self._check_size(images)
        x = self._conditioned(images)
        if isinstance(self.model, ERadio):
            found = self._eradio_intermediates(x, options, intermediates_only)
            if intermediates_only:
                return found
            (summary, features), maps = found
            return self._output(summary, summary, features, images, output_fmt), maps
        collected = collect_intermediates(self.model, self.inter_feature_normalizer, x, options)
        results = [self._intermediate(tokens, images, options) for tokens in collected.tokens]
        if intermediates_only:
            return results
        return self._output_of_tokens(collected.final, images, output_fmt), results

    def forward_hidden_states(self, images: Tensor, feature_fmt: str = "NLC", *, keep: bool = True) -> HiddenStates:
        """Compute what `forward` does, and hand out whole token sequences too.

        Nothing is normalised by stored statistics in the sequences; `forward_intermediates` does that.

        Args:
            images: As for `forward`.
            feature_fmt: As for `forward`.
            keep: Whether to keep the sequence after each block, and not only the last one.

        Returns:
            The outputs, and the sequences.

        Raises:
            OptionError: `feature_fmt` is unknown.
            ResolutionError: The image size is not supported.
        """
        check_feature_fmt(feature_fmt)
        self._check_size(images)
        x = self._conditioned(images)
        if isinstance(self.model, ERadio):
            (summary, features), maps = self.model.forward_intermediates(x)
            outputs = self._output(summary, summary, features, images, feature_fmt)
            return HiddenStates(outputs, features, tuple(maps) if keep else ())
        states: list[Tensor] = []
        for _, sequence in self.model.steps(x):
            if keep:
                states.append(sequence.in_order())
        tokens = self.model.finish(sequence.tokens())
        last = torch.cat(tokens, dim=1) if self.model.config.final_norm else sequence.in_order()  # [B, P + L, C]
        return HiddenStates(self._output_of_tokens(tokens, images, feature_fmt), last, tuple(states))

    def prefix_attention(self, images: Tensor, layer: int = -1) -> Tensor:
        """Compute how the class and register tokens attend in one block.

        Args:
            images: [B, 3, H, W] in [0, 1].
            layer: Block index; negative ones count from the end.

        Returns:
            float32 [B, heads, P, P + L]: the softmax of each prefix token over the P prefix tokens (class tokens come
            first) and the L patches, row-major.

        Raises:
            CapabilityError: The trunk is no vision transformer, has no prefix tokens, or the block is windowed.
            OptionError: There is no such block.
            ResolutionError: The image size is not supported.
        """
        trunk = self._vit("attention of prefix tokens")
        if trunk.num_prefix_tokens == 0:
            raise CapabilityError("The model has neither class nor register tokens whose attention could be seen.")
        (block,) = take_indices([layer], len(trunk.blocks))
        self._check_size(images)
        return trunk.prefix_attention(self._conditioned(images), block)

    def view(self, name: str) -> Any:
        """One adaptor (or ``"backbone"``) as a model of its own, which returns a plain `RadioOutput`.

        Args:
            name: A loaded adaptor's name, or ``backbone``.

        Returns:
            An `amradio.models.view.RadioView`, sharing this model's weights.

        Raises:
            UnknownAdaptorError: No such adaptor is loaded.
        """
        from amradio.models.view import RadioView

        return RadioView(self, name)

    @property
    def _has_token_summary(self) -> bool:
        """Whether summaries are made of prefix tokens, and not of a mean."""
        return isinstance(self.model, VisionTransformer) and self.model.config.pool == "token"

    def _check_tokens(self) -> None:
        if not self._has_token_summary:
            return
        count = self.model.num_prefix_tokens
        readers = [(f"The summary of adaptor {a.name!r}", a.head_idx) for a in self._adaptors()]
        readers += [("The backbone summary", i) for i in self._summary_idxs]
        for reader, i in readers:
            if not 0 <= i < count:
                raise ConfigError(
                    f"{reader} reads prefix token {i}, but the trunk has {count} prefix tokens (counted from 0). The "
                    f"teachers' token slots, or class_token, contradict the rest of the model's description."
                )

    def _check_size(self, images: Tensor) -> None:
        if images.ndim != 4:
            raise ResolutionError(f"Images must be [B, 3, H, W], got the shape {list(images.shape)}.")
        if not images.is_floating_point():
            raise OptionError(
                f"Images must be floating point in [0, 1], got {images.dtype}. For bytes, pass images.float() / 255."
            )
        height, width = images.shape[-2:]
        step = self.min_resolution_step
        if height % step or width % step or height == 0 or width == 0:
            h, w = self.get_nearest_supported_resolution(height, width)
            raise ResolutionError(
                f"The input resolution must be a multiple of `self.min_resolution_step={step}` on both sides, got "
                f"{height}x{width} (height x width). The nearest supported size is {h}x{w}; "
                f"`get_nearest_supported_resolution(height, width)` computes it."
            )

    def _conditioned(self, images: Tensor) -> Tensor:
        x: Tensor = self.input_conditioner(images)
        return x.to(self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The trunk's parameter dtype."""
        return next(self.model.parameters()).dtype

    def _output_of_tokens(
        self, tokens: Tokens, images: Tensor, feature_fmt: str
    ) -> RadioOutput | dict[str, RadioOutput]:
        assert isinstance(self.model, VisionTransformer)
        prefix, patches = tokens
        if self.model.config.pool == "avg":
            summary = patches.mean(dim=1)
            if self.compat == "official" and feature_fmt == "NLC":  # which takes prefix tokens for features here
                patches = torch.cat(tokens, dim=1)
            return self._output(summary, summary, patches, images, feature_fmt)
        return self._output(self._summary(prefix), prefix, patches, images, feature_fmt)

    def _summary(self, prefix: Tensor) -> Tensor:
        """The class tokens of `summary_idxs` side by side: [B, k*C]."""
        return torch.cat([prefix[:, i] for i in self._summary_idxs], dim=-1)

    def _output(
        self, summary: Tensor, for_adaptors: Tensor, patches: Tensor, images: Tensor, feature_fmt: str
    ) -> RadioOutput | dict[str, RadioOutput]:
        """Finish: normalise, run adaptors, arrange.

        `for_adaptors` is one summary [B, C] for all adaptors, or the prefix tokens [B, P, C] of which each takes its
        own.
        """
        patches = self.feature_normalizer(patches)
        grid = (images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size)
        backbone = RadioOutput(summary, arrange(patches, grid, feature_fmt))
        if not self.adaptors:
            return backbone
        outputs = {"backbone": backbone}
        for adaptor in self._adaptors():
            token = for_adaptors if for_adaptors.ndim == 2 else for_adaptors[:, adaptor.head_idx]
            y, features = adaptor(token.float(), patches, grid)
            if self.compat == "official":  # which rounds the spatial output to the backbone's dtype
                features = features.to(patches.dtype)
            u = adaptor.upsample_factor
            features = arrange(features.float(), (grid[0] * u, grid[1] * u), feature_fmt)
            outputs[adaptor.name] = RadioOutput(y.float(), features)
        return outputs

    def _adaptors(self) -> list[Adaptor]:
        return [a for a in self.adaptors.values() if isinstance(a, Adaptor)]

    def _intermediate(self, tokens: Tokens, images: Tensor, options: IntermediatesOptions) -> Tensor | RadioOutput:
        grid = (images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size)
        features = arrange(tokens.patches, grid, options.output_fmt)
        return RadioOutput(self._summary(tokens.prefix), features) if options.prefix_tokens else features

    def _eradio_intermediates(self, x: Tensor, options: IntermediatesOptions, intermediates_only: bool) -> Any:
        assert isinstance(self.model, ERadio)
        if options.aggregation != "sparse":
            raise CapabilityError("E-RADIO's stages have different strides, so they cannot be aggregated densely.")
        return self.model.forward_intermediates(
            x,
            options.indices,
            output_fmt=options.output_fmt,
            stop_early=options.stop_early and intermediates_only,  # the final output needs all stages
            intermediates_only=intermediates_only,
            norm=options.norm,
            return_prefix_tokens=options.prefix_tokens,
        )

    # ---- changing it ----

    def set_vitdet(
        self, window_size: int | None, num_windowed: int | None = None, num_global: int | None = None
    ) -> None:
        """Switch ViTDet windows on or off.

        Args:
            window_size: Side of a window in patches; None for global attention.
            num_windowed: Windowed blocks between two global ones; default as published with the weights.
            num_global: Number of global blocks; default as published, else 4.

        Raises:
            CapabilityError: The trunk is not a vision transformer.
            OptionError: `window_size`, `num_windowed` or `num_global` is too small.
        """
        if window_size is not None and window_size < 1:
            raise OptionError(f"vitdet_window_size must be at least 1, got {window_size}.")
        if (num_windowed is not None and num_windowed < 0) or (num_global is not None and num_global < 1):
            raise OptionError(
                f"num_windowed must be at least 0 and num_global at least 1, got {num_windowed} and {num_global}."
            )
        if num_windowed is None and num_global is None:
            num_windowed, num_global = self.config.vitdet_num_windowed, self.config.vitdet_num_global
        self._vit("ViTDet windows").set_windows(window_size, num_windowed, num_global)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass instead of keeping them.

        Raises:
            CapabilityError: The trunk is not a vision transformer.
        """
        self._vit("gradient checkpointing").grad_checkpointing = enable

    def make_preprocessor_external(self) -> nn.Module:
        """Take the input conditioner out, so that a data pipeline can run it.

        Returns:
            The conditioner; images must go through it before they are given to the model from now on.
        """
        conditioner = self.input_conditioner
        if isinstance(conditioner, InputConditioner):
            conditioner.dtype = self.dtype
        self.input_conditioner = nn.Identity()
        return conditioner

    def switch_to_deploy(self) -> None:
        """Fuse what can be fused for inference (E-RADIO's batch norms); other trunks have nothing to fuse."""
        if isinstance(self.model, ERadio):
            self.model.switch_to_deploy()

    @contextmanager
    def cpe_video_mode(self, num_frames: int) -> Iterator[None]:
        """Let the frames of a video share one position crop while training.

        Args:
            num_frames: Consecutive images that make a video.

        Raises:
            CapabilityError: The trunk is not a vision transformer.
        """
        with self._vit("cpe_video_mode").patch_generator.video_mode(num_frames):
            yield

    def _vit(self, what: str) -> VisionTransformer:
        if not isinstance(self.model, VisionTransformer):
            raise CapabilityError(f"{type(self.model).__name__} has no {what}; only vision transformers have.")
        return self.model


def _take_summary_idxs(module: nn.Module, _: Any) -> None:
    """Follow the positions in a state dict that was loaded. Reading them in each forward would wait for the device."""
    assert isinstance(module, RadioModel)
    if not module.summary_idxs.is_meta:
        module._summary_idxs = tuple(module.summary_idxs.tolist())


def build_trunk(config: RadioConfig) -> VisionTransformer | ERadio:
    """Build the trunk of a model with random weights.

    Args:
        config: The whole model's description.

    Returns:
        The trunk.
    """
    if isinstance(config.backbone, ERadioConfig):
        return ERadio(config.backbone)
    assert isinstance(config.backbone, ViTConfig)
    return VisionTransformer(config.backbone, config.position_interpolation)


def _adaptor_config(config: RadioConfig, name: str) -> Any:
    try:
        return config.adaptors[name]
    except KeyError:
        raise UnknownAdaptorError(
            f"Unable to find the specified adaptor name {name!r}. Known names: {list(config.adaptors)}."
        ) from None
