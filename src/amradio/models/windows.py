"""ViTDet windowed attention as pure functions on the token sequence (Li et al., arXiv 2203.16527, section 3).

Most blocks attend inside square windows, a few attend globally. Patch tokens are permuted once so that windows are
contiguous; going from windowed to global is then only a reshape. Prefix tokens do not take part in windowed blocks.
"""

from __future__ import annotations

from torch import Tensor


def global_blocks(depth: int, num_windowed: int | None = None, num_global: int | None = None) -> tuple[bool, ...]:
    """Say which blocks attend globally.

    Blocks come in periods of windowed blocks followed by one global block, and the last block is always global.

    Args:
        depth: Number of blocks.
        num_windowed: Windowed blocks in a period; takes precedence.
        num_global: Number of global blocks, spread evenly; default 4.

    Returns:
        One flag a block, True for global. A period of one block makes every block global.
    """
    period = num_windowed + 1 if num_windowed is not None else max(depth // (num_global or 4), 1)
    return tuple(i == depth - 1 or i % period == period - 1 for i in range(depth))


def to_windows(patches: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """Cut the patch grid into windows.

    Args:
        patches: [B, h * w, C], row-major.
        grid: (h, w), both multiples of `window`.
        window: Side of a window, in patches.

    Returns:
        [B * (h/window) * (w/window), window**2, C]; windows and the tokens inside them are row-major.
    """
    b, _, c = patches.shape
    rows, cols = grid[0] // window, grid[1] // window
    x = patches.reshape(b, rows, window, cols, window, c).transpose(2, 3)  # [B, rows, cols, ws, ws, C]
    return x.reshape(b * rows * cols, window * window, c)


def from_windows(windows: Tensor, batch: int, grid: tuple[int, int], window: int) -> Tensor:
    """Undo `to_windows`.

    Args:
        windows: Tokens in window order, with any split of the leading dimensions, such as [B, h * w, C].
        batch: B.
        grid: (h, w).
        window: Side of a window, in patches.

    Returns:
        [B, h * w, C], row-major.
    """
    rows, cols, c = grid[0] // window, grid[1] // window, windows.shape[-1]
    x = windows.reshape(batch, rows, cols, window, window, c).transpose(2, 3)  # [B, rows, ws, cols, ws, C]
    return x.reshape(batch, grid[0] * grid[1], c)
