"""Plots of evaluations with matplotlib (extra ``viz``), as PNG, SVG or PDF: the same plot is always the same bytes.

Functions take plain numbers, as reports hold them, and return a figure; `save_plot` writes it. Nothing global is
changed: figures are made without ``pyplot``, styles hold for one figure.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amradio.errors import MissingDependencyError, OptionError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLOT_SUFFIXES = (".png", ".svg", ".pdf")

Row = Mapping[str, Any]

_BLUE, _ORANGE, _GREEN, _GREY = "#1f5fa8", "#d1601f", "#3c8a4a", "#707070"
_COLOURS = (_BLUE, _ORANGE, _GREEN, "#8a4fa8", "#b0891f")
_SWITCH = "#f3c9b4"
_NOISE = 1e-12  # eigenvalues below this share of the largest are rounding
_STYLE: dict[str, Any] = {
    "axes.edgecolor": _GREY,
    "axes.grid": True,
    "axes.labelcolor": "#202020",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "figure.dpi": 110,
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that every machine draws the same
    "font.size": 9,
    "grid.color": "#e4e4e4",
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "pdf.fonttype": 42,  # text stays text
    "svg.fonttype": "none",
    "svg.hashsalt": "amradio",  # names inside the file do not change from run to run
}


def check_plots() -> None:
    """Check that plots can be drawn, before hours of computing.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError("Plots need matplotlib: pip install 'amradio[viz]'.") from error


