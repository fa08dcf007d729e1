"""Quantization in rational arithmetic: who is right where two tools differ."""

from __future__ import annotations

from bisect import bisect_left
from fractions import Fraction

from qexp.quant.grid import Grid, IntegerGrid


def float32(value: Fraction) -> Fraction:
    """The nearest number with 24 bits, ties to even, denormals included; no largest one, since codes are clamped."""
    if value == 0:
        return value
    exponent = abs(value.numerator).bit_length() - value.denominator.bit_length()
    if abs(value) < Fraction(2) ** exponent:
        exponent -= 1
    ulp = Fraction(2) ** max(exponent - 23, -149)
    return round(value / ulp) * ulp  # round() of a Fraction is half to even


def quotient(x: float, scale: float, rounded: bool) -> Fraction:
    """x / S: of the definition, a float32, or of real arithmetic."""
    exact = Fraction(x) / Fraction(scale)
    return float32(exact) if rounded else exact


def answers(grid: Grid, x: float, scale: float, zero: float, rounded: bool) -> dict[str, float]:
    """Code, value (a float32) and gradient of one input."""
    q = quotient(x, scale, rounded)
    if not isinstance(grid, IntegerGrid):
        return {"values": float(float32(_nearest(grid.unit, grid.zero_index, q) * Fraction(scale)))}
    code = round(q) + int(zero)
    inside = grid.quant_min <= code <= grid.quant_max
    code = min(max(code, grid.quant_min), grid.quant_max)
    value = float32((code - int(zero)) * Fraction(scale))
    # Above the largest float32 a product is infinite.
    shown = float("inf") * (1 if value > 0 else -1) if abs(value) >= 2**128 else float(value)
    return {"codes": float(code), "values": shown, "gradient": float(inside)}


def _nearest(levels: tuple[float, ...], zero_index: int, q: Fraction) -> Fraction:
    """The nearest level; of two equally near ones that with the even code."""
    upper = bisect_left(levels, q)
    if upper in (0, len(levels)):
        return Fraction(levels[min(upper, len(levels) - 1)])
    below, above = Fraction(levels[upper - 1]), Fraction(levels[upper])
    if q - below == above - q:
        return above if (upper - zero_index) % 2 == 0 else below
    return below if q - below < above - q else above
