"""``amradio visualize similarity | match | text``: what is drawn between patches, photos and words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from amradio.cli.visualize_maps import HeatCommand
from amradio.cli.visualize_options import Column, DrawCommand, Drawing, Photo, grid_text
from amradio.errors import CapabilityError, OptionError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from amradio.backbones.protocol import Backbone


@dataclass(frozen=True, kw_only=True)
class Similarity(HeatCommand):
    """Where photos are like a patch of the first one: the cosine similarity of features."""

    at: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """X,Y: place in the first photo, in its pixels or in percent (50%,40%); default its middle. Repeat the option for
    several: similar is then what is similar to any of them."""

    def check(self) -> None:
        """Refuse places that are none."""
        super().check()
        for place in self.at:
            _parse_place(place, (1, 1))

    def draw(self, photos: Sequence[Photo], columns: Sequence[Column]) -> Drawing:
        """A row for each photo; the places are marked in the first one."""
        from amradio.viz import Cell, limits_of, mark, patch_of, similarity_map
        from amradio.viz.similarity import centre_of

        if not photos[0].is_first:
            raise OptionError("The first photo, in which the places are, could not be used.")
        own = photos[0].picture
        places = [_place_on(own, place) for place in self.at or ("50%,50%",)]
        rows = [[Cell(self.shown(columns[0].results[i].photo), photo.name)] for i, photo in enumerate(photos)]
        legend = None
        for column in columns:
            features = column.results[0].features
            seen, grid = column.results[0].photo, features.shape[:2]
            inside = [self._seen(place, own.size, seen.size) for place in places]
            patches = [patch_of(place, (seen.height, seen.width), grid) for place in inside]
            query = features[tuple(zip(*patches, strict=True))]  # [n, D]
            found = [similarity_map(result.features, query) for result in column.results]
            limits = limits_of(found)
            for row, result, one in zip(rows, column.results, found, strict=True):
                low, high = limits_of([one])
                row.append(Cell(self.heat(one, self.shown(result.photo), limits), f"{low:.2f} … {high:.2f}"))
            first = rows[0][-1]
            points = [centre_of(patch, grid, first.picture.size[::-1]) for patch in patches]
            rows[0][-1] = Cell(mark(first.picture, points), first.caption)
            legend = self.legend(f"{limits[0]:.2f}", f"{limits[1]:.2f}")
        if len(columns) > 1:
            legend = self.legend("least", "most similar of the column")
        note = "Cosine similarity of the features with those at the marked places."
        return Drawing(["photo", *(c.head for c in columns)], rows, note, legend)

    def _seen(self, place: tuple[float, float], own: tuple[int, int], seen: tuple[int, int]) -> tuple[float, float]:
        """A place in the photo as a place in what the model sees of it; sizes are (width, height)."""
        scales = own[0] / seen[0], own[1] / seen[1]
        if self.mode == "crop" or (self.mode == "auto" and self.resolution and len(self.resolution[0]) == 2):
            scales = (min(scales),) * 2  # the rest is cut off on both sides
        x, y = (seen[i] / 2 + (place[i] - own[i] / 2) / scales[i] for i in range(2))
        return x, y


@dataclass(frozen=True, kw_only=True)
class Match(DrawCommand):
    """Patches of two photos that belong together, joined by lines."""

    count: int = 32
    """Lines at most."""
    spacing: float = 3.0
    """Patches between two ends in the first photo, so that lines spread; 0 takes the best ones wherever they are."""
    one_way: bool = False
    """Also join patches that are not each other's most similar one."""

    def check(self) -> None:
        """Refuse impossible numbers."""
        if self.count < 1 or self.spacing < 0:
            raise OptionError(
                f"--count must be at least 1 and --spacing at least 0, got {self.count}, {self.spacing:g}."
            )

    def draw(self, photos: Sequence[Photo], columns: Sequence[Column]) -> Drawing:
        """A row for each model."""
        from amradio.viz import Cell, correspondences, draw_correspondences

        if len(photos) != 2:
            raise OptionError(f"Correspondences are drawn between two photos, got {len(photos)} that can be read.")
        rows = []
        for column in columns:
            a, b = column.results
            matches = correspondences(a.features, b.features, self.count, not self.one_way, self.spacing)
            picture = draw_correspondences(
                self.shown(a.photo), self.shown(b.photo), matches, (a.features.shape[:2], b.features.shape[:2])
            )
            cosines = f", cosine {matches[-1].similarity:.2f} … {matches[0].similarity:.2f}" if matches else ""
            grids = f"{grid_text(a.features.shape)} and {grid_text(b.features.shape)} patches"
            rows.append([Cell(picture, f"{column.head}: {len(matches)} matches{cosines}; {grids}")])
        how = "Most similar patches" if self.one_way else "Patches that are each other's most similar one"
        heads = [f"{photos[0].name} · {photos[1].name}"]
        return Drawing(heads, rows, f"{how}, by the cosine of their features.", together=True)


