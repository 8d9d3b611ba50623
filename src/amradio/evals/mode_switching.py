"""How well a student imitates a teacher at each resolution, and whether it switches its behaviour in between.

The sweep of RADIO's examples, and of figure 2 of the RADIOv2.5 report (arXiv 2412.07679): features of a student's
adaptor against those of the real teacher, over many resolutions. Without a teacher, against the student's own features
at one reference resolution. What counts as a switch is defined in `amradio.evals.switches`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from amradio.backbones.protocol import Backbone
from amradio.errors import OptionError
from amradio.evals.pairs import PaddedBackbone, Pair, PairedPass, Side, fixed_resolution, resized_to
from amradio.evals.report import EvalReport, Metric
from amradio.evals.runner import Measurement, Setup, model_record
from amradio.evals.switches import LEAST_SIZE, Verdict, find_switches
from amradio.images.resize import ResizePolicy
from amradio.statistics.moments import ChannelMoments

if TYPE_CHECKING:
    from amradio.images.dataset import ImageSet

FIRST, LAST = 196, 1536
"""Resolutions, in pixels, between which RADIO's examples sweep."""

CURVE_COLUMNS = (
    "resolution",
    "teacher_resolution",
    "pictures",
    "one_minus_cosine",
    "one_minus_cosine_se",
    "mse",
    "fidelity",
    "student_variance",
    "teacher_variance",
)
"""What is measured at each resolution, in this order in the CSV file."""


@dataclass(frozen=True, kw_only=True)
class ModeSwitchingConfig:
    """How to sweep.

    Attributes:
        resolutions: Sides of square pictures in pixels, ascending; each is rounded to what the student supports.
        reference: Without a teacher: the resolution whose features all others are compared with; None: the student's
            preferred one.
        teacher_resolution: The teacher always sees this size; None: it sees as many patches as the student.
        teacher_fit: For teachers that accept one size only. ``resize``: pictures are brought to it. ``pad``: a picture
            has as many patches as the student's and lies in the top left corner, as SAM has it.
        measure: What a switch is looked for in: ``mse``: MSE over the teacher's variance, the mean of all resolutions;
            ``cosine``: 1 - cosine, which is small for features that are far from zero.
        least_size: How large a switch must be at least, in that measure.
        strip_pictures: Of how many pictures feature maps are handed out, for pictures.
        strip_resolutions: At how many resolutions, spread evenly.
    """

    resolutions: tuple[int, ...]
    reference: int | None = None
    teacher_resolution: int | None = None
    teacher_fit: Literal["resize", "pad"] = "resize"
    measure: Literal["mse", "cosine"] = "mse"
    least_size: float = LEAST_SIZE
    strip_pictures: int = 3
    strip_resolutions: int = 8

    def __post_init__(self) -> None:
        ascending = list(self.resolutions) == sorted(set(self.resolutions))
        if not self.resolutions or min(self.resolutions) < 1 or not ascending:
            raise OptionError(f"Resolutions must be ascending numbers of pixels, got {list(self.resolutions)}.")
        if not self.least_size > 0:
            raise OptionError(f"A switch must have a size above 0, got {self.least_size}.")
        if self.strip_pictures < 0 or self.strip_resolutions < 1:
            raise OptionError(
                f"Strips need at least 0 pictures and 1 resolution, got {self.strip_pictures} and "
                f"{self.strip_resolutions}."
            )


@dataclass(frozen=True)
class StripMap:
    """A feature map for the strip of a picture over resolutions.

    Attributes:
        picture: Number of the picture, from 0.
        resolution: In pixels.
        pixels: uint8 [3, H, W]: what the student saw.
        features: float32 [h, w, D] of the student.
    """

    picture: int
    resolution: int
    pixels: Tensor
    features: Tensor


