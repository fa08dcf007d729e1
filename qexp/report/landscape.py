"""Figures of loss landscapes: slices along one direction, and planes with common colours.

Importing this file needs matplotlib, the optional extra `plots`; `qexp.report.figures.save` writes what it draws.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.contour import ContourSet
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from qexp.report.figures import BLUE, GREEN, GREY, RED, STYLE

# Okabe and Ito's, each with a dash of its own, so that they differ in grey too.
LINES = (
    (BLUE, "-"), (RED, (0, (5, 1.5))), (GREEN, (0, (5, 1.5, 1, 1.5))), ("#CC79A7", (0, (1.5, 1))),
    ("#E69F00", (0, (9, 2))), ("#56B4E9", (0, (3, 1, 1, 1, 1, 1))), ("#000000", (0, (1, 2))),
)  # fmt: skip
CELL, CELL_COLOR, DARK = "half a quantization step", "#E3E3E3", "#575C6D"
DISTANCE = "{} (norms of the filters)"
LOSS = "cross-entropy (nats)"
CROSS = {"marker": "+", "color": "white", "markersize": 7, "markeredgewidth": 1.2}
DASHES = (0, (4, 2))
RINGS = 13  # bounds of colours in a plane


class Curve(NamedTuple):
    """Losses (K,) in nats and, where wanted, shares of correct predictions (K,), at distances (K,) from a minimum."""

    distances: Sequence[float]
    losses: Sequence[float]
    accuracies: Sequence[float] | None = None


class Plane(NamedTuple):
    """Losses (K, M) in nats at distances x (K,) along one direction and y (M,) along another."""

    x: Sequence[float]
    y: Sequence[float]
    losses: Sequence[Sequence[float]]


def read_curve(path: Path) -> tuple[Curve, float]:
    """What flatness.csv of a run holds: the slice, and the distance that is worth half a quantization step."""
    distances, losses, accuracies, (half_width, *_) = _columns(path, ("distance", "loss", "accuracy", "half_width"))
    return Curve(distances, losses, accuracies), half_width


def read_plane(path: Path) -> Plane:
    """What flatness_plane.csv of a run holds."""
    x, y, losses = _columns(path, ("x", "y", "loss"))
    axes = sorted(set(x)), sorted(set(y))
    at = dict(zip(zip(x, y, strict=True), losses, strict=True))
    return Plane(*axes, [[at[a, b] for b in axes[1]] for a in axes[0]])


def _columns(path: Path, names: tuple[str, ...]) -> list[list[float]]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [[float(row[name]) for row in rows] for name in names]


@matplotlib.rc_context(STYLE)
def landscape_figure(
    curves: Mapping[str, Curve | tuple],
    half_width: float | Mapping[str, float] | None = None,
    log: bool = True,
    title: str = "",
) -> Figure:
    """Losses of named minima along a direction (Li et al. 2018, section 3), above their accuracies where they have any.

    `half_width` is the distance that is worth half a quantization step: a band, or by the names of the curves a dot
    on either side. Errors: ValueError for no or too many curves, and for lengths that differ.

    >>> figure = landscape_figure({"float": ([-1, 0, 1], [1.0, 0.1, 1.2])}, half_width=0.2)
    >>> [axes.get_ylabel() for axes in figure.axes]
    ['cross-entropy (nats)']
    """
    drawn = {name: _curve(name, curve) for name, curve in curves.items()}
    if not 0 < len(drawn) <= len(LINES):
        raise ValueError(f"curves: must be 1 to {len(LINES)}, not {len(drawn)}")
    panels = 1 + any(curve.accuracies is not None for curve in drawn.values())
    figure = Figure(figsize=(6, 2.4 + 1.5 * panels), layout="constrained")
    axes = figure.subplots(panels, sharex=True, squeeze=False, height_ratios=(2, 1)[:panels])[:, 0]
    for panel, values, axis_label in zip(axes, ("losses", "accuracies"), (LOSS, "accuracy (%)"), strict=False):
        _lines(panel, {n: (c.distances, getattr(c, values)) for n, c in drawn.items()}, half_width)
        panel.set_ylabel(axis_label)
    if log:
        axes[0].set_yscale("log")
        _plain_decades(axes[0].yaxis)
    axes[0].set_title(title)
    axes[-1].set_xlabel(DISTANCE.format("distance along the direction"))
    figure.legend(handles=_key(drawn, half_width), loc="outside lower center", ncols=3, handlelength=3.2)
    figure.align_ylabels(axes)
    return figure


def _curve(name: str, curve: Curve | tuple) -> Curve:
    """As arrays by increasing distance, accuracies in percent."""
    distances, losses, accuracies = (None if v is None else np.asarray(v, dtype=float) for v in Curve(*curve))
    for values in losses, accuracies:
        if values is not None and values.shape != distances.shape:
            raise ValueError(f"{name}: {values.shape} values at {distances.shape} distances")
    order = np.argsort(distances)
    return Curve(distances[order], losses[order], None if accuracies is None else 100 * accuracies[order])


def _lines(axes: Axes, lines: Mapping[str, tuple], half_width: float | Mapping[str, float] | None) -> None:
    if isinstance(half_width, (int, float)):
        axes.axvspan(-half_width, half_width, color=CELL_COLOR, linewidth=0, zorder=0)
    for (name, (distances, values)), (color, dash) in zip(lines.items(), LINES, strict=False):
        if values is None:
            continue
        axes.plot(distances, values, color=color, linestyle=dash, linewidth=1.6, label=name)
        if isinstance(half_width, Mapping) and name in half_width:
            ends = np.array([-half_width[name], half_width[name]])
            axes.plot(ends, np.interp(ends, distances, values), ".", color=color, markersize=9, label="_ends")
    axes.margins(x=0)


def _key(curves: Mapping[str, Curve], half_width: float | Mapping[str, float] | None) -> list:
    styles = zip(curves, LINES, strict=False)
    handles = [Line2D([], [], color=color, linestyle=dash, linewidth=1.6, label=n) for n, (color, dash) in styles]
    if isinstance(half_width, Mapping):
        handles.append(Line2D([], [], color=GREY, linestyle="none", marker=".", markersize=9, label=CELL))
    elif half_width is not None:
        handles.append(Patch(facecolor=CELL_COLOR, edgecolor=GREY, linewidth=0.5, label=CELL))
    return handles


def _number(value: float, _: object = None) -> str:
    return f"{value:.3g}".replace("-", "−")


def _plain_decades(axis: Axis) -> None:
    """Numbers as they are at 1, 2 and 5 times a power of ten."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
    axis.set_major_formatter(_number)
    axis.set_minor_formatter(NullFormatter())


