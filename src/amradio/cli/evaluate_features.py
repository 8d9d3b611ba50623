"""``amradio eval mode-switching``, ``feature-stats`` and ``compare-features``: pictures without labels."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from amradio.cli.arguments import Size
from amradio.cli.common import DEFAULT_MODEL, check_counts, device_of
from amradio.cli.evaluation import EvalCommand, print_problems
from amradio.cli.text import table
from amradio.errors import OptionError

if TYPE_CHECKING:
    from amradio.backbones.protocol import Backbone
    from amradio.evals.feature_stats import FeatureStatsConfig
    from amradio.evals.mode_switching import StripMap
    from amradio.evals.report import EvalReport
    from amradio.evals.runner import Setup
    from amradio.images.dataset import ImageSet
    from amradio.images.resize import ResizePolicy
    from amradio.statistics.moments import Moments


@dataclass(frozen=True, kw_only=True)
class UnlabelledCommand(EvalCommand):
    """Base class of evaluations of one set of pictures without labels, with plots beside the reports."""

    dataset: Annotated[str, tyro.conf.arg(aliases=["--images"])]
    """Pictures; labels are not needed: folder, tar shards, list file, Hugging Face dataset, ..."""
    split: str | None = None
    """Its part; default validation where there are several."""
    plots: Literal["png", "svg", "pdf", "none"] = "png"
    """Format of the plots that --output gets; they need the extra amradio[viz]."""

    def open(self) -> dict[str, ImageSet]:
        """The pictures, after a check that plots can be drawn."""
        if self.output is not None and self.plots != "none":
            from amradio.viz.plots import check_plots

            check_plots()
        return {"eval": self.open_set(self.dataset, self.split, "validation")}

    def load_other(self, spec: str, adaptor: str | None, options: Sequence[str]) -> Backbone:
        """A second backbone, with options of its own, under this command's device, precision and cache."""
        # What this command says about its own model is not meant for the other one.
        own = dataclasses.replace(
            self, model_option=tuple(options), revision=None, vitdet_window_size=None, position_interpolation=None
        )
        return own.load_backbone(spec, adaptor, device_of(self.device), progress=not self.json)

    def _print(self, reports: Sequence[EvalReport]) -> None:
        """Metrics down, models and sizes across, for there are many metrics."""
        if self.json:
            super()._print(reports)
            return
        for report in reports:
            print_problems(report)
        units = {name: metric.unit for report in reports for name, metric in report.metrics.items()}
        rows = [
            [
                name.replace("_", " "),
                *(_short(r.metrics[name].value) if name in r.metrics else "" for r in reports),
                unit,
            ]
            for name, unit in units.items()
        ]
        print(table(["", *(report.label for report in reports), "unit"], rows))
        if self.output is not None:
            print(f"\nreports are in {self.output}")


