"""Tools for floating-point formats of 4 to 8 bits: the types of torch and of ml_dtypes."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import torch

from conformance_.compare import Answers, Reason, Tool
from conformance_.inputs import Array, Case
from qexp.quant.grid import Grid
from qexp.quant.minifloat import Minifloat

FORMATS = [Minifloat(4, 3, "fn"), Minifloat(5, 2, "ieee"), Minifloat(4, 3, "ieee"), Minifloat(3, 4, "ieee"),
           Minifloat(3, 2, "none"), Minifloat(2, 3, "none"), Minifloat(2, 1, "none")]  # fmt: skip
TORCH_TYPES = {Minifloat(4, 3, "fn"): torch.float8_e4m3fn, Minifloat(5, 2, "ieee"): torch.float8_e5m2}
ML_TYPES = {
    Minifloat(4, 3, "fn"): ml_dtypes.float8_e4m3fn, Minifloat(5, 2, "ieee"): ml_dtypes.float8_e5m2,
    Minifloat(4, 3, "ieee"): ml_dtypes.float8_e4m3, Minifloat(3, 4, "ieee"): ml_dtypes.float8_e3m4,
    Minifloat(3, 2, "none"): ml_dtypes.float6_e3m2fn, Minifloat(2, 3, "none"): ml_dtypes.float6_e2m3fn,
    Minifloat(2, 1, "none"): ml_dtypes.float4_e2m1fn,
}  # fmt: skip


def cast_torch(grid: Minifloat, x: Array) -> Array:
    return torch.from_numpy(x).to(TORCH_TYPES[grid]).float().numpy()


def cast_ml_dtypes(grid: Minifloat, x: Array) -> Array:
    return x.astype(ML_TYPES[grid]).astype(np.float32)


def round_to(grid: Minifloat, x: Array) -> Array:
    """Nearest number of the format if its exponents had no end, ties to even."""
    _, exponent = np.frexp(x.astype(np.float64))
    least = 2 - 2 ** (grid.exponent_bits - 1)  # the exponent of the smallest normal number
    step = np.ldexp(1.0, np.maximum(exponent - 1, least) - grid.mantissa_bits)
    return (np.rint(x / step) * step).astype(np.float32)


def with_specials(grid: Minifloat, x: Array, of_fn: float = np.nan) -> Array:
    """What a conversion does beyond the largest number: infinity, NaN, or, where there is neither, that number."""
    rounded, largest = round_to(grid, x), np.float32(grid.unit[-1])
    beyond = {"ieee": np.inf, "fn": of_fn, "none": largest}[grid.specials]
    return np.where(np.abs(rounded) > largest, np.copysign(np.float32(beyond), x), rounded)


def with_specials_torch(grid: Minifloat, x: Array) -> Array:
    """float8_e4m3fn has a NaN to give, but torch saturates."""
    return with_specials(grid, x, of_fn=grid.unit[-1])


def _scaled(cast: Callable[[Minifloat, Array], Array], clamped: bool) -> Callable[[Case], Answers]:
    """S cast(x / S), with or without clamping to the largest number first."""

    def run(case: Case) -> Answers:
        quotient = (case.x / case.scale).astype(np.float32)
        if clamped:
            quotient = np.clip(quotient, np.float32(case.grid.unit[0]), np.float32(case.grid.unit[-1]))
        return {"values": cast(case.grid, quotient) * case.scale}

    return run


BEYOND = Reason(
    "values", "x/S rounds beyond the largest number: infinity or NaN, where qexp saturates",
    lambda p: np.abs(round_to(p.case.grid, p.quotient.astype(np.float32))) > np.float32(p.case.grid.unit[-1]),
)  # fmt: skip


def _missing(types: dict, name: str) -> Callable[[Grid], str | None]:
    return lambda grid: None if grid in types else f"{name} converts to no such type"


def tools() -> list[Tool]:
    """The types themselves, and behind a clamp."""
    rows = []
    for name, package, types, cast, formula in (
        ("torch float8", "torch", TORCH_TYPES, cast_torch, with_specials_torch),
        ("ml_dtypes", "ml_dtypes", ML_TYPES, cast_ml_dtypes, with_specials),
    ):
        refuses = _missing(types, name.split()[0])
        for how, clamped in (("", False), (" behind a clamp", True)):
            says = f"`S * cast({'clamp(x / S)' if clamped else 'x / S'})`, nearest, ties to even"
            if package == "torch" and not clamped:
                says += "; float8_e4m3fn saturates, although it has a NaN"
            rows.append(Tool(name + how, package, says, _scaled(cast, clamped), _scaled(formula, clamped),
                             () if clamped else (BEYOND,), ("values",), refuses))  # fmt: skip
    return rows
