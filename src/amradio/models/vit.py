"""The vision transformer trunk of RADIO: pre-norm blocks over [prefix, patches], optionally with ViTDet windows.

Legend of shape comments: B batch, N tokens of one sequence, P prefix tokens, L patches, C width, H heads, W windows of
an image.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from amradio.errors import CapabilityError
from amradio.models.cache import caching_is_safe
from amradio.models.configs import PositionInterpolation, ViTConfig
from amradio.models.patches import PatchGenerator
from amradio.models.windows import from_windows, global_blocks, to_windows

NORM_EPS = 1e-6
MLP_NORM_EPS = 1e-5  # unlike every other norm of the trunk
LONG_SEQUENCE = 1024  # from here on, attention on a CPU is faster (by 5 to 10 %) after copying keys and values


class DynamicTanh(nn.Module):
    """``gamma * tanh(alpha * x) + beta``, a norm without statistics (arXiv 2503.10622)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((1,), 0.5))
        self.gamma = nn.Parameter(torch.ones(dim))
        self.beta = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Apply to tokens [..., C]."""
        return self.gamma * torch.tanh(self.alpha * x) + self.beta


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Mean of the values for each query, weighed by the softmax over the keys.

    Args:
        q: [B, H, N, C/H].
        k: [B, H, N, C/H].
        v: [B, H, N, C/H].

    Returns:
        [B, N, H, C/H].
    """
    if k.device.type == "cpu" and caching_is_safe() and k.shape[2] >= LONG_SEQUENCE:
        # All keys are read once for every few queries; interleaved as they are, each row is on a page of its own.
        k, v = k.contiguous(), v.contiguous()
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)  # [B, N, H, C/H]


class Attention(nn.Module):
    """Multi-head self-attention; the rows of `qkv` are q, k, v, each split into heads contiguously."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over tokens [B, N, C]."""
        y = self.attend(*self._heads(x)).reshape(x.shape)  # [B, N, C]
        return self.proj(y)  # type: ignore[no-any-return]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `attend`."""
        return attend(q, k, v)

    def weights(self, x: Tensor, count: int) -> Tensor:
        """How the first tokens of [B, N, C] spread their attention over all of them: float32 [B, H, count, N]."""
        q, k, _ = self._heads(x)
        logits = q[:, :, :count].float() @ k.float().transpose(-2, -1)  # [B, H, count, N]
        weights: Tensor = (logits * q.shape[-1] ** -0.5).softmax(-1)
        return weights

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of tokens [B, N, C]: [B, H, N, C/H] each."""
        b, n, c = x.shape
        qkv = self.qkv(x).view(b, n, 3, self.num_heads, c // self.num_heads)  # [B, N, 3, H, C/H]
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v


class Mlp(nn.Module):
    """fc1, exact GELU, optional layer norm, fc2."""

    def __init__(self, dim: int, hidden_dim: int, norm: bool = False) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.norm = nn.LayerNorm(hidden_dim, eps=MLP_NORM_EPS) if norm else None
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to tokens [..., C]."""
        x = _gelu(self.fc1(x), in_place=caching_is_safe() and not self.fc1._forward_hooks)
        return self.fc2(x if self.norm is None else self.norm(x))  # type: ignore[no-any-return]


def _gelu(x: Tensor, in_place: bool) -> Tensor:
    """Exact GELU; in place where nobody else sees `x`, for it is the largest tensor of the whole forward pass."""
    return torch.ops.aten.gelu_(x) if in_place else F.gelu(x)


class SwiGLU(nn.Module):
    """``w3(silu(a) * b)`` with ``a, b`` the halves of ``w12(x)``, as in DINOv2-g."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden_dim)
        self.w3 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to tokens [..., C]."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)  # type: ignore[no-any-return]


class LayerScale(nn.Module):
    """Adds a residual branch, each channel times a learned factor."""

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        """``x + gamma * branch`` in one pass, for tokens [..., C]."""
        return torch.addcmul(x, branch, self.gamma)


class Block(nn.Module):
    """One pre-norm transformer block.

    Args:
        config: The trunk's description.
        index: 0-based position in the trunk (scaled norms depend on it).
    """

    def __init__(self, config: ViTConfig, index: int = 0) -> None:
        super().__init__()
        c = config.embed_dim
        self.norm_factor = (index + 1) ** -0.5 if config.scaled_norm else None
        self.norm1 = _norm(config)
        self.attn = Attention(c, config.num_heads, config.qkv_bias)
        self.ls1 = None if config.layer_scale is None else LayerScale(c, config.layer_scale)
        self.norm2 = _norm(config)
        self.mlp = (
            Mlp(c, config.mlp_hidden_dim, config.mlp_norm) if config.mlp == "gelu" else SwiGLU(c, config.mlp_hidden_dim)
        )
        self.ls2 = None if config.layer_scale is None else LayerScale(c, config.layer_scale)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to tokens [B, N, C]."""
        x = self._add(x, self.attn(self._normed(x, self.norm1)), self.ls1)
        return self._add(x, self.mlp(self._normed(x, self.norm2)), self.ls2)

    def attention(self, x: Tensor, count: int) -> Tensor:
        """Attention weights of the first tokens of the block's input [B, N, C]: float32 [B, H, count, N]."""
        return self.attn.weights(self._normed(x, self.norm1), count)

    def _normed(self, x: Tensor, norm: nn.Module) -> Tensor:
        y: Tensor = norm(x)
        return y if self.norm_factor is None else y * self.norm_factor

    def _add(self, x: Tensor, branch: Tensor, scale: LayerScale | None) -> Tensor:
        return x + branch if scale is None else scale(x, branch)