@dataclass(frozen=True, kw_only=True)
class ModeSwitching(UnlabelledCommand):
    """Sweep over resolutions: how well an adaptor's features match its teacher's, and whether they switch in between.

    Without --teacher, features are compared with the model's own at one resolution. --output gets the curve as CSV and
    as plots, and PCA maps of some pictures over resolutions. 16 pictures, which is enough to see a switch, are the
    default; published sweeps use --from 196 --to 1536 --step 16 --limit 100.
    """

    teacher: str | None = None
    """The real teacher, written as a --model."""
    teacher_adaptor: str | None = None
    """Of a teacher that is a RADIO model."""
    teacher_option: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=VALUE: what only this kind of teacher knows, such as stride=16. Repeat the option for several."""
    teacher_resolution: int | None = None
    """The teacher always sees this size; default as many patches as the student."""
    teacher_fit: Literal["resize", "pad"] = "resize"
    """Teachers that accept one size only get the picture at that size, or padded at the bottom and right (SAM)."""
    reference: int | None = None
    """Without a teacher: the resolution that others are compared with; default the model's preferred one."""
    first: Annotated[int, tyro.conf.arg(name="from")] = 128
    """Smallest resolution in pixels."""
    last: Annotated[int, tyro.conf.arg(name="to")] = 1024
    """Largest resolution."""
    step: int = 64
    """Between two of them."""
    resolution: tyro.conf.UseAppendAction[tuple[Size, ...]] = ()
    """A single resolution, instead of --from, --to and --step. Repeat the option for several."""
    measure: Literal["mse", "cosine"] = "mse"
    """What a switch is looked for in: MSE over the teacher's variance, or 1 - cosine."""
    least_switch: float = 0.05
    """How large a switch must be at least, in that measure."""
    strips: int = 3
    """Of how many pictures PCA maps are drawn."""
    knn_train: str | None = None
    """Labelled pictures: also measure k-NN accuracy at each resolution, with these as the train set."""
    knn_eval: str | None = None
    """Labelled pictures to classify by them; default another part of the same data."""
    zero_shot: str | None = None
    """Labelled pictures: also measure zero-shot accuracy at each resolution."""
    accuracy_adaptor: str | None = None
    """Whose summaries these accuracies are of: an adaptor, or backbone; default that of --adaptor."""
    limit: int | None = 16
    """Take only so many pictures, chosen at random."""
    batch_size: int = 8
    """Most pictures in one forward pass; halved by itself when memory runs out."""

    def open(self) -> dict[str, ImageSet]:
        """The pictures, after a check of what does not fit together."""
        if self.teacher is None and (self.teacher_adaptor or self.teacher_option or self.teacher_resolution):
            raise OptionError("--teacher-adaptor, --teacher-option and --teacher-resolution need a --teacher.")
        if self.teacher is not None and self.reference is not None:
            raise OptionError("--reference is for sweeps without a teacher; for one with a --teacher, leave it out.")
        if self.accuracy_adaptor is not None and self.knn_train is None and self.zero_shot is None:
            raise OptionError("--accuracy-adaptor needs labelled pictures: --knn-train or --zero-shot.")
        if any(len(size) != 1 for size in self.resolution):
            raise OptionError("The sweep uses squares: give each --resolution as one number.")
        return super().open()

    def policies(self, backbone: Backbone) -> list[ResizePolicy]:
        """One, for the sweep is one evaluation: that of the largest size."""
        from amradio.images.resize import ResizePolicy

        mode: Any = "crop" if self.mode == "auto" else self.mode
        return [ResizePolicy.parse((self._sides(backbone)[-1],), mode)]

    def amount(self, images: dict[str, Any], backbone: Backbone) -> int:
        """Pictures times resolutions."""
        return super().amount(images, backbone) * len(self._sides(backbone))

    def evaluate(self, backbone: Backbone, images: dict[str, ImageSet], setup: Setup) -> EvalReport:
        """One backbone over the whole sweep."""
        from amradio.evals.mode_switching import ModeSwitchingConfig, run_mode_switching

        config = ModeSwitchingConfig(
            resolutions=self._sides(backbone),
            reference=self.reference,
            teacher_resolution=self.teacher_resolution,
            teacher_fit=self.teacher_fit,
            measure=self.measure,
            least_size=self.least_switch,
            strip_pictures=self.strips,
        )
        self._maps.clear()
        return run_mode_switching(
            backbone,
            self._teacher,
            images["eval"],
            config,
            setup,
            accuracies=self._accuracies(backbone, setup),
            on_strip=self._maps.append if self.output is not None and self.plots != "none" else None,
        )

    def draw(self, report: EvalReport, path: Path) -> None:
        """The curve as CSV and as plots, and the strips."""
        curve = report.details["curve"]
        _write_csv(Path(f"{path}.csv"), list(curve[0]), ([row[name] for name in curve[0]] for row in curve))
        if self.plots == "none":
            return
        from amradio.viz.grid import save_sheet
        from amradio.viz.plots import plot_mode_switching, save_plot
        from amradio.viz.strips import resolution_strips

        title = f"{report.model_label} against {_against(report)}"
        figure = plot_mode_switching(curve, report.details["switches"]["switches"], title)
        save_plot(figure, f"{path}.{self.plots}")
        if self._maps:
            title = f"{report.model_label}: principal components over resolutions"
            sheet = resolution_strips(self._maps, title, report.details["verdict"])
            save_sheet(sheet, f"{path}.strips.{self.plots}")

    def _sides(self, backbone: Backbone) -> tuple[int, ...]:
        from amradio.evals.mode_switching import supported, sweep_of

        if self.resolution:
            return supported([size[0] for size in self.resolution], backbone)
        check_counts(step=self.step)
        return supported(sweep_of(self.first, self.last, self.step, backbone.min_resolution_step), backbone)

    @cached_property
    def _maps(self) -> list[StripMap]:
        """Feature maps of the evaluation that is running, for its strips."""
        return []

    @cached_property
    def _teacher(self) -> Backbone | None:
        if self.teacher is None:
            return None
        return self.load_other(self.teacher, self.teacher_adaptor, self.teacher_option)

    def _accuracies(self, backbone: Backbone, setup: Setup) -> Any:
        """Measures k-NN and zero-shot accuracy under a policy; None if nothing is asked for."""
        if self.knn_train is None and self.zero_shot is None:
            return None
        judged = self._judged(backbone)
        sets = self._labelled

        def measured(policy: ResizePolicy) -> dict[str, float]:
            from amradio.evals.knn import KnnConfig, run_knn
            from amradio.evals.runner import Setup
            from amradio.evals.zero_shot import run_zero_shot

            own = Setup(policy, setup.options)
            found = {}
            if "train" in sets:
                k = min(KnnConfig.k[0], len(sets["train"]))
                report = run_knn(judged, sets["train"], sets["eval"], KnnConfig(k=(k,)), own)
                found["knn_top1"] = report.metrics["top1"].value
            if "zero-shot" in sets:
                report = run_zero_shot(judged, sets["zero-shot"], None, own, cache_dir=self.cache_dir)
                found["zero_shot_top1"] = report.metrics["top1"].value
            return found

        return measured

    def _judged(self, backbone: Backbone) -> Backbone:
        """The backbone whose summaries classify."""
        if self.accuracy_adaptor is None or self.accuracy_adaptor == self.adaptor:
            return backbone
        if len(self.model) > 1:
            raise OptionError("--accuracy-adaptor takes one --model.")
        spec = self.model[0] if self.model else DEFAULT_MODEL
        return self.load_backbone(spec, self.accuracy_adaptor, device_of(self.device), progress=not self.json)

    @cached_property
    def _labelled(self) -> dict[str, ImageSet]:
        from amradio.evals.runner import check_pair, labels_of

        all_pictures = dataclasses.replace(self, limit=None)
        sets: dict[str, ImageSet] = {}
        if self.knn_train is not None:
            train = all_pictures.open_set(self.knn_train, None, "train")
            evaluation = all_pictures.open_set(self.knn_eval or self.knn_train, None, "validation")
            check_pair(train, evaluation, "same")
            sets |= {"train": train, "eval": evaluation}
        if self.zero_shot is not None:
            sets["zero-shot"] = all_pictures.open_set(self.zero_shot, None, "validation")
            labels_of(sets["zero-shot"])
        return sets

    def _print(self, reports: Sequence[EvalReport]) -> None:
        """The curve and the verdict of each model."""
        if self.json:
            super()._print(reports)
            return
        for report in reports:
            curve = report.details["curve"]
            print(f"{report.model_label} against {_against(report)}")
            names = [name for name in curve[0] if name not in ("pictures", "one_minus_cosine_se")]
            print(table([name.replace("_", " ") for name in names], [[_short(row[n]) for n in names] for row in curve]))
            print(f"\n{report.details['verdict']}\n")
            print_problems(dataclasses.replace(report, notes=report.notes[1:]))  # the verdict is above
        if self.output is not None:
            print(f"reports, curves and plots are in {self.output}")


