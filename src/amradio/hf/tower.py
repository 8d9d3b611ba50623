"""A model as the vision tower of a language model: one sequence of tokens an image, as few as wanted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from amradio.errors import CapabilityError, ConfigError, OptionError, ResolutionError
from amradio.hf.configuration import AmradioConfig
from amradio.hf.image_processing import AmradioImageProcessor
from amradio.hf.library import BaseModelOutputWithPooling, PreTrainedConfig, PreTrainedModel
from amradio.hf.modeling import AmradioModel
from amradio.models.configs import ViTConfig

PREFIX_TOKENS = ("none", "summary", "all")
REDUCTIONS = ("none", "average", "pixel_shuffle")


class AmradioTowerConfig(PreTrainedConfig):  # type: ignore[misc]
    """What a tower is made of: the encoder, and which tokens of it a language model sees.

    ``hidden_size``, ``patch_size`` and ``image_size`` are those of the tokens that come out, so that the LLaVA family
    and its processors count right: with 2 x 2 patches in one token, ``patch_size`` is twice the encoder's.

    Args:
        encoder_config: An `AmradioConfig`, or its JSON object.
        prefix_tokens: What stands before the patches: ``none``; ``summary``, the class tokens that the summary is made
            of; ``all``, class tokens and registers.
        reduction: How neighbouring patches become one token: ``none``, their ``average``, or ``pixel_shuffle``, which
            puts them side by side in the channels.
        reduction_factor: Side in patches of what becomes one token.

    Raises:
        ConfigError: An option is unknown, or options do not fit together.
    """

    model_type = "amradio_tower"
    sub_configs: ClassVar[dict[str, Any]] = {"encoder_config": AmradioConfig}

    encoder_config: dict[str, Any] | PreTrainedConfig | None = None
    prefix_tokens: str = "none"
    reduction: str = "none"
    reduction_factor: int = 2

    def __post_init__(self, **kwargs: Any) -> None:
        given = self.encoder_config
        own = given.to_dict() if isinstance(given, AmradioConfig) else dict(given or {})
        self.encoder_config = AmradioConfig.from_dict(own)  # a copy: the encoder's own config stays as it is
        for name in ("hidden_size", "patch_size", "num_hidden_layers", "num_attention_heads"):
            kwargs.pop(name, None)  # views of the encoder's config
        if (size := kwargs.pop("image_size", None)) is not None:
            self.encoder.image_size = size
        self._check()
        super().__post_init__(**kwargs)

    def _check(self) -> None:
        for name, known in (("prefix_tokens", PREFIX_TOKENS), ("reduction", REDUCTIONS)):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} must be one of {list(known)}, got {getattr(self, name)!r}.")
        factor: Any = self.reduction_factor  # from a file it may be anything
        if not isinstance(factor, int) or factor < 1:
            raise ConfigError(f"reduction_factor must be a whole number from 1, got {factor!r}.")
        if self.prefix_tokens == "none":
            self._check_image_size()
            return
        if self.reduction == "pixel_shuffle":
            raise ConfigError(
                f"pixel_shuffle makes tokens of {self.reduction_factor**2} times the channels, which prefix tokens do "
                "not have. Choose prefix_tokens='none', or reduction='average'."
            )
        if self.encoder.is_hybrid:
            raise ConfigError("E-RADIO has no class tokens or registers: prefix_tokens must be 'none'.")
        trunk = self.encoder.to_radio().backbone
        mean = isinstance(trunk, ViTConfig) and trunk.pool == "avg"
        if not self.prefix_indices or (self.prefix_tokens == "summary" and mean):
            raise ConfigError(
                "The summary of this model is made of no tokens of its own, or it has none: prefix_tokens must be "
                f"'none', got {self.prefix_tokens!r}."
            )
        self._check_image_size()

    def _check_image_size(self) -> None:
        size = self.image_size
        sides = [size] if isinstance(size, int) else list(size) if isinstance(size, (list, tuple)) else [size]
        if not all(isinstance(side, int) for side in sides) or len(sides) > 2:
            raise ConfigError(f"image_size must be a number of pixels, or (height, width), got {size!r}.")
        step = self.size_multiple
        if any(side % step or side < step for side in sides):
            nearest = [max(round(side / step), 1) * step for side in sides]
            raise ConfigError(
                f"Images of {' x '.join(map(str, sides))} pixels do not consist of whole tokens: sides must be "
                f"multiples of {step}. Nearest: {' x '.join(map(str, nearest))}."
            )

    @property
    def size_multiple(self) -> int:
        """What sides of images are multiples of, in pixels."""
        return int(AmradioImageProcessor.from_config(self.encoder).size_multiple) * self.factor

    @property
    def encoder(self) -> AmradioConfig:
        """The encoder's config."""
        config: AmradioConfig = self.encoder_config  # type: ignore[assignment]  # since __post_init__
        return config

    @property
    def factor(self) -> int:
        """Side in patches of what becomes one token."""
        return 1 if self.reduction == "none" else self.reduction_factor

    @property
    def hidden_size(self) -> int:
        """Channels of a token."""
        wide = self.factor**2 if self.reduction == "pixel_shuffle" else 1
        return int(self.encoder.hidden_size) * wide

    @property
    def patch_size(self) -> int:
        """Side in pixels of what becomes one token."""
        return int(self.encoder.patch_size) * self.factor

    @property
    def image_size(self) -> Any:
        """Side in pixels, or (height, width), that processors and language models assume; any other works too."""
        return self.encoder.image_size

    @property
    def num_hidden_layers(self) -> int:
        """Blocks of the encoder."""
        return int(self.encoder.num_hidden_layers)

    @property
    def num_attention_heads(self) -> int:
        """Attention heads of the encoder."""
        return int(self.encoder.num_attention_heads)

    @property
    def prefix_indices(self) -> list[int]:
        """Positions of the tokens that stand before the patches, among the encoder's."""
        radio = self.encoder.to_radio()
        if self.prefix_tokens == "none" or not isinstance(radio.backbone, ViTConfig):
            return []
        if self.prefix_tokens == "summary":
            return list(radio.summary_idxs)
        return list(range(radio.backbone.num_prefix_tokens))

    def num_tokens(self, height: int, width: int) -> int:
        """How many tokens an image gives.

        Args:
            height: In pixels.
            width: In pixels.
        """
        return len(self.prefix_indices) + (height // self.patch_size) * (width // self.patch_size)

    def image_processor(self) -> AmradioImageProcessor:
        """The processor that brings pictures to `image_size`."""
        processor = AmradioImageProcessor.from_config(self.encoder)
        processor.size_multiple = self.size_multiple
        return processor


class AmradioTower(PreTrainedModel):  # type: ignore[misc]
    """A RADIO model as the vision tower of a language model.

    Args:
        config: What to build; weights are random.

    Attributes:
        encoder: The model; its names in the state dict begin with ``encoder.``.
    """

    config_class = AmradioTowerConfig
    base_model_prefix = "tower"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules: ClassVar[list[str]] = ["Block", "PatchGenerator", "Stage"]

    def __init__(self, config: AmradioTowerConfig) -> None:
        super().__init__(config)
        self.encoder = AmradioModel(config.encoder)
        self._prefix = config.prefix_indices
        self.post_init()

    @classmethod
    def from_encoder(cls, encoder: AmradioModel | str, **options: Any) -> Any:
        """Make a tower of a model.

        Args:
            encoder: A model, whose weights are shared; or a name, for `AmradioModel.from_pretrained`.
            **options: Of `AmradioTowerConfig`, ``image_size`` among them; others are for ``from_pretrained``. By
                default the image size is the nearest to the model's own that consists of whole tokens.

        Returns:
            The tower, in the encoder's mode.
        """
        from transformers.initialization import no_init_weights

        known = ("prefix_tokens", "reduction", "reduction_factor", "image_size")
        ours = {k: options.pop(k) for k in known if k in options}
        if options and not isinstance(encoder, str):
            raise OptionError(f"{', '.join(options)}: not options of a tower. They are {', '.join(known)}.")
        model: Any = AmradioModel.from_pretrained(encoder, **options) if isinstance(encoder, str) else encoder
        if not isinstance(model, AmradioModel):
            raise OptionError(
                f"A tower is made of an AmradioModel or a name, got a {type(model).__name__}. Wrap a RadioModel with "
                "AmradioModel.from_radio."
            )
        ours.setdefault("image_size", _whole(model.config, **ours))
        config = AmradioTowerConfig(encoder_config=model.config, dtype=model.dtype, **ours)
        with torch.device("meta"), no_init_weights():
            tower = cls(config)
        tower.encoder = model
        return tower.train(model.training)

    def train(self, mode: bool = True) -> Any:
        """Switch to training or evaluation mode.

        A tower that is frozen stays in evaluation mode: in training mode positions are cropped at random, an
        augmentation that only its own training wants.

        Args:
            mode: Whether to train.
        """
        return super().train(mode and any(p.requires_grad for p in self.parameters()))

    def get_input_embeddings(self) -> Any:
        """The layer that makes tokens of patches."""
        return self.encoder.get_input_embeddings()

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the layer that `get_input_embeddings` returns."""
        self.encoder.set_input_embeddings(value)

    def _set_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        self.encoder._set_gradient_checkpointing(*args, **kwargs)

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether activations are recomputed in the backward pass."""
        return self.encoder.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool) -> None:
        # A model that this one is part of switches all its parts so; the encoder is one of them, and does it.
        pass

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Nothing here has weights of its own; the encoder makes its own."""

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Tokens of images.

        Args:
            pixel_values: [B, 3, H, W] in [0, 1]; H and W are multiples of the config's ``patch_size``.
            output_hidden_states: Whether to return the tokens after each block, reduced likewise; numbers return those
                only, and None in place of the others. The last entry always is ``last_hidden_state``.
            return_dict: False for a tuple.
            **kwargs: Not used.

        Returns:
            ``last_hidden_state`` [B, N, hidden_size], the prefix tokens first; ``pooler_output``, the summary
            [B, summary_dim]; ``hidden_states``.

        Raises:
            ResolutionError: The image size does not suit.
            OptionError: There is no such hidden state.
            CapabilityError: Other states than the last one are asked of E-RADIO, whose maps differ in size.
        """
        self._check_size(pixel_values)
        count = 1 + self.config.num_hidden_layers
        asked = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        wanted = _indices(asked, count)
        below = wanted - {count - 1}
        if below and self.config.encoder.is_hybrid:
            raise CapabilityError(
                f"The stages of E-RADIO have maps of different sizes, so that only the last one (-1) makes tokens; got "
                f"{asked!r}."
            )
        found = self.encoder.radio.forward_hidden_states(pixel_values, keep=bool(below))
        output = found.outputs["backbone"] if isinstance(found.outputs, dict) else found.outputs
        grid = tuple(side // self.encoder.radio.patch_size for side in pixel_values.shape[-2:])
        prefix = found.last.shape[1] - output.features.shape[1]
        last = self._tokens(found.last[:, :prefix], output.features, grid)
        states = [
            last
            if i == count - 1
            else self._tokens(found.states[i][:, :prefix], found.states[i][:, prefix:], grid)
            if i in wanted
            else None
            for i in range(count)
        ]
        result = BaseModelOutputWithPooling(
            last_hidden_state=last, pooler_output=output.summary, hidden_states=tuple(states) if wanted else None
        )
        return result.to_tuple() if return_dict is False else result

    def _tokens(self, prefix: Tensor, patches: Tensor, grid: tuple[int, ...]) -> Tensor:
        """[B, P, C] and [B, L, C] to [B, N, hidden_size]."""
        factor, kind = self.config.factor, self.config.reduction
        if kind == "average":
            maps = patches.mT.unflatten(-1, grid)  # [B, C, h, w]
            patches = F.avg_pool2d(maps, factor).flatten(2).mT  # [B, L / f², C]
        elif kind == "pixel_shuffle":
            h, w = (side // factor for side in grid)
            blocks = patches.reshape(len(patches), h, factor, w, factor, -1)  # [B, h/f, f, w/f, f, C]
            patches = blocks.transpose(2, 3).reshape(len(patches), h * w, -1)  # [B, L / f², f² C]
        if not self._prefix:
            return patches
        return torch.cat([prefix[:, self._prefix], patches.to(prefix.dtype)], dim=1)  # [B, K + L / f², C]

    def _check_size(self, images: Tensor) -> None:
        step = self.config.patch_size
        height, width = images.shape[-2:]
        if self.config.factor > 1 and (height % step or width % step):
            nearest = tuple(max(round(side / step), 1) * step for side in (height, width))
            raise ResolutionError(
                f"Images of {height} x {width} pixels do not consist of whole tokens of {step} x {step} pixels "
                f"(reduction {self.config.reduction!r} by {self.config.factor}). Nearest: {nearest[0]} x {nearest[1]}."
            )


def _whole(
    config: AmradioConfig, reduction: str = "none", reduction_factor: int = 2, **_: Any
) -> int | list[int] | tuple[int, ...]:
    """The size nearest to a model's own that consists of whole tokens."""
    step = AmradioImageProcessor.from_config(config).size_multiple * (
        1 if reduction == "none" else max(reduction_factor, 1)
    )
    size = config.image_size
    if isinstance(size, int):
        return max(round(size / step), 1) * step
    return [max(round(side / step), 1) * step for side in size or ()]


def _indices(wanted: bool | int | Sequence[int] | None, count: int) -> set[int]:
    """Which of `count` states are asked for, counted from 0."""
    if wanted is None or wanted is False:
        return set()
    if wanted is True:
        return set(range(count))
    asked = [wanted] if isinstance(wanted, int) else list(wanted)
    if bad := [i for i in asked if not -count <= i < count]:
        raise OptionError(f"There is no hidden state {bad[0]}: they go from 0 to {count - 1}, or from -{count} to -1.")
    return {i % count for i in asked}
