"""ScaNN behind the common call: partitions, anisotropic quantisation, reordering.

Guo et al. 2020, "Accelerating Large-Scale Inference with Anisotropic Vector Quantization".
"""

from __future__ import annotations

import importlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amradio.errors import MissingDependencyError, OptionError
from amradio.search.approximate import as_neighbours, block_rows, query_array, require_rows
from amradio.search.neighbours import Neighbours, empty_neighbours
from amradio.search.rows import Rows, largest_norm

_ABOUT = "amradio.json"
_DOCUMENT_IDS = "scann_docids.pkl"


@dataclass(frozen=True, kw_only=True)
class ScannOptions:
    """How a ScaNN index is made; the defaults are the setting that HummingBird evaluations publish.

    Attributes:
        num_leaves: Partitions of the database; as a rule about the square root of its rows.
        num_leaves_to_search: How many of them a query looks into.
        num_reordering_candidates: Of so many, scores are computed in float32.
        anisotropic_quantization_threshold: Weighs errors along a row more than those across it; T in the paper.
        dimensions_per_block: Features that one code stands for.
        training_rows: Rows to learn partitions and codes from.
        threads: For training; 0 is ScaNN's choice.
    """

    num_leaves: int = 512
    num_leaves_to_search: int = 32
    num_reordering_candidates: int = 120
    anisotropic_quantization_threshold: float = 0.2
    dimensions_per_block: int = 4
    training_rows: int = 100_000
    threads: int = 0


class ScannIndex:
    """A ScaNN index.

    Attributes:
        spec: ``scann``.
        searcher: ScaNN's own object.
        options: What it was made with.
    """

    spec = "scann"

    def __init__(self, searcher: Any, dim: int, options: ScannOptions) -> None:
        self.searcher = searcher
        self.options = options
        self._dim = dim

    def __len__(self) -> int:
        return int(self.searcher.size())

    def search(self, queries: Tensor, k: int) -> Neighbours:
        """The nearest rows that the index finds; see `Index.search`. The order of equal scores is ScaNN's.

        For a k above `num_reordering_candidates`, k candidates are reordered.
        """
        array = query_array(queries, self._dim, k)
        if len(array) == 0:
            return empty_neighbours(0, k, queries.device)
        indices, scores = self.searcher.search_batched(
            array,
            final_num_neighbors=k,
            pre_reorder_num_neighbors=max(k, self.options.num_reordering_candidates),
        )
        return as_neighbours(scores, indices, np.isnan(scores), k, queries.device)  # of what is missing, scores are NaN

    def save(self, path: Path | str) -> None:
        """Write the index to a folder, which may be moved; `load_index` can read it."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        self.searcher.serialize(str(folder), relative_path=True)
        about = {"dim": self._dim, "options": asdict(self.options)}
        (folder / _ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def build_scann(rows: Rows, options: ScannOptions) -> ScannIndex:
    """Train and fill an index.

    Args:
        rows: The database; ScaNN holds all of it in float32.
        options: Training and search.

    Raises:
        OptionError: An option does not fit the database, with ScaNN's own words.
        MissingDependencyError: ScaNN is not installed.
    """
    scann = import_scann()
    require_rows(rows)
    if not 1 <= options.num_leaves_to_search <= options.num_leaves <= len(rows):
        raise OptionError(
            f"An index needs 1 <= num_leaves_to_search <= num_leaves <= rows of the database, got "
            f"{options.num_leaves_to_search}, {options.num_leaves} and {len(rows)}. A common choice of num_leaves is "
            f"the square root of the rows, here {max(round(len(rows) ** 0.5), 1)}."
        )
    builder = scann.builder(_all_rows(rows), 1, "dot_product")  # k is given with each search
    builder = builder.set_n_training_threads(options.threads)
    builder = builder.tree(
        num_leaves=options.num_leaves,
        num_leaves_to_search=options.num_leaves_to_search,
        training_sample_size=options.training_rows,
    )
    builder = builder.score_ah(
        options.dimensions_per_block,
        anisotropic_quantization_threshold=options.anisotropic_quantization_threshold,
        training_sample_size=options.training_rows,
    )
    try:
        searcher = builder.reorder(options.num_reordering_candidates).build()
    except (RuntimeError, ValueError) as e:
        raise OptionError(
            f"ScaNN cannot make an index of {len(rows)} rows of {rows.dim} features with {options}: {e}"
        ) from e
    return ScannIndex(searcher, rows.dim, options)


def load_scann(folder: Path) -> ScannIndex:
    """Read an index that `ScannIndex.save` wrote.

    Raises:
        OptionError: The folder holds something else.
        MissingDependencyError: ScaNN is not installed.
    """
    scann = import_scann()
    if not (folder / _ABOUT).is_file():
        raise OptionError(f"{folder} is no ScaNN index that amradio saved: it has no {_ABOUT}.")
    if (folder / _DOCUMENT_IDS).exists():  # ScaNN would unpickle it, which may run any code
        raise OptionError(f"{folder} holds a pickle, {_DOCUMENT_IDS}, which amradio never writes. It was not read.")
    try:
        about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        known = {f.name for f in fields(ScannOptions)}
        options = ScannOptions(**{name: value for name, value in about["options"].items() if name in known})
        searcher = scann.load_searcher(str(folder), assets_backcompat_shim=False)
    except (RuntimeError, ValueError, KeyError) as e:
        raise OptionError(f"ScaNN cannot read the index in {folder}: {e}") from e
    return ScannIndex(searcher, int(about["dim"]), options)


def import_scann() -> Any:
    """The module that works without TensorFlow, or an error that says where it comes from."""
    try:
        return importlib.import_module("scann").scann_ops_pybind
    except ImportError as e:
        raise MissingDependencyError(
            f"ScaNN cannot be imported ({e}). Install it with `pip install 'amradio[scann]'` (Linux only), or use "
            "'faiss:...' or 'exact'."
        ) from e


def _all_rows(rows: Rows) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The database as float32 [N, D], checked."""
    found = np.empty((len(rows), rows.dim), np.float32)
    target = torch.from_numpy(found)
    for start, stop in rows.bounds(block_rows(rows)):
        target[start:stop] = rows.block(start, stop)
        largest_norm(target[start:stop], "database", start)
    return found
