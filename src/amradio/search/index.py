"""Indexes: one call for exact and approximate search."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

from amradio.errors import OptionError, nearest_names
from amradio.search.exact import top_k
from amradio.search.neighbours import Neighbours
from amradio.search.plan import DEFAULT_MEMORY_LIMIT
from amradio.search.rows import Database, Rows

if TYPE_CHECKING:
    from amradio.distributed import Group
    from amradio.search.engine import Similarity

_Options = TypeVar("_Options")


class Index(Protocol):
    """A database that can be asked for neighbours.

    Attributes:
        spec: What kind it is, as given to `build_index`.
    """

    spec: str

    def __len__(self) -> int:
        """Rows in the database."""
        ...

    def search(self, queries: Tensor, k: int) -> Neighbours:
        """Find neighbours by inner product, [Q, D] -> [Q, k], on the device of the queries.

        An approximate index may find fewer than k: the places that are left have index -1 and score -inf.
        """
        ...


def build_index(database: Database, spec: str = "exact", **options: Any) -> Index:
    """Make an index of a database; the similarity is the inner product.

    Args:
        database: [N, D] features: a tensor, an array, a memory map, or anything with a length whose slices are one of
            these. It is read block by block. Approximate indexes hold a copy of their own, ScaNN in float32.
        spec: ``exact``: `top_k`; options are `ExactOptions`.
            ``faiss:FACTORY``: any factory string of FAISS, such as ``faiss:Flat``, ``faiss:IVF1024,Flat``,
            ``faiss:HNSW32``, ``faiss:IVF1024,PQ64``, ``faiss:PQ64np`` (without ``np``, FAISS spends minutes on an order
            of the codes that its default search does not use); options are `amradio.search.faiss_index.FaissOptions`.
            ``scann``: a partitioned, quantised and reordered ScaNN index; options are
            `amradio.search.scann_index.ScannOptions`.
        **options: Fields of the options of that kind.

    Returns:
        The index.

    Raises:
        OptionError: The specification, an option or the database is wrong.
        MissingDependencyError: FAISS or ScaNN is not installed.
    """
    kind, _, factory = spec.partition(":")
    if kind == "exact" and not factory:
        return ExactIndex(database, read_options(ExactOptions, options, spec))
    if kind == "faiss" and factory:
        from amradio.search.faiss_index import FaissOptions, build_faiss

        return build_faiss(Rows(database), factory, read_options(FaissOptions, options, spec))
    if kind == "scann" and not factory:
        from amradio.search.scann_index import ScannOptions, build_scann

        return build_scann(Rows(database), read_options(ScannOptions, options, spec))
    raise OptionError(
        f"{spec!r} is no kind of index. Known: 'exact', 'scann', and 'faiss:' with a factory string, such as "
        "'faiss:Flat', 'faiss:IVF1024,Flat', 'faiss:HNSW32' or 'faiss:IVF1024,PQ64'."
    )


def load_index(path: Path | str) -> Index:
    """Read an approximate index that was saved: FAISS writes a file, ScaNN a folder.

    Args:
        path: The file or folder. Load only what you trust: both libraries read it in C++ without further checks.

    Raises:
        OptionError: There is nothing, or something else.
        MissingDependencyError: FAISS or ScaNN is not installed.
    """
    path = Path(path)
    if path.is_dir():
        from amradio.search.scann_index import load_scann

        return load_scann(path)
    if path.is_file():
        from amradio.search.faiss_index import load_faiss

        return load_faiss(path)
    raise OptionError(f"There is no index at {path}.")


@dataclass(frozen=True, kw_only=True)
class ExactOptions:
    """How an exact index searches; see `top_k`."""

    similarity: Similarity | None = None
    dtype: torch.dtype | None = None
    device: torch.device | str | None = None
    memory_limit_bytes: int = DEFAULT_MEMORY_LIMIT
    group: Group | None = None
    shared_queries: bool = False
    offset: int | None = None


class ExactIndex:
    """`top_k` as an index. It keeps the database that it was given, not a copy."""

    spec = "exact"

    def __init__(self, database: Database, options: ExactOptions) -> None:
        self._database = database
        self._options = {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}

    def __len__(self) -> int:
        return len(self._database)

    def search(self, queries: Tensor, k: int) -> Neighbours:
        """The nearest rows; there are always k."""
        return top_k(queries, self._database, k, **self._options)


def read_options(kind: type[_Options], options: dict[str, Any], spec: str) -> _Options:
    """Options of one kind of index from keywords."""
    known = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for name in options:
        if name not in known:
            raise OptionError(f"An index {spec!r} has no option {name!r}. {nearest_names(name, known)}")
    return kind(**options)