@matplotlib.rc_context(STYLE)
def contour_figure(
    planes: Mapping[str, Plane | tuple], half_widths: Mapping[str, float] | None = None, title: str = ""
) -> Figure:
    """Losses of named minima in the plane of two directions, in the same colours (Li et al. 2018, section 3).

    Every ring between two colours is the same factor of loss; a cross stands at the weights, a dashed circle at the
    distance that is worth half a quantization step. Errors: ValueError without planes, for shapes that do not fit, and
    for losses that are not positive and finite.

    >>> figure = contour_figure({"float": ([-1, 0, 1], [-1, 1], [[1, 1], [0.1, 0.1], [1, 1]])})
    >>> [axes.get_title(loc="left") for axes in figure.axes]
    ['float', '']
    """
    drawn = {name: _plane(name, plane) for name, plane in planes.items()}
    if not drawn:
        raise ValueError("planes: must be at least 1")
    lowest, highest = (pick([pick(plane.losses) for plane in drawn.values()]) for pick in (np.min, np.max))
    bounds = np.linspace(np.log(lowest) - 1e-6, np.log(highest) + 1e-6, RINGS)
    figure = Figure(figsize=(2.9 * len(drawn) + 1.3, 3.9), layout="constrained")
    figure.get_layout_engine().set(wspace=0.04)
    row = figure.subplots(1, len(drawn), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (name, plane) in zip(row, drawn.items(), strict=True):
        colours = _contours(axes, plane, bounds)
        _mark(axes, (half_widths or {}).get(name))
        axes.set_title(name)
        axes.set_aspect("equal")
        axes.set_xlabel(DISTANCE.format("first direction"))
    row[0].set_ylabel(DISTANCE.format("second direction"))
    if title:
        figure.suptitle(title, fontsize=10)
    _colorbar(figure, colours, row, bounds)
    key = {"frameon": True, "facecolor": DARK, "edgecolor": DARK, "framealpha": 1, "labelcolor": "white"}
    figure.legend(handles=_marks_key(bool(half_widths)), loc="outside lower center", ncols=2, handlelength=3, **key)
    return figure


def _plane(name: str, plane: Plane | tuple) -> Plane:
    x, y, losses = (np.asarray(values, dtype=float) for values in Plane(*plane))
    if losses.shape != (len(x), len(y)):
        raise ValueError(f"{name}: losses of shape {losses.shape} at {len(x)} times {len(y)} distances")
    if not (losses > 0).all() or not np.isfinite(losses).all():
        raise ValueError(f"{name}: losses must be positive and finite")
    return Plane(x, y, losses)


def _contours(axes: Axes, plane: Plane, bounds: np.ndarray) -> ContourSet:
    """Of logarithms, so that a ring is smooth where the losses are far apart."""
    places = plane.x, plane.y, np.log(plane.losses.T)
    axes.contour(*places, levels=bounds[1:-1], colors="white", linewidths=0.4, linestyles="solid")
    for axis in axes.xaxis, axes.yaxis:
        axis.set_major_locator(MaxNLocator(4))
        axis.set_major_formatter(_number)
    return axes.contourf(*places, levels=bounds, cmap="cividis", zorder=0)


def _mark(axes: Axes, half_width: float | None) -> None:
    """The weights and the cell around them, white on the dark colours of low losses."""
    axes.plot(0, 0, **CROSS)
    if half_width is not None:
        axes.add_patch(Circle((0, 0), half_width, fill=False, color="white", linewidth=1.2, linestyle=DASHES))


def _marks_key(with_cells: bool) -> list:
    cell = Line2D([], [], color="white", linewidth=1.2, linestyle=DASHES, label=CELL)
    return [Line2D([], [], linestyle="none", label="trained weights", **CROSS), *([cell] if with_cells else [])]


def _colorbar(figure: Figure, colours: ContourSet, row: Sequence[Axes], bounds: np.ndarray) -> None:
    bar = figure.colorbar(colours, ax=list(row), label=LOSS, ticks=bounds[::2], shrink=0.9)
    bar.ax.yaxis.set_major_formatter(lambda value, _: _number(np.exp(value)))
