"""Tables of number formats: what they are, and which levels and thresholds they have."""

from __future__ import annotations

from collections.abc import Mapping

from rich import box
from rich.markup import escape
from rich.table import Table

from qexp.quant.grid import Grid, IntegerGrid
from qexp.quant.recipe import Recipe, Scheme
from qexp.report.formats import View

MOST_LISTED = 32  # levels
ENGINES = "onnxruntime, openvino"


def formats_table(recipe: Recipe, views: Mapping[str, View]) -> Table:
    """A column for each tensor's format; the caption says what the pair of them means for an engine."""
    table = Table(title="formats", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for name in views:
        table.add_column(name, overflow="fold")
    schemes = recipe.weight, recipe.activation
    cells = [_cells(scheme, view) for scheme, view in zip(schemes, views.values(), strict=True)]
    engines = [_engines(scheme, is_weight) for scheme, is_weight in zip(schemes, (True, False), strict=True)]
    if any(view.fitted for view in views.values()):
        for column, view in zip(cells, views.values(), strict=True):
            column["made for data"] = view.fitted or "no"
    for label in cells[0]:
        table.add_row(label, *(escape(column[label]) for column in cells))
    table.add_row("int8 engines", *map(escape, engines))
    if recipe.simulation_only and ENGINES in engines:
        culprit = next(name for name, what in zip(views, engines, strict=True) if what != ENGINES)
        table.caption, table.caption_justify = f"both together are a simulation only, because of the {culprit}", "left"
    return table


def _cells(scheme: Scheme, view: View) -> dict[str, str]:
    grid, units = scheme.grid, view.units.double()
    zero = "yes" if bool((units == 0).any()) else f"no, {number(float(units.abs().min()))} S is the nearest"
    return {
        "name": grid.format,
        "bits": str(grid.bits),
        "convention": grid.convention,
        "scale S": f"{grid.scale}, {scheme.granularity}",
        "bits beside the codes": f"{grid.overhead_bits} for each {'S and Z' if not grid.symmetric else 'S'}",
        "levels": f"{len(units):,}, {'uniform' if view.uniform else 'non-uniform'}",
        "smallest step": f"{number(float(units.diff().min()))} S",
        "smallest level": _outermost(grid, "quant_min", float(units[0])),
        "largest level": _outermost(grid, "quant_max", float(units[-1])),
        "zero exact": zero,
        "rounding": str(scheme.rounding),
    }


def _outermost(grid: Grid, bound: str, unit: float) -> str:
    if isinstance(grid, IntegerGrid) and not grid.symmetric:
        return f"S ({getattr(grid, bound)} - Z)"
    return f"{number(unit)} S"


def _engines(scheme: Scheme, is_weight: bool) -> str:
    why = scheme.not_in_int8(is_weight)
    return f"simulation only: {why}" if why else ENGINES


def levels_table(name: str, view: View) -> Table | None:
    """Levels X_i and the thresholds Delta_(i+1) above them in units of S; None where there are many."""
    units = view.units.tolist()
    if len(units) > MOST_LISTED:
        return None
    table = Table(
        title=escape(f"{name}: {view.grid}, {_where(view)}"), title_justify="left", title_style="bold",
        box=box.SIMPLE_HEAD, pad_edge=False,
    )  # fmt: skip
    for heading in "code", "X", "Δ above":
        table.add_column(heading, justify="right", no_wrap=True)
    largest = max(map(abs, units))
    thresholds = [None] * len(units) if view.thresholds is None else [*view.thresholds.tolist(), None]
    for code, unit, above in zip(range(view.grid.quant_min, view.grid.quant_max + 1), units, thresholds, strict=True):
        table.add_row(str(code), number(unit), "" if above is None else number(above, largest))
    if view.thresholds is None:
        table.caption, table.caption_justify = f"no thresholds: rounding {view.rounding} draws", "left"
    return table


def _where(view: View) -> str:
    zero_point = "" if view.grid.symmetric else f", drawn with Z = {int(view.qparams.zero_point)}"
    return f"in units of S{zero_point}{f', {view.fitted}' if view.fitted else ''}"


def number(value: float, beside: float = 0.0) -> str:
    """Six digits; nothing where it is less than a rounding error beside another value.

    >>> number(0.1234567), number(-1e-45, 1.0)
    ('0.123457', '0')
    """
    return f"{value:.6g}" if abs(value) > 1e-12 * beside and value else "0"