class Agreement:
    """Compares feature maps of a student and a teacher, picture by picture, at one resolution.

    Args:
        dim: Width of both.
    """

    def __init__(self, dim: int) -> None:
        self._student, self._teacher = ChannelMoments(dim), ChannelMoments(dim)
        self.distances: dict[int, float] = {}
        """For each picture, by position, the mean over positions of 1 - cosine."""
        self.squares: dict[int, float] = {}
        """Likewise the mean squared error, over positions and channels."""

    def update(self, position: int, student: Tensor, teacher: Tensor) -> None:
        """Add a picture.

        Args:
            position: In its set.
            student: [D, h, w].
            teacher: [D, h', w']; brought to the student's grid.
        """
        goal = resized_to(teacher.double(), (student.shape[-2], student.shape[-1])).flatten(1)  # [D, L]
        own = student.double().flatten(1)  # [D, L]
        self.distances[position] = 1 - float(F.cosine_similarity(own, goal, dim=0).mean())
        self.squares[position] = float((own - goal).square().mean())
        self._student.update(own.T)
        self._teacher.update(goal.T)

    def values(self) -> dict[str, float | None]:
        """What was measured: see `CURVE_COLUMNS`; None where it would be infinite or cannot be known.

        Variances are means over channels, about the mean over all pictures and positions, with divisor N: a student
        that always says the teacher's mean has a fidelity of 1.
        """
        distances, squares = list(self.distances.values()), list(self.squares.values())
        mse = math.fsum(squares) / len(squares)
        teacher = float(self._teacher.variance.mean())
        deviation = float(np.std(distances, ddof=1)) / math.sqrt(len(distances)) if len(distances) > 1 else None
        return {
            "pictures": len(distances),
            "one_minus_cosine": math.fsum(distances) / len(distances),
            "one_minus_cosine_se": deviation,
            "mse": mse,
            "fidelity": teacher / mse if mse > 0 else None,
            "student_variance": float(self._student.variance.mean()),
            "teacher_variance": teacher,
        }


