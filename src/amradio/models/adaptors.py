"""Adaptor heads: what turns backbone tokens into one teacher's summary and features.

Version names are those of the official training arguments: ``v1``, ``v2`` and ``attn``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amradio.errors import CapabilityError, ConfigError, MissingDependencyError
from amradio.models.configs import AdaptorConfig, HeadConfig, ViTConfig
from amradio.models.vit import Block

ATTN_HEADS = 16
ATTN_BLOCKS = 2
ATTN_LAYER_SCALE = 1e-5


class MlpV1(nn.Module):
    """``fc2(inner(relu(LN(fc1(x)))))`` with `inner` a flat run of (linear, LN, ReLU)."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        hidden = config.hidden_dim
        self.fc1 = nn.Linear(config.input_dim, hidden)
        self.norm = nn.LayerNorm(hidden)
        inner = [(nn.Linear(hidden, hidden), nn.LayerNorm(hidden), nn.ReLU()) for _ in range(config.num_inner)]
        self.inner = nn.Sequential(*(layer for layers in inner for layer in layers))
        self.fc2 = nn.Linear(hidden, config.output_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [..., input_dim] to [..., output_dim]."""
        return self.fc2(self.inner(F.relu(self.norm(self.fc1(x)))))  # type: ignore[no-any-return]


class MlpV2(nn.Module):
    """A linear layer, residual pre-norm GELU layers, and a pre-norm GELU output layer."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        hidden = config.hidden_dim
        self.pre_norm = nn.Sequential(nn.LayerNorm(config.input_dim), nn.GELU()) if config.pre_norm else nn.Identity()
        self.fc1 = nn.Linear(config.input_dim, hidden)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, hidden)) for _ in range(config.num_inner)
        )
        self.final = nn.Sequential(nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, config.output_dim))

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [..., input_dim] to [..., output_dim]."""
        x = self.fc1(self.pre_norm(x))
        for block in self.blocks:
            x = x + block(x)
        return self.final(x)  # type: ignore[no-any-return]


class AttentionHead(nn.Module):
    """Two transformer blocks over the patch tokens, then an `MlpV2` without inner blocks."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        if config.input_dim % ATTN_HEADS:
            raise ConfigError(
                f"An 'attn' spatial head has {ATTN_HEADS} attention heads, which do not divide its width of "
                f"{config.input_dim}."
            )
        if config.num_inner:
            raise ConfigError(f"An 'attn' spatial head has no inner MLP blocks, got num_inner={config.num_inner}.")
        block = ViTConfig(
            embed_dim=config.input_dim,
            depth=ATTN_BLOCKS,
            num_heads=ATTN_HEADS,
            mlp_hidden_dim=4 * config.input_dim,
            qkv_bias=False,
            layer_scale=ATTN_LAYER_SCALE,
        )
        self.blocks = nn.Sequential(*(Block(block, i) for i in range(ATTN_BLOCKS)))
        self.mlp = MlpV2(config)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [B, L, input_dim] to [B, L, output_dim]."""
        return self.mlp(self.blocks(x))  # type: ignore[no-any-return]


_HEADS: dict[str, type[MlpV1 | MlpV2 | AttentionHead]] = {"v1": MlpV1, "v2": MlpV2, "attn": AttentionHead}


def build_head(config: HeadConfig) -> nn.Module:
    """Build one head with random weights.

    Args:
        config: What to build.

    Returns:
        A module from [..., input_dim] to [..., output_dim].

    Raises:
        ConfigError: The sizes do not fit the head's version.
    """
    if config.output_dim % config.upsample_factor**2:
        raise ConfigError(
            f"A head that upsamples by {config.upsample_factor} needs an output_dim divisible by "
            f"{config.upsample_factor**2}, got {config.output_dim}."
        )
    if config.pre_norm and config.version == "v1":
        raise ConfigError("A 'v1' head has no pre-norm.")
    return _HEADS[config.version](config)


def upsample_tokens(tokens: Tensor, grid: tuple[int, int], factor: int) -> Tensor:
    """Spread sub-positions that are stored in the channels over a finer grid.

    Args:
        tokens: [B, h*w, u*u*C], channel index (sub-row * u + sub-column) * C + c.
        grid: (h, w).
        factor: u.

    Returns:
        [B, (h*u)*(w*u), C], row-major.
    """
    if factor == 1:
        return tokens
    b, (h, w), u, c = tokens.shape[0], grid, factor, tokens.shape[-1] // factor**2
    x = tokens.reshape(b, h, w, u, u, c).transpose(2, 3)  # [B, h, u, w, u, C]
    return x.reshape(b, h * u * w * u, c)


class TextSide(Protocol):
    """The text tower of a teacher, as `amradio.text` provides it."""

    tokenizer: Callable[..., Any]

    def to(self, device: torch.device) -> Any:
        """Move to a device, in place."""
        ...

    def encode_text(self, tokens: Any, normalize: bool = False) -> Tensor:
        """Embed tokenized text: [N, C]."""
        ...


class Adaptor(nn.Module):
    """The summary head and the spatial head of one teacher, and its text side if it has one.

    Attributes:
        name: Teacher name.
        head_idx: Prefix token that feeds the summary head.
        upsample_factor: Rows and columns of output for each patch row and column.
        summary_dim: Width of the summary.
        embed_dim: Width of the features.
    """

    def __init__(self, name: str, config: AdaptorConfig) -> None:
        super().__init__()
        self.name = name
        self.config = config
        self.head_idx = config.head_idx
        self.upsample_factor = config.features.upsample_factor
        self.summary_dim = config.summary.output_dim
        self.embed_dim = config.features.output_dim // self.upsample_factor**2
        self.head_mlp = build_head(config.summary)
        self.feat_mlp = build_head(config.features)
        self._load_text: Callable[[torch.device], TextSide] | None = None
        self._text: list[TextSide] = []  # in a list, so that a tower never becomes a part of the model's state

    def forward(self, summary: Tensor, patches: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Imitate the teacher.

        Args:
            summary: The teacher's token [B, C].
            patches: Backbone features [B, h*w, D].
            grid: (h, w).

        Returns:
            Summary [B, summary_dim] and row-major features [B, (h*u)*(w*u), embed_dim], both in the heads' dtype.
        """
        dtype = next(self.parameters()).dtype
        features = self.feat_mlp(patches.to(dtype))
        return self.head_mlp(summary.to(dtype)), upsample_tokens(features, grid, self.upsample_factor)

    def attach_text(self, load: Callable[[torch.device], TextSide] | None) -> None:
        """Say how the text side is loaded. Nothing is loaded until it is used.

        Args:
            load: Returns the text side on a device; None if the teacher has none.
        """
        self._load_text, self._text = load, []

    @property
    def has_text(self) -> bool:
        """Whether the teacher has a text side."""
        return self._load_text is not None

    @property
    def text(self) -> TextSide:
        """The teacher's text side, on this adaptor's device, loaded at the first use.

        Raises:
            CapabilityError: The teacher has none.
            MissingDependencyError: It needs a package that is not installed.
        """
        device = next(self.parameters()).device
        if not self._text:
            if self._load_text is None:
                raise CapabilityError(
                    f"The teacher {self.name!r} has no text side. Adaptors have one whose teacher's record is of the "
                    f"type open_clip, siglip2, siglip, hf or sentence."
                )
            try:
                self._text.append(self._load_text(device))
            except AttributeError as e:  # which torch would report as a missing attribute of this module
                raise MissingDependencyError(
                    f"The text side of {self.name!r} cannot be loaded with the installed packages: {e}. "
                    f"`amradio doctor` shows their versions."
                ) from e
        self._text[0].to(device)  # the model may have moved since
        return self._text[0]

    @property
    def tokenizer(self) -> Callable[..., Any]:
        """The text side's tokenizer: a list of strings to tokens with a ``.to()``."""
        return self.text.tokenizer

    def encode_text(self, tokens: Any, normalize: bool = False) -> Tensor:
        """Embed tokenized text in the space of this adaptor's summary.

        Args:
            tokens: What `tokenizer` gave.
            normalize: Whether to scale each embedding to unit length.

        Returns:
            [N, summary_dim].
        """
        return self.text.encode_text(tokens, normalize=normalize)
