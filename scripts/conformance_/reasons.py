"""Why quantizers part: classes of inputs, each with the test of belonging to it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from conformance_.compare import Points, Reason
from conformance_.inputs import Array


def ulp(values: Array) -> Array:
    """Distance of float32 numbers at these magnitudes."""
    return np.spacing(np.minimum(np.abs(values), np.finfo(np.float32).max).astype(np.float32)).astype(np.float64)


def code_count(p: Points) -> int:
    """Steps from the lowest to the highest code."""
    return p.case.grid.quant_max - p.case.grid.quant_min


def exact_tie(p: Points) -> Array:
    """Whether the quotient, rounded to float32, is k + 1/2."""
    q = p.quotient.astype(np.float32).astype(np.float64)
    return q - np.floor(q) == 0.5


def near_tie(ulps: float) -> Callable[[Points], Array]:
    """Within so many ulps of the quotient from a tie."""
    return lambda p: p.tie_distance <= ulps * ulp(p.quotient)


def reciprocal(aspect: str, formula: str = "x * (1/S)", ulps: int = 2) -> Reason:
    """The product with a reciprocal crosses a tie that the quotient does not."""
    text = f"quotient within {ulps} ulp of a tie: `{formula}` rounds twice, so the product lands on the other side"
    return Reason(aspect, text, near_tie(ulps))


def denormal_reciprocal(aspect: str) -> Reason:
    """1/S has lost bits."""
    return Reason(
        aspect, "S above 2^126: 1/S is denormal and has lost bits, which moves every threshold",
        lambda p: (1 / p.scale < 2.0**-126) & (p.tie_distance <= np.abs(p.quotient) * 2.0**-149 * p.scale),
    )  # fmt: skip


def wraps_in_int64(aspect: str) -> Reason:
    """A quotient that int64 cannot hold."""
    return Reason(
        aspect, "x/S at or above 2^63: the cast to int64 yields its minimum, so a huge positive x gets the lowest code",
        lambda p: p.quotient * (1 + 2.0**-22) >= 2.0**63,
    )  # fmt: skip


def odd_tie(offset: str, of: Callable[[Points], Array]) -> Reason:
    """Rounding after the addition of an odd number turns ties around."""
    return Reason(
        "codes", f"exact tie and odd {offset}: rounding after adding it takes the other neighbour",
        lambda p: exact_tie(p) & (of(p) % 2 != 0),
    )  # fmt: skip


def last_place(text: str, bound: Callable[[Points], Array]) -> Reason:
    """The same code, dequantized by another expression."""
    return Reason("values", f"the last places of the value: {text}", lambda p: np.abs(p.mine - p.other) <= bound(p))
