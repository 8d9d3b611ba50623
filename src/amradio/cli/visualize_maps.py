"""``amradio visualize pca | segments | norms | attention``: what is drawn of single photos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import tyro

from amradio.cli.visualize_options import Column, DrawCommand, Drawing, Photo, grid_text
from amradio.errors import OptionError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from amradio.backbones.protocol import Backbone
    from amradio.images import ResizePolicy
    from amradio.viz import Legend


@dataclass(frozen=True, kw_only=True)
class HeatCommand(DrawCommand):
    """Base class of commands that draw numbers. Each field is an option."""

    style: Literal["overlay", "heat", "mask"] = "overlay"
    """Colours over the grey photo, colours alone, or the photo itself, dark where numbers are low."""
    colour_map: str = "ember"
    """ember, grey, or any of matplotlib's (extra viz), such as viridis."""
    opacity: float = 0.6
    """Of the overlay, from 0 to 1."""

    def check(self) -> None:
        """Refuse unknown colours."""
        from amradio.viz.heat import colour_table

        colour_table(self.colour_map)
        if not 0 <= self.opacity <= 1:
            raise OptionError(f"--opacity is from 0 to 1, got {self.opacity:g}.")

    def heat(self, values: Tensor, photo: Image, limits: tuple[float, float]) -> Image:
        """Draw numbers [h, w] over a photo, in the chosen style."""
        from amradio.viz import heat_picture, overlay, spotlight

        if self.style == "mask":
            return spotlight(photo, values, limits, self.upsample)
        heat = heat_picture(
            values,
            (photo.height, photo.width),
            colour_map=self.colour_map,
            limits=limits,
            method=self.upsample,
            guide=photo,
        )
        return heat if self.style == "heat" else overlay(photo, heat, self.opacity)

    def legend(self, low: str, high: str) -> Legend:
        """What the colours mean."""
        from amradio.viz import Legend, colour_bar

        return Legend(colour_bar("grey" if self.style == "mask" else self.colour_map), low, high)


@dataclass(frozen=True, kw_only=True)
class PCA(DrawCommand):
    """Feature maps as colours: their three strongest directions are red, green and blue.

    With a joint basis, equal colours mean similar features in all photos and at all resolutions of a model.
    """

    basis: Literal["joint", "image"] = "joint"
    """One basis for all photos, or one for each, which shows more of it."""
    skip: int = 0
    """Leading components to leave out; the first often only tells the object from the background."""
    foreground: bool = False
    """Cut off the background by the first component, and fit the colours to the rest."""
    range: Literal["robust", "full"] = "robust"
    """Scale colours without outliers, or between the extremes."""

    def check(self) -> None:
        """Refuse a negative number of components."""
        if self.skip < 0:
            raise OptionError(f"--skip must be at least 0, got {self.skip}.")

    def draw(self, photos: Sequence[Photo], columns: Sequence[Column]) -> Drawing:
        """A row for each photo."""
        from amradio.viz import Cell, PCAStyle, pca_pictures

        style = PCAStyle(self.basis == "joint", self.skip, self.foreground, self.range == "robust", self.upsample)
        drawn: dict[int, list[Image]] = {}
        for group in dict.fromkeys(column.group for column in columns):
            members = [i for i, column in enumerate(columns) if column.group == group]
            results = [result for i in members for result in columns[i].results]
            pictures = pca_pictures([r.features for r in results], [self.shown(r.photo) for r in results], style)
            for place, i in enumerate(members):
                drawn[i] = pictures[place * len(photos) : (place + 1) * len(photos)]
        rows = [
            [Cell(self.shown(columns[0].results[i].photo), photo.name)]
            + [
                Cell(drawn[j][i], f"{grid_text(column.results[i].features.shape)} patches")
                for j, column in enumerate(columns)
            ]
            for i, photo in enumerate(photos)
        ]
        same = (
            "each photo" if self.basis == "image" else "all photos" if len(columns) == 1 else "each output of a model"
        )
        of = f"components {self.skip + 1} to {self.skip + 3}" if self.skip else "the first three principal components"
        note = f"Red, green and blue: {of} of the features, one basis for {same}."
        return Drawing(["photo", *(c.head for c in columns)], rows, note)


