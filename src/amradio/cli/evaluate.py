"""``amradio eval``: one inner command a protocol."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from amradio.cli.evaluate_features import CompareFeatures, FeatureStats, ModeSwitching
from amradio.cli.evaluate_in_context import InContext
from amradio.cli.evaluate_linear_seg import LinearSeg
from amradio.cli.evaluate_position import Position
from amradio.cli.evaluate_retrieval_map import RetrievalMap
from amradio.cli.evaluate_sam import Sam
from amradio.cli.evaluate_text import Retrieval, ZeroShot
from amradio.cli.evaluation import EvalCommand
from amradio.cli.fungi import ImageFungiOptions
from amradio.errors import OptionError

if TYPE_CHECKING:
    from amradio.backbones.protocol import Backbone
    from amradio.evals.report import EvalReport
    from amradio.evals.runner import Setup
    from amradio.images.dataset import ImageSet


@dataclass(frozen=True, kw_only=True)
class TrainAndEval(ImageFungiOptions, EvalCommand):
    """Base class of evaluations that learn from one labelled set and are judged on another."""

    train: Annotated[str, tyro.conf.arg(aliases=["--dataset"])]
    """Pictures to learn from: folder of class folders, tar shards, list file, Hugging Face dataset, ..."""
    train_split: str | None = None
    """Its part; default train where there are several."""
    evaluation: Annotated[str | None, tyro.conf.arg(name="eval", aliases=["--eval-dataset"])] = None
    """Pictures to classify; default another part of the same data."""
    eval_split: str | None = None
    """Its part; default validation where there are several."""
    classes: Literal["same", "subset"] = "same"
    """How classes must agree: as many in both, or those to classify are some of the others, under the same numbers."""

    def open(self) -> dict[str, ImageSet]:
        """The train and the evaluation set."""
        from amradio.evals.runner import check_pair

        self.check_fungi()
        train = self.open_set(self.train, self.train_split, "train")
        spec = self.train if self.evaluation is None else self.evaluation
        evaluation = self.open_set(spec, self.eval_split, "validation")
        check_pair(train, evaluation, self.classes)  # before a model is loaded
        return {"train": train, "eval": evaluation}

    def prepared(self, backbone: Backbone, images: dict[str, ImageSet]) -> Backbone:
        """The backbone, with gradients in its summaries if asked for."""
        return self.with_image_gradients(backbone, images["train"], self.seed)


@dataclass(frozen=True, kw_only=True)
class Knn(TrainAndEval):
    """k-NN classification of summaries: the k nearest train pictures vote with exp(similarity / temperature)."""

    protocol: Literal["weighted", "fungi"] = "weighted"
    """weighted: as RADIO, DINO and DINOv2 report it. fungi: as FUNGI's numbers are made: equal votes by Euclidean
    distance, after PCA if asked for; --shots takes the first pictures of each class."""
    pca: int | None = None
    """Under fungi: reduce features to so many principal components of the train set; published: 384 or 512."""
    k: tyro.conf.UseAppendAction[tuple[int, ...]] = ()
    """Neighbours; default 20. Repeat the option for several: all come from one search."""
    temperature: float = 0.07
    """Of the vote."""
    shots: int | None = None
    """Few-shot: take so many train pictures of each class."""
    draws: int = 5
    """Few-shot: draw as many times; mean and deviation are reported."""
    search_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the similarities."""

    def open(self) -> dict[str, ImageSet]:
        """The train and the evaluation set, after a check that options belong to the protocol."""
        others = ("pca",) if self.protocol == "weighted" else ("temperature", "draws", "search_dtype")
        defaults = {field.name: field.default for field in fields(self)}
        changed = [f"--{name.replace('_', '-')}" for name in others if getattr(self, name) != defaults[name]]
        if changed:
            raise OptionError(f"Under --protocol {self.protocol} there is no {', '.join(changed)}. Leave it out.")
        return super().open()

    def evaluate(self, backbone: Backbone, images: dict[str, ImageSet], setup: Setup) -> EvalReport:
        """One backbone at one size."""
        if self.protocol == "fungi":
            return self._uniform(backbone, images, setup)
        from amradio.evals.knn import KnnConfig, run_knn

        config = KnnConfig(
            k=self.k or KnnConfig.k,
            temperature=self.temperature,
            shots=self.shots,
            draws=self.draws,
            seed=self.seed,
            classes=self.classes,
            search_dtype=self.search_dtype,
        )
        return run_knn(backbone, images["train"], images["eval"], config, setup)

    def _uniform(self, backbone: Backbone, images: dict[str, ImageSet], setup: Setup) -> EvalReport:
        from amradio.evals.uniform_knn import UniformKnnConfig, run_uniform_knn

        config = UniformKnnConfig(k=self.k or UniformKnnConfig.k, pca=self.pca, shots=self.shots, classes=self.classes)
        return run_uniform_knn(backbone, images["train"], images["eval"], config, setup)