def sweep_of(first: int, last: int, step: int, multiple: int) -> tuple[int, ...]:
    """The resolutions of a sweep.

    Args:
        first: In pixels; rounded down to the multiple, as in RADIO's examples.
        last: Rounded up.
        step: Rounded to the multiple, at least one.
        multiple: What sides are multiples of.

    Returns:
        Ascending; `last` is among them.

    Raises:
        OptionError: There is nothing between first and last, or a number is not positive.
    """
    if min(first, step) < 1 or first > last:
        raise OptionError(f"A sweep needs 0 < from <= to and a step of at least 1, got {first}, {last} and {step}.")
    low = max(first // multiple, 1) * multiple
    high = max(-(-last // multiple) * multiple, low)
    stride = max(round(step / multiple), 1) * multiple
    found = list(range(low, high + 1, stride))
    return tuple(found if found[-1] == high else [*found, high])


def supported(resolutions: Sequence[int], backbone: Backbone) -> tuple[int, ...]:
    """Resolutions rounded to sizes that a backbone accepts, each once.

    Raises:
        OptionError: The backbone does not accept squares.
    """
    sizes = [tuple(backbone.get_nearest_supported_resolution(side, side)) for side in resolutions]
    odd = next((size for size in sizes if size[0] != size[1]), None)
    if odd is not None:
        raise OptionError(
            f"The sweep uses squares, and {model_record(backbone)['name']} makes {odd[0]}x{odd[1]} of one."
        )
    return tuple(sorted({height for height, _ in sizes}))


def teacher_side(resolution: int, student: Backbone, teacher: Backbone, config: ModeSwitchingConfig) -> int:
    """At which resolution the teacher sees a picture.

    Args:
        resolution: Of the student.
        student: The student; of an adaptor that upsamples, `patch_size` counts the finer grid.
        teacher: As it is run: in a `PaddedBackbone` if it is padded.
        config: May fix it.

    Returns:
        Pixels: of as many patches as the student has, or what the teacher accepts nearest to that.
    """
    goal = config.teacher_resolution or round(resolution * teacher.patch_size / student.patch_size)
    return teacher.get_nearest_supported_resolution(goal, goal)[0]


def run_mode_switching(
    student: Backbone,
    teacher: Backbone | None,
    images: ImageSet,
    config: ModeSwitchingConfig,
    setup: Setup | None = None,
    *,
    accuracies: Callable[[ResizePolicy], dict[str, float]] | None = None,
    on_strip: Callable[[StripMap], None] | None = None,
    cache_bytes: int = 2**31,
) -> EvalReport:
    """Sweep over resolutions.

    Args:
        student: Its features are what is measured; the view of the adaptor that imitates the teacher.
        teacher: The real one; None compares the student with itself at `ModeSwitchingConfig.reference`.
        images: Some pictures; labels are not used.
        config: The sweep.
        setup: Device and precision. Of its policy the mode counts: ``crop`` cuts the largest centred square out of each
            picture, ``exact`` stretches it to a square.
        accuracies: Called with the policy of each resolution; what it measures, in percent by name, joins the curve.
        on_strip: Gets feature maps of some pictures at some resolutions.
        cache_bytes: The teacher's features are kept if its size does not change and they fit into so much memory.

    Returns:
        The report. ``details["curve"]`` has a row for each resolution, ``details["switches"]`` the verdict.

    Raises:
        OptionError: The features are of different widths, the mode is no square, or this is one of several processes.
        DatasetError: No picture worked.
    """
    setup = setup or Setup(ResizePolicy("crop", (config.resolutions[-1],) * 2))
    mode = setup.policy.mode
    if mode not in ("crop", "exact"):
        raise OptionError(f"The sweep uses squares: choose the mode 'crop' or 'exact' (--mode), not {mode!r}.")
    if setup.group is not None:
        raise OptionError("Mode switching is measured by one process; start it without torchrun.")
    resolutions = supported(config.resolutions, student)
    config = dataclasses.replace(config, resolutions=resolutions)
    other, config = _teacher(student, teacher, config)
    measurement = Measurement(student, setup)
    passes = PairedPass(measurement, images)
    strips = _spread(len(resolutions), config.strip_resolutions) if on_strip is not None else set()
    curve: list[dict[str, float | None]] = []
    found: list[Agreement] = []
    for i, resolution in enumerate(resolutions):
        policy = _square(mode, resolution)
        side = teacher_side(resolution, student, other, config)
        agreement = Agreement(student.embed_dim)
        sides = Side(student, policy), Side(other, _square(mode, side))
        for count, pair in enumerate(
            passes.run(*sides, keep_second_bytes=cache_bytes if _is_same(config, other) else 0)
        ):
            agreement.update(pair.position, pair.first.features, pair.second.features)
            if on_strip is not None and i in strips and count < config.strip_pictures:
                on_strip(_strip(pair, count, resolution))
        if not agreement.distances:
            passes.finish("eval")  # says that no picture worked, and why
        row = {"resolution": resolution, "teacher_resolution": side, **agreement.values()}
        if accuracies is not None:
            with measurement.stage("accuracy"):
                row |= accuracies(policy)
        curve.append(row)
        found.append(agreement)
    passes.finish("eval")
    verdict = find_switches(resolutions, _errors(found, curve, config.measure), least_size=config.least_size)
    measurement.notes.append(str(verdict))
    if any(row["pictures"] != curve[0]["pictures"] for row in curve):
        measurement.notes.append("Some pictures failed at some resolutions; the verdict is about the others.")
    report = measurement.report(
        task="mode-switching",
        protocol=_protocol(teacher, config, mode),
        config=config,
        metrics=_metrics(curve, verdict),
        details={
            "teacher": None if teacher is None else model_record(teacher),
            "curve": curve,
            "switches": dataclasses.asdict(verdict),
            "verdict": str(verdict),
        },
    )
    span = f"{resolutions[0]}-{resolutions[-1]}"
    resize = {"mode": mode, "size": [span], "multiple": student.min_resolution_step}
    return dataclasses.replace(report, config={**report.config, "resize": resize})


def _teacher(
    student: Backbone, teacher: Backbone | None, config: ModeSwitchingConfig
) -> tuple[Backbone, ModeSwitchingConfig]:
    """What the student is compared with, as it is run, and the config with the size that it sees."""
    if teacher is None:
        preferred = student.preferred_resolution
        reference = config.reference or (None if preferred is None else preferred[0])
        if reference is None:
            raise OptionError(
                f"{model_record(student)['name']} does not say which resolution suits it. Choose the reference."
            )
        (reference,) = supported([reference], student)
        return student, dataclasses.replace(config, reference=reference, teacher_resolution=reference)
    if teacher.embed_dim != student.embed_dim:
        adaptor = model_record(student)["adaptor"]
        raise OptionError(
            f"The student's features are {student.embed_dim} wide and the teacher's {teacher.embed_dim}, so the one "
            f"cannot be measured by the other. Choose the adaptor that imitates this teacher (--adaptor; now "
            f"{adaptor or 'none'}), or the layer of the teacher that the adaptor imitates (--teacher-option)."
        )
    if config.teacher_fit == "pad":
        padded = PaddedBackbone(teacher)
        largest = round(config.resolutions[-1] * teacher.patch_size / student.patch_size)
        if largest > min(padded.size):
            raise OptionError(
                f"The teacher takes pictures of {padded.size[0]}x{padded.size[1]} at most, and a student at "
                f"{config.resolutions[-1]} px asks for {largest}. End the sweep earlier, or choose the fit 'resize'."
            )
        return padded, config
    return teacher, config


def _is_same(config: ModeSwitchingConfig, teacher: Backbone) -> bool:
    """Whether the teacher sees the same at all resolutions."""
    return config.teacher_resolution is not None or fixed_resolution(teacher) is not None


def _square(mode: Literal["crop", "exact"], side: int) -> ResizePolicy:
    return ResizePolicy(mode, (side, side))


def _strip(pair: Pair, picture: int, resolution: int) -> StripMap:
    return StripMap(picture, resolution, pair.pixels, pair.first.features.permute(1, 2, 0))


def _spread(count: int, wanted: int) -> set[int]:
    """Some of `count` numbers, evenly spread, the first and the last among them."""
    return {round(float(i)) for i in np.linspace(0, count - 1, min(wanted, count))}


def _errors(
    found: Sequence[Agreement], curve: Sequence[dict[str, float | None]], measure: str
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """[R, N] errors of each picture; NaN where it failed."""
    positions = sorted({position for agreement in found for position in agreement.distances})
    tables = [agreement.distances if measure == "cosine" else agreement.squares for agreement in found]
    # One scale for all resolutions: where only the teacher's variance changes, the student did not switch.
    variance = math.fsum(row["teacher_variance"] or 0.0 for row in curve) / len(curve)
    scale = 1.0 if measure == "cosine" else max(variance, 1e-30)
    return np.array([[table.get(position, math.nan) / scale for position in positions] for table in tables])


def _metrics(curve: Sequence[dict[str, float | None]], verdict: Verdict) -> dict[str, Metric]:
    def mean(name: str) -> float:
        values = [row[name] for row in curve]
        known = [v for v in values if v is not None]
        return math.fsum(known) / max(len(known), 1)

    metrics = {"switches": Metric(float(len(verdict.switches)))}
    if verdict.largest is not None:
        metrics["largest_change"] = Metric(verdict.largest.size)
        metrics["largest_change_above"] = Metric(float(verdict.largest.low), "px")
    metrics |= {f"mean_{name}": Metric(mean(name)) for name in ("one_minus_cosine", "mse", "fidelity")}
    return metrics


def _protocol(teacher: Backbone | None, config: ModeSwitchingConfig, mode: str) -> str:
    if teacher is None:
        against = f"the student's own at {config.reference} px"
    elif config.teacher_resolution is not None:
        against = f"a teacher's at {config.teacher_resolution} px"
    elif config.teacher_fit == "pad":
        against = "a teacher's at as many patches, padded to the one size that it accepts"
    else:
        against = "a teacher's at as many patches, or at the size nearest to that which it accepts"
    squares = "largest centred square" if mode == "crop" else "stretched to a square"
    return (
        f"features at {len(config.resolutions)} resolutions against {against}, resized to the student's grid "
        f"(bilinear, corners aligned); pictures: {squares}; errors: 1 - cosine, MSE; fidelity: variance / MSE"
    )
