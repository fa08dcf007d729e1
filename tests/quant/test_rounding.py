"""Rounding modes against exact decimals and fractions, alone and through every format; the random one by statistics."""

import math
from decimal import ROUND_CEILING, ROUND_DOWN, ROUND_FLOOR, ROUND_HALF_EVEN, ROUND_HALF_UP, Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qexp.quant.affine import QParams
from qexp.quant.codebooks import AdditivePowerOfTwo, Binary, KMeans, NormalFloat, PowerOfTwo
from qexp.quant.grid import CONVENTIONS, IntegerGrid
from qexp.quant.level_list import Levels
from qexp.quant.lloyd_max import LloydMax
from qexp.quant.minifloat import Minifloat
from qexp.quant.quantizer import Mode, Quantizer
from qexp.quant.recipe import Scheme
from qexp.quant.rounding import Ceil, Floor, HalfAway, HalfEven, Rounding, Stochastic, TowardZero

# The name in the decimal module; its ROUND_HALF_UP takes ties away from zero.
DETERMINISTIC = {
    HalfEven(): ROUND_HALF_EVEN,
    HalfAway(): ROUND_HALF_UP,
    Floor(): ROUND_FLOOR,
    Ceil(): ROUND_CEILING,
    TowardZero(): ROUND_DOWN,
}
EVERY_MODE = pytest.mark.parametrize("mode", DETERMINISTIC, ids=str)
FORMATS = [
    *(IntegerGrid(b, name) for name in CONVENTIONS for b in (2, 3, 8)), IntegerGrid(1, "affine"), IntegerGrid(12),
    Binary(), PowerOfTwo(4), PowerOfTwo(3, signed=False), AdditivePowerOfTwo(4), AdditivePowerOfTwo(5, signed=False),
    NormalFloat(4), NormalFloat(3), KMeans(3), LloydMax(3), LloydMax(2, "laplace"), Minifloat(4, 3, "fn"),
    Minifloat(5, 2, "ieee"), Minifloat(2, 1, "none"), Minifloat(3, 0, "none"), Levels((-3, -0.1, 0.0, 0.3, 5)),
    Levels((0.1, 0.2, 0.7)), Levels((-5, -3, -0.7)),
]  # fmt: skip
EVERY_FORMAT = pytest.mark.parametrize("grid", FORMATS, ids=str)
ONE = QParams(torch.tensor(1.0), torch.tensor(0.0))


def down_and_up(x):
    return torch.nextafter(x, torch.tensor(-math.inf)), torch.nextafter(x, torch.tensor(math.inf))


