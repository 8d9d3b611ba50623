"""``amradio eval retrieval-map``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from amradio.cli.evaluation import EvalCommand
from amradio.cli.fungi import ImageFungiOptions

if TYPE_CHECKING:
    from amradio.backbones.protocol import Backbone
    from amradio.evals.report import EvalReport
    from amradio.evals.retrieval_task import RetrievalTask
    from amradio.evals.runner import Setup
    from amradio.images.dataset import ImageSet


@dataclass(frozen=True, kw_only=True)
class RetrievalMap(ImageFungiOptions, EvalCommand):
    """Retrieval of pictures by pictures: mean average precision of the whole database ranked by similarity.

    Right are pictures of the query's class, or what a --ground-truth says, as ROxford and RParis have it.
    """

    database: Annotated[str, tyro.conf.arg(aliases=["--dataset"])]
    """Pictures to search among: folder of class folders, tar shards, list file, Hugging Face dataset, ..."""
    database_split: str | None = None
    """Its part; default train where there are several."""
    queries: str | None = None
    """Pictures to search for; default each of the database among all others."""
    queries_split: str | None = None
    """Its part; default validation where there are several."""
    ground_truth: Path | None = None
    """JSON file with imlist, qimlist and gnd (easy, hard, junk of each query), as the revisited Oxford and Paris sets
    have it; pictures are told by file names. Without it, labels say what is right."""
    pca: int | None = None
    """Reduce features to so many principal components of the database; published: 512."""

    def open(self) -> dict[str, ImageSet]:
        """The pictures, after a check that something is to be found."""
        self.check_fungi()
        task = self._task
        same = task.queries is task.database
        return {"database": task.database} if same else {"database": task.database, "queries": task.queries}

    def prepared(self, backbone: Backbone, images: dict[str, ImageSet]) -> Backbone:
        """The backbone, with gradients in its summaries if asked for."""
        return self.with_image_gradients(backbone, images["database"], self.seed)

    def evaluate(self, backbone: Backbone, images: dict[str, ImageSet], setup: Setup) -> EvalReport:
        """One backbone at one size."""
        from amradio.evals.retrieval_map import RetrievalMapConfig, run_retrieval_map

        return run_retrieval_map(backbone, self._task, RetrievalMapConfig(pca=self.pca), setup)

    @cached_property
    def _task(self) -> RetrievalTask:
        from amradio.errors import OptionError
        from amradio.evals.retrieval_task import labelled_task, read_ground_truth

        if self.ground_truth is not None and self.limit is not None:
            raise OptionError("--limit leaves out pictures that the --ground-truth lists. Leave out one of them.")
        if self.queries is None and self.queries_split is not None:
            raise OptionError("--queries-split needs --queries, which may be the database again.")
        database = self.open_set(self.database, self.database_split, "train")
        queries = None if self.queries is None else self.open_set(self.queries, self.queries_split, "validation")
        if self.ground_truth is not None:
            return read_ground_truth(self.ground_truth, database, database if queries is None else queries)
        return labelled_task(database, queries)
