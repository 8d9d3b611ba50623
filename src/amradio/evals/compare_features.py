"""What two backbones have in common: CCA, maps between their features, linear CKA.

The CCA comparison of RADIO's examples, from second moments that are added up picture by picture; the mathematics is in
`amradio.statistics.cca`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from amradio.backbones.protocol import Backbone
from amradio.errors import OptionError
from amradio.evals.pairs import PairedPass, Side
from amradio.evals.report import EvalReport, Metric
from amradio.evals.runner import Measurement, Setup, model_record, policy_for
from amradio.images.resize import ResizePolicy
from amradio.statistics.cca import compare_spaces
from amradio.statistics.moments import Moments

if TYPE_CHECKING:
    from amradio.images.dataset import ImageSet

_ROWS = 10**6


@dataclass(frozen=True, kw_only=True)
class CompareFeaturesConfig:
    """What is compared.

    Attributes:
        of: Patch features, summaries, or both.
        max_rows: Pictures are left out of the features' comparison once it has seen so many patches.
    """

    of: Literal["features", "summary", "both"] = "both"
    max_rows: int = _ROWS

    def __post_init__(self) -> None:
        if self.max_rows < 2:
            raise OptionError(f"max_rows must be at least 2, got {self.max_rows}.")


def aligned(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Bring two feature maps of one picture to the smaller grid.

    Args:
        a: [Da, h, w].
        b: [Db, h', w'].

    Returns:
        Rows [L, Da] and [L, Db]: the map with more positions is resized bilinearly, with antialiasing.
    """
    grids = [tuple(maps.shape[-2:]) for maps in (a, b)]
    smaller = min(grids, key=lambda grid: grid[0] * grid[1])
    rows = []
    for maps, grid in zip((a, b), grids, strict=True):
        if grid != smaller:
            maps = F.interpolate(maps[None], size=smaller, mode="bilinear", antialias=True)[0]
        rows.append(maps.flatten(1).T)  # [L, D]
    return rows[0], rows[1]


def run_compare_features(
    first: Backbone,
    second: Backbone,
    images: ImageSet,
    config: CompareFeaturesConfig | None = None,
    setup: Setup | None = None,
    second_policy: ResizePolicy | None = None,
) -> EvalReport:
    """Compare two backbones on the same pictures.

    Args:
        first: A backbone, A in the names of the metrics.
        second: Another one, B.
        images: Pictures; labels are not used.
        config: What is compared.
        setup: Size of the pictures for the first one, device.
        second_policy: Size for the second one; default its preferred resolution.

    Returns:
        The report, about the first one; ``details["second"]`` is the other one's record, and
        ``details["correlations"]`` has all canonical correlations.

    Raises:
        DatasetError: No picture worked.
        OptionError: Features are not finite or do not vary, there are too few of them, or this is one of several
            processes.
    """
    config = config or CompareFeaturesConfig()
    setup = setup or Setup(policy_for(first))
    if setup.group is not None:
        raise OptionError("Backbones are compared by one process; start it without torchrun.")
    measurement = Measurement(first, setup)
    passes = PairedPass(measurement, images)
    wanted = {"features", "summary"} if config.of == "both" else {config.of}
    widths = {
        "features": (first.embed_dim, second.embed_dim),
        "summary": (first.summary_dim, second.summary_dim),
    }
    moments = {name: Moments(sum(widths[name])) for name in sorted(wanted)}
    for pair in passes.run(Side(first, setup.policy), Side(second, second_policy or policy_for(second))):
        if "features" in moments and moments["features"].count < config.max_rows:
            rows = aligned(pair.first.features, pair.second.features)
            moments["features"].update(torch.cat(rows, 1))  # [L, Da + Db]
        if "summary" in moments:
            moments["summary"].update(torch.cat([pair.first.summary, pair.second.summary])[None])
    passes.finish("eval")
    metrics: dict[str, Metric] = {}
    details: dict[str, Any] = {"second": model_record(second), "rows": {}, "correlations": {}}
    for name, joint in moments.items():
        if joint.count <= sum(widths[name]):
            too_few = f"{joint.count} rows are too few to compare the {name} of widths {widths[name]}"
            if wanted == {name}:
                raise OptionError(f"{too_few}: with no more rows than channels, everything correlates. Take more.")
            measurement.notes.append(f"{too_few}, so they are left out; more than {sum(widths[name])} are needed.")
            continue
        with measurement.stage("cca"):
            found = dataclasses.asdict(compare_spaces(joint, widths[name][0]))
        correlations = found.pop("correlations").clamp(0, 1)
        details["rows"][name] = joint.count
        details["correlations"][name] = correlations.tolist()
        metrics[f"{name}_cca_rank"] = Metric(float(correlations.sum()))
        metrics[f"{name}_mean_correlation"] = Metric(float(correlations.mean()))
        metrics |= {f"{name}_{key}": Metric(value) for key, value in found.items()}
    if not metrics:
        raise OptionError(
            f"{len(images)} pictures are too few: with no more rows than channels, everything correlates. Take more "
            "pictures or a higher resolution."
        )
    return measurement.report(
        task="compare-features",
        protocol="CCA of centred features after PHI-S; A: this backbone, B: the second one; fidelity: mean of 1 / MSE "
        "of the map through canonical directions; explained: variance that least squares explains; rank: smooth rank",
        config=config,
        metrics=metrics,
        details=details,
    )