def _norm(config: ViTConfig) -> nn.Module:
    if config.norm == "dyt":
        return DynamicTanh(config.embed_dim)
    return nn.LayerNorm(config.embed_dim, eps=NORM_EPS)


class Tokens(NamedTuple):
    """A token sequence taken apart.

    Attributes:
        prefix: Class and register tokens [B, P, C]; P may be 0.
        patches: Patch tokens [B, L, C], row-major.
    """

    prefix: Tensor
    patches: Tensor


class VisionTransformer(nn.Module):
    """Images to tokens.

    Args:
        config: What to build.
        interpolation: How the position grid is resized.

    Attributes:
        window_size: Side of the ViTDet windows in patches, None for global attention everywhere.
        grad_checkpointing: Recompute activations in the backward pass instead of keeping them.
        checkpoint: What does so: takes a block and its input.
    """

    def __init__(self, config: ViTConfig, interpolation: PositionInterpolation = "half_pixel") -> None:
        super().__init__()
        self.config = config
        self.patch_size = config.patch_size
        self.embed_dim = config.embed_dim
        self.num_cls_tokens = config.num_cls_tokens
        self.num_prefix_tokens = config.num_prefix_tokens
        self.input_multiple = config.patch_size
        self.window_size: int | None = None
        self.grad_checkpointing = False
        self.checkpoint: Callable[..., Any] = functools.partial(checkpoint, use_reentrant=False)
        self._global: tuple[bool, ...] = ()
        self.patch_generator = PatchGenerator(config, interpolation)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.depth))
        self.norm = nn.LayerNorm(config.embed_dim, eps=NORM_EPS) if config.final_norm else nn.Identity()
        if config.unused_reg_tokens:
            # The v2 architectures store these and never read them. They are kept so that nothing is lost on saving.
            shape = (1, config.unused_reg_tokens, config.embed_dim)
            self.reg_token = nn.Parameter(torch.zeros(shape), requires_grad=False)

    def set_windows(
        self, window_size: int | None, num_windowed: int | None = None, num_global: int | None = None
    ) -> None:
        """Switch ViTDet windows on or off.

        Args:
            window_size: Side of a window in patches; None for global attention everywhere.
            num_windowed: See `amradio.models.windows.global_blocks`.
            num_global: See `amradio.models.windows.global_blocks`.
        """
        self.window_size = window_size
        self._global = () if window_size is None else global_blocks(len(self.blocks), num_windowed, num_global)

    @property
    def global_schedule(self) -> tuple[bool, ...]:
        """Whether each block attends globally; empty without windows."""
        return self._global

    def forward(self, images: Tensor) -> Tokens:
        """Run the trunk.

        Args:
            images: Conditioned images [B, in_chans, H, W]; sides are multiples of patch size times window size.

        Returns:
            The final tokens after the final norm.
        """
        ((_, tokens),) = self.run(images, ())
        return self.finish(tokens)

    def finish(self, tokens: Tokens) -> Tokens:
        """Apply the final norm (the identity in most models) to both parts."""
        if isinstance(self.norm, nn.Identity):
            return tokens
        return Tokens(self.norm(tokens.prefix), self.norm(tokens.patches))

    def run(self, images: Tensor, wanted: Sequence[int], stop: int | None = None) -> Iterator[tuple[int, Tokens]]:
        """Run block by block.

        Args:
            images: As for `forward`.
            wanted: Blocks after which the tokens are yielded.
            stop: Last block to run; default the last one there is.

        Yields:
            Block index and its output (before any final norm), for each wanted block and for the last one run.
        """
        stop = len(self.blocks) - 1 if stop is None else stop
        for i, sequence in self.steps(images, stop):
            if i == stop or i in wanted:
                yield i, sequence.tokens()

    def steps(self, images: Tensor, stop: int | None = None) -> Iterator[tuple[int, TokenSequence]]:
        """Run block by block, and show the running sequence each time.

        Args:
            images: As for `forward`.
            stop: Last block to run; default the last one there is.

        Yields:
            -1 and the embedded images, then each block's index and the sequence after it. It is one object that
            changes with the next step.
        """
        p = self.patch_size
        grid = (images.shape[-2] // p, images.shape[-1] // p)
        x = self.patch_generator(images)  # [B, P + L, C]
        sequence = TokenSequence(x, self.num_prefix_tokens, grid, self.window_size)
        yield -1, sequence
        for i, block in enumerate(self.blocks if stop is None else self.blocks[: stop + 1]):
            if self._global:
                sequence.make_global() if self._global[i] else sequence.make_windowed()
            sequence.apply(self._checkpointed(block))
            yield i, sequence

    def prefix_attention(self, images: Tensor, block: int) -> Tensor:
        """Compute how the prefix tokens attend in one block.

        Args:
            images: As for `forward`.
            block: Index from 0.

        Returns:
            float32 [B, H, P, P + L], each row a distribution over prefix tokens and patches.

        Raises:
            CapabilityError: The block is windowed, and prefix tokens have no part in windows.
        """
        if self._global and not self._global[block]:
            which = ", ".join(str(i) for i, is_global in enumerate(self._global) if is_global)
            raise CapabilityError(
                f"Prefix tokens take no part in block {block}, which attends within windows. Blocks without windows: "
                f"{which}; or switch windows off."
            )
        if block == 0:
            x = self.patch_generator(images)  # [B, P + L, C]
        else:
            ((_, tokens),) = self.run(images, (), stop=block - 1)
            x = torch.cat(tokens, dim=1)  # [B, P + L, C]
        chosen = self.blocks[block]
        assert isinstance(chosen, Block)
        return chosen.attention(x, self.num_prefix_tokens)

    def _checkpointed(self, block: nn.Module) -> Callable[[Tensor], Tensor]:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return lambda x: self.checkpoint(block, x)
        return block


class TokenSequence:
    """The running token sequence, whole or taken apart into windows and withheld prefix tokens."""

    def __init__(self, x: Tensor, num_prefix: int, grid: tuple[int, int], window: int | None) -> None:
        self.batch, self.num_prefix, self.grid, self.window = x.shape[0], num_prefix, grid, window
        self.whole: Tensor | None = x  # [B, P + L, C]
        self.prefix = x[:, :num_prefix]  # [B, P, C], meaningful while not whole
        self.windows = x[:, num_prefix:]  # [B * W, window**2, C], meaningful while not whole
        self.permuted = False  # whether the patches are in window order

    def make_windowed(self) -> None:
        """Cut the patches into windows, apart from the prefix tokens."""
        if self.whole is None:
            return
        assert self.window is not None
        self.prefix, patches = self.whole[:, : self.num_prefix], self.whole[:, self.num_prefix :]
        if self.permuted:
            area, c = self.window**2, patches.shape[-1]
            count = (self.grid[0] // self.window) * (self.grid[1] // self.window)
            self.windows = patches.reshape(self.batch * count, area, c)  # [B * W, window**2, C]
        else:
            self.windows = to_windows(patches, self.grid, self.window)  # [B * W, window**2, C]
            self.permuted = True
        self.whole = None

    def make_global(self) -> None:
        """Put windows and prefix tokens together."""
        if self.whole is None:
            count = self.grid[0] * self.grid[1]
            patches = self.windows.reshape(self.batch, count, self.windows.shape[-1])  # [B, L, C]
            self.whole = torch.cat([self.prefix, patches], dim=1) if self.num_prefix else patches  # [B, P + L, C]

    def apply(self, block: Callable[[Tensor], Tensor]) -> None:
        """Run a block over the whole, or over each window."""
        if self.whole is None:
            self.windows = block(self.windows)
        else:
            self.whole = block(self.whole)

    def tokens(self) -> Tokens:
        """The present tokens with patches in row-major order."""
        prefix = self.prefix if self.whole is None else self.whole[:, : self.num_prefix]
        patches = self.windows if self.whole is None else self.whole[:, self.num_prefix :]
        if self.permuted:
            assert self.window is not None
            patches = from_windows(patches, self.batch, self.grid, self.window)  # [B, L, C]
        return Tokens(prefix, patches)

    def in_order(self) -> Tensor:
        """Prefix tokens, then patches in row-major order: [B, P + L, C]."""
        if self.whole is not None and not self.permuted:
            return self.whole  # the very tensor that the next block takes, so that gradients reach it
        return torch.cat(self.tokens(), dim=1)  # [B, P + L, C]
