"""From an image to a token sequence: patch embedding, cropped position embedding (CPE), prefix tokens.

The position grid is stored once, at the largest training size. At inference it is resized to a square that covers the
image's patch grid and cropped; in training a random crop is sampled (AM-RADIO, arXiv 2312.06709, section 3.4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amradio.errors import OptionError, ResolutionError
from amradio.models.cache import TensorCache, caching_is_safe
from amradio.models.configs import PositionInterpolation, ViTConfig
from amradio.models.stem import EfficientNetStem

POSITION_DROPOUT = 0.1
MIN_CROP = math.sqrt(0.1)
MAX_ASPECT = 4 / 3

Uniform: TypeAlias = Callable[[tuple[int, ...]], Tensor]
"""Gives numbers in [0, 1) of a shape whose first axis are images, or videos in video mode."""


class PrefixTokens(nn.Module):
    """Class tokens, then register tokens, learned.

    Attributes:
        token: [num_cls + num_registers, C].
    """

    def __init__(self, count: int, embed_dim: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(count, embed_dim) * embed_dim**-0.5)


class PatchGenerator(nn.Module):
    """Images to tokens [B, prefix + h*w, C]: class tokens, registers, patches in row-major order.

    Args:
        config: The trunk's description.
        interpolation: How the position grid is resized.

    Attributes:
        pos_embed: [1, rows*cols, C], or with leading rows for the prefix tokens.
        num_video_frames: Frames that share one position crop in training, None outside `video_mode`.
    """

    def __init__(self, config: ViTConfig, interpolation: PositionInterpolation = "half_pixel") -> None:
        super().__init__()
        self.config = config
        self.interpolation = interpolation
        self.num_video_frames: int | None = None
        self._uniform: Uniform | None = None
        self._cache = TensorCache()
        c, rows = config.embed_dim, config.position_grid[0] * config.position_grid[1]
        if config.position_of_prefix:
            rows += config.num_prefix_tokens
        self.embedder: nn.Module = (
            nn.Linear(config.in_chans * config.patch_size**2, c, bias=config.patch_bias)
            if config.stem == "patch"
            else EfficientNetStem(c, config.num_cls_tokens)
        )
        self.pos_embed = nn.Parameter(torch.randn(1, rows, c) * c**-0.5)
        self.cls_token = PrefixTokens(config.num_prefix_tokens, c) if config.num_prefix_tokens else None
        self.patch_normalizer = nn.LayerNorm(c, eps=1e-5) if config.patch_norm else None

    def forward(self, images: Tensor) -> Tensor:
        """Embed images.

        Args:
            images: Conditioned images [B, in_chans, H, W]; H and W are multiples of the patch size.

        Returns:
            Tokens [B, prefix + h*w, C].

        Raises:
            ResolutionError: The trunk has a fixed position embedding and the image another size.
            OptionError: In video mode, B is not a multiple of the frame count.
        """
        p = self.config.patch_size
        grid = (images.shape[-2] // p, images.shape[-1] // p)
        whole: Tensor | None = None
        if self.config.stem == "patch":
            x = self.embed_patches(images)  # [B, h*w, C]
        else:
            x, whole = self.embedder(images)  # [B, h*w, C], [B, num_cls, C]
        x = x + self.positions(x.shape[0], grid)
        if self.cls_token is not None:
            prefix: Tensor = self.cls_token.token
            if self.config.position_of_prefix:
                prefix = prefix + self.pos_embed[0, : prefix.shape[0]]
            prefix = prefix.expand(x.shape[0], -1, -1)  # [B, prefix, C]
            if whole is not None:
                prefix = prefix + F.pad(whole, (0, 0, 0, self.config.num_registers))
            x = torch.cat([prefix, x], dim=1)  # [B, prefix + h*w, C]
        return x if self.patch_normalizer is None else self.patch_normalizer(x)

    def embed_patches(self, images: Tensor) -> Tensor:
        """Cut images [B, in_chans, H, W] into patches (channel, row, column order) and embed them: [B, h*w, C]."""
        b, chans, height, width = images.shape
        p = self.config.patch_size
        x = images.reshape(b, chans, height // p, p, width // p, p)  # [B, chans, h, P, w, P]
        x = x.permute(0, 2, 4, 1, 3, 5).reshape(b, (height // p) * (width // p), chans * p * p)  # [B, h*w, chans*P*P]
        return self.embedder(x)  # type: ignore[no-any-return]

    def positions(self, batch: int, grid: tuple[int, int]) -> Tensor:
        """Position embeddings for a patch grid.

        Args:
            batch: B, of which only training needs to know.
            grid: (h, w) in patches.

        Returns:
            [1, h*w, C] at inference, [B, h*w, C] in training with CPE (random crops and position dropout).

        Raises:
            ResolutionError: The position embedding is fixed and has another grid.
            OptionError: In video mode, B is not a multiple of the frame count.
        """
        if self.training and self.config.position in ("cpe", "window"):
            positions = self.training_positions(batch, grid)  # [B or 1, h*w, C]
            keep = self._rand(batch, 1, 1) > POSITION_DROPOUT  # [B, 1, 1]
            return torch.where(keep, positions, torch.zeros_like(positions))
        if not caching_is_safe():
            return self._resized(grid)
        key = (*grid, self.pos_embed.device, self.pos_embed.dtype, self.interpolation)
        return self._cache.get((self.pos_embed,), key, lambda: self._resized(grid))

    def training_positions(self, batch: int, grid: tuple[int, int]) -> Tensor:
        """Random crops of the position grid, one for each image, or one for each video in video mode.

        Crop sides are drawn uniformly from [sqrt(0.1), 1] of the grid with a log-uniform aspect in [3/4, 4/3].

        Args:
            batch: B.
            grid: (h, w) in patches.

        Returns:
            [B, h*w, C]; [1, h*w, C] where nothing is drawn (the grid equals the stored one, or CPE is off).

        Raises:
            OptionError: In video mode, B is not a multiple of the frame count.
        """
        if self.config.position != "cpe" or tuple(grid) == tuple(self.config.position_grid):
            return self._resized(grid)
        frames = self.num_video_frames or 1
        if batch % frames:
            raise OptionError(
                f"Video mode has {frames} frames a video, but the batch of {batch} images is not a multiple of that. "
                f"Pass whole videos."
            )
        n, device = batch // frames, self.pos_embed.device
        log_aspect = math.log(MAX_ASPECT)
        scale = MIN_CROP + (1 - MIN_CROP) * self._rand(n, 1, 1)  # [n, 1, 1]
        aspect = torch.exp(self._rand(n, 1, 1) * (2 * log_aspect) - log_aspect)  # [n, 1, 1]
        size = torch.stack([scale * aspect, scale / aspect], dim=-1).clamp(0, 1)  # [n, 1, 1, 2], x then y
        origin = self._rand(n, 1, 1, 2) * (1 - size)  # [n, 1, 1, 2]
        x = torch.linspace(0, 1, grid[1], device=device).view(1, 1, -1).expand(n, grid[0], -1)  # [n, h, w]
        y = torch.linspace(0, 1, grid[0], device=device).view(1, -1, 1).expand(n, -1, grid[1])  # [n, h, w]
        where = (origin + size * torch.stack([x, y], dim=-1)) * 2 - 1  # [n, h, w, 2]
        crops = F.grid_sample(
            self._position_map().expand(n, -1, -1, -1),  # [n, C, rows, cols]
            where,
            mode="bilinear",
            padding_mode="zeros",
            align_corners=True,
        ).to(self.pos_embed.dtype)
        crops = crops.flatten(2).transpose(1, 2)  # [n, h*w, C]
        return crops.repeat_interleave(frames, dim=0) if frames > 1 else crops  # [B, h*w, C]

    @contextmanager
    def video_mode(self, frames: int) -> Iterator[None]:
        """Let `frames` consecutive images share one position crop while training.

        Args:
            frames: Frames in a video, at least 1.

        Raises:
            OptionError: `frames` is below 1.
        """
        if frames < 1:
            raise OptionError(f"A video has at least one frame, got {frames}.")
        before, self.num_video_frames = self.num_video_frames, frames
        try:
            yield
        finally:
            self.num_video_frames = before

    @contextmanager
    def drawing_from(self, uniform: Uniform) -> Iterator[None]:
        """Let random crops and dropout come from `uniform` instead of torch's own generator.

        Training that is spread over processes gives each of them its rows of what one process would draw.

        Args:
            uniform: Gives the numbers, on any device; asked anew for each use.
        """
        before, self._uniform = self._uniform, uniform
        try:
            yield
        finally:
            self._uniform = before

    def _rand(self, *shape: int) -> Tensor:
        """Uniform numbers on the device of the positions."""
        if self._uniform is None:
            return torch.rand(shape, device=self.pos_embed.device)
        return self._uniform(shape).to(self.pos_embed.device)

    def _position_map(self) -> Tensor:
        """The stored grid as a float32 map [1, C, rows, cols]."""
        skip = self.config.num_prefix_tokens if self.config.position_of_prefix else 0
        grid: Tensor = self.pos_embed[:, skip:].unflatten(1, self.config.position_grid)  # [1, rows, cols, C]
        return grid.permute(0, 3, 1, 2).float()

    def _resized(self, grid: tuple[int, int]) -> Tensor:
        """The inference position embedding [1, h*w, C] of a patch grid (h, w)."""
        h, w = grid
        rows, cols = self.config.position_grid
        mode = self.config.position
        # A resize to the stored size is the identity, so a compiled graph leaves the branch (and its guards) out.
        if mode != "cpe" or not torch.compiler.is_compiling():
            if (h, w) == (rows, cols):
                skip = self.config.num_prefix_tokens if self.config.position_of_prefix else 0
                return self.pos_embed[:, skip:]
            if mode == "fixed":
                p = self.config.patch_size
                raise ResolutionError(
                    f"This model has a fixed position embedding for {rows * p}x{cols * p} images (height x width), "
                    f"got {h * p}x{w * p}. Resize the images to {rows * p}x{cols * p}."
                )
        maps = self._position_map()  # [1, C, rows, cols]
        if mode == "resize":
            maps = self._resized_as_dino(maps, grid)
        elif mode == "cpe":
            side = torch.sym_max(h, w)
            maps = _corner(self._interpolate(maps, (side, side)), h, w)
        else:
            maps = _corner(maps, torch.sym_min(h, rows), torch.sym_min(w, cols))
            if torch.compiler.is_compiling() or tuple(maps.shape[-2:]) != (h, w):
                maps = self._interpolate(maps, (h, w))
        return maps.to(self.pos_embed.dtype).flatten(2).transpose(1, 2)  # [1, h*w, C]

    def _interpolate(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        return F.interpolate(maps, size=size, mode="bilinear", align_corners=self.interpolation == "align_corners")

    def _resized_as_dino(self, maps: Tensor, grid: tuple[int, int]) -> Tensor:
        """Bicubic, at a scale that is slightly off where the weights were trained so: [1, C, h, w]."""
        offset = self.config.position_offset
        if not offset:
            return F.interpolate(maps, size=grid, mode="bicubic", antialias=self.config.position_antialias)
        scale = [(side + offset) / stored for side, stored in zip(grid, self.config.position_grid, strict=True)]
        return F.interpolate(maps, scale_factor=scale, mode="bicubic", antialias=self.config.position_antialias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PatchGenerator:
        self._cache.clear()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def _corner(maps: Tensor, height: int, width: int) -> Tensor:
    """The top left of maps [..., height, width], contiguous.

    A slice has the strides of the whole, with which a graph would be good for one kind of aspect ratio (wide, tall,
    square) only. While exporting it is gathered, for a copy would keep the guard on strides; while compiling it must
    not be, for inductor's backward of this gather writes out of bounds on the CPU (torch 2.13, batch of one).
    """
    if not torch.compiler.is_exporting():
        return maps[..., :height, :width].contiguous()
    rows, cols = torch.arange(height, device=maps.device), torch.arange(width, device=maps.device)
    return maps.index_select(-2, rows).index_select(-1, cols)
