"""Floating-point formats against torch and ml_dtypes to the bit; MX and NVFP4 blocks against their specifications."""

import bisect
import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch

from qexp.quant.affine import QParams
from qexp.quant.granularity import PerGroup
from qexp.quant.grid import IntegerGrid
from qexp.quant.minifloat import Minifloat
from qexp.quant.quantizer import Mode, Quantizer
from qexp.quant.recipe import Scheme

# name -> our format, theirs in ml_dtypes and in torch, largest and smallest magnitude
FORMATS = {
    "e4m3": (Minifloat(4, 3, "fn"), ml_dtypes.float8_e4m3fn, torch.float8_e4m3fn, 448, 2.0**-9),
    "e5m2": (Minifloat(5, 2, "ieee"), ml_dtypes.float8_e5m2, torch.float8_e5m2, 57344, 2.0**-16),
    "e4m3 ieee": (Minifloat(4, 3, "ieee"), ml_dtypes.float8_e4m3, None, 240, 2.0**-9),
    "e3m4": (Minifloat(3, 4, "ieee"), ml_dtypes.float8_e3m4, None, 15.5, 2.0**-6),
    "e3m2": (Minifloat(3, 2, "none"), ml_dtypes.float6_e3m2fn, None, 28, 2.0**-4),
    "e2m3": (Minifloat(2, 3, "none"), ml_dtypes.float6_e2m3fn, None, 7.5, 2.0**-3),
    "e2m1": (Minifloat(2, 1, "none"), ml_dtypes.float4_e2m1fn, None, 6, 0.5),
}
EVERY_FORMAT = pytest.mark.parametrize("name", FORMATS)
ONE = QParams(torch.tensor(1.0), torch.tensor(0.0))


def bits_of(x, theirs):
    """Bit patterns of a cast by ml_dtypes."""
    return x.numpy().astype(theirs).view(np.uint8)


def codes_of(bits, width):
    """The code that a bit pattern is: its magnitude, with the sign in front."""
    magnitude = (bits & (2 ** (width - 1) - 1)).astype(np.float32)
    return np.where(bits >> (width - 1) & 1, -magnitude, magnitude)


def all_patterns(name):
    """Every finite number of the format with its bit pattern."""
    grid, theirs, *_ = FORMATS[name]
    bits = np.arange(2**grid.bits, dtype=np.uint8)
    values = bits.view(theirs).astype(np.float32)
    return bits[np.isfinite(values)], values[np.isfinite(values)]


def values_of_every_size(grid, count=200_000):
    """Numbers, ties, their float neighbours, subnormals and random values up to the largest number."""
    levels = grid.levels(ONE)
    points = torch.cat([levels, (levels[1:] + levels[:-1]) / 2])
    up, down = torch.tensor(math.inf), torch.tensor(-math.inf)
    points = torch.cat([points, torch.nextafter(points, up), torch.nextafter(points, down)])
    generator = torch.Generator().manual_seed(0)
    exponents = torch.empty(count).uniform_(-24, math.log2(float(levels[-1])), generator=generator)
    random = torch.exp2(exponents) * torch.randn(count, generator=generator).sign()
    even = torch.linspace(float(levels[0]), float(levels[-1]), count // 2)
    tiny = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-38, -1e-30])
    x = torch.cat([points, random, even, tiny])
    return x[x.abs() <= levels[-1]]


@EVERY_FORMAT
def test_the_numbers_are_those_of_ml_dtypes_in_the_order_of_their_bits(name):
    grid, _, _, largest, smallest = FORMATS[name]
    bits, values = all_patterns(name)
    assert sorted({float(v) for v in values}) == list(grid.unit)
    assert (grid.unit[-1], min(v for v in grid.unit if v > 0)) == (largest, smallest)
    codes = grid.encode(torch.from_numpy(values), ONE).numpy()
    assert np.array_equal(codes, codes_of(bits, grid.bits))
    assert np.array_equal(grid.decode(torch.from_numpy(codes), ONE).numpy(), values)