@dataclass(frozen=True, kw_only=True)
class Text(HeatCommand):
    """Where photos are like a text, for an adaptor whose features live in the space of a text tower.

    With amradio-tiny, take -a minilm; many common words come with the package, so that it works offline.
    """

    text: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(aliases=["-t"])] = ()
    """What is looked for. Repeat the option for several."""
    template: str = "a photo of a {}."
    """Put around each text; {} alone for none."""
    contrast: bool = False
    """Show the share of each text among all that are given (softmax) instead of cosines, so that what they have in
    common drops out."""
    temperature: float = 0.03
    """Of the softmax."""

    def check(self) -> None:
        """Refuse what means nothing."""
        super().check()
        if not self.text:
            raise OptionError("Nothing is looked for; say what, with --text cat.")
        if "{}" not in self.template:
            raise OptionError(f"--template {self.template!r} has no {{}}, where the text would go.")
        if self.contrast and len(self.text) < 2:
            raise OptionError("--contrast shares photos among texts; give at least two.")
        if self.temperature <= 0:
            raise OptionError(f"--temperature must be above 0, got {self.temperature:g}.")

    def extra(self, backbone: Backbone) -> Tensor:
        """Embeddings of the texts [n, D] in the space of the model's features."""
        view: Any = backbone
        if not hasattr(type(view), "encode_text"):  # not of the object: to ask its tokenizer would load it
            raise CapabilityError(
                f"{self._name(backbone)} has no text side. Choose an adaptor that has one, such as -a minilm of "
                "amradio-tiny, or -a siglip2-g of c-radio_v4-h."
            )
        embedded: Tensor = view.encode_text(view.tokenizer([self.template.replace("{}", text) for text in self.text]))
        if embedded.shape[1] != backbone.embed_dim:
            raise CapabilityError(
                f"Texts are {embedded.shape[1]} numbers for {self._name(backbone)}, and its features are "
                f"{backbone.embed_dim}: they are not in one space, so that only whole photos can be compared with "
                "texts, as `amradio eval zero-shot` does."
            )
        return embedded.float().cpu()

    def draw(self, photos: Sequence[Photo], columns: Sequence[Column]) -> Drawing:
        """A row for each photo, in it a picture for each model and text."""
        import torch

        from amradio.viz import Cell, limits_of, shares, similarity_map

        rows = [[Cell(self.shown(columns[0].results[i].photo), photo.name)] for i, photo in enumerate(photos)]
        heads, legend = ["photo"], None
        for column in columns:
            found = [
                torch.stack([similarity_map(result.features, one) for one in column.extra], -1)  # [h, w, n]
                for result in column.results
            ]
            if self.contrast:
                found = [shares(one, self.temperature) for one in found]
            limits = (0.0, 1.0) if self.contrast else limits_of(found)
            for i, text in enumerate(self.text):
                heads.append(f"{column.head} · {text}" if len(columns) > 1 else text)
                for row, result, one in zip(rows, column.results, found, strict=True):
                    picture = self.heat(one[..., i], self.shown(result.photo), limits)
                    row.append(Cell(picture, "{:.2f} … {:.2f}".format(*limits_of([one[..., i]]))))
            legend = self.legend(f"{limits[0]:.2f}", f"{limits[1]:.2f}")
        if len(columns) > 1 and not self.contrast:
            legend = self.legend("least", "most similar of a model")
        what = "Share of each text among those above" if self.contrast else "Cosine similarity of features and text"
        note = f"{what}, on one scale for all photos and texts of a model; template: {self.template}"
        return Drawing(heads, rows, f"{columns[0].head}: {note}" if len(columns) == 1 else note, legend)

    def _name(self, backbone: Backbone) -> str:
        return f"The adaptor {backbone.name!r}" if hasattr(backbone, "name") else f"A {type(backbone).__name__}"


def _parse_place(place: str, size: tuple[int, int]) -> tuple[float, float]:
    """``X,Y`` in pixels, or in percent of (width, height)."""
    words = place.replace(" ", "").split(",")
    try:
        found = [
            float(w[:-1]) / 100 * side if w.endswith("%") else float(w) for w, side in zip(words, size, strict=True)
        ]
    except ValueError:
        raise OptionError(f"--at {place!r} is no place: write X,Y in pixels, or in percent, as 50%,40%.") from None
    # The far end of a photo is its last pixel.
    x, y = (min(value, side - 1) if w == "100%" else value for value, side, w in zip(found, size, words, strict=True))
    return x, y


def _place_on(photo: Image, place: str) -> tuple[float, float]:
    """A place in pixels of a photo.

    Raises:
        OptionError: It is beside the photo.
    """
    x, y = _parse_place(place, photo.size)
    if not (0 <= x < photo.width and 0 <= y < photo.height):
        raise OptionError(
            f"--at {place} is not on the photo, which is {photo.width} pixels wide and {photo.height} high."
        )
    return x, y
