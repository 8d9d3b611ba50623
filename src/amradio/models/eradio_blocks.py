"""Building blocks of E-RADIO: foldable convolutions, C2f, and windowed attention with a learned position bias.

E-RADIO is described in AM-RADIO (arXiv 2312.06709, section 5); C2f is YOLOv8's, windowed attention after convolutional
stages follows FasterViT (arXiv 2306.06189).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amradio.models.cache import caching_is_safe
from amradio.models.eradio_bias import PositionBias
from amradio.models.windows import from_windows, to_windows

Activation = Literal["none", "relu", "gelu", "silu"]
MATMUL_RATIO = 10  # from here on, weights over input values, a convolution on a CPU is faster as a matrix product


class ConvBN(nn.Module):
    """A convolution without bias and its batch norm, which `fuse` turns into one convolution with bias.

    Args:
        in_chans: Input channels.
        out_chans: Output channels.
        kernel: Side of the kernel; the padding keeps the size at stride 1.
        stride: Stride.
        groups: Channel groups.
        activation: What follows the norm.
    """

    def __init__(
        self,
        in_chans: int,
        out_chans: int,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        activation: Activation = "none",
    ) -> None:
        super().__init__()
        self.activation = activation
        self.conv = nn.Conv2d(in_chans, out_chans, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn: nn.BatchNorm2d | None = nn.BatchNorm2d(out_chans)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to maps [B, in_chans, H, W], sides multiples of the stride: [B, out_chans, H / stride, W / stride]."""
        y = self._matmul(x) if self._is_weight_bound(x) else self.conv(x)
        if self.conv.stride[0] == 2 and torch.compiler.is_compiling():
            # Cuts nothing off, as sides are even. A compiler knows the size of the result as (H - 1) // 2 + 1, which
            # nested five times with a symbolic H costs it minutes; this says that it is H // 2.
            y = y.narrow(2, 0, x.shape[2] // 2).narrow(3, 0, x.shape[3] // 2)
        if self.bn is not None:
            y = self.bn(y)
        # In place: neither a convolution nor a batch norm needs its own output for the backward pass.
        if self.activation == "silu":
            return F.silu(y, inplace=True)
        if self.activation == "relu":
            return F.relu(y, inplace=True)
        return F.gelu(y) if self.activation == "gelu" else y

    def _is_weight_bound(self, x: Tensor) -> bool:
        """Whether re-packing the weights, which oneDNN does at each call, would outweigh the convolution itself.

        True of the last stage's convolutions at a small batch: 85 MB of weights for a map of 1.5 MB. Only inference
        goes this way: training would have to keep all the neighbourhoods, and compilers pack weights better.
        """
        return (
            caching_is_safe()
            and x.device.type == "cpu"
            and x.dtype == torch.float32
            and self.conv.groups == 1
            and self.conv.weight.numel() > MATMUL_RATIO * x.numel()
        )

    def _matmul(self, x: Tensor) -> Tensor:
        """The convolution as a product of its weights with the neighbourhoods of all positions."""
        conv = self.conv
        (kernel, _), (stride, _), padding = conv.kernel_size, conv.stride, conv.kernel_size[0] // 2
        size = [(side + 2 * padding - kernel) // stride + 1 for side in x.shape[-2:]]
        patches = F.unfold(x, kernel, padding=padding, stride=stride).transpose(1, 2)  # [B, h * w, in * kernel**2]
        y = F.linear(patches, conv.weight.flatten(1), conv.bias)  # [B, h * w, out]
        return y.view(x.shape[0], *size, -1).permute(0, 3, 1, 2)  # [B, out, h, w]

    @torch.no_grad()
    def fuse(self) -> None:
        """Fold the batch norm's running statistics and affine map into the convolution."""
        bn, weight = self.bn, self.conv.weight
        if bn is None:
            return
        assert bn.running_mean is not None  # track_running_stats is on
        assert bn.running_var is not None
        dtype = torch.promote_types(weight.dtype, torch.float32)
        scale = bn.weight.to(dtype) / (bn.running_var.to(dtype) + bn.eps).sqrt()  # [out]
        bias = bn.bias.to(dtype) - bn.running_mean.to(dtype) * scale
        weight.copy_(weight.to(dtype) * scale[:, None, None, None])
        self.conv.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=weight.requires_grad)
        self.bn = None


class Bottleneck(nn.Module):
    """Two 3x3 convolutions with SiLU and a residual connection."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.cv1 = ConvBN(dim, dim, 3, activation="silu")
        self.cv2 = ConvBN(dim, dim, 3, activation="silu")

    def forward(self, x: Tensor) -> Tensor:
        """Apply to maps [B, C, H, W]."""
        return x + self.cv2(self.cv1(x))  # type: ignore[no-any-return]


class C2f(nn.Module):
    """YOLOv8's stage: a chain of bottlenecks on one half of the channels, all of whose outputs are mixed at the end."""

    def __init__(self, dim: int, depth: int) -> None:
        super().__init__()
        half = dim // 2
        self.cv1 = ConvBN(dim, 2 * half, activation="silu")
        self.cv2 = ConvBN((2 + depth) * half, dim, activation="silu")
        self.m = nn.ModuleList(Bottleneck(half) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        """Apply to maps [B, C, H, W]."""
        parts = list(self.cv1(x).chunk(2, dim=1))  # 2 x [B, C/2, H, W]
        for bottleneck in self.m:
            parts.append(bottleneck(parts[-1]))
        return self.cv2(torch.cat(parts, dim=1))  # type: ignore[no-any-return]


class ConvBlock(nn.Module):
    """A residual pair of 3x3 convolutions with GELU between them."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = ConvBN(dim, dim, 3, activation="gelu")
        self.conv2 = ConvBN(dim, dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to maps [B, C, H, W]."""
        return x + self.conv2(self.conv1(x))  # type: ignore[no-any-return]


class WindowAttention(nn.Module):
    """Multi-head self-attention inside each window, with a position bias."""

    def __init__(self, dim: int, num_heads: int, window: int, bias_hidden_dim: int, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=False)
        self.pos_emb_funct = PositionBias(window, num_heads, bias_hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over windows of tokens [B * W, N, C], N = window**2."""
        b, n, c = x.shape
        qkv = self.qkv(x).view(b, n, 3, self.num_heads, c // self.num_heads)  # [B * W, N, 3, H, C/H]
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # 3 x [B * W, H, N, C/H]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.pos_emb_funct(q.dtype))  # [B * W, H, N, C/H]
        return self.proj(y.transpose(1, 2).reshape(b, n, c))  # type: ignore[no-any-return]  # [B * W, N, C]


class Mlp(nn.Module):
    """fc1, exact GELU, fc2, without biases."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim, bias=False)
        self.fc2 = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to tokens [..., C]."""
        return self.fc2(F.gelu(self.fc1(x)))  # type: ignore[no-any-return]


class AttentionBlock(nn.Module):
    """Windowed attention and an MLP on a map that may be sub-sampled for it, averaged with the block's input.

    Args:
        dim: Width C.
        num_heads: Attention heads.
        window: Side of a window in cells of the sub-sampled map.
        subsample: Sub-sampling ratio.
        mlp_ratio: Hidden width over width in the MLP.
        bias_hidden_dim: Hidden width of the position-bias network.
        qkv_bias: Whether the qkv projection has a bias.
        layer_scale: Initial value of the branch scales, None for none.
        conv_base: Sub-sample and back by strided convolutions; otherwise by pooling and repetition, each with a 1x1
            convolution.
        conv_groups: Groups of the 3x3 convolution that lets windows exchange information where nothing is sub-sampled.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: int,
        subsample: int,
        *,
        mlp_ratio: float,
        bias_hidden_dim: int,
        qkv_bias: bool,
        layer_scale: float | None,
        conv_base: bool,
        conv_groups: int,
    ) -> None:
        super().__init__()
        self.window_size = window
        self.subsample = subsample
        self.conv_base = conv_base
        if subsample == 1:
            self.pre_conv = ConvBN(dim, dim, 3, groups=conv_groups)
        elif conv_base:
            self.downsample_op = nn.Conv2d(dim, dim, subsample, stride=subsample)
            self.upsample_op: nn.Module = nn.ConvTranspose2d(dim, dim, subsample, stride=subsample)
        else:
            self.downsample_mixer = ConvBN(dim, dim)
            self.upsample_op = ConvBN(dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads, window, bias_hidden_dim, qkv_bias)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.gamma1 = self.gamma2 = None
        if layer_scale is not None:
            self.gamma1 = nn.Parameter(torch.full((dim,), float(layer_scale)))
            self.gamma2 = nn.Parameter(torch.full((dim,), float(layer_scale)))

    def change_window_size(self, window: int) -> None:
        """Attend in windows of another size from now on."""
        self.window_size = self.attn.pos_emb_funct.window_size = window

    def forward(self, x: Tensor) -> Tensor:
        """Apply to maps [B, C, H, W]; H and W are multiples of the sub-sampling ratio."""
        y = self._reduce(x)
        height, width, window = y.shape[-2], y.shape[-1], self.window_size
        pad_h, pad_w = -height % window, -width % window
        if pad_h or pad_w:
            y = F.pad(y, (0, pad_w, 0, pad_h), mode="reflect")
        grid = (height + pad_h, width + pad_w)
        tokens = to_windows(y.permute(0, 2, 3, 1).flatten(1, 2), grid, window)  # [B * W, window**2, C]
        tokens = self._transform(tokens)
        tokens = from_windows(tokens, x.shape[0], grid, window)  # [B, h * w, C]
        y = tokens.view(x.shape[0], *grid, -1).permute(0, 3, 1, 2)  # [B, C, h, w]
        if pad_h or pad_w:
            y = y[:, :, :height, :width]
        return (x + self._expand(y)) * 0.5

    def _transform(self, x: Tensor) -> Tensor:
        """The two pre-norm residual branches on tokens [B * W, N, C]."""
        y = self.attn(self.norm1(x))
        x = x + (y if self.gamma1 is None else self.gamma1 * y)
        y = self.mlp(self.norm2(x))
        return x + (y if self.gamma2 is None else self.gamma2 * y)  # type: ignore[no-any-return]

    def _reduce(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C, H / subsample, W / subsample]."""
        if self.subsample == 1:
            return self.pre_conv(x) + x  # type: ignore[no-any-return]
        if self.conv_base:
            return self.downsample_op(x)  # type: ignore[no-any-return]
        return self.downsample_mixer(F.avg_pool2d(x, self.subsample))  # type: ignore[no-any-return]

    def _expand(self, x: Tensor) -> Tensor:
        """Undo the sub-sampling."""
        if self.subsample == 1:
            return x
        if self.conv_base:
            return self.upsample_op(x)  # type: ignore[no-any-return]
        if self.training:  # the running variance depends on how many cells there are
            return self.upsample_op(self._repeat(x))  # type: ignore[no-any-return]
        # A 1x1 convolution and repetition commute; in this order the convolution sees subsample**2 times fewer cells.
        return self._repeat(self.upsample_op(x))

    def _repeat(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=float(self.subsample), mode="nearest")


class MultiResolutionBlock(nn.Module):
    """Attention blocks one after another, each at a resolution of its own.

    Args:
        blocks: The blocks, in order.
    """

    def __init__(self, blocks: Sequence[AttentionBlock]) -> None:
        super().__init__()
        self.attention_blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to maps [B, C, H, W]."""
        for block in self.attention_blocks:
            x = block(x)
        return x