@dataclass(frozen=True, kw_only=True)
class FeatureStats(UnlabelledCommand):
    """Statistics of features: RankMe and LiDAR, distribution, spectral norms, activations and attention, cost.

    --output gets a plot, the histograms as CSV, and mean and covariance of the features as .safetensors.
    """

    part: tyro.conf.UseAppendAction[tuple[Literal["ranks", "distribution", "weights", "activations", "cost"], ...]] = ()
    """Measure only this. Repeat the option for several."""
    views: int = 9
    """Augmented views of each picture, for LiDAR; 0 leaves it out. Published: 99, of 1000 pictures at 336 px."""
    cost_batch_size: int = 8
    """Pictures in each timed forward pass."""
    cost_batches: int = 3
    """Timed forward passes."""
    limit: int | None = 100
    """Take only so many pictures, chosen at random."""
    batch_size: int = 8
    """Most pictures in one forward pass; halved by itself when memory runs out."""
    cache_gib: float = 4.0
    """Memory for feature maps, whose histograms need a second look; if they do not fit, they are computed again."""

    def open(self) -> dict[str, ImageSet]:
        """The pictures, after a check of the options."""
        self._config()
        return super().open()

    def amount(self, images: dict[str, Any], backbone: Backbone) -> int:
        """Pictures, and where LiDAR is measured their views."""
        with_views = self.views > 0 and "ranks" in self._config().parts
        return super().amount(images, backbone) * (2 + self.views if with_views else 1)

    def evaluate(self, backbone: Backbone, images: dict[str, ImageSet], setup: Setup) -> EvalReport:
        """One backbone at one size."""
        from amradio.evals.feature_stats import run_feature_stats

        self._moments.clear()
        return run_feature_stats(
            backbone,
            images["eval"],
            self._config(),
            setup,
            on_moments=self._moments.append,
            cache_bytes=int(self.cache_gib * 2**30),
        )

    def draw(self, report: EvalReport, path: Path) -> None:
        """The plot, histograms and covariance."""
        for moments in self._moments:
            from safetensors.torch import save_file

            tensors = {"mean": moments.mean, "covariance": moments.covariance.contiguous()}
            save_file(tensors, f"{path}.covariance.safetensors", {"count": str(moments.count)})
        distribution = report.details.get("distribution")
        if distribution:
            _write_csv(Path(f"{path}.histograms.csv"), ["values", "channel", "low", "high", "share"],
                       _histogram_rows(distribution))  # fmt: skip
        if self.plots != "none":
            from amradio.viz.plots import plot_feature_stats, save_plot

            figure = plot_feature_stats(report.details, report.label)
            if figure is not None:
                save_plot(figure, f"{path}.{self.plots}")

    def _config(self) -> FeatureStatsConfig:
        from amradio.evals.feature_stats import PARTS, FeatureStatsConfig

        return FeatureStatsConfig(
            parts=self.part or PARTS,
            views=self.views,
            seed=self.seed,
            cost_batch_size=self.cost_batch_size,
            cost_batches=self.cost_batches,
        )

    @cached_property
    def _moments(self) -> list[Moments]:
        """Of the evaluation that is running, if it measures them."""
        return []


