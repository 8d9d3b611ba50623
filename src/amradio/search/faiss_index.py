"""FAISS behind the common call: any index that its factory knows."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amradio.errors import MissingDependencyError, OptionError
from amradio.search.approximate import as_neighbours, float_blocks, query_array, require_rows, sample_rows
from amradio.search.neighbours import Neighbours
from amradio.search.rows import Rows


@dataclass(frozen=True, kw_only=True)
class FaissOptions:
    """How a FAISS index is trained and asked.

    Attributes:
        nprobe: Lists that an IVF index looks into; FAISS's default is 1, which finds little.
        ef_search: Candidates that an HNSW graph follows; at least k is useful. FAISS's default is 16.
        ef_construction: Candidates while an HNSW graph is built. FAISS's default is 40.
        train_rows: Rows to learn centroids and codebooks from, a random sample.
        seed: Of the sample. Clustering has a fixed seed of its own.
        threads: None: as many as torch uses.
    """

    nprobe: int | None = None
    ef_search: int | None = None
    ef_construction: int | None = None
    train_rows: int = 262_144
    seed: int = 0
    threads: int | None = None


class FaissIndex:
    """A FAISS index.

    Attributes:
        spec: ``faiss:`` and the factory string; for an index from a file the name of its class.
        index: FAISS's own object.
    """

    def __init__(self, index: Any, spec: str, options: FaissOptions) -> None:
        self.spec = spec
        self.index = index
        self._options = options

    def __len__(self) -> int:
        return int(self.index.ntotal)

    def search(self, queries: Tensor, k: int) -> Neighbours:
        """The nearest rows that the index finds; see `Index.search`. The order of equal scores is FAISS's."""
        array = query_array(queries, self.index.d, k)
        with _threads(self._options.threads):
            scores, indices = self.index.search(array, k)
        return as_neighbours(scores, indices, indices < 0, k, queries.device)

    def save(self, path: Path | str) -> None:
        """Write the index to a file, which `load_index` and FAISS itself can read. Search options are part of it."""
        import_faiss().write_index(self.index, str(path))


def build_faiss(rows: Rows, factory: str, options: FaissOptions) -> FaissIndex:
    """Make, train and fill an index.

    Args:
        rows: The database.
        factory: FAISS's factory string.
        options: Training and search.

    Raises:
        OptionError: The factory string or an option does not fit, with FAISS's own words.
        MissingDependencyError: FAISS is not installed.
    """
    faiss = import_faiss()
    require_rows(rows)
    try:
        index = faiss.index_factory(rows.dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as e:
        raise OptionError(
            f"FAISS cannot make an index {factory!r} for {rows.dim} features: {_words(e)} Factory strings are "
            "described at https://github.com/facebookresearch/faiss/wiki/The-index-factory."
        ) from e
    _configure(faiss, index, factory, {"efConstruction": options.ef_construction})
    with _threads(options.threads):
        try:
            if not index.is_trained:
                index.train(sample_rows(rows, options.train_rows, options.seed))
            for block in float_blocks(rows):
                index.add(block)
        except RuntimeError as e:
            raise OptionError(
                f"FAISS cannot fill the index {factory!r} with {len(rows)} rows of {rows.dim} features (trained on at "
                f"most {options.train_rows}): {_words(e)}"
            ) from e
    _configure(faiss, index, factory, {"nprobe": options.nprobe, "efSearch": options.ef_search})
    return FaissIndex(index, f"faiss:{factory}", options)


def load_faiss(path: Path) -> FaissIndex:
    """Read an index that FAISS wrote.

    Raises:
        OptionError: The file is not one, or compares by another measure than the inner product.
        MissingDependencyError: FAISS is not installed.
    """
    faiss = import_faiss()
    try:
        index = faiss.read_index(str(path))
    except RuntimeError as e:
        raise OptionError(f"FAISS cannot read {path}: {_words(e)}") from e
    if index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise OptionError(f"The index in {path} compares by another measure than the inner product.")
    return FaissIndex(index, f"faiss:{type(index).__name__}", FaissOptions())


def import_faiss() -> Any:
    """The package, or an error that says where it comes from."""
    try:
        return importlib.import_module("faiss")
    except ImportError as e:
        raise MissingDependencyError(
            f"FAISS cannot be imported ({e}). Install it with `pip install 'amradio[search]'`, or search with 'exact'."
        ) from e


def _configure(faiss: Any, index: Any, factory: str, parameters: dict[str, int | None]) -> None:
    for name, value in parameters.items():
        if value is None:
            continue
        try:
            faiss.ParameterSpace().set_index_parameter(index, name, value)
        except RuntimeError as e:
            raise OptionError(f"A FAISS index {factory!r} has no parameter {name}.") from e


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """FAISS's own number of threads, for the time of a call; it is a global of FAISS."""
    faiss = import_faiss()
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count or torch.get_num_threads())
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _words(error: RuntimeError) -> str:
    """FAISS's message without the place in its sources."""
    text = str(error).strip()
    for marker in ("failed: ", ".cpp:"):
        if marker in text:
            text = text.rpartition(marker)[2]
            break
    return text.partition(": ")[2].rstrip(".") + "." if text[:1].isdigit() else text.rstrip(".") + "."
