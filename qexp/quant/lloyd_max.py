"""The quantizer of least squared error for a known distribution. Importing this file needs no torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from qexp.quant.checks import require_bits
from qexp.quant.levels import LevelGrid


@dataclass(frozen=True)
class LloydMax(LevelGrid):
    """The levels of least squared error for a normal or a Laplace distribution (Lloyd 1982; Max 1960).

    Fixed point of: Delta_i = (X_(i-1) + X_i) / 2,  X_i = E[x | Delta_i < x <= Delta_(i+1)]. The scale is found by a
    calibration; mse finds the one that fits, the extrema give too large a one.

    >>> [round(x, 4) for x in LloydMax(2).unit]
    [-1.5104, -0.4528, 0.4528, 1.5104]
    """

    bits: int = 4
    distribution: str = "normal"

    def __post_init__(self) -> None:
        require_bits(self.bits, 1, 6)
        if self.distribution not in ("normal", "laplace"):
            raise ValueError(f"distribution={self.distribution!r}: allowed are normal, laplace")

    @property
    def format(self) -> str:
        return f"lloyd_max{self.bits}" + ("" if self.distribution == "normal" else f"_{self.distribution}")

    @property
    def unit(self) -> tuple[float, ...]:
        return _lloyd_max(2**self.bits, self.distribution)


@lru_cache
def _lloyd_max(count: int, distribution: str) -> tuple[float, ...]:
    """Levels of a symmetric distribution of variance 1.

    Shooting: X_1 decides Delta_1 by X_1 = E[x | 0 < x <= Delta_1], that decides X_2 by the middle, and so on; X_1 is
    found by bisection on whether the last level lies above the mean of the last cell.
    """
    half = count // 2
    mass, moment = (_normal_mass, _normal_moment) if distribution == "normal" else (_laplace_mass, _laplace_moment)

    def mean(a: float, b: float) -> float:
        weight = mass(a, b)
        return moment(a, b) / weight if weight > 0 else a

    def chain(first: float) -> tuple[list[float], bool]:
        """The levels that follow from the first, as far as they exist, and whether they end too high."""
        levels, edge = [first], 0.0
        while len(levels) < half:
            level = levels[-1]
            if mean(edge, math.inf) <= level:
                return levels, True
            edge = _bisect(lambda b, a=edge, x=level: mean(a, b) > x, level, 40.0)
            levels.append(2 * edge - level)
        return levels, levels[-1] > mean(edge, math.inf)

    positive, _ = chain(_bisect(lambda first: chain(first)[1], 0.0, 1.5))
    while len(positive) < half:  # a last digit short of the root
        positive.append(mean(positive[-1], math.inf))
    return (*(-x for x in reversed(positive)), *positive)


def _bisect(above: Callable[[float], bool], low: float, high: float) -> float:
    """The largest float below the place from which `above` holds."""
    while low < (middle := (low + high) / 2) < high:
        low, high = (low, middle) if above(middle) else (middle, high)
    return low


def _normal_mass(a: float, b: float) -> float:
    return (math.erfc(a / math.sqrt(2)) - math.erfc(b / math.sqrt(2))) / 2


def _normal_moment(a: float, b: float) -> float:
    return (math.exp(-a * a / 2) - math.exp(-b * b / 2)) / math.sqrt(2 * math.pi)


def _laplace_mass(a: float, b: float) -> float:
    return (math.exp(-math.sqrt(2) * a) - math.exp(-math.sqrt(2) * b)) / 2


def _laplace_moment(a: float, b: float) -> float:
    def integral(x: float) -> float:  # of x sqrt(1/2) exp(-sqrt(2) x) from x on
        return 0.0 if math.isinf(x) else (x + math.sqrt(0.5)) * math.exp(-math.sqrt(2) * x) / 2

    return integral(a) - integral(b)
