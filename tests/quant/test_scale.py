"""Formats of scales: powers of two and FP8 against exact numbers and torch's cast; blocks of zeros or nearly so."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qexp.quant.codebooks import AdditivePowerOfTwo, Binary, KMeans, NormalFloat, PowerOfTwo
from qexp.quant.grid import CONVENTIONS, IntegerGrid
from qexp.quant.lloyd_max import LloydMax
from qexp.quant.minifloat import Minifloat
from qexp.quant.scale import SCALE_FORMATS, as_format

SYMMETRIC = [name for name in CONVENTIONS if name != "affine"]
GRIDS = [
    *(IntegerGrid(b, name, scale) for b in (2, 4, 8, 16) for name in SYMMETRIC for scale in SCALE_FORMATS),
    *(Minifloat(*f, scale) for f in ((2, 1, "none"), (4, 3, "fn"), (5, 2, "ieee")) for scale in SCALE_FORMATS),
]  # fmt: skip
# Any float32 from which S is a normal number.
magnitudes = st.floats(2.0**-100, 2.0**120, width=32)
tops = st.sampled_from([0.5, 1.0, 1.5, 3.0, 3.5, 6.0, 7.0, 7.5, 127.0, 127.5, 128.0, 255.0, 448.0, 32767.5, 57344.0])
examples = settings(max_examples=200, deadline=None)


def is_power_of_two(x):
    return bool((torch.frexp(x).mantissa == 0.5).all())


def test_powers_of_two_are_themselves_and_what_is_above_is_rounded_up_or_down():
    powers = torch.tensor([2.0**k for k in range(-126, 128)])
    above = torch.nextafter(powers, torch.tensor(math.inf))
    below = torch.nextafter(powers, torch.tensor(0.0))
    for name in "power_of_two", "e8m0":
        assert torch.equal(as_format(name, powers, 1.0), powers)
    assert torch.equal(as_format("power_of_two", above[:-1], 1.0), powers[1:])
    assert torch.equal(as_format("power_of_two", below[1:], 1.0), powers[1:])
    assert torch.equal(as_format("e8m0", above, 1.0), powers)
    assert torch.equal(as_format("e8m0", below[1:], 1.0), powers[:-1])


@examples
@given(magnitudes, tops)
def test_a_power_of_two_is_the_smallest_that_clips_nothing(magnitude, top):
    scale = as_format("power_of_two", torch.tensor([magnitude]), top)
    assert is_power_of_two(scale)
    exact = Fraction(scale.item()) * Fraction(top)
    assert exact / 2 < Fraction(magnitude) <= exact


@examples
@given(magnitudes, tops)
def test_e8m0_is_the_ratio_of_the_leading_powers(magnitude, top):
    scale = as_format("e8m0", torch.tensor([magnitude]), top)
    assert scale.item() == 2.0 ** (math.floor(math.log2(magnitude)) - math.floor(math.log2(top)))


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid} {grid.scale}")
def test_power_of_two_scales_clip_nothing_and_zero_and_tiny_blocks_become_zero(grid):
    x = torch.randn(60, 16, generator=torch.Generator().manual_seed(0)).abs()
    x *= torch.exp2(torch.linspace(-100, 100, 60)).unsqueeze(1)
    x[7] = 0
    qparams = grid.qparams(x.amin(1, keepdim=True), x.amax(1, keepdim=True))
    assert (qparams.scale >= torch.finfo(torch.float32).tiny).all() and qparams.scale.isfinite().all()
    values = grid.fake_quantize(x, qparams)
    assert values.isfinite().all()
    assert (values[7] == 0).all()
    if grid.scale == "power_of_two":
        if grid.convention == "pow2_divisor":  # whose maximum lies up to one step above the last level
            assert ((x - values) <= qparams.scale).all()
        else:
            assert grid.clipped(x, qparams) == 0
        assert is_power_of_two(qparams.scale)
    if grid.scale == "e8m0":
        assert is_power_of_two(qparams.scale)


@pytest.mark.parametrize("scale", SCALE_FORMATS)
@pytest.mark.parametrize("tiny", [0.0, 1e-45, 1e-42, 1e-39])
def test_all_blocks_zero_or_denormal_round_trip_to_zero_or_themselves(scale, tiny):
    x = torch.full((2, 8), tiny)
    x[0, 0] = 0
    for grid in GRIDS:
        if grid.scale == scale:
            qparams = grid.qparams(x.amin(1, keepdim=True), x.amax(1, keepdim=True))
            values = grid.fake_quantize(x, qparams)
            assert values.isfinite().all() and values[0, 0] == 0
            assert ((values - x).abs() <= 2.0**-126).all()


@pytest.mark.parametrize(
    "grid", [Binary(), PowerOfTwo(4), AdditivePowerOfTwo(4), NormalFloat(4), KMeans(2), LloydMax(3)], ids=str
)
def test_level_formats_keep_a_block_of_zeros_at_zero(grid):
    x = torch.tensor([[0.0, 0.0], [-1.0, 2.0]])
    values = grid.fake_quantize(x, grid.qparams(x.amin(1, keepdim=True), x.amax(1, keepdim=True)))
    # Without a level zero there is only a vanishing one.
    assert (values[0].abs() <= (0 if 0.0 in grid.unit else 2.0**-124)).all()
    assert values[1].abs().min() > 0.1


def test_e4m3_scales_are_torchs_cast_of_the_quotients():
    generator = torch.Generator().manual_seed(0)
    numbers = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (numbers[1:] + numbers[:-1]) / 2
    up, down = torch.tensor(math.inf), torch.tensor(0.0)
    points = torch.cat([numbers, ties, torch.nextafter(ties, up), torch.nextafter(ties, down)])
    random = torch.exp2(torch.empty(100_000).uniform_(-9.5, 8.8, generator=generator))
    # 448 among them makes the scale of the tensor 1, so that the quotients are these numbers.
    x = torch.cat([points, random.clamp(max=448)])
    scale = as_format("e4m3", x, 1.0)
    expected = x.to(torch.float8_e4m3fn).float()
    assert torch.equal(scale, expected)
    # Of any other size the scale is an FP8 number times one float32.
    other = as_format("e4m3", x * 0.1, 6.0)
    whole = (x * 0.1).max() / 6 / 448
    quotients = ((x * 0.1) / 6 / whole).to(torch.float8_e4m3fn).float().clamp(min=2.0**-9)
    assert torch.equal(other, quotients * whole)


def test_an_e4m3_scale_never_vanishes():
    scale = as_format("e4m3", torch.tensor([1.0, 1e-9, 1e-30, 0.0]), 6.0)
    whole = 1 / 6 / 448
    assert scale.tolist() == pytest.approx([1 / 6, whole * 2.0**-9, whole * 2.0**-9, 1.0])


@examples
@given(st.integers(1, 16), st.floats(-1e6, 1e6, width=32), st.floats(-1e6, 1e6, width=32))
def test_an_affine_power_of_two_holds_both_ends(bits, a, b):
    grid, lo, hi = IntegerGrid(bits, "affine", "power_of_two"), min(a, b, 0.0), max(a, b, 0.0)
    qparams = grid.qparams(torch.tensor(lo), torch.tensor(hi))
    assert is_power_of_two(qparams.scale)
    assert 0 <= qparams.zero_point.item() == int(qparams.zero_point) <= 2**bits - 1
    assert grid.clipped(torch.tensor([lo, hi]), qparams) == 0
    if hi - lo > 1e-30:
        # The quotient is of a rounded difference.
        assert (1 - 2.0**-22) * qparams.scale.item() * (2**bits - 1) / 2 < hi - lo


def test_scale_formats_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="scale='fp16': allowed are float32, power_of_two, e8m0, e4m3"):
        IntegerGrid(8, "restricted", "fp16")
    for scale in "e8m0", "e4m3":
        with pytest.raises(ValueError, match=f"scale='{scale}': allowed are float32, power_of_two for affine"):
            IntegerGrid(8, "affine", scale)


def test_a_block_costs_its_scale_and_its_zero_point():
    for scale, (bits, _) in SCALE_FORMATS.items():
        assert IntegerGrid(4, "restricted", scale).overhead_bits == bits
        assert Minifloat(2, 1, "none", scale).overhead_bits == bits
    assert IntegerGrid(4, "affine").overhead_bits == 36
    assert IntegerGrid(4, "affine", "power_of_two").overhead_bits == 12
    assert NormalFloat(4).overhead_bits == 32
