"""What a contact sheet of one picture shows, as arrays: the picture, its truth, its prediction, and why.

Drawing them is `amradio.viz.contact_sheet`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from amradio.errors import OptionError
from amradio.evals.in_context.loader import ReadOptions, changed, read_pair
from amradio.evals.in_context.memory import MemoryBank
from amradio.evals.in_context.protocol import InContextProtocol
from amradio.evals.in_context.transforms import Change

if TYPE_CHECKING:
    from amradio.images.segmentation import SegmentationSet

_CONTEXT = 2.0  # patches on each side of a neighbour that are shown with it


@dataclass(frozen=True)
class SheetOptions:
    """How much sheets show.

    Attributes:
        pictures: How many pictures of the evaluation set get one, evenly spread over it.
        patches: How many patches of each.
        neighbours: How many neighbours of each patch.
    """

    pictures: int
    patches: int = 5
    neighbours: int = 9

    def __post_init__(self) -> None:
        if min(self.pictures, self.patches, self.neighbours) < 1:
            raise OptionError(
                f"A contact sheet shows at least 1 picture, patch and neighbour, got {self.pictures}, {self.patches} "
                f"and {self.neighbours}."
            )

    def positions(self, count: int) -> frozenset[int]:
        """Which of so many pictures get a sheet."""
        return frozenset(np.linspace(0, count - 1, min(self.pictures, count)).round().astype(int).tolist())


@dataclass(frozen=True)
class SheetNeighbour:
    """A patch of the memory.

    Attributes:
        pixels: uint8 [h, w, 3]: the patch and what is around it, as the backbone saw it.
        box: (top, left, height, width) of the patch in it.
        weight: Its share in the vote.
        label: The class that most of its pixels have.
        share: How many of them, from 0 to 1.
        picture: Id of its picture.
    """

    pixels: np.ndarray
    box: tuple[int, int, int, int]
    weight: float
    label: int
    share: float
    picture: str


@dataclass(frozen=True)
class SheetPatch:
    """A patch of the picture, and its nearest neighbours.

    Attributes:
        box: (top, left, height, width) in the picture.
        label: The class that the vote gives it.
        neighbours: Nearest first.
    """

    box: tuple[int, int, int, int]
    label: int
    neighbours: tuple[SheetNeighbour, ...]


@dataclass(frozen=True)
class Sheet:
    """One picture.

    Attributes:
        id: Of the picture.
        title: What was evaluated.
        image: uint8 [H, W, 3] as the backbone saw it.
        truth: uint8 [H', W'] classes, and 255 for void; H' and W' are the size at which it was scored.
        prediction: uint8 [H', W'].
        class_names: C.
        patches: Some of its patches: in the middle of the classes that were found most often.
    """

    id: str
    title: str
    image: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray
    class_names: tuple[str, ...]
    patches: tuple[SheetPatch, ...]


@dataclass(frozen=True)
class Votes:
    """How one picture came out.

    Attributes:
        pixels: [3, H, W] as it was read.
        grid: (h, w) patches.
        truth: uint8 [H', W'].
        prediction: uint8 [H', W'].
        labels: [P, C].
        weights: [P, k].
        indices: int64 [P, k].
    """

    pixels: Tensor
    grid: tuple[int, int]
    truth: Tensor
    prediction: Tensor
    labels: Tensor
    weights: Tensor
    indices: Tensor


class SheetMaker:
    """Makes sheets; pictures of the memory are read again for it.

    Args:
        options: How much they show.
        train: The pictures of the memory.
        protocol: How these were made.
        read: How pictures are read.
        emit: Gets the sheets.
    """

    def __init__(
        self,
        options: SheetOptions,
        train: SegmentationSet,
        protocol: InContextProtocol,
        read: ReadOptions,
        emit: Callable[[Sheet], None],
    ) -> None:
        self.options = options
        self.emit = emit
        self._train = train
        self._protocol = protocol
        self._read = read

    def make(self, name: str, title: str, votes: Votes, bank: MemoryBank) -> None:
        """Make the sheet of one picture.

        Args:
            name: Id of the picture.
            title: What was evaluated.
            votes: How it came out.
            bank: Where its neighbours are.
        """
        size = self._read.patch_size
        patches = []
        shown: dict[int, np.ndarray] = {}  # pictures of the memory
        for number in self._chosen(votes.labels.argmax(1)):
            row, column = divmod(number, votes.grid[1])
            neighbours = tuple(self._neighbours(votes.indices[number], votes.weights[number], bank, shown))
            box = (row * size, column * size, size, size)
            patches.append(SheetPatch(box, int(votes.labels[number].argmax()), neighbours))
        sheet = Sheet(
            id=name,
            title=title,
            image=_bytes(votes.pixels),
            truth=votes.truth.cpu().numpy(),
            prediction=votes.prediction.cpu().numpy(),
            class_names=self._train.class_names,
            patches=tuple(patches),
        )
        self.emit(sheet)

    def _chosen(self, labels: Tensor) -> list[int]:
        """A patch in the middle of each of the classes that most patches have; more of them if classes are few."""
        classes, counts = labels.cpu().unique(return_counts=True)
        classes = classes[counts.argsort(descending=True, stable=True)][: self.options.patches]
        each, extra = divmod(min(self.options.patches, len(labels)), len(classes))
        found: list[int] = []
        for i, label in enumerate(classes.tolist()):
            places = (labels.cpu() == label).nonzero()[:, 0]
            wanted = min(each + (i < extra), len(places))
            middle = (torch.arange(wanted) + 0.5) * len(places) / wanted
            found += places[middle.long()].tolist()
        return found

    def _neighbours(
        self, indices: Tensor, weights: Tensor, bank: MemoryBank, shown: dict[int, np.ndarray]
    ) -> Iterator[SheetNeighbour]:
        for index, weight in zip(
            indices[: self.options.neighbours].tolist(), weights[: self.options.neighbours].tolist(), strict=True
        ):
            item = int(bank.item[index]) if index >= 0 else -1
            if item < 0:  # a spare row, or a place that the index did not fill
                continue
            position, _, height, width = bank.pictures[item, :4].tolist()
            if item not in shown:
                shown[item] = self._picture(bank, item)
            row, column = divmod(int(bank.patch[index]), width // self._read.patch_size)
            window, box = self._window(row, column, height, width)
            counts = bank.counts[index]
            yield SheetNeighbour(
                shown[item][window],
                box,
                weight,
                int(counts.argmax()),
                float(counts.max() / counts.sum()),
                self._train[position].id,
            )

    def _picture(self, bank: MemoryBank, item: int) -> np.ndarray:
        """The picture of the memory, as the backbone saw it."""
        position, _, height, width, *crop = bank.pictures[item].tolist()
        top, left, h, w = crop
        factors = [None if np.isnan(factor) else factor for factor in bank.jitter[item].tolist()]
        pair = read_pair(position, self._train[position], self._read)
        if pair.reason is not None:  # it was there when the memory was made
            return np.zeros((height, width, 3), np.uint8)
        brightness, contrast, saturation, hue = factors
        pixels, _ = changed(pair, Change((brightness, contrast, saturation, hue), (top, left, h, w)), self._protocol)
        return _bytes(pixels)

    def _window(
        self, row: int, column: int, height: int, width: int
    ) -> tuple[tuple[slice, slice], tuple[int, int, int, int]]:
        """The part of a picture around a patch, moved where it would reach over the edge, and the patch in it."""
        size = self._read.patch_size
        side = round((1 + 2 * _CONTEXT) * size)
        top = min(max(row * size - round(_CONTEXT * size), 0), max(height - side, 0))
        left = min(max(column * size - round(_CONTEXT * size), 0), max(width - side, 0))
        window = slice(top, min(top + side, height)), slice(left, min(left + side, width))
        return window, (row * size - top, column * size - left, size, size)


def _bytes(pixels: Tensor) -> np.ndarray:
    """[3, H, W], uint8 or in [0, 1], as uint8 [H, W, 3]."""
    levels = pixels if pixels.dtype == torch.uint8 else (pixels * 255).round().clamp(0, 255).to(torch.uint8)
    found: np.ndarray = levels.permute(1, 2, 0).cpu().numpy()
    return found
