"""The table of minima, and the interval of a mean over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

Metrics = Mapping[str, Any]


def _accuracy(metrics: Metrics) -> float:
    """In percent, of what the run is about: the engine, the simulation or the float network."""
    return 100 * next(metrics[name] for name in ("acc/engine", "acc/sim", "acc/fp32") if name in metrics)


# Heading -> figure and digits.
COLUMNS = {
    "accuracy %": (_accuracy, ".2f"),
    "train loss": (lambda metrics: metrics["flat/loss"], ".3g"),
    "top eigenvalue": (lambda metrics: metrics["flat/top_eigenvalue"], ".3g"),
    "trace": (lambda metrics: metrics["flat/trace"], ".3g"),
    "SAM sharpness": (lambda metrics: metrics["flat/sam_sharpness"], ".3g"),
    "worst in cell": (lambda metrics: metrics["flat/worst_in_cell"], ".3g"),
}


def flatness_table(minima: Mapping[str, Sequence[Metrics]], title: str = "") -> Table:
    """Named minima with the metrics of their seeds: of one seed its figures, of more a mean and its 95 % interval."""
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False,
        collapse_padding=True,
    )  # fmt: skip
    table.add_column("minimum", no_wrap=True)
    for heading in COLUMNS:
        table.add_column(heading, justify="right")
    for name, seeds in minima.items():
        table.add_row(name, *(_cell([figure(m) for m in seeds], form) for figure, form in COLUMNS.values()))
    return table


def _cell(values: list[float | None], form: str) -> str:
    if None in values:  # infinite, in JSON
        return "infinite"
    mean = _number(statistics.fmean(values), form)
    return mean if len(values) == 1 else f"{mean} ± {_number(half_interval(values), '.2g')}"


def _number(value: float, form: str) -> str:
    """Without an exponent where that is short."""
    text = format(value, form)
    return format(float(text), "g") if "e" in text and 1 <= abs(value) < 1e5 else text


def half_interval(values: Sequence[float], share: float = 0.95) -> float:
    """Half the interval of a mean that Student's t gives; of values n >= 2.

    >>> round(half_interval([1.0, 2.0, 3.0]), 3)
    2.484
    """
    freedom = len(values) - 1
    return t_quantile(freedom, share) * statistics.stdev(values) / math.sqrt(len(values))


def t_quantile(freedom: int, share: float = 0.95) -> float:
    """The t with P(|T| <= t) = share, by bisection of its closed form (Abramowitz, Stegun 1964, 26.7.3 and 26.7.4).

    >>> round(t_quantile(2), 3), round(t_quantile(9), 3)
    (4.303, 2.262)
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < share else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _within(angle: float, freedom: int) -> float:
    """P(|T| <= sqrt(freedom) tan angle)."""
    cosine, odd = math.cos(angle), freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(2 + odd, freedom + 1, 2):
        total += term
        term *= cosine**2 * (k - 1) / k
    return (angle + math.sin(angle) * total) * 2 / math.pi if odd else math.sin(angle) * total
