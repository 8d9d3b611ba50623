"""``amradio eval position``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from amradio.cli.evaluation import EvalCommand

if TYPE_CHECKING:
    from amradio.backbones.protocol import Backbone
    from amradio.evals.report import EvalReport
    from amradio.evals.runner import Setup
    from amradio.images.dataset import ImageSet

_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Position(EvalCommand):
    """Patch position predictor: how well a linear map finds where in the picture a patch feature comes from.

    Pictures need no labels. The error is the mean distance in x and y, where the picture reaches from -1 to 1.
    """

    train: Annotated[str, tyro.conf.arg(aliases=["--dataset"])]
    """Pictures to fit the map on: folder, tar shards, list file, Hugging Face dataset, ..."""
    train_split: str | None = None
    """Its part; default train where there are several."""
    evaluation: Annotated[str | None, tyro.conf.arg(name="eval", aliases=["--eval-dataset"])] = None
    """Pictures to measure the error on; default another part of the same data."""
    eval_split: str | None = None
    """Its part; default validation where there are several."""
    solver: Literal["adam", "ridge"] = "adam"
    """adam: several epochs, as published; ridge: closed form, in one pass."""
    epochs: int = 5
    """Of adam."""
    fit_batch_size: int = 32
    """Pictures in a step of adam, over all processes together."""
    learning_rate: float = 1e-2
    """Of adam."""
    ridge: float = 1e-6
    """Regularisation of ridge, as a share of the mean variance of the features."""
    cache_gib: float = 4.0
    """Memory of each process in which adam may keep the features of the train set; if they do not fit, each epoch
    computes them anew."""

    def open(self) -> dict[str, ImageSet]:
        """The train and the evaluation set."""
        train = self.open_set(self.train, self.train_split, "train")
        spec = self.train if self.evaluation is None else self.evaluation
        return {"train": train, "eval": self.open_set(spec, self.eval_split, "validation")}

    def evaluate(self, backbone: Backbone, images: dict[str, ImageSet], setup: Setup) -> EvalReport:
        """One backbone at one size."""
        from amradio.evals.position import PositionConfig, run_position

        config = PositionConfig(
            solver=self.solver,
            epochs=self.epochs,
            batch_size=self.fit_batch_size,
            learning_rate=self.learning_rate,
            seed=self.seed,
            ridge=self.ridge,
        )
        return run_position(
            backbone, images["train"], images["eval"], config, setup, cache_bytes=int(self.cache_gib * _GIB)
        )