def save_plot(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write a figure.

    Args:
        figure: See the functions of this module.
        path: Its suffix is one of `PLOT_SUFFIXES`; folders that are missing are made.

    Returns:
        The path.

    Raises:
        OptionError: The suffix is none of these.
    """
    target = Path(path)
    suffix = target.suffix.lower()
    if suffix not in PLOT_SUFFIXES:
        raise OptionError(f"{target} does not say how it is written: end it with one of {', '.join(PLOT_SUFFIXES)}.")
    target.parent.mkdir(parents=True, exist_ok=True)
    undated = {".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    with _styled():
        figure.savefig(target, metadata=undated[suffix])
    return target


def plot_mode_switching(curve: Sequence[Row], switches: Sequence[Row], title: str) -> Figure:
    """Plot a sweep over resolutions.

    Args:
        curve: A row for each resolution, with the columns of `amradio.evals.mode_switching.CURVE_COLUMNS`; further
            columns are accuracies in percent.
        switches: With ``low`` and ``high`` in pixels; drawn as bands.
        title: Above everything.

    Returns:
        Panels: 1 - cosine with its standard error over pictures, MSE, fidelity, variances, and accuracies if there are
        any.
    """
    known = {
        *("resolution", "teacher_resolution", "pictures", "one_minus_cosine", "one_minus_cosine_se", "mse"),
        *("fidelity", "student_variance", "teacher_variance"),
    }
    accuracies = [name for name in curve[0] if name not in known]
    x = [row["resolution"] for row in curve]
    panels = 6 if accuracies else 4
    with _figure(2, panels // 2, (3.4 * panels / 2, 5.6), title) as (figure, axes):
        flat = list(axes.flat)
        _line(flat[0], x, curve, "one_minus_cosine", _BLUE)
        _band(flat[0], x, curve)
        flat[0].set_title("1 - cosine")
        _line(flat[1], x, curve, "mse", _BLUE)
        flat[1].set_title("MSE")
        _line(flat[2], x, curve, "fidelity", _BLUE)
        flat[2].set_title("fidelity: variance of the teacher / MSE")
        _line(flat[3], x, curve, "student_variance", _BLUE, "student")
        _line(flat[3], x, curve, "teacher_variance", _ORANGE, "teacher")
        flat[3].set_title("variance of features")
        flat[3].legend()
        if accuracies:
            for name, colour in zip(accuracies, _COLOURS, strict=False):
                _line(flat[4], x, curve, name, colour, name.replace("_", " "))
            flat[4].set_title("accuracy in %")
            flat[4].legend()
            flat[5].set_axis_off()
        for panel in flat[: 5 if accuracies else 4]:
            panel.set_xlabel("resolution in px")
            if panel.get_ylim()[0] > 0:
                panel.set_ylim(bottom=0)  # a change looks as large as it is
            for switch in switches:
                panel.axvspan(switch["low"], switch["high"], color=_SWITCH, zorder=0)
    return figure


def plot_feature_stats(details: Mapping[str, Any], title: str) -> Figure | None:
    """Plot what `amradio.evals.feature_stats` measured.

    Args:
        details: Of its report: ``distribution``, ``weights`` and ``activations``, or some of them.
        title: Above everything.

    Returns:
        Panels for what is there; None if there is nothing to draw.
    """
    draw: list[Any] = []
    distribution = details.get("distribution")
    if distribution:
        draw += [lambda axes: _histograms(axes, distribution), lambda axes: _eigenvalues(axes, distribution)]
    if details.get("weights"):
        draw.append(lambda axes: _weights(axes, details["weights"]))
    layers = details.get("activations") or []
    if layers:
        draw.append(lambda axes: _norms(axes, layers))
    if any("entropy" in layer for layer in layers):
        draw += [lambda axes: _entropies(axes, layers), lambda axes: _logits(axes, layers)]
    if not draw:
        return None
    columns = min(len(draw), 3)
    rows = -(-len(draw) // columns)
    with _figure(rows, columns, (4 * columns, 2.9 * rows + 0.4), title) as (figure, axes):
        panels = list(axes.flat)
        for one, panel in zip(draw, panels, strict=False):
            one(panel)
        for panel in panels[len(draw) :]:
            panel.set_axis_off()
    return figure


def plot_correlations(correlations: Mapping[str, Sequence[float]], title: str) -> Figure:
    """Plot canonical correlations.

    Args:
        correlations: Descending, by name: ``features``, ``summary``.
        title: Above everything.
    """
    with _figure(1, 1, (5.4, 3.4), title) as (figure, axes):
        (panel,) = axes.flat
        for (name, values), colour in zip(correlations.items(), _COLOURS, strict=False):
            label = f"{name}: sum {sum(values):.1f} of {len(values)}"
            panel.plot(range(1, len(values) + 1), values, color=colour, label=label)
        panel.set_ylim(0, 1.02)
        panel.set_xlabel("canonical direction")
        panel.set_title("correlation")
        panel.legend()
    return figure


@contextmanager
def _styled() -> Iterator[None]:
    check_plots()
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        yield


@contextmanager
def _figure(rows: int, columns: int, size: tuple[float, float], title: str) -> Iterator[tuple[Figure, Any]]:
    with _styled():
        from matplotlib.figure import Figure

        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        yield figure, axes


def _line(axes: Axes, x: Sequence[float], rows: Sequence[Row], name: str, colour: str, label: str = "") -> None:
    y = [float("nan") if row.get(name) is None else row[name] for row in rows]
    axes.plot(x, y, color=colour, label=label, marker="o", markersize=2.5 if len(x) > 24 else 4)


def _band(axes: Axes, x: Sequence[float], rows: Sequence[Row]) -> None:
    if all(row.get("one_minus_cosine_se") is not None for row in rows):
        low = [row["one_minus_cosine"] - row["one_minus_cosine_se"] for row in rows]
        high = [row["one_minus_cosine"] + row["one_minus_cosine_se"] for row in rows]
        axes.fill_between(x, low, high, color=_BLUE, alpha=0.18, linewidth=0)


def _histograms(axes: Axes, distribution: Row) -> None:
    for (name, one), colour in zip(distribution["histograms"].items(), _COLOURS, strict=False):
        width = (one["high"] - one["low"]) / len(one["shares"])
        centres = [one["low"] + (i + 0.5) * width for i in range(len(one["shares"]))]
        density = [share / width if share else float("nan") for share in one["shares"]]  # gaps, not walls, in a log
        channel = "" if one["channel"] is None else f": {one['channel']}"
        axes.plot(centres, density, color=colour, label=f"{name.replace('_', ' ')}{channel}", linewidth=1.2)
    axes.set_yscale("log")
    axes.set_title("density of feature values")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.7)  # room for the legend
    axes.legend(title="channel of", fontsize=7, title_fontsize=7, loc="upper center", ncols=2, handlelength=1.2)


def _eigenvalues(axes: Axes, distribution: Row) -> None:
    largest = max(distribution["eigenvalues"])
    values = [value for value in distribution["eigenvalues"] if value > _NOISE * largest]
    axes.plot(range(1, len(values) + 1), values, color=_BLUE)
    axes.set_yscale("log")
    axes.set_xlabel("principal component")
    axes.set_title("variance of features along components")


def _weights(axes: Axes, norms: Mapping[str, float]) -> None:
    names = list(norms)
    groups = {"q": _BLUE, "k": _ORANGE, "v": _GREEN, "": _GREY}
    for part, colour in groups.items():
        own = [i for i, name in enumerate(names) if _part(name) == part]
        if own:
            label = part or "other weights"
            axes.plot(own, [norms[names[i]] for i in own], ".", color=colour, label=label, markersize=5)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("weight, from input to output")
    axes.set_title("largest singular value")
    axes.legend()


def _part(name: str) -> str:
    last = name.rpartition(".")[2]
    return last if last in ("q", "k", "v") else ""


def _norms(axes: Axes, layers: Sequence[Row]) -> None:
    for kind, colour in (("attention", _BLUE), ("mlp", _ORANGE)):
        own = [layer for layer in layers if layer["kind"] == kind]
        for side, style in (("input", "--"), ("output", "-")):
            y = [layer[f"{side}_norm"] for layer in own]
            axes.plot(range(len(y)), y, style, color=colour, label=f"{kind} {side}", marker="o", markersize=3)
    axes.set_yscale("log")
    _count_layers(axes, "layer")
    axes.set_title("mean length of tokens")
    axes.legend()


def _count_layers(axes: Axes, label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _entropies(axes: Axes, layers: Sequence[Row]) -> None:
    own = [layer for layer in layers if "entropy" in layer]
    for i, layer in enumerate(own):
        largest = layer["entropy"] / layer["relative_entropy"] if layer["relative_entropy"] > 0 else 1.0
        heads = [value / largest for value in layer["entropy_of_heads"]]
        axes.plot([i] * len(heads), heads, ".", color=_GREY, markersize=4, label="heads" if i == 0 else "")
    mean = [layer["relative_entropy"] for layer in own]
    axes.plot(range(len(mean)), mean, color=_BLUE, marker="o", markersize=4, label="mean")
    axes.set_ylim(0, 1.02)
    _count_layers(axes, "attention layer")
    axes.set_title("entropy of attention, 1: even")
    axes.legend()


def _logits(axes: Axes, layers: Sequence[Row]) -> None:
    own = [layer for layer in layers if "entropy" in layer]
    x = range(len(own))
    low, high = [layer["logit_min"] for layer in own], [layer["logit_max"] for layer in own]
    axes.fill_between(x, low, high, color=_BLUE, alpha=0.18, linewidth=0, label="smallest to largest")
    axes.plot(x, [layer["logit_mean"] for layer in own], color=_BLUE, marker="o", markersize=4, label="mean")
    _count_layers(axes, "attention layer")
    axes.set_title("logits of attention")
    axes.legend()