@dataclass(frozen=True, kw_only=True)
class Linear(TrainAndEval):
    """Linear classification of summaries: logistic regression, its regularisation chosen on held-out train pictures."""

    c: tyro.conf.UseAppendAction[tuple[float, ...]] = ()
    """Inverse regularisation, as scikit-learn's C; default a sweep from 1e-6 to 1e5. Repeat the option for several."""
    normalise: Literal["standardise", "l2", "none"] = "standardise"
    """What is done to summaries: each channel to mean 0 and deviation 1, each summary to length 1, nothing."""
    holdout: float = 0.1
    """Share of each class of the train set on which C is chosen."""
    max_iterations: int = 1000
    """Of L-BFGS, for each C."""
    tolerance: float = 1e-5
    """L-BFGS stops at this share of the gradient at zero weights."""
    fit_dtype: Literal["float32", "float64"] = "float32"
    """Precision of the fit."""

    def evaluate(self, backbone: Backbone, images: dict[str, ImageSet], setup: Setup) -> EvalReport:
        """One backbone at one size."""
        from amradio.evals.linear import LinearConfig, run_linear

        config = LinearConfig(
            c=self.c or LinearConfig.c,
            normalise=self.normalise,
            holdout=self.holdout,
            seed=self.seed,
            max_iterations=self.max_iterations,
            tolerance=self.tolerance,
            dtype=self.fit_dtype,
            classes=self.classes,
        )
        return run_linear(backbone, images["train"], images["eval"], config, setup)


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure how good the features of a backbone are, without training it.

    Several models and several resolutions, given by repeating the option, make one table. Start with `torchrun` to use
    several processes.
    """

    protocol: (
        Annotated[Knn, tyro.conf.subcommand("knn")]
        | Annotated[Linear, tyro.conf.subcommand("linear")]
        | Annotated[ZeroShot, tyro.conf.subcommand("zero-shot")]
        | Annotated[Retrieval, tyro.conf.subcommand("retrieval")]
        | Annotated[RetrievalMap, tyro.conf.subcommand("retrieval-map")]
        | Annotated[Position, tyro.conf.subcommand("position")]
        | Annotated[InContext, tyro.conf.subcommand("in-context")]
        | Annotated[ModeSwitching, tyro.conf.subcommand("mode-switching")]
        | Annotated[FeatureStats, tyro.conf.subcommand("feature-stats")]
        | Annotated[CompareFeatures, tyro.conf.subcommand("compare-features")]
        | Annotated[LinearSeg, tyro.conf.subcommand("linear-seg")]
        | Annotated[Sam, tyro.conf.subcommand("sam")]
    )

    @property
    def json(self) -> bool:
        """Whether errors are printed as JSON."""
        return self.protocol.json

    def run(self) -> int:
        """Evaluate; returns the exit code."""
        return self.protocol.run()

    def reports(self) -> list[EvalReport]:
        """Evaluate without printing."""
        return self.protocol.reports()
