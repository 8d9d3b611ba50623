"""Looking patches up in memories, and scoring what comes out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from amradio.errors import OptionError
from amradio.evals.in_context.build import PassResult, Watch
from amradio.evals.in_context.config import InContextConfig
from amradio.evals.in_context.forward import Forward, PatchFeatures
from amradio.evals.in_context.loader import ReadOptions, load_val
from amradio.evals.in_context.memory import MemoryBank
from amradio.evals.in_context.metrics import Confusion
from amradio.evals.in_context.propagate import attention, label_map, mix_labels
from amradio.evals.in_context.sheets import SheetMaker, Votes
from amradio.evals.report import Metric
from amradio.features.collect import Failure
from amradio.search import Neighbours, build_index, top_k
from amradio.search.faiss_index import FaissOptions, import_faiss
from amradio.search.index import read_options
from amradio.search.scann_index import ScannOptions, import_scann

if TYPE_CHECKING:
    from amradio.images.segmentation import SegmentationSet

_QUERIES_AT_ONCE = 4096
_SHARE_OF_GPU = 0.5  # of its free memory, for the memory of patches; the rest is for pictures and scores


class Memory:
    """A memory of one size, its index, and the score of what it says.

    Args:
        size: As asked for; None: all patches.
        bank: Its rows.
        config: Search, k, temperature.
        similarity: Of the backbone's features, where it is no inner product.
        device: Where scores are computed.

    Attributes:
        size: See above.
        bank: See above.
        confusion: What was counted so far; see `Scorer`.
    """

    confusion: Confusion

    def __init__(
        self, size: int | None, bank: MemoryBank, config: InContextConfig, similarity: Any, device: torch.device
    ) -> None:
        self.size = size
        self.bank = bank
        self._config = config
        self._similarity = similarity
        self._device = device
        self._features, self._counts = bank.features, bank.counts
        if device.type == "cuda" and bank.nbytes < _SHARE_OF_GPU * torch.cuda.mem_get_info(device)[0]:
            self._features, self._counts = self._features.to(device), self._counts.to(device)
        self._index = None
        if config.search != "exact":
            self._index = build_index(bank.features, config.search, **_options(config))

    @property
    def metric(self) -> Metric:
        """How many patches it holds, for tables."""
        return Metric(float(len(self.bank)))

    def find(self, queries: Tensor) -> Neighbours:
        """The nearest patches of queries [Q, D] of any length."""
        if self._index is not None:
            return self._index.search(queries, self._config.k)
        return top_k(queries, self._features, self._config.k, similarity=self._similarity, device=self._device)

    def vote(self, queries: Tensor, found: Neighbours) -> tuple[Tensor, Tensor]:
        """Weights of neighbours [Q, k], and labels [Q, C]."""
        norms = None if self._similarity is not None else torch.linalg.vector_norm(queries, dim=1)  # [Q]
        weights = attention(found.scores, norms, self._config.temperature)
        return weights, mix_labels(weights, found.indices, self._counts)


class Scorer:
    """Segments pictures with several memories.

    Args:
        val: The pictures.
        config: How.
        forward: The backbone.
        options: How pictures are read.
        memories: Each counts in its `Memory.confusion`.
        watch: Is told of pictures and times.
        sheets: Makes contact sheets.
    """

    def __init__(
        self,
        val: SegmentationSet,
        config: InContextConfig,
        forward: Forward,
        options: ReadOptions,
        memories: list[Memory],
        watch: Watch,
        sheets: SheetMaker | None = None,
    ) -> None:
        self._val = val
        self._config = config
        self._forward = forward
        self._options = options
        self._memories = memories
        self._watch = watch
        self._sheets = sheets
        self._shown = frozenset() if sheets is None else sheets.options.positions(len(val))
        for memory in memories:
            memory.confusion = Confusion(len(val.class_names), val.ignore_index)
        self._result = PassResult()

    def score(self, own: range) -> PassResult:
        """Score the part of one process.

        Args:
            own: Positions of its pictures.

        Returns:
            What went wrong.
        """
        waiting: list[PatchFeatures] = []
        count = 0
        for batch in self._batches(own):
            waiting.append(batch)
            assert batch.features is not None
            count += batch.features.shape[0] * batch.features.shape[1]
            if count >= _QUERIES_AT_ONCE:
                self._look_up(waiting)
                waiting, count = [], 0
        if waiting:
            self._look_up(waiting)
        return self._result

    def _batches(self, own: range) -> Iterator[PatchFeatures]:
        """Batches whose features are usable."""
        pairs = load_val(self._val, own, self._config.score_at, self._config.protocol, self._options)
        batches = self._forward.batches(pairs)
        while True:
            with self._watch.stage("eval_forward"):  # and waiting for pictures
                batch = next(batches, None)
            if batch is None:
                return
            if batch.features is None:
                for pair in batch.pairs:
                    reason = pair.reason or batch.reason or ""
                    place = pair.sample.image.location
                    self._result.failures.append(Failure(pair.position, pair.sample.id, place, reason))
                    self._watch.seen(pair, reason)
                continue
            finite = torch.isfinite(batch.features).flatten(1).all(1).tolist()
            self._result.not_finite += [p.sample.id for p, ok in zip(batch.pairs, finite, strict=True) if not ok]
            if all(finite):
                yield batch

    def _look_up(self, batches: list[PatchFeatures]) -> None:
        parts = [batch.features.flatten(0, 1).float() for batch in batches if batch.features is not None]
        queries = torch.cat(parts)  # [Q, D]
        for memory in self._memories:
            with self._watch.stage("search"):
                found = memory.find(queries)
            with self._watch.stage("propagate"):
                weights, labels = memory.vote(queries, found)
            with self._watch.stage("score"):
                self._count(memory, batches, found, weights, labels)
        for batch in batches:
            for pair in batch.pairs:
                self._watch.seen(pair, None)

    def _count(
        self, memory: Memory, batches: list[PatchFeatures], found: Neighbours, weights: Tensor, labels: Tensor
    ) -> None:
        start = 0
        for batch in batches:
            for pair in batch.pairs:
                assert pair.labels is not None
                assert pair.pixels is not None
                stop = start + batch.grid[0] * batch.grid[1]
                own = labels[start:stop]  # [P, C]
                truth = pair.labels.to(labels.device)
                predicted = label_map(own.unflatten(0, batch.grid), (truth.shape[0], truth.shape[1]))
                memory.confusion.update(truth, predicted)
                if self._sheets is not None and pair.position in self._shown:
                    votes = Votes(
                        pair.pixels, batch.grid, truth, predicted, own, weights[start:stop], found.indices[start:stop]
                    )
                    size = "all" if memory.size is None else f"{memory.size:,}"
                    self._sheets.make(pair.sample.id, f"memory of {size} patches", votes, memory.bank)
                start = stop


def check_search(config: InContextConfig) -> None:
    """Refuse a search that cannot be made, before any picture is read.

    Raises:
        OptionError: There is no such index, or it has no such option.
        MissingDependencyError: FAISS or ScaNN is not installed.
    """
    options = _options(config)
    kind, _, factory = config.search.partition(":")
    if kind == "faiss" and factory:
        import_faiss()
        read_options(FaissOptions, options, config.search)
    elif config.search == "scann":
        import_scann()
        read_options(ScannOptions, options, config.search)
    elif config.search != "exact":
        build_index(torch.zeros(1, 1), config.search)  # which says what is known
    elif options:
        raise OptionError(f"The exact search has no options, got {', '.join(options)}. Choose 'scann' or 'faiss:...'.")


def describe_search(config: InContextConfig) -> str:
    """The search in words, with the options that were chosen."""
    options = ", ".join(f"{name} {value}" for name, value in _options(config).items())
    return f"{config.search} ({options})" if options else config.search


def _options(config: InContextConfig) -> dict[str, Any]:
    options = {name: value for name, value in config.search_options.items() if value is not None}
    if config.search == "scann":
        options.setdefault("dimensions_per_block", config.protocol.scann_dimensions_per_block)
    return options