@EVERY_FORMAT
def test_rounding_equals_the_cast_of_ml_dtypes_to_the_bit(name):
    grid, theirs, *_ = FORMATS[name]
    x = values_of_every_size(grid)
    bits = bits_of(x, theirs)
    codes = grid.encode(x, ONE)
    assert np.array_equal(codes.numpy(), codes_of(bits, grid.bits))
    assert np.array_equal(grid.fake_quantize(x, ONE).numpy(), bits.view(theirs).astype(np.float32))


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_rounding_equals_the_cast_of_torch_to_the_bit(name):
    grid, _, theirs, *_ = FORMATS[name]
    x = values_of_every_size(grid)
    cast = x.to(theirs)
    assert torch.equal(grid.fake_quantize(x, ONE), cast.float())
    assert np.array_equal(grid.encode(x, ONE).numpy(), codes_of(cast.view(torch.uint8).numpy(), 8))


@EVERY_FORMAT
def test_what_lies_beyond_becomes_the_largest_number(name):
    grid, _, _, largest, _ = FORMATS[name]
    x = torch.tensor([1.0, 1.01, 1.07, 1.5, 1e9, math.inf]) * largest
    assert grid.fake_quantize(x, ONE).tolist() == [largest] * 6
    assert grid.fake_quantize(-x, ONE).tolist() == [-largest] * 6


@EVERY_FORMAT
def test_the_gradient_passes_up_to_the_largest_number_and_stops_after_it(name):
    grid, _, _, largest, smallest = FORMATS[name]
    beyond = np.nextafter(np.float32(largest), np.float32(np.inf))
    x = torch.tensor([largest, beyond, smallest / 3, -largest, 2e9, -2e9])
    x.requires_grad_()
    (grid.fake_quantize(x, ONE) * torch.arange(1.0, 7)).sum().backward()
    assert x.grad.tolist() == [1, 0, 3, 4, 0, 0]


@EVERY_FORMAT
def test_the_scale_maps_the_largest_number_to_the_range(name):
    grid, _, _, largest, _ = FORMATS[name]
    for lo, hi in (-3.0, 1.0), (-1.0, 5.0), (0.0, 0.0), (2.0, 3.0):
        scale = grid.qparams(torch.tensor(lo), torch.tensor(hi)).scale.item()
        magnitude = max(abs(lo), abs(hi))
        assert scale == (float(np.float32(magnitude) / np.float32(largest)) if magnitude else 1.0)


def element(value, magnitudes):
    """The nearest of the magnitudes, ties to the even one in order, saturating; with the sign."""
    above = min(bisect.bisect_left(magnitudes, abs(value)), len(magnitudes) - 1)
    candidates = [max(above - 1, 0), above]
    i = min(candidates, key=lambda i: (abs(abs(value) - magnitudes[i]), i % 2))
    return magnitudes[i] if value >= 0 else -magnitudes[i]


def mx_block(block, largest_exponent, magnitudes):
    """Microscaling Formats v1.0, section 6.3: X = 2^(floor(log2 max|v|) - emax), P_i = element(v_i / X)."""
    block = [Fraction(v) for v in block]
    top = max(map(abs, block))
    if top == 0:
        return [0.0] * len(block)
    shared = Fraction(2) ** (math.frexp(float(top))[1] - 1 - largest_exponent)
    return [float(shared * element(v / shared, magnitudes)) for v in block]


def magnitudes_of(exponent_bits, mantissa_bits, largest):
    """The numbers of a format from its definition: section 5.3."""
    bias, found = 2 ** (exponent_bits - 1) - 1, []
    for exponent in range(2**exponent_bits):
        for mantissa in range(2**mantissa_bits):
            fraction = Fraction(mantissa, 2**mantissa_bits)
            power = Fraction(2) ** (max(exponent, 1) - bias)
            found.append(power * (fraction + (exponent > 0)))
    return [m for m in found if m <= largest]


