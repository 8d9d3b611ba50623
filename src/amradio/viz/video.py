"""Feature maps of a video as a video: one basis of colours for all of it, and maps beside the frames they belong to.

With one basis, a colour means the same from the first frame to the last, so that what flickers is the features. The
recipe is that of RADIO's visualiser: principal components over about 30 frames, evenly spaced.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import TYPE_CHECKING

from amradio.errors import OptionError
from amradio.viz.pca import PCABasis, fit_basis, to_picture
from amradio.viz.upsample import Upsampling

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from amradio.features.maps import FeatureMap
    from amradio.images.resize import ResizePolicy

BASIS_FRAMES = 30
"""Frames that colours are fitted on."""

MOST_VALUES = 2**25
"""Feature values that a basis is fitted on (0.13 GB in float32); of more, every n-th position is taken."""

_BACKGROUND, _INK = (24, 24, 24), (235, 235, 235)
_GAP = 4
_DIMMED = 0.25  # brightness of what a centre crop leaves out


def fit_clip_bases(
    frames: Iterable[Sequence[Tensor]], spaces: Sequence[Hashable], *, count: int = BASIS_FRAMES, skip: int = 0
) -> list[PCABasis]:
    """Fit the colours of a clip, of which there may be several maps a frame.

    Args:
        frames: For each frame the maps [h, w, C], one a panel; read once.
        spaces: For each panel in which space its features live (the model, say); panels of one space get one basis,
            so that their colours can be compared.
        count: How many frames there are, about: decides how many positions of each are taken.
        skip: See `fit_basis`.

    Returns:
        A basis a panel.

    Raises:
        OptionError: There are no frames, or as `fit_basis`.
    """
    kept: dict[Hashable, list[Tensor]] = {space: [] for space in spaces}
    share = {space: MOST_VALUES // (max(count, 1) * list(spaces).count(space)) for space in spaces}
    for i, maps in enumerate(frames):
        for space, found in zip(spaces, maps, strict=True):
            rows = found.flatten(0, 1)  # [h * w, C]
            step = max(-(-rows.numel() // share[space]), 1)
            # From another row each time, so that no column of the grid is always left out. Copied: a view would keep
            # the whole map.
            kept[space].append(rows[i % step :: step].clone())
    bases = {space: fit_basis(rows, skip=skip) for space, rows in kept.items()}
    return [bases[space] for space in spaces]


class ClipPainter:
    """Paints frames of a video beside their feature maps, in rows that each begin with the frame.

    Args:
        frame_size: (height, width) of the video's frames.
        heads: What stands above each panel.
        bases: A basis a panel.
        policies: How frames were brought to the size that each backbone sees: the map of a centre crop is painted
            where it belongs.
        columns: Panels in a row; all if not given.
        height: Of each picture in pixels; that of the frame, but at most 480, if not given.
        upsampling: How maps become as large as frames.
        captions: Whether the heads are written.

    Raises:
        OptionError: The numbers do not fit together.
    """

    def __init__(
        self,
        frame_size: tuple[int, int],
        heads: Sequence[str],
        bases: Sequence[PCABasis],
        policies: Sequence[ResizePolicy],
        *,
        columns: int | None = None,
        height: int | None = None,
        upsampling: Upsampling = "bilinear",
        captions: bool = True,
    ) -> None:
        if not heads or len({len(heads), len(bases), len(policies)}) != 1:
            raise OptionError(
                f"Each panel needs a head, a basis and a policy, got {len(heads)}, {len(bases)} and {len(policies)}."
            )
        self._columns = columns or len(heads)
        if self._columns < 1:
            raise OptionError(f"columns must be at least 1, got {columns}.")
        height = min(frame_size[0], 480) if height is None else height
        if not 16 <= height <= 4096:
            raise OptionError(f"Pictures are from 16 to 4096 pixels high, got {height}.")
        self._cell = height, max(round(frame_size[1] * height / frame_size[0]), 1)
        self._bases, self._policies, self._upsampling = list(bases), list(policies), upsampling
        self._head_height = max(round(height / 20), 14) + _GAP if captions else 0
        self._page = self._blank(heads)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the pictures; even numbers, as video needs."""
        return self._page.height, self._page.width

    def paint(self, frame: Image, maps: Sequence[FeatureMap]) -> Image:
        """Paint one frame.

        Args:
            frame: In RGB.
            maps: What each panel shows.

        Returns:
            A picture in RGB of the size `size`.

        Raises:
            OptionError: There is another number of maps than of panels, or features are not finite.
        """
        from PIL.Image import Resampling

        height, width = self._cell
        page = self._page.copy()
        shown = frame.resize((width, height), Resampling.LANCZOS)
        for row in range(-(-len(self._bases) // self._columns)):
            page.paste(shown, self._place(row, 0))
        for i, (found, basis, policy) in enumerate(zip(maps, self._bases, self._policies, strict=True)):
            row, column = divmod(i, self._columns)
            page.paste(self._panel(shown, found, basis, policy), self._place(row, column + 1))
        return page

    def _panel(self, shown: Image, found: FeatureMap, basis: PCABasis, policy: ResizePolicy) -> Image:
        from PIL import Image

        if not bool(found.features.isfinite().all()):
            raise OptionError(
                "A frame has features that are not finite; a model in float16 may have overflowed: run it in bfloat16 "
                "or float32."
            )
        left, top, right, bottom = self._region(found, policy)
        size = bottom - top, right - left
        guide = shown.crop((left, top, right, bottom)) if self._upsampling == "guided" else None
        picture = to_picture(basis.rgb(found.features), size, self._upsampling, guide)
        if picture.size == shown.size:
            return picture
        panel = Image.blend(Image.new("RGB", shown.size), shown, _DIMMED)
        panel.paste(picture, (left, top))
        return panel

    def _region(self, found: FeatureMap, policy: ResizePolicy) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of what the backbone saw, in the cell."""
        height, width = self._cell
        if policy.mode != "crop":
            return 0, 0, width, height
        scale = min(height / found.photo.height, width / found.photo.width)
        h, w = max(round(found.photo.height * scale), 1), max(round(found.photo.width * scale), 1)
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h

    def _place(self, row: int, column: int) -> tuple[int, int]:
        """Left and top of a picture."""
        height, width = self._cell
        return column * (width + _GAP), self._head_height + row * (height + self._head_height + _GAP)

    def _blank(self, heads: Sequence[str]) -> Image:
        """The page with everything that is the same in all frames."""
        from PIL import Image, ImageDraw

        rows = -(-len(heads) // self._columns)
        left, top = self._place(rows - 1, self._columns)
        width, height = left + self._cell[1], top + self._cell[0]
        page = Image.new("RGB", (width + width % 2, height + height % 2), _BACKGROUND)
        if not self._head_height:
            return page
        draw = ImageDraw.Draw(page)
        for row in range(rows):
            self._write(draw, "video", self._place(row, 0))
        for i, head in enumerate(heads):
            row, column = divmod(i, self._columns)
            self._write(draw, head, self._place(row, column + 1))
        return page

    def _write(self, draw: object, text: str, place: tuple[int, int]) -> None:
        """Write a head in the middle above a picture, as small as it must be."""
        from PIL import ImageFont
        from PIL.ImageDraw import ImageDraw

        assert isinstance(draw, ImageDraw)
        size = self._head_height - _GAP
        font = ImageFont.load_default(size)
        while size > 8 and font.getlength(text) > self._cell[1]:
            size -= 1
            font = ImageFont.load_default(size)
        middle = place[0] + self._cell[1] / 2, place[1] - self._head_height / 2
        draw.text(middle, text, _INK, font, anchor="mm")
