"""Grids: scale and zero point against rational arithmetic, golden values, and properties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qexp.quant.grid import CONVENTIONS, IntegerGrid

EVERY_CONVENTION = pytest.mark.parametrize("convention", CONVENTIONS)
# One bit has a level besides zero only where zero is the lowest.
ALL = [IntegerGrid(b, name) for name in CONVENTIONS for b in range(1 if name in ("affine", "unsigned") else 2, 17)]
grids = st.sampled_from(ALL)
# Any float32 up to 1e30, denormals included; hi - lo stays finite.
numbers = st.floats(-(2.0**100), 2.0**100, width=32)
tensors = st.lists(numbers, min_size=1, max_size=20).map(torch.tensor)
examples = settings(max_examples=80, deadline=None)


def fitted(grid, x):
    return grid.qparams(x.min(), x.max())


def sqnr(grid, x):
    qparams = fitted(grid, x)
    noise = (grid.decode(grid.encode(x, qparams), qparams) - x).double().square().sum()
    return 10 * math.log10((x.double().square().sum() / noise).item())


def test_the_codes_are_those_of_the_convention(exact):
    for grid in ALL:
        assert (grid.quant_min, grid.quant_max) == exact.codes_of(grid.bits, grid.convention)
        assert grid.signed == (grid.convention not in ("affine", "unsigned"))


@examples
@given(grids, numbers, numbers)
def test_scale_and_zero_point_equal_rational_arithmetic(exact, grid, a, b):
    lo, hi = min(a, b), max(a, b)
    qparams = grid.qparams(torch.tensor(lo), torch.tensor(hi))
    scale, zero_point = exact.qparams(lo, hi, grid.bits, grid.convention)
    assert (qparams.scale.item(), qparams.zero_point.item()) == (float(scale), zero_point)


@pytest.mark.parametrize(("bits", "ratio"), [(8, 1.008), (4, 1.148), (3, 1.361), (2, 2.25)])
def test_on_uniform_data_restricted_costs_the_golden_ratio_over_full_range(bits, ratio):
    n = 510 * 210 * 7  # the number of cells of every grid here divides it
    x = (torch.arange(n).double() * 2 + 1) / n - 1
    errors = []
    for convention in "restricted", "full_range":
        grid = IntegerGrid(bits, convention)
        qparams = grid.qparams(torch.tensor(-1.0), torch.tensor(1.0))
        codes = grid.encode(x.float(), qparams).double()
        errors.append((codes * qparams.scale.double() - x).square().mean().item())
    assert errors[0] / errors[1] == pytest.approx(((2**bits - 1) / (2**bits - 2)) ** 2, rel=1e-3)
    assert errors[0] / errors[1] == pytest.approx(ratio, abs=1e-3)


@pytest.mark.parametrize("bits", range(2, 17))
def test_full_range_saturates_its_maximum_with_half_a_step(bits):
    grid = IntegerGrid(bits, "full_range")
    qparams = grid.qparams(torch.tensor(-1.0), torch.tensor(1.0))
    assert (1 / qparams.scale).item() == pytest.approx(2 ** (bits - 1) - 0.5)
    code = grid.encode(torch.tensor(1.0), qparams)
    assert code.item() == grid.quant_max
    assert (1 - grid.decode(code, qparams)).item() == pytest.approx(qparams.scale.item() / 2, rel=2.0 ** (bits - 22))


@examples
@given(grids, tensors)
def test_grid_points_survive(grid, x):
    qparams = fitted(grid, x)
    levels = grid.levels(qparams)
    codes = torch.arange(grid.quant_min, grid.quant_max + 1).float()
    assert torch.equal(grid.decode(codes, qparams), levels)
    assert torch.equal(grid.encode(levels, qparams), codes)


@examples
@given(grids, tensors)
def test_quantizing_twice_is_quantizing_once(grid, x):
    qparams = fitted(grid, x)
    once = grid.decode(grid.encode(x, qparams), qparams)
    assert torch.equal(grid.decode(grid.encode(once, qparams), qparams), once)


@examples
@given(grids, tensors)
def test_the_error_is_at_most_half_a_step_inside_the_range(grid, x):
    qparams = fitted(grid, x)
    scale, levels = qparams.scale.double(), grid.levels(qparams).double()
    error = (grid.decode(grid.encode(x, qparams), qparams).double() - x.double()).abs()
    inside = (x >= levels[0]) & (x <= levels[-1])
    # x / S and S (q - Z) are rounded once each, both of at most 2^bits steps: 2^bits 2^-24 S for each.
    # A denormal product loses up to 2^-150.
    slack = scale * 2.0 ** (grid.bits - 23) + 2.0**-149
    assert (error[inside] <= (scale / 2 + slack)).all()
    if grid.convention == "unsigned":
        inside = x >= 0
        assert (error[~inside] == x[~inside].double().abs()).all()
        error = error[inside]
    if grid.convention != "pow2_divisor":  # whose maximum lies one step above the last level
        # S, which is rounded too, is multiplied by up to 2^bits.
        assert (error <= scale / 2 + 3 * slack).all()


@examples
@given(grids, tensors)
def test_zero_is_exact(grid, x):
    qparams = fitted(grid, x)
    assert grid.decode(grid.encode(torch.zeros(1), qparams), qparams).item() == 0.0
    assert grid.quant_min <= qparams.zero_point.item() <= grid.quant_max
    assert qparams.zero_point.item() == int(qparams.zero_point)


@examples
@given(grids, tensors)
def test_the_scale_is_a_normal_number(grid, x):
    scale = fitted(grid, x).scale
    assert scale >= torch.finfo(torch.float32).tiny
    assert scale.isfinite()


@pytest.mark.parametrize("grid", ALL, ids=str)
def test_blocks_of_zeros_round_trip_beside_others(grid):
    x = torch.tensor([[0.0, 0.0], [-1.0, 2.0]])
    qparams = grid.qparams(x.amin(1, keepdim=True), x.amax(1, keepdim=True))
    assert grid.decode(grid.encode(x, qparams), qparams)[0].tolist() == [0.0, 0.0]
    assert qparams.scale[0].item() == 1.0


@pytest.mark.parametrize("convention", ["affine", "restricted", "wide_codes"])
@pytest.mark.parametrize("value", [3.0, -3.0, 1e-30, -0.1, 7e-7])
def test_constant_tensors_round_trip(convention, value):
    grid, x = IntegerGrid(8, convention), torch.full((4,), value)
    qparams = fitted(grid, x)
    assert grid.decode(grid.encode(x, qparams), qparams).tolist() == pytest.approx([x[0].item()] * 4, rel=2e-7)


@EVERY_CONVENTION
@settings(max_examples=5, deadline=None)
@given(st.integers(0, 10**6))
def test_more_bits_never_lower_the_sqnr_of_a_normal_tensor(convention, seed):
    x = torch.randn(4096, generator=torch.Generator().manual_seed(seed))
    if convention == "unsigned":
        x = x.abs()
    ratios = [sqnr(IntegerGrid(bits, convention), x) for bits in range(2, 17)]
    assert ratios == sorted(ratios)
    # Far from the coarsest grids, a bit is worth 6 dB.
    assert ratios[6] - ratios[5] == pytest.approx(6.02, abs=0.7)
    assert ratios[-1] - ratios[6] == pytest.approx(8 * 6.02, abs=0.7)


@pytest.mark.parametrize("bits", [1, 17, 0, -3, True, 2.5, "8", None])
def test_other_numbers_of_bits_are_refused_by_value(bits):
    with pytest.raises(ValueError, match=f"bits={bits!r}"):
        IntegerGrid(bits)


@pytest.mark.parametrize("convention", ["full_range", "restricted", "wide_codes", "pow2_divisor"])
def test_one_symmetric_bit_is_refused_with_its_reason(convention):
    with pytest.raises(ValueError, match="divides by"):
        IntegerGrid(1, convention)


@pytest.mark.parametrize("convention", ["affine", "unsigned"])
def test_one_bit_without_a_sign_has_two_levels(convention):
    grid = IntegerGrid(1, convention)
    qparams = grid.qparams(torch.tensor(0.0), torch.tensor(3.0))
    assert grid.levels(qparams).tolist() == [0, 3]
    assert grid.decode(grid.encode(torch.tensor([-1.0, 1.4, 1.6, 9.0]), qparams), qparams).tolist() == [0, 0, 3, 3]


def test_an_unknown_convention_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="convention='symmetric'.*affine.*full_range.*restricted"):
        IntegerGrid(8, "symmetric")


@pytest.mark.parametrize(
    ("lo", "hi"),
    [(1.0, -1.0), (math.nan, 1.0), (0.0, math.nan), (-math.inf, 0.0), (0.0, math.inf), (math.inf, math.inf)],
)
@EVERY_CONVENTION
def test_ranges_that_are_none_are_refused(convention, lo, hi):
    good = torch.zeros(1)
    with pytest.raises(ValueError, match="finite lo <= hi"):
        IntegerGrid(8, convention).qparams(torch.cat([good, torch.tensor([lo])]), torch.cat([good, torch.tensor([hi])]))


def test_a_range_whose_width_is_no_float32_has_a_symmetric_scale_and_no_affine_one():
    lo, hi = torch.tensor(-3e38), torch.tensor(3e38)
    assert IntegerGrid(8).qparams(lo, hi).scale == hi / 127
    with pytest.raises(ValueError, match="wider than the largest float32"):
        IntegerGrid(8, "affine").qparams(lo, hi)