MX = {
    "mxfp4": (Minifloat(2, 1, "none", "e8m0"), 2, magnitudes_of(2, 1, 6)),
    "mxfp6 e2m3": (Minifloat(2, 3, "none", "e8m0"), 2, magnitudes_of(2, 3, Fraction(15, 2))),
    "mxfp6 e3m2": (Minifloat(3, 2, "none", "e8m0"), 4, magnitudes_of(3, 2, 28)),
    "mxfp8 e4m3": (Minifloat(4, 3, "fn", "e8m0"), 8, magnitudes_of(4, 3, 448)),
    "mxfp8 e5m2": (Minifloat(5, 2, "ieee", "e8m0"), 15, magnitudes_of(5, 2, 57344)),
    # 8-bit two's complement with 6 fraction bits; the one number without a mirror image is left out, as allowed.
    "mxint8": (IntegerGrid(8, "restricted", scale="e8m0"), 0, [Fraction(k, 64) for k in range(128)]),
}


def awkward_weight(rows, columns):
    """Rows of every size, with zeros, a block of zeros, outliers, and values on ties."""
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(3))
    w *= torch.exp2(torch.linspace(-90, 90, rows)).unsqueeze(1)
    w[:, 5] *= 100
    w[0, :32], w[1, 32:], w[:, 7] = 0, 0, 0
    w[2, :32] = torch.arange(32) * 0.125  # the maximum 3.875 saturates FP4, and many lie on ties
    w[3, 32:] = torch.tensor([-7.99, 5.0, 2.5, 1.25, -0.75, 0.25, 3.5, -1.75] * 4)
    return w


def quantizer_of(grid, size, weight):
    quantizer = Quantizer(Scheme(grid, PerGroup(size)), weight.shape, is_weight=True)
    quantizer.calibrate(weight)
    quantizer.mode = Mode.QUANTIZE
    return quantizer


@pytest.mark.parametrize("name", MX)
def test_mx_blocks_are_those_of_the_specification(name):
    grid, largest_exponent, magnitudes = MX[name]
    weight = awkward_weight(12, 64)
    quantizer = quantizer_of(grid, 32, weight)
    found = quantizer(weight)
    for row in range(12):
        for start in 0, 32:
            block = weight[row, start : start + 32].tolist()
            assert found[row, start : start + 32].tolist() == mx_block(block, largest_exponent, magnitudes)
    mantissas = torch.frexp(quantizer.scale).mantissa
    assert (mantissas == 0.5).all()
    assert grid.overhead_bits == 8


def test_nvfp4_blocks_are_fp4_with_an_fp8_scale_and_one_float_of_the_tensor():
    weight = awkward_weight(12, 64)
    weight *= torch.exp2(torch.linspace(90, -90, 12)).unsqueeze(1)  # of comparable size again
    weight[4, 16:32] *= 1e-7  # a block whose scale would vanish in FP8
    quantizer = quantizer_of(Minifloat(2, 1, "none", "e4m3"), 16, weight)
    groups = weight.view(12, 4, 16)
    largest = groups.abs().amax(2)
    whole = largest.max() / 6 / 448
    assert whole.item() == pytest.approx(weight.abs().max().item() / 2688, rel=1e-6)
    stored = (largest / 6 / whole).to(torch.float8_e4m3fn).float()
    stored[stored == 0] = 2.0**-9
    scale = torch.where(largest > 0, stored * whole, 1.0)
    assert torch.equal(quantizer.scale, scale)
    quotients = groups / scale.unsqueeze(2)
    elements = quotients.clamp(-6, 6).numpy().astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    expected = torch.from_numpy(elements) * scale.unsqueeze(2)
    assert torch.equal(quantizer(weight), expected.view(12, 64))
    assert (quantizer(weight)[4, 16:32] == 0).all()
    assert (quantizer(weight)[0, :32] == 0).all()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ((0, 3), "exponent_bits=0"),
        ((6, 1), "exponent_bits=6"),
        ((True, 3), "exponent_bits=True"),
        ((4, -1), "mantissa_bits=-1"),
        ((4, 2.0), "mantissa_bits=2.0"),
        ((5, 3), "mantissa_bits=3: E5 leaves 2"),
        ((4, 3, "nan"), "specials='nan'.*ieee, fn, none"),
        ((4, 3, "fn", "fp16"), "scale='fp16'.*float32, power_of_two, e8m0, e4m3"),
        ((1, 0, "ieee"), "leaves fp2_e1m0 no number besides zero"),
    ],
)
def test_formats_that_do_not_exist_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        Minifloat(*options)
