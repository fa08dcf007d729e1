"""Uniform quantization in rational arithmetic, from its equations; float32 is a rounding of fractions."""

from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch

DIVISORS = {
    "full_range": lambda b: Fraction(2**b - 1, 2),
    "restricted": lambda b: Fraction(2 ** (b - 1) - 1),
    "wide_codes": lambda b: Fraction(2 ** (b - 1) - 1),
    "pow2_divisor": lambda b: Fraction(2 ** (b - 1)),
    "unsigned": lambda b: Fraction(2**b - 1),
}


def float32(value: Fraction) -> Fraction:
    """The float32 nearest to value, ties to even, denormals included; value must lie below 2^127."""
    if value == 0:
        return Fraction(0)
    exponent = abs(value.numerator).bit_length() - value.denominator.bit_length()
    if abs(value) < Fraction(2) ** exponent:
        exponent -= 1
    assert Fraction(2) ** exponent <= abs(value) < Fraction(2) ** min(exponent + 1, 127)
    ulp = Fraction(2) ** max(exponent - 23, -149)
    return round(value / ulp) * ulp  # round() of a Fraction is half to even


def codes_of(bits, convention):
    """Smallest and largest code."""
    if convention in ("affine", "unsigned"):
        return 0, 2**bits - 1
    top = 2 ** (bits - 1) - 1
    return (-top if convention == "restricted" else -top - 1), top


def qparams(lo, hi, bits, convention):
    """Scale and zero point of a clipping range of two float32 values."""
    lo, hi = min(Fraction(lo), Fraction(0)), max(Fraction(hi), Fraction(0))
    if convention == "affine":
        scale = float32(float32(hi - lo) / (2**bits - 1))
    else:
        magnitude = hi if convention == "unsigned" else max(-lo, hi)
        scale = float32(magnitude / DIVISORS[convention](bits))
    scale = max(scale, Fraction(1, 2**126)) if scale else Fraction(1)
    return scale, (-round(float32(lo / scale)) if convention == "affine" else 0)


def quantize(x, scale, zero_point, lowest, highest):
    """Code of one float32 value."""
    return min(max(round(float32(Fraction(x) / Fraction(scale))) + int(zero_point), lowest), highest)


def dequantize(code, scale, zero_point):
    """Value of one code."""
    return float32((int(code) - int(zero_point)) * Fraction(scale))


@pytest.fixture(scope="session")
def exact():
    """The functions above."""
    return SimpleNamespace(qparams=qparams, quantize=quantize, dequantize=dequantize, codes_of=codes_of)


@pytest.fixture(scope="module")
def one_thread():
    """Many small tensors: threads that wait for each other take ten times as long on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
