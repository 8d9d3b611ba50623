"""Standardisation of inputs, final features and intermediate features by stored statistics."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from amradio.models.configs import InterNormalizerConfig

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class InputConditioner(nn.Module):
    """Standardise an image per channel.

    The two buffers stay float32 whatever the model is cast to: rounding the constants to bfloat16 would shift every
    input. They are loaded from the checkpoint, never replaced by the constants, because half precision files hold
    rounded values that the published numbers were made with.

    Attributes:
        norm_mean: [3, 1, 1].
        norm_std: [3, 1, 1].
        dtype: Output dtype; None keeps float32.
    """

    norm_mean: Tensor
    norm_std: Tensor

    def __init__(self, mean: tuple[float, ...] = CLIP_MEAN, std: tuple[float, ...] = CLIP_STD) -> None:
        super().__init__()
        self.dtype: torch.dtype | None = None
        self.register_buffer("norm_mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))  # [3, 1, 1]
        self.register_buffer("norm_std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))  # [3, 1, 1]

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, 3, H, W] in [0, 1] to zero mean and unit variance (of the statistics' data set)."""
        y = (images - self.norm_mean) / self.norm_std
        return y if self.dtype is None else y.to(self.dtype)

    def inverse(self, conditioned: Tensor) -> Tensor:
        """Map conditioned images [B, 3, H, W] back to [0, 1]."""
        return conditioned * self.norm_std + self.norm_mean

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> InputConditioner:
        exact = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in self._buffers.items():
            before = exact[name]
            if buffer is not None and before is not None and buffer.dtype != before.dtype:
                self._buffers[name] = before.to(buffer.device)  # moved, but not cast there and back
        return self


class FeatureNormalizer(nn.Module):
    """Whiten or rotate final features: ``y = (x - mean) @ tx.T`` (PHI-S, arXiv 2410.01680).

    Attributes:
        mean: [D].
        tx: [D, D].
    """

    mean: Tensor
    tx: Tensor

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(embed_dim))
        self.register_buffer("tx", torch.eye(embed_dim))

    def forward(self, features: Tensor) -> Tensor:
        """Standardise features [B, L, D] or [B, D, h, w]; the layout is kept."""
        x = features.movedim(1, -1) if features.ndim == 4 else features  # [B, h, w, D]
        y = (x - self.mean) @ self.tx.T
        return y.movedim(-1, 1) if features.ndim == 4 else y  # [B, D, h, w]


class InterFeatureNormalizer(nn.Module):
    """Standardise the features of intermediate blocks, each with its own mean and scale.

    Attributes:
        alphas: [N], a scale for each block.
        means: [N, D].
        rotation: [D, D], or [N, D, D] with one rotation for each block.
    """

    alphas: Tensor
    means: Tensor
    rotation: Tensor

    def __init__(self, embed_dim: int, config: InterNormalizerConfig) -> None:
        super().__init__()
        count = config.num_intermediates
        eye = torch.eye(embed_dim)
        self.register_buffer("alphas", torch.ones(count))
        self.register_buffer("means", torch.zeros(count, embed_dim))
        self.register_buffer("rotation", eye.repeat(count, 1, 1) if config.rotation_per_layer else eye)

    def forward(self, features: Tensor, index: int, rotation_index: int | None = None) -> tuple[Tensor, Tensor]:
        """Standardise what block `index` gave, without its scale.

        Args:
            features: Patch tokens [B, L, D] or a map [B, D, h, w].
            index: Block whose mean and scale apply.
            rotation_index: Block whose rotation applies (the last of an aggregated group); default `index`.

        Returns:
            The rotated features in the layout given, and the scale (a scalar tensor) to multiply them with.
        """
        x = features.movedim(1, -1) if features.ndim == 4 else features  # [B, h, w, D]
        rotation = self.rotation
        if rotation.ndim == 3:
            rotation = rotation[index if rotation_index is None else rotation_index]  # [D, D]
        y = (x - self.means[index]) @ rotation.T
        return (y.movedim(-1, 1) if features.ndim == 4 else y), self.alphas[index]
