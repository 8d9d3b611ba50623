"""How much features of a video change where its pixels do not.

Definition. Take each two consecutive frames, as the backbone sees them. A patch is *static* if its pixels change by
less than a threshold, on average over its pixels and channels. Of the static patches of all pairs together,

    change = sqrt( mean |f_t - f_{t-1}|^2 / (2 v) ),

where f are the features of a patch and v is their variance over all patches of all frames (the mean squared distance
from their mean). Two patches drawn at random from the clip are 2 v apart in the mean square, so the number says how far
features move where nothing happens, on a scale from 0, not at all, to 1, as far as from one random place to another. As
it is relative, models and resolutions can be compared. It is not only noise that it shows: attention lets a patch
know of what moves elsewhere. The same number of patches that are not static stands beside it.

Everything is added up as frames come; only the last frame is kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from amradio.errors import OptionError
from amradio.evals.report import EvalReport, Metric
from amradio.evals.runner import environment, model_record, options_record

if TYPE_CHECKING:
    from amradio.features.frames import View
    from amradio.features.runner import ExtractOptions

PROTOCOL = (
    "Root mean square change of features between consecutive frames, at patches whose pixels change by less than the "
    "threshold on average, over the root mean square distance of two random patches of the clip."
)


@dataclass(frozen=True)
class StabilityConfig:
    """Options of the measure.

    Attributes:
        threshold: Mean absolute change of a patch's pixels, as a share of the range from black to white, below which it
            is static. The noise of a compressed video is about 0.005.
    """

    threshold: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise OptionError(f"The threshold is a share above 0 and up to 1, got {self.threshold:g}.")


class _Sums:
    """Sums over patches of one kind."""

    def __init__(self) -> None:
        self.count, self.squares, self.cosines = 0, 0.0, 0.0

    def add(self, squares: Tensor, cosines: Tensor) -> None:
        self.count += squares.numel()
        self.squares += float(squares.sum())
        self.cosines += float(cosines.sum())


class TemporalStability:
    """Adds up frames, one after the other.

    Args:
        config: See `StabilityConfig`.
    """

    def __init__(self, config: StabilityConfig | None = None) -> None:
        self.config = config or StabilityConfig()
        self.frames = 0
        self._before: tuple[Tensor, Tensor] | None = None  # pixels [3, H, W], features [h, w, D]
        self._static, self._moving = _Sums(), _Sums()
        self._worst: tuple[float, float] | None = None  # mean square change of static patches of a pair, its time
        self._origin: Tensor | None = None  # [D], near the mean, so that differences of squares stay exact
        self._sum: Tensor | None = None  # [D]
        self._squares, self._patches = 0.0, 0

    def update(self, pixels: Tensor, features: Tensor, time: float = 0.0) -> None:
        """Take the next frame.

        Args:
            pixels: uint8 [3, H, W], as the backbone saw them.
            features: [h, w, D].
            time: Of the frame, in seconds; only for saying when features changed most.

        Raises:
            OptionError: The features are not those of the frame before: of another width.
        """
        x = features.double()
        if self._origin is None:
            self._origin = x.mean((0, 1))
            self._sum = torch.zeros_like(self._origin)
        if x.shape[-1] != len(self._origin):
            raise OptionError(f"Features of width {x.shape[-1]} follow features of width {len(self._origin)}.")
        assert self._sum is not None
        centred = (x - self._origin).flatten(0, 1)  # [h * w, D]
        self._sum += centred.sum(0)
        self._squares += float(centred.square().sum())
        self._patches += len(centred)
        if self._before is not None and self._before[0].shape == pixels.shape:
            self._compare(*self._before, pixels, x, time)
        self._before = pixels, x
        self.frames += 1

    def _compare(self, pixels_before: Tensor, before: Tensor, pixels: Tensor, features: Tensor, time: float) -> None:
        difference = (pixels.float() - pixels_before.float()).abs().mean(0) / 255  # [H, W]
        h, w = features.shape[:2]
        change = F.adaptive_avg_pool2d(difference[None], (h, w))[0]  # [h, w]
        static = change < self.config.threshold
        squares = (features - before).square().sum(-1)  # [h, w]
        cosines = F.cosine_similarity(features, before, dim=-1)
        self._static.add(squares[static], cosines[static])
        self._moving.add(squares[~static], cosines[~static])
        if bool(static.any()):
            mean = float(squares[static].mean())
            if self._worst is None or mean > self._worst[0]:
                self._worst = mean, time

    @property
    def variance(self) -> float:
        """Mean squared distance of all features from their mean."""
        if self._sum is None:
            return 0.0
        return max(self._squares / self._patches - float((self._sum / self._patches).square().sum()), 0.0)

    @property
    def change(self) -> float | None:
        """See the module; None if there was no static patch, 0 if all features are the same."""
        return self._relative(self._static.squares, self._static.count)

    def _relative(self, squares: float, count: int) -> float | None:
        if count == 0:
            return None
        return math.sqrt(squares / count / (2 * self.variance)) if squares > 0 else 0.0

    def metrics(self) -> dict[str, Metric]:
        """The results; those that need static or moving patches are left out where there were none.

        Returns:
            ``change``, the first where there is one; ``change_of_moving``; ``cosine``, the mean cosine similarity of
            a static patch's features to those before; ``static``, the share of static patches in %;
            ``feature_spread``, the root of 2 v, in units of the features.
        """
        found = {
            "change": self.change,
            "change_of_moving": self._relative(self._moving.squares, self._moving.count),
            "cosine": self._static.cosines / self._static.count if self._static.count else None,
            "static": 100 * self._static.count / max(self._static.count + self._moving.count, 1),
            "feature_spread": math.sqrt(2 * self.variance),
        }
        units = {"static": "%"}
        return {name: Metric(value, units.get(name, "")) for name, value in found.items() if value is not None}

    def details(self) -> dict[str, Any]:
        """When the static patches of a pair changed most, and by how much."""
        if self._worst is None:
            return {}
        return {"largest_change": {"time_s": self._worst[1], "change": self._relative(self._worst[0], 1)}}

    def notes(self) -> tuple[str, ...]:
        """What a reader has to know."""
        if self.frames < 2:
            return ("There was one frame only, so nothing could be compared.",)
        if self._static.count == 0:
            return (
                f"No patch was static: all changed by {self.config.threshold:g} of the range or more between two "
                "frames, as when the camera moves. Raise the threshold, or take frames that lie closer together.",
            )
        return ()


def stability_report(
    measured: TemporalStability,
    view: View,
    clip: Mapping[str, Any],
    options: ExtractOptions,
    wall_s: float,
) -> EvalReport:
    """Make the report of a clip.

    Args:
        measured: After the last frame.
        view: Backbone, size and layer.
        clip: What the clip is, and which frames of it were taken: with ``name``; plain values.
        options: Device and batch size.
        wall_s: Seconds of the whole run, with everything else that was done with the frames.

    Returns:
        The report.
    """
    policy = view.policy
    return EvalReport(
        task="temporal-stability",
        protocol=PROTOCOL,
        metrics=measured.metrics(),
        config={
            **asdict(measured.config),
            "layer": view.layer,
            "resize": {"mode": policy.mode, "size": list(policy.size), "multiple": policy.multiple},
            **options_record(options),
        },
        model=model_record(view.backbone),
        dataset={"video": {**clip, "count": measured.frames, "failed": 0, "failures": []}},
        environment=environment(view.backbone, options, None),
        wall_s=wall_s,
        images_per_s=measured.frames / max(wall_s, 1e-9),
        notes=measured.notes(),
        details=measured.details(),
    )
