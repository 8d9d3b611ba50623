"""Building blocks of E-RADIO: foldable convolutions, C2f, and windowed attention with a learned position bias.

Feature maps are [B, C, H, W] in channels-last memory, so that cutting them into windows of tokens is one copy of long rows.
E-RADIO is described in AM-RADIO (arXiv 2312.06709, section 5); C2f is YOLOv8's, the position bias is Swin v2's
(arXiv 2111.09883, section 3.3), attention at two resolutions follows FasterViT (arXiv 2306.06189).
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amradio.models.patches import caching_is_safe
from amradio.models.windows import from_windows, to_windows

Activation = Literal["none", "relu", "gelu", "silu"]
COORDS_SPAN = 8  # normalised offsets reach from -8 to 8 before the logarithm
BIAS_SPAN = 16  # the bias of a pair of tokens lies between 0 and 16


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
        """Apply to maps [B, in_chans, H, W]: [B, out_chans, H / stride, W / stride]."""
        x = self.conv(x)
        if self.bn is not None:
            x = self.bn(x)
        # In place: neither a convolution nor a batch norm needs its own output for the backward pass.
        if self.activation == "silu":
            return F.silu(x, inplace=True)
        if self.activation == "relu":
            return F.relu(x, inplace=True)
        return F.gelu(x) if self.activation == "gelu" else x

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


class BiasCache:
    """Position biases, kept for one state of the tensors that they are computed from.

    Nothing here is part of the state dict. The cache holds aliases of its sources: as long as it does, no other tensor can
    get their addresses, so equal addresses and versions mean equal values.
    """

    def __init__(self, capacity: int = 4) -> None:
        self.capacity = capacity
        self._sources: tuple[Tensor, ...] = ()
        self._versions: tuple[int, ...] = ()
        self._entries: OrderedDict[tuple[object, ...], Tensor] = OrderedDict()

    def get(self, sources: Sequence[Tensor], key: tuple[object, ...], compute: Callable[[], Tensor]) -> Tensor:
        """Return the entry of `key` for the present values of `sources`, computing it if needed.

        Args:
            sources: Everything with values that the result depends on.
            key: What else it depends on.
            compute: Computes the result.

        Returns:
            The cached or computed tensor. Not to be written to.
        """
        if any(s.is_inference() for s in sources):  # without a version counter, a change could not be noticed
            return compute()
        if not self._is_current(sources):
            self.clear()
            self._sources = tuple(s.detach() for s in sources)
            self._versions = tuple(s._version for s in sources)
        if key in self._entries:
            self._entries.move_to_end(key)
            return self._entries[key]
        with torch.inference_mode(False), torch.no_grad():  # so that the value is of use outside inference mode too
            value = self._entries[key] = compute()
        if len(self._entries) > self.capacity:
            self._entries.popitem(last=False)
        return value

    def _is_current(self, sources: Sequence[Tensor]) -> bool:
        return len(self._sources) == len(sources) and all(
            held.data_ptr() == s.data_ptr() and held.device == s.device and version == s._version
            for held, version, s in zip(self._sources, self._versions, sources, strict=True)
        )

    def clear(self) -> None:
        """Forget everything."""
        self._sources, self._versions = (), ()
        self._entries.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> BiasCache:
        return BiasCache(self.capacity)

    def __reduce__(self) -> tuple[type[BiasCache], tuple[int]]:
        return BiasCache, (self.capacity,)


def relative_coords(window: int, trained_window: int) -> Tensor:
    """Tabulate the log-spaced offsets between two tokens of a window.

    Args:
        window: Side of the window.
        trained_window: Side of the windows that the bias was trained with, which sets the scale.

    Returns:
        [1, 2 * window - 1, 2 * window - 1, 2]: (dy, dx) for dy, dx from -(window - 1) to window - 1, float32.
    """
    offsets = torch.arange(-(window - 1), window, dtype=torch.float32) / (trained_window - 1) * COORDS_SPAN
    offsets = offsets.sign() * torch.log2(offsets.abs() + 1.0) / 3.0  # 3 = log2(COORDS_SPAN)
    return torch.stack(torch.meshgrid(offsets, offsets, indexing="ij"), dim=-1)[None]


def relative_index(window: int) -> Tensor:
    """Say which row of the flattened `relative_coords` belongs to each (query, key) pair: [window**2, window**2], int64."""
    y, x = torch.arange(window).repeat_interleave(window), torch.arange(window).repeat(window)  # [window**2]
    dy, dx = y[:, None] - y[None, :], x[:, None] - x[None, :]  # [window**2, window**2]
    return (dy + window - 1) * (2 * window - 1) + dx + window - 1


class PositionBias(nn.Module):
    """What a small network adds to the attention logits of two tokens, given their offset.

    The buffers belong to the window that the weights were trained with, whatever the window in use, so the state dict always
    fits. Without gradients the bias is kept between calls as long as nothing that it depends on changes.

    Args:
        window: Side of the windows in training, at least 2.
        num_heads: Attention heads H.
        hidden_dim: Hidden width of the network.

    Attributes:
        window_size: Side of the windows in use.
        relative_coords_table: `relative_coords`, used as loaded: a half-precision checkpoint holds it rounded.
        relative_position_index: `relative_index`.
        relative_bias: The bias of the trained window as of the last `store` or checkpoint. Other software reads it from
            deployed checkpoints; it is never trusted here, because published ones may be stale.
    """

    relative_coords_table: Tensor
    relative_position_index: Tensor
    relative_bias: Tensor

    def __init__(self, window: int, num_heads: int, hidden_dim: int) -> None:
        super().__init__()
        self.trained_window = window
        self.window_size = window
        self._cache = BiasCache()
        self.cpb_mlp = nn.Sequential(
            nn.Linear(2, hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, num_heads, bias=False),
        )
        self.register_buffer("relative_coords_table", relative_coords(window, window))
        self.register_buffer("relative_position_index", relative_index(window))
        self.register_buffer("relative_bias", torch.zeros(1, num_heads, window**2, window**2))

    def forward(self, dtype: torch.dtype) -> Tensor:
        """Return the bias [1, H, N, N] of the window in use, N = window_size**2, in `dtype`."""
        window = self.window_size
        if not caching_is_safe():
            return self.compute(window).to(dtype)
        sources = (*self.cpb_mlp.parameters(), self.relative_coords_table, self.relative_position_index)
        return self._cache.get(sources, (window, dtype), lambda: self.compute(window).to(dtype))

    def compute(self, window: int) -> Tensor:
        """Compute the bias from the network's present parameters.

        Args:
            window: Side of the windows.

        Returns:
            [1, H, window**2, window**2], float32 or wider.
        """
        first, last = self.cpb_mlp[0], self.cpb_mlp[2]
        device, dtype = first.weight.device, torch.promote_types(first.weight.dtype, torch.float32)
        if window == self.trained_window:
            coords, index = self.relative_coords_table, self.relative_position_index
        else:
            coords, index = relative_coords(window, self.trained_window).to(device), relative_index(window).to(device)
        # In float32 even under autocast: bfloat16 steps of the logits would add up through the network.
        with _without_autocast(device.type):
            x = F.relu(F.linear(coords.to(dtype), first.weight.to(dtype), first.bias.to(dtype)))
            x = F.linear(x, last.weight.to(dtype)).flatten(0, 2)  # [(2 * window - 1)**2, H]
        x = BIAS_SPAN * torch.sigmoid(x).t()  # [H, (2 * window - 1)**2]; before the gather, which repeats entries
        return x.index_select(1, index.flatten()).unflatten(1, index.shape)[None]  # [1, H, window**2, window**2]

    @torch.no_grad()
    def store(self) -> None:
        """Write the trained window's bias into the buffer."""
        self.relative_bias.copy_(self.compute(self.trained_window))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> PositionBias:
        self._cache.clear()  # do not keep what is on the old device alive
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._cache.clear()
        super()._load_from_state_dict(*args, **kwargs)


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


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
        conv_base: Sub-sample and back by strided convolutions; otherwise by pooling and repetition, with 1x1 convolutions.
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
        y = from_windows(tokens, x.shape[0], grid, window).unflatten(1, grid).permute(0, 3, 1, 2)  # [B, C, h, w]
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
        y: Tensor = self.upsample_op(x)
        # A 1x1 convolution and repetition commute; in this order the convolution sees subsample**2 times fewer cells.
        return y if self.conv_base else F.interpolate(y, scale_factor=float(self.subsample), mode="nearest")


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