@dataclass(frozen=True, kw_only=True)
class CompareFeatures(UnlabelledCommand):
    """What the features of two backbones have in common: CCA after PHI-S, maps both ways, linear CKA.

    A needs more pictures, or patches, than channels of both backbones together.
    """

    against: str
    """The second backbone, written as a --model."""
    against_adaptor: str | None = None
    """Its adaptor."""
    against_option: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=VALUE: what only this kind of backbone knows. Repeat the option for several."""
    against_resolution: Size = ()
    """For the second backbone; default that of the first, if one is given, else what suits the second."""
    of: Literal["features", "summary", "both"] = "both"
    """Compare patch features, summaries, or both."""
    limit: int | None = 1000
    """Take only so many pictures, chosen at random."""
    batch_size: int = 8
    """Most pictures in one forward pass; halved by itself when memory runs out."""

    def evaluate(self, backbone: Backbone, images: dict[str, ImageSet], setup: Setup) -> EvalReport:
        """One backbone at one size, against the second one."""
        from amradio.evals.compare_features import CompareFeaturesConfig, run_compare_features

        size = self.against_resolution or (setup.policy.size if self.resolution else ())
        policy = self.policy(self._second, size)
        return run_compare_features(
            backbone, self._second, images["eval"], CompareFeaturesConfig(of=self.of), setup, policy
        )

    def draw(self, report: EvalReport, path: Path) -> None:
        """The plot of the correlations."""
        if self.plots != "none":
            from amradio.viz.plots import plot_correlations, save_plot

            second = report.details["second"]
            title = f"{report.model_label} and {_name(second)}"
            save_plot(plot_correlations(report.details["correlations"], title), f"{path}.{self.plots}")

    @cached_property
    def _second(self) -> Backbone:
        return self.load_other(self.against, self.against_adaptor, self.against_option)


def _against(report: EvalReport) -> str:
    teacher = report.details["teacher"]
    return f"itself at {report.config['reference']} px" if teacher is None else _name(teacher)


def _name(record: dict[str, Any]) -> str:
    return f"{record['name']}/{record['adaptor']}" if record["adaptor"] else str(record["name"])


def _short(value: float | None) -> str:
    return "inf" if value is None else str(value) if isinstance(value, int) else f"{value:.4g}"


def _histogram_rows(distribution: dict[str, Any]) -> Iterable[list[Any]]:
    for name, one in distribution["histograms"].items():
        width = (one["high"] - one["low"]) / len(one["shares"])
        for i, share in enumerate(one["shares"]):
            yield [name, one["channel"], one["low"] + i * width, one["low"] + (i + 1) * width, share]


def _write_csv(path: Path, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        writer.writerows(rows)