@dataclass(frozen=True, kw_only=True)
class Segments(DrawCommand):
    """Feature maps cut into segments.

    kmeans clusters the features of all photos together: a colour means the same in all of them. spectral cuts each
    photo by itself where its parts have least in common.
    """

    count: int = 6
    """Segments."""
    method: Literal["kmeans", "spectral"] = "kmeans"
    """How they are found."""
    opacity: float = 0.65
    """Of the colours over the grey photo, from 0 to 1."""
    upsample: Literal["nearest", "bilinear", "bicubic", "guided"] = "guided"
    """How borders of segments become as fine as the photo; nearest shows the true grid."""

    def check(self) -> None:
        """Refuse impossible numbers."""
        if not 2 <= self.count <= 64:
            raise OptionError(f"--count must be from 2 to 64 segments, got {self.count}.")
        if not 0 <= self.opacity <= 1:
            raise OptionError(f"--opacity is from 0 to 1, got {self.opacity:g}.")

    def draw(self, photos: Sequence[Photo], columns: Sequence[Column]) -> Drawing:
        """A row for each photo."""
        from amradio.viz import Cell, kmeans_segments, overlay, segment_picture, spectral_segments

        rows = [[Cell(self.shown(columns[0].results[i].photo), photo.name)] for i, photo in enumerate(photos)]
        for column in columns:
            maps = [result.features for result in column.results]
            if self.method == "kmeans":
                labels = kmeans_segments(maps, self.count)
            else:
                labels = [spectral_segments(features, self.count) for features in maps]
            for row, result, found in zip(rows, column.results, labels, strict=True):
                photo = self.shown(result.photo)
                size = (photo.height, photo.width)
                colours = segment_picture(found, size, self.count, method=self.upsample, guide=photo)
                row.append(Cell(overlay(photo, colours, self.opacity), f"{grid_text(found.shape)} patches"))
        how = {
            "kmeans": "k-means of the features; a colour means the same in all photos of a column",
            "spectral": "spectral, photo by photo; colours of two photos have nothing to do with each other",
        }[self.method]
        return Drawing(["photo", *(c.head for c in columns)], rows, f"{self.count} segments: {how}.")


@dataclass(frozen=True, kw_only=True)
class Norms(HeatCommand):
    """Lengths of the features; bright specks in the background are artefacts, which some networks have.

    Of a backbone that gives features of its blocks, those of the last block are taken before the norm that follows it,
    which would make all lengths equal.
    """

    def compute(self, backbone: Backbone, photo: Image, policy: ResizePolicy, layer: int | None) -> Any:
        """A `FeatureMap` without the final norm, where that is known."""
        from amradio.backbones.protocol import HasIntermediates
        from amradio.features import feature_map

        before = layer is None and isinstance(backbone, HasIntermediates)
        return feature_map(backbone, photo, policy, layer=-1 if before else layer, norm=False)

    def draw(self, photos: Sequence[Photo], columns: Sequence[Column]) -> Drawing:
        """A row for each photo."""
        from amradio.viz import Cell, limits_of, norm_map

        rows = [[Cell(self.shown(columns[0].results[i].photo), photo.name)] for i, photo in enumerate(photos)]
        ranges = []
        for column in columns:
            found = [norm_map(result.features) for result in column.results]
            limits = limits_of([one.norms for one in found])
            ranges.append(f"{limits[0]:.1f} to {limits[1]:.1f}")
            for row, result, one in zip(rows, column.results, found, strict=True):
                low, high = limits_of([one.norms])
                caption = f"{low:.1f} … {high:.1f}, {one.share:.1%} outliers"
                row.append(Cell(self.heat(one.norms, self.shown(result.photo), limits), caption))
        note = "Lengths of the features. Outliers are far above the median of their photo."
        ends = tuple(ranges[0].split(" to ")) if len(columns) == 1 else ("shortest", "longest of the column")
        return Drawing(["photo", *(c.head for c in columns)], rows, note, self.legend(*ends))


@dataclass(frozen=True, kw_only=True)
class Attention(HeatCommand):
    """Where the class and register tokens of a transformer look."""

    token: tyro.conf.UseAppendAction[tuple[int, ...]] = ()
    """Number of a token, class tokens first; default all class tokens. Repeat the option for several."""
    head: tyro.conf.UseAppendAction[tuple[int, ...]] = ()
    """One attention head, from 0; default the mean over all. Repeat the option for several."""

    def check(self) -> None:
        """Refuse adaptors, which have no attention of their own."""
        super().check()
        if any(name != "backbone" for name in self.adaptor):
            raise OptionError(
                "Attention is that of the trunk, which all adaptors share: leave out --adaptor. --layer chooses a "
                "block."
            )

    def compute(self, backbone: Backbone, photo: Image, policy: ResizePolicy, layer: int | None) -> Any:
        """An `AttentionMap`."""
        from amradio.features import attention_map

        return attention_map(backbone, photo, policy, layer=-1 if layer is None else layer)

    def draw(self, photos: Sequence[Photo], columns: Sequence[Column]) -> Drawing:
        """A row for each photo, in it the tokens and heads of each model."""
        from amradio.viz import Cell, limits_of, token_attention, token_name

        rows = [[Cell(self.shown(columns[0].results[i].photo), photo.name)] for i, photo in enumerate(photos)]
        heads = ["photo"]
        for column in columns:
            classes = column.results[0].num_cls_tokens
            tokens = self.token or range(max(classes, 1))
            for token in tokens:
                for head in self.head or (None,):
                    of = token_name(token, classes) + ("" if head is None else f", head {head}")
                    heads.append(f"{column.head} · {of}" if len(columns) > 1 else of)
                    for row, result in zip(rows, column.results, strict=True):
                        found = token_attention(result.patches, token, head)
                        picture = self.heat(found.values, self.shown(result.photo), limits_of([found.values]))
                        row.append(Cell(picture, f"max {found.values.max():.1%}, photo {found.share:.0%}"))
        of = f"{columns[0].head}: " if len(columns) == 1 else ""
        note = (
            f"{of}softmax(q k / sqrt(d)) of a token over the patches; each picture has its own scale. photo: share of "
            "the attention that goes to patches and not to other tokens."
        )
        return Drawing(heads, rows, note, self.legend("least", "most"))
