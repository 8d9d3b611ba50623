"""E-RADIO's position bias: a small network from the offset of two tokens to an addend of their attention logits.

It is Swin v2's continuous log-spaced bias (arXiv 2111.09883, section 3.3), so windows can change after training.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amradio.models.cache import TensorCache, caching_is_safe

if TYPE_CHECKING:
    from typing_extensions import Self

COORDS_SPAN = 8  # normalised offsets reach from -8 to 8 before the logarithm
BIAS_SPAN = 16  # the bias of a pair of tokens lies between 0 and 16


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
    """Say which row of the flattened `relative_coords` belongs to each (query, key) pair.

    Args:
        window: Side of the window.

    Returns:
        [window**2, window**2], int64.
    """
    y, x = torch.arange(window).repeat_interleave(window), torch.arange(window).repeat(window)  # [window**2]
    dy, dx = y[:, None] - y[None, :], x[:, None] - x[None, :]  # [window**2, window**2]
    return (dy + window - 1) * (2 * window - 1) + dx + window - 1


class PositionBias(nn.Module):
    """What a small network adds to the attention logits of two tokens, given their offset.

    The buffers belong to the window that the weights were trained with, whatever the window in use, so the state dict
    always fits. Without gradients the bias is kept between calls as long as nothing that it depends on changes.

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
        self._cache = TensorCache(capacity=4)
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
        assert isinstance(first, nn.Linear)
        assert isinstance(last, nn.Linear)
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
        return x.index_select(1, index.flatten()).view(1, -1, *index.shape)  # [1, H, window**2, window**2]

    @torch.no_grad()
    def store(self) -> None:
        """Write the trained window's bias into the buffer."""
        self.relative_bias.copy_(self.compute(self.trained_window))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        self._cache.clear()  # do not keep what is on the old device alive
        return super()._apply(fn, recurse)  # type: ignore[no-any-return,no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._cache.clear()
        super()._load_from_state_dict(*args, **kwargs)


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
