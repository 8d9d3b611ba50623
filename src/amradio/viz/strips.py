"""Feature maps of pictures over resolutions, in colours that mean the same everywhere on the sheet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from amradio.viz.grid import Cell, Sheet
from amradio.viz.pca import fit_basis, to_picture

_SIDE = 150
_BASIS_GRID = 16  # maps count equally in the basis, whatever their resolution


class MapAt(Protocol):
    """A feature map; see `amradio.evals.mode_switching.StripMap`."""

    @property
    def picture(self) -> int:
        """Number of the picture."""
        ...

    @property
    def resolution(self) -> int:
        """In pixels."""
        ...

    @property
    def pixels(self) -> Tensor:
        """uint8 [3, H, W]: the picture as it was seen."""
        ...

    @property
    def features(self) -> Tensor:
        """[h, w, D]."""
        ...


def resolution_strips(maps: Sequence[MapAt], title: str = "", note: str = "") -> Sheet:
    """Arrange PCA maps: a row for each picture, a column for each resolution, the picture itself first.

    One basis for all: where a backbone switches its behaviour, colours change.

    Args:
        maps: Square ones, of the same width, in any order.
        title: Above everything.
        note: Below everything.

    Returns:
        The sheet; see `amradio.viz.grid.save_sheet`.
    """
    from PIL import Image

    basis = fit_basis([_pooled(one.features) for one in maps])
    resolutions = sorted({one.resolution for one in maps})
    rows = []
    for picture in sorted({one.picture for one in maps}):
        own = {one.resolution: one for one in maps if one.picture == picture}
        photo = Image.fromarray(own[max(own)].pixels.permute(1, 2, 0).contiguous().numpy())
        cells = [Cell(photo.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC))]
        for resolution in resolutions:
            one = own.get(resolution)
            if one is None:  # it failed at this size
                cells.append(Cell(Image.new("RGB", (_SIDE, _SIDE), (236, 236, 236))))
            else:
                cells.append(Cell(to_picture(basis.rgb(one.features), (_SIDE, _SIDE), "nearest")))
        rows.append(cells)
    return Sheet(rows, ["picture", *(f"{resolution} px" for resolution in resolutions)], title, note)


def _pooled(features: Tensor) -> Tensor:
    """A map [h, w, D] on a grid of at most 16 x 16, as [g, g, D]."""
    side = min(_BASIS_GRID, *features.shape[:2])
    return adaptive_avg_pool2d(features.float().permute(2, 0, 1), side).permute(1, 2, 0)
