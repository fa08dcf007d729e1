"""Figures of number formats: staircases with their errors, and samples under symmetric and affine codes.

Importing this file needs matplotlib, the optional extra `plots`; it draws into `Figure` objects, with no window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import wraps
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from qexp.report.formats import MARGIN, Fit, View

# Okabe and Ito's colours, which all kinds of colour vision tell apart.
BLUE, RED, GREEN, GREY, PALE = "#0072B2", "#D55E00", "#009E73", "#8C8C8C", "#EDEDED"
STYLE = {
    "font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left", "axes.labelsize": 9, "legend.fontsize": 8,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#555555", "axes.labelcolor": "#222222",
    "axes.linewidth": 0.8, "xtick.color": "#444444", "ytick.color": "#444444", "legend.frameon": False,
    "figure.facecolor": "white", "savefig.facecolor": "white", "svg.fonttype": "path", "svg.hashsalt": "qexp",
}  # fmt: skip
MANY = 64  # levels from which on a staircase is magnified around zero


def _styled(draw):
    @wraps(draw)
    def inner(*args, **options):
        with matplotlib.rc_context(STYLE):
            return draw(*args, **options)

    return inner


@_styled
def save(figure: Figure, path: Path, dpi: int = 150) -> None:
    """Write a figure as PNG or as SVG that needs no other file; the same figure gives the same bytes."""
    figure.savefig(path, dpi=dpi, metadata={"Date": None} if path.suffix == ".svg" else None)


@_styled
def staircases(views: Mapping[str, View]) -> Figure:
    """Q(r) against r for each named format, and the quantization error below (Gholami et al. 2021, figure 1)."""
    figure = Figure(figsize=(5 * len(views), 6.2), layout="constrained")
    axes = figure.subplots(2, len(views), sharex="col", squeeze=False, height_ratios=(3, 1.2))
    for (name, view), (top, bottom) in zip(views.items(), axes.T, strict=True):
        _staircase(top, view, f"{name}: {view.grid}")
        _error(bottom, view)
    figure.legend(handles=_staircase_key(views), loc="outside lower center", ncols=5)
    return figure


def _bounds(view: View) -> tuple[float, float, float]:
    """The outermost levels, and how far beyond them a figure goes."""
    lo, hi = (float(view.levels[i]) for i in (0, -1))
    return lo, hi, MARGIN * (hi - lo)


def _staircase(axes: Axes, view: View, title: str) -> None:
    lo, hi, margin = _bounds(view)
    low, high = lo - margin, hi + margin
    r, q = (t.numpy() for t in view.staircase(low, high))
    axes.plot([low, high], [low, high], color=GREY, linewidth=0.8, linestyle=(0, (4, 3)))
    _line(axes, view, r, q)
    axes.set(xlim=(low, high), ylim=(low, high), ylabel="quantized value Q(r)")
    levels = view.levels.numpy()
    width = _width(view)
    _rug(axes, levels, BLUE, width, vertical=False)
    if view.thresholds is not None:
        _rug(axes, (view.thresholds * view.qparams.scale).numpy(), RED, width)
    _shade_clipped(axes, view)
    kind = "uniform" if view.uniform else "non-uniform"
    axes.set_title(f"{title}\n{kind}, {len(levels):,} levels, rounding {view.rounding}", linespacing=1.4)
    axes.text(0.015, 0.985, view.fitted, transform=axes.transAxes, va="top", fontsize=8, color="#444444")
    if len(levels) > MANY:
        _magnified(axes, view)


def _line(axes: Axes, view: View, r: np.ndarray, q: np.ndarray, width: float = 1.4) -> None:
    """A line; where a draw decides, a dot for each draw."""
    style = {"linestyle": "none", "marker": ".", "markersize": 1.5} if view.rounding.is_random else {"linewidth": width}
    axes.plot(r, q, color=BLUE, label="Q(r)", **style)


def _error(axes: Axes, view: View) -> None:
    lo, hi, margin = _bounds(view)
    r, q = (t.numpy() for t in view.staircase(lo - margin, hi + margin))
    axes.axhline(0, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)))
    _line(axes, view, r, q - r, 0.9 if len(view.levels) <= MANY else 0.4)
    _shade_clipped(axes, view)
    largest = 1.25 * np.abs((q - r)[(r >= lo) & (r <= hi)]).max()
    axes.set(ylim=(-largest, largest), xlabel="real value r", ylabel="error Q(r) − r")
    _plain(axes.yaxis)


def _shade_clipped(axes: Axes, view: View) -> None:
    lo, hi, margin = _bounds(view)
    for start, end in (lo - margin, lo), (hi, hi + margin):
        axes.axvspan(start, end, color=PALE, linewidth=0, zorder=0)


def _width(view: View) -> float:
    """Of a tick that stands for one level."""
    return 1.2 if len(view.levels) <= MANY else 0.5


def _rug(
    axes: Axes, values: np.ndarray, color: str, width: float, vertical: bool = True, length: float = 0.025
) -> None:
    """Ticks inside the lower or the right edge, one a value; of values that share a pixel, one."""
    low, high = axes.get_xlim()
    cells = np.round((values - low) / (high - low) * 1500)
    values = values[np.unique(cells, return_index=True)[1]]
    along = np.repeat(values, 3)  # one path: there, back up, and a gap
    across = np.tile([*((0, length) if vertical else (1 - length, 1)), np.nan], len(values))
    transform = axes.get_xaxis_transform() if vertical else axes.get_yaxis_transform()
    x, y = (along, across) if vertical else (across, along)
    axes.plot(x, y, color=color, linewidth=width, transform=transform, scalex=False, scaley=False, snap=False)


def _magnified(axes: Axes, view: View) -> None:
    """Some levels around zero, in the corner that a staircase leaves empty."""
    levels = view.levels.numpy()
    middle, reach = int(np.abs(levels).argmin()), 6 if view.uniform else 28
    low, high = levels[max(middle - reach, 0)], levels[min(middle + reach, len(levels) - 1)]
    inset = axes.inset_axes((0.57, 0.1, 0.36, 0.34))
    r, q = (t.numpy() for t in view.staircase(float(low), float(high)))
    inset.plot([low, high], [low, high], color=GREY, linewidth=0.8, linestyle=(0, (4, 3)))
    _line(inset, view, r, q)
    inset.set(xlim=(low, high), ylim=(low, high))
    inset.set_title("around zero", fontsize=8, color="#444444")
    for axis in inset.xaxis, inset.yaxis:
        axis.set_major_locator(MaxNLocator(2, symmetric=True))
        _plain(axis)
    inset.tick_params(labelsize=7)


def _plain(axis: Axis) -> None:
    """Numbers as they are, without a power of ten beside the axis."""
    axis.set_major_formatter(lambda value, _: f"{value:g}".replace("-", "−"))


def _staircase_key(views: Mapping[str, View]) -> list:
    handles = [
        Line2D([], [], color=BLUE, linewidth=1.4, label="Q(r)"),
        Line2D([], [], color=GREY, linewidth=0.8, linestyle=(0, (4, 3)), label="r"),
        Line2D([], [], color=BLUE, linestyle="none", marker="_", markersize=7, label="levels"),
        Line2D([], [], color=RED, linestyle="none", marker="|", markersize=7, label="thresholds"),
        Patch(facecolor=PALE, edgecolor=GREY, linewidth=0.5, label="clipped"),
    ]
    if all(view.thresholds is None for view in views.values()):
        del handles[3]
    return handles


@_styled
def histograms(fits: Mapping[str, Sequence[Fit]], caption: str = "") -> Figure:
    """A row for each named sample, a column for each way to quantize it (Gholami et al. 2021, figure 2)."""
    columns = max(map(len, fits.values()))
    figure = Figure(figsize=(5 * columns, 3.3 * len(fits) + 0.4), layout="constrained")
    axes = figure.subplots(
        2 * len(fits), columns, squeeze=False, height_ratios=(5, 1.1) * len(fits), gridspec_kw={"hspace": 0.02}
    )
    for row, (name, tried) in enumerate(fits.items()):
        ends = [float(t) for fit in tried for t in (*fit.x.aminmax(), *fit.view.levels[[0, -1]])]
        low, high = min(ends), max(ends)
        margin = 0.03 * (high - low)
        for column, fit in enumerate(tried):
            top, strip = axes[2 * row : 2 * row + 2, column]
            for panel in top, strip:
                panel.set_xlim(low - margin, high + margin)
            _histogram(top, fit)
            _codes(strip, fit)
            strip.set_xlabel(name)
        axes[2 * row, 0].set_ylabel("values" + (" (log)" if axes[2 * row, 0].get_yscale() == "log" else ""))
    figure.legend(handles=_histogram_key(), loc="outside lower center", ncols=5, title=caption, title_fontsize=8)
    return figure


def _histogram(axes: Axes, fit: Fit) -> None:
    x, (lo, hi) = fit.x.numpy(), (float(fit.view.levels[i]) for i in (0, -1))
    many_zeros = bool((x == 0).mean() > 0.1)
    axes.hist(x, bins=np.linspace(*axes.get_xlim(), 101), color="#BDBDBD", histtype="stepfilled", log=many_zeros)
    if many_zeros:
        axes.set_ylim(bottom=0.5)
    for bound in lo, hi:
        axes.axvline(bound, color="black", linewidth=1, linestyle=(0, (4, 2)))
    axes.tick_params(labelbottom=False)
    zero, unused, codes = int(fit.view.qparams.zero_point), int((~fit.used).sum()), len(fit.used)
    told = f"{unused:,} of {codes:,} codes unused" if unused else f"all {codes:,} codes used"
    mirrored = fit.view.grid.symmetric and abs(lo + hi) < 1e-6 * hi
    text = f"{'symmetric, ' if mirrored else ''}{fit.view.grid}"
    told = f"range [{lo:.3g}, {hi:.3g}], Z = {zero}, {told}".replace("-", "−")
    axes.set_title(f"{text}: SQNR {fit.sqnr_db:.1f} dB\n{told}", linespacing=1.4)


def _codes(axes: Axes, fit: Fit) -> None:
    """A tick for each code at its value, and the names of the first, the last, and that of zero."""
    levels, used, grid = fit.view.levels.numpy(), fit.used.numpy(), fit.view.grid
    axes.set(ylim=(0, 1), yticks=[])
    axes.spines["left"].set_visible(False)
    for chosen, color in (used, BLUE), (~used, RED):
        _rug(axes, levels[chosen], color, _width(fit.view), length=0.42)
    low, high = axes.get_xlim()
    zero = int(fit.view.qparams.zero_point)
    taken: list[float] = []
    for code in (zero, grid.quant_min, grid.quant_max):
        place = float(levels[code - grid.quant_min])
        if all(abs(place - other) > 0.07 * (high - low) for other in taken):
            name = f"Z = {code}" if place == 0 else str(code).replace("-", "−")
            axes.text(place, 0.5, name, ha="center", va="bottom", fontsize=8, color="#222222")
            taken.append(place)
    axes.set_ylabel("codes", rotation=0, ha="right", va="center", y=0.2)


def _histogram_key() -> list:
    return [
        Patch(color="#BDBDBD", label="float values"),
        Line2D([], [], color="black", linewidth=1, linestyle=(0, (4, 2)), label="outermost levels"),
        Line2D([], [], color=BLUE, linestyle="none", marker="|", markersize=8, label="codes in use"),
        Line2D([], [], color=RED, linestyle="none", marker="|", markersize=8, label="unused codes"),
    ]