def awkward():
    """Integers, ties and their float neighbours, and numbers that x + 0.5 would round wrongly."""
    large = torch.tensor([2.0**22, 2.0**22 + 1, 2.0**23 - 1, 2.0**23, 2.0**23 + 1])
    whole = torch.cat([torch.arange(-40.0, 41), large])
    points = torch.cat([whole, whole + 0.5, torch.tensor([0.49999997, 1e-45, 1e-38, 2.0**24, 2.0**31, 2.0**100])])
    points = torch.cat([points, *down_and_up(points)])
    random = torch.randn(2000, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.linspace(-3, 6, 2000)
    return torch.cat([points, -points, random])


def levels_of(grid):
    """All values for S = 1, and the codes."""
    return grid.levels(ONE), torch.arange(grid.quant_min, grid.quant_max + 1)


def around(levels, fine=151):
    """Levels, the middles between them, both with their float neighbours, values between and beyond."""
    middles = ((levels[1:].double() + levels[:-1].double()) / 2).float()
    points = torch.cat([levels, middles])
    span = float(levels[-1] - levels[0])
    even = torch.linspace(float(levels[0]) - span / 9, float(levels[-1]) + span / 9, fine)
    return torch.cat([points, *down_and_up(points), even, torch.tensor([0.0, -0.0, math.inf, -math.inf])])


@EVERY_MODE
def test_integers_equal_those_of_the_decimal_module(mode):
    x = awkward()
    expected = [int(Decimal(v).to_integral_value(DETERMINISTIC[mode])) for v in x.tolist()]
    assert [int(v) for v in mode(x.clone()).tolist()] == expected


@EVERY_MODE
def test_the_named_hard_cases(mode):
    x = torch.tensor([-0.5, 0.5, 0.49999997, -0.49999997, 1.5, -1.5, 2.5, 2.0**23, -(2.0**23), 2.0**23 - 0.5])
    expected = {
        "half_even": [0, 0, 0, 0, 2, -2, 2, 2**23, -(2**23), 2**23],
        "half_away": [-1, 1, 0, 0, 2, -2, 3, 2**23, -(2**23), 2**23],
        "floor": [-1, 0, 0, -1, 1, -2, 2, 2**23, -(2**23), 2**23 - 1],
        "ceil": [0, 1, 1, 0, 2, -1, 3, 2**23, -(2**23), 2**23],
        "toward_zero": [0, 0, 0, 0, 1, -1, 2, 2**23, -(2**23), 2**23 - 1],
    }
    assert mode(x).tolist() == expected[str(mode)]


@EVERY_FORMAT
def test_infinite_quotients_saturate_and_a_nan_stays_one(grid):
    qparams = QParams(torch.tensor(2.0**-126), torch.tensor(0.0))
    for mode in [*DETERMINISTIC, Stochastic()]:
        codes = grid.encode(torch.tensor([1e30, -1e30]), qparams, mode)
        assert codes.tolist() == [grid.quant_max, grid.quant_min], mode
        assert grid.fake_quantize(torch.tensor([math.nan, 0.0]), ONE, mode).isnan().tolist() == [True, False], mode


def assert_takes_the_exact_neighbour(grid, mode, fine=151):
    levels, codes = levels_of(grid)
    exact, names = [Fraction(v) for v in levels.tolist()], codes.tolist()
    if len(exact) > 300:  # the ends and the middle of the 12-bit grid
        keep = [*range(40), *range(len(exact) // 2 - 20, len(exact) // 2 + 20), *range(len(exact) - 40, len(exact))]
    else:
        keep = range(len(exact))
    x = around(levels[list(keep)], fine)
    x = x[x.isfinite()]
    found = grid.encode(x, ONE, mode).tolist()
    values = np.asarray(levels.double())
    for value, code in zip(x.tolist(), found, strict=True):
        value = Fraction(value)
        i = int(np.searchsorted(values, float(value), side="right")) - 1
        if value == exact[i] or i < 0 or i == len(exact) - 1:
            assert code == names[max(i, 0)]
            continue
        below, above = value - exact[i], exact[i + 1] - value
        if isinstance(mode, (Floor, Ceil)):
            up = isinstance(mode, Ceil)
        elif isinstance(mode, TowardZero) and (exact[i] >= 0 or exact[i + 1] <= 0):
            up = exact[i + 1] <= 0
        elif below != above:
            up = below > above
        elif isinstance(mode, HalfAway):
            up = value >= 0
        else:  # the even code
            up = names[i] % 2 != 0
        assert code == names[i + up], (mode, float(value))


@EVERY_FORMAT
def test_every_format_takes_the_exact_neighbour(grid):
    for mode in DETERMINISTIC:
        assert_takes_the_exact_neighbour(grid, mode)


@EVERY_FORMAT
@pytest.mark.parametrize("mode", [HalfEven(), Stochastic(3)], ids=str)
def test_grid_points_survive_and_all_others_become_a_neighbour(grid, mode):
    levels, codes = levels_of(grid)
    assert torch.equal(grid.encode(levels, ONE, mode), codes.float())
    x = around(levels)
    x = x[x.isfinite()]
    values = grid.decode(grid.encode(x, ONE, mode), ONE)
    inside = (x >= levels[0]) & (x <= levels[-1])
    above = torch.searchsorted(levels, x).clamp(max=len(levels) - 1)
    below = (torch.searchsorted(levels, x, right=True) - 1).clamp(min=0)
    assert ((values == levels[below]) | (values == levels[above]))[inside].all()
    assert (values[x > levels[-1]] == levels[-1]).all()
    assert (values[x < levels[0]] == levels[0]).all()
    assert torch.equal(grid.fake_quantize(x, ONE, mode), values)


@EVERY_FORMAT
def test_rounding_is_monotone(grid):
    x = around(levels_of(grid)[0]).sort().values
    for mode in DETERMINISTIC:
        assert (grid.encode(x, ONE, mode).diff() >= 0).all(), mode


# Of numbers from 2^-10 to 2^13 the middles are exact in float64.
@settings(max_examples=60, deadline=None)
@given(st.sets(st.floats(2.0**-10, 4096, width=32)), st.sets(st.floats(-4096, -(2.0**-10), width=32)), st.booleans())
def test_any_list_of_levels_is_searched_exactly(above, below, with_zero):
    grid = Levels(tuple(sorted(above | below | {5000.0, -5000.0} | ({0.0} if with_zero else set()))))
    for mode in DETERMINISTIC:
        assert_takes_the_exact_neighbour(grid, mode, fine=5)


@pytest.mark.parametrize("fraction", [0.5, 0.1, 0.9, 2.0**-10, 1 / 3])
@pytest.mark.parametrize("whole", [0, -3, 500])
def test_the_expectation_of_a_stochastic_value_is_the_value(fraction, whole):
    x = torch.full((1_000_000,), whole + fraction)
    up = Stochastic(seed=7).at("fc", 3)(x) - math.floor(whole)
    assert set(up.unique().tolist()) <= {0, 1}
    # In float32 the fractional part is what is left of it beside the whole; draws are multiples of 2^-24.
    probability = float(x[0]) - whole
    sigma = math.sqrt(probability * (1 - probability) / len(x))
    assert abs(float(up.double().mean()) - probability) < 5 * sigma + 2.0**-24


@pytest.mark.parametrize("fraction", [0.0625, 0.5, 0.8125])
def test_the_probability_depends_on_the_fractional_part_alone(fraction):
    mode = Stochastic(seed=1)
    ups = [mode(torch.full((4096,), whole + fraction)) - whole for whole in (0.0, 1, 77, 4095, -1, -60, -4096)]
    assert all(torch.equal(up, ups[0]) for up in ups)
    # A value of the other sign goes up with the other probability: the fractional part is above the floor.
    mirrored = mode(torch.full((1_000_000,), -fraction))
    assert float(-mirrored.mean()) == pytest.approx(fraction, abs=5 * 0.5 / 1000)


@EVERY_FORMAT
def test_the_expectation_on_a_format_is_the_value(grid):
    levels, _ = levels_of(grid)
    n = 30_000
    places = [(0, 0.3), (len(levels) // 2 - 1, 0.75), (len(levels) - 2, 0.1)]
    for i, share in places:
        below, above = levels[i].double(), levels[i + 1].double()
        x = (below + share * (above - below)).float()
        seen = grid.decode(grid.encode(x.expand(n), ONE, Stochastic(5)), ONE).double().mean()
        # The share is added to the index of the level, in float32.
        slack = 5 * 0.5 / math.sqrt(n) + len(levels) * 2.0**-24
        assert abs(float((seen - x.double()) / (above - below))) < slack


def test_draws_are_uniform_and_of_24_bits():
    draws = Stochastic(seed=0).at("conv1.weight", 12).uniform(torch.empty(1_000_000)).double()
    assert 0 <= float(draws.min()) < 1e-5 and 1 - 1e-5 < float(draws.max()) < 1
    assert torch.equal(draws * 2**24, (draws * 2**24).round())
    cells = 1024
    for values in draws, (draws * 4096) % 1:  # the upper and the lower bits
        counts = torch.histc(values, cells, 0, 1)
        chi_square = float(((counts - 1e6 / cells).square() / (1e6 / cells)).sum())
        assert abs(chi_square - (cells - 1)) < 5 * math.sqrt(2 * (cells - 1))
    pairs = torch.histc((draws[1:] * 32).floor() * 32 + (draws[:-1] * 32).floor(), 1024, 0, 1024)
    chi_square = float(((pairs - 999_999 / 1024).square() / (999_999 / 1024)).sum())
    assert abs(chi_square - 1023) < 5 * math.sqrt(2 * 1023)


def test_draws_of_other_sites_steps_seeds_and_elements_are_uncorrelated():
    n = 200_000
    modes = [
        Stochastic(seed).at(site, step) for seed in (0, 1) for site in ("fc.weight", "fc.input") for step in (0, 1, 2)
    ]
    draws = torch.stack([mode.uniform(torch.empty(n)) for mode in [*modes, Stochastic(0), Stochastic(1)]])
    correlations = np.corrcoef(draws.numpy())
    assert np.abs(correlations - np.eye(len(draws))).max() < 5 / math.sqrt(n)
    for lag in 1, 2, 3, 64, 1000:
        assert abs(np.corrcoef(draws[0, lag:], draws[0, :-lag])[0, 1]) < 5 / math.sqrt(n)


def test_the_same_seed_repeats_to_the_bit_whatever_else_draws():
    x = torch.randn(64, 33)
    first = Stochastic(4).at("a", 9)(x)
    torch.manual_seed(123)
    torch.rand(7)
    assert torch.equal(Stochastic(4).at("a", 9)(x), first)
    others = Stochastic(5).at("a", 9), Stochastic(4).at("b", 9), Stochastic(4).at("a", 10)
    assert all(not torch.equal(other(x), first) for other in others)


def test_a_quantizer_draws_anew_in_every_training_step_and_alike_in_all_evaluations():
    quantizer = Quantizer(Scheme(IntegerGrid(4), rounding=Stochastic(0)), (40, 40), "fc.weight", is_weight=True)
    weight = torch.randn(40, 40, generator=torch.Generator().manual_seed(0))
    quantizer.calibrate(weight)
    quantizer.mode = Mode.QUANTIZE
    quantizer.train()
    one, two = quantizer(weight), quantizer(weight)
    assert not torch.equal(one, two)
    quantizer.eval()
    assert torch.equal(quantizer(weight), quantizer(weight))
    twin = Quantizer(Scheme(IntegerGrid(4), rounding=Stochastic(0)), (40, 40), "fc.weight", is_weight=True)
    twin.calibrate(weight)
    twin.mode = Mode.QUANTIZE
    twin.train()
    assert torch.equal(twin(weight), one)
    # The straight-through gradient is that of other modes.
    x = weight.clone().requires_grad_()
    twin(x).sum().backward()
    assert set(x.grad.unique().tolist()) <= {0.0, 1.0} and x.grad.mean() > 0.99


@pytest.mark.parametrize("seed", [-1, True, 1.0, "0", None])
def test_a_seed_that_is_none_is_refused(seed):
    with pytest.raises(ValueError, match="seed="):
        Stochastic(seed)


def test_a_mode_that_lacks_a_method_says_so():
    with pytest.raises(TypeError, match="__call__"):
        Rounding()(torch.zeros(1))
    with pytest.raises(TypeError, match="goes_up_at"):
        Rounding().goes_up_at(*[torch.zeros(1)] * 4)
    with pytest.raises(TypeError, match="no thresholds"):
        Stochastic().goes_up_at(*[torch.zeros(1)] * 4)
