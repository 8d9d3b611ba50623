"""The pictures that the app was started with: embedded once, kept in a cache folder, searched for every page."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amradio.app.photos import clean_name, fitted
from amradio.errors import ImageError, OptionError

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

    from amradio.features import Embeddings
    from amradio.images import ImageSet, ResizePolicy
    from amradio.search import Neighbours

RESOLUTION = 448
"""Longest side of a collection's pictures in pixels, as the model sees them."""

MAPS_LIMIT_BYTES = 4 * 2**30
"""Of all feature maps of a collection on disk; above that only summaries are kept, and regions cannot be looked for."""

_SHOWN_SIDE = 384


@dataclass(frozen=True)
class Hit:
    """A picture that was found.

    Attributes:
        row: Of the embeddings.
        name: For people.
        score: Cosine similarity.
        place: (x, y) of the most similar patch, as shares of width and height; None if whole pictures were compared.
    """

    row: int
    name: str
    score: float
    place: tuple[float, float] | None = None


class Collection:
    """Pictures and their embeddings.

    Args:
        images: The pictures.
        embeddings: Of `images`.
        policy: How they were resized.
    """

    def __init__(self, images: ImageSet, embeddings: Embeddings, policy: ResizePolicy) -> None:
        self.images = images
        self.embeddings = embeddings
        self.policy = policy
        self._units: dict[str, Tensor] = {}
        table = embeddings.table
        self._positions: list[int] = table["position"].to_pylist()
        self._names = [clean_name(name) for name in embeddings.ids]

    def __len__(self) -> int:
        return len(self._positions)

    @property
    def has_regions(self) -> bool:
        """Whether parts of pictures can be looked for."""
        return bool(self.embeddings.manifest["config"]["keep"] == "all")

    def by_summary(self, query: Tensor, output: str, count: int) -> list[Hit]:
        """The pictures whose summaries are most similar to a vector.

        Args:
            query: [C].
            output: Whose summaries.
            count: At most so many.
        """
        import torch.nn.functional as F

        from amradio.search import top_k

        if output not in self._units:
            self._units[output] = F.normalize(self.embeddings.summaries(output)[:].float(), dim=1)  # [N, C]
        unit = F.normalize(query.float(), dim=0)[None]
        found = top_k(unit, self._units[output], min(count, len(self)))
        return [self._hit(row, score) for score, row in zip(found.scores[0].tolist(), found.indices[0].tolist(),
                                                             strict=True)]  # fmt: skip

    def by_region(
        self, query: Tensor, output: str, count: int, best_positions: Callable[[Tensor, Tensor, Tensor], Neighbours]
    ) -> list[Hit]:
        """The pictures with the patches that are most similar to a vector; all patches are read.

        Args:
            query: [D].
            output: Whose features.
            count: At most so many.
            best_positions: See `amradio.search.regions`.

        Raises:
            OptionError: The collection is too large for that.
        """
        if not self.has_regions:
            raise OptionError(
                "This collection is so large that only whole pictures were remembered, and no parts of them. Search by "
                "picture or by words, or search in your photos."
            )
        hits = []
        first = 0
        for shard in self.embeddings.shards_of_features(output):
            found = best_positions(shard.tokens, shard.offsets, query)
            for i, (score, place) in enumerate(zip(found.scores.tolist(), found.indices.tolist(), strict=True)):
                h, w = shard.grids[i].tolist()
                centre = ((place % w + 0.5) / w, (place // w + 0.5) / h)
                hits.append((score, first + i, centre))
            first += len(found.scores)
        hits.sort(key=lambda hit: (-hit[0], hit[1]))
        return [self._hit(row, score, centre) for score, row, centre in hits[:count]]

    def picture(self, row: int) -> Image | None:
        """A picture at the size in which it is shown; None if it cannot be read any more."""
        from amradio.images import MAX_PIXELS, WHITE

        source = self.images[self._positions[row]]
        try:
            picture = source.decode(max_pixels=MAX_PIXELS, background=WHITE, at_least=(_SHOWN_SIDE, _SHOWN_SIDE))
        except ImageError:
            return None
        return fitted(picture, _SHOWN_SIDE)

    def _hit(self, row: int, score: float, place: tuple[float, float] | None = None) -> Hit:
        return Hit(row, self._names[row], score, place)


def open_collection(
    spec: str,
    model_name: str,
    model: Any,
    device: torch.device,
    cache_dir: Path,
    *,
    resolution: int = RESOLUTION,
    workers: int | None = None,
    on_start: Callable[[int, str], Callable[[int], object]] = lambda count, folder: lambda done: None,
) -> tuple[Collection, Sequence[str]]:
    """Embed pictures, or take the embeddings that are in the cache.

    Args:
        spec: See `amradio.images.open_images`.
        model_name: What the model was loaded by.
        model: A backbone, or a RADIO model with the adaptor that is compared with words.
        device: Where it is.
        cache_dir: Where embeddings are kept: in a folder for each collection and model, which is made anew when
            pictures were added, changed or removed.
        resolution: Longest side in pixels at which the model sees them.
        workers: Decoding threads.
        on_start: Called with the number of pictures and the folder; returns what hears of progress.

    Returns:
        The collection, and sentences for people: what could not be used.

    Raises:
        DatasetError: There are no pictures.
        OptionError: None of them could be read, or the folder in the cache holds what is no embeddings.
    """
    import torch

    from amradio.features import EmbedOptions, ExtractOptions, StaleError, embed, load_embeddings
    from amradio.images import ResizePolicy, open_images

    images = open_images(spec)
    policy = ResizePolicy.parse([resolution], "longest", model.min_resolution_step)
    said = []
    keep: Any = "all"
    if len(images) * _bytes_of_maps(model, resolution) > MAPS_LIMIT_BYTES:
        keep = "summary"
        said.append(f"{len(images):,} pictures are too many to remember their parts: regions cannot be looked for.")
    name = hashlib.sha256(f"{Path(spec).expanduser().absolute()}\n{model_name}".encode()).hexdigest()[:24]
    folder = cache_dir / name
    options = ExtractOptions(batch_size=8, device=device, keep=keep, decode="draft", workers=workers)
    try:
        embedding = EmbedOptions(store=torch.float16)
        report = embed(
            images, model, policy, folder, options, embedding, on_progress=on_start(len(images), str(folder))
        )
    except StaleError:  # of other pictures, or of an earlier version
        embedding = EmbedOptions(store=torch.float16, overwrite=True)
        report = embed(
            images, model, policy, folder, options, embedding, on_progress=on_start(len(images), str(folder))
        )
    if not report["ok"]:
        raise OptionError(f"None of the {len(images)} pictures of {spec} could be read.")
    if report["failed"]:
        said.append(f"{report['failed']} of {len(images)} pictures could not be read and are left out.")
    return Collection(images, load_embeddings(folder), policy), said


def _bytes_of_maps(model: Any, side: int) -> int:
    """Of one picture, in float16."""
    views = [model.view(name) for name in getattr(model, "adaptors", ())] or []
    return sum(2 * o.embed_dim * (side // o.patch_size) ** 2 for o in (model, *views))
