"""ACIQ: thresholds against the integral of the expected error, published constants and the best ones of samples."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, optimize
from scipy import stats as distributions

from qexp.quant.aciq import ACIQ, optimal_threshold
from qexp.quant.codebooks import NormalFloat
from qexp.quant.grid import IntegerGrid
from qexp.quant.sketch import Sketch
from qexp.quant.stats import Statistics

FAMILIES = {"laplace": distributions.laplace, "normal": distributions.norm}
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)


def expected_error(family, bits, alpha):
    """Squared error of clipping at +-alpha, by quadrature, and step^2 / 12 with the step 2 alpha / 2^bits."""
    density = FAMILIES[family].pdf
    clipped, _ = integrate.quad(lambda x: (x - alpha) ** 2 * density(x), alpha, alpha + 60, epsabs=0, epsrel=1e-11)
    return 2 * clipped + (2 * alpha / 2**bits) ** 2 / 12


@EVERY_FAMILY
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_threshold_is_that_of_least_expected_error(family, bits):
    found = optimize.minimize_scalar(
        lambda alpha: expected_error(family, bits, alpha), bounds=(0.1, 20), method="bounded", options={"xatol": 1e-9}
    )
    alpha = optimal_threshold(family, bits)
    assert alpha == pytest.approx(found.x, rel=1e-4)
    assert expected_error(family, bits, alpha) <= found.fun * (1 + 1e-9)


@pytest.mark.parametrize(("family", "published"), [("laplace", (2.83, 3.89, 5.03)), ("normal", (1.71, 2.15, 2.55))])
def test_the_thresholds_are_those_that_were_published(family, published):
    """Banner et al. 2019 for 2, 3 and 4 bits; they cut or round the last digit."""
    assert [optimal_threshold(family, bits) for bits in (2, 3, 4)] == pytest.approx(published, abs=0.01)


@EVERY_FAMILY
def test_the_threshold_grows_with_every_bit(family):
    thresholds = [optimal_threshold(family, bits) for bits in range(1, 18)]
    assert (np.diff(thresholds) > 0).all()
    assert thresholds[-1] < 64


def drawn(family, n=40_000, seed=0):
    """Samples with mean absolute deviation or standard deviation about 3."""
    rng = np.random.default_rng(seed)
    return (3 * (rng.laplace(size=n) if family == "laplace" else rng.normal(size=n))).astype(np.float32)


def spread_of(family, x):
    """b or sigma around 0."""
    x = x.astype(np.float64)
    return np.abs(x).mean() if family == "laplace" else math.sqrt((x**2).mean())


def at_hand(x):
    return Statistics.of(torch.as_tensor(x), np.shape(x))


def streamed(x):
    sketch = Sketch()
    for batch in np.array_split(x, 5):
        sketch.update(torch.from_numpy(batch))
    return sketch.compute()


def span(family, stats, grid):
    lo, hi = ACIQ(family).range(stats, grid)
    assert lo.shape == hi.shape == stats.lo.shape
    return lo.item(), hi.item()


def squared_error(x, lo, hi, levels):
    """Mean squared error of so many evenly spaced values over [lo, hi]."""
    step = (hi - lo) / (levels - 1)
    codes = np.clip(np.rint((x.astype(np.float64) - lo) / step), 0, levels - 1)
    return ((lo + codes * step - x) ** 2).mean()


@EVERY_FAMILY
@pytest.mark.parametrize("bits", range(2, 9))
def test_samples_of_the_distribution_get_nearly_the_best_threshold(family, bits):
    """The model's error is an approximation: what it finds costs at most 12 % at 2 bits and 5 % from 4 bits on."""
    x, levels = drawn(family), 2**bits
    lo, hi = span(family, at_hand(x), IntegerGrid(bits, "full_range"))
    best = min(squared_error(x, -t, t, levels) for t in np.linspace(0.04, 1, 25) * np.abs(x).max())
    assert lo == -hi
    assert squared_error(x, lo, hi, levels) <= best * {2: 1.12, 3: 1.06}.get(bits, 1.05)
    if bits <= 4:
        assert squared_error(x, lo, hi, levels) < 0.6 * squared_error(x, -np.abs(x).max(), np.abs(x).max(), levels)


@EVERY_FAMILY
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_range_lies_around_the_mean_of_an_affine_grid_and_around_0_of_others(family, bits):
    x = drawn(family) + 2
    alpha = optimal_threshold(family, bits)
    mu = x.astype(np.float64).mean()
    around = spread_of(family, x - mu) * alpha
    lo, hi = span(family, at_hand(x), IntegerGrid(bits, "affine"))
    assert (lo, hi) == pytest.approx((max(mu - around, x.min()), min(mu + around, x.max())), rel=1e-5)
    bound = spread_of(family, x) * alpha
    for grid in IntegerGrid(bits), IntegerGrid(bits, "full_range"):
        lo, hi = span(family, at_hand(x), grid)
        assert (lo, hi) == pytest.approx((max(-bound, x.min()), min(bound, x.max())), rel=1e-5)


@EVERY_FAMILY
def test_a_level_grid_is_a_symmetric_one_of_as_many_bits(family):
    x = at_hand(drawn(family))
    assert span(family, x, NormalFloat(4)) == span(family, x, IntegerGrid(4))


@EVERY_FAMILY
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_data_without_a_sign_are_half_of_the_distribution(family, bits):
    """All levels on one side are those of one more bit; a grid with levels on both sides has no such bit."""
    x = np.abs(drawn(family))
    b = spread_of(family, x)
    for grid, extra in (
        (IntegerGrid(bits, "affine"), 1), (IntegerGrid(bits, "unsigned"), 1), (IntegerGrid(bits), 0)
    ):  # fmt: skip
        lo, hi = span(family, at_hand(x), grid)
        assert lo == pytest.approx(x.min())
        assert hi == pytest.approx(optimal_threshold(family, bits + extra) * b, rel=1e-5)
    levels = 2**bits
    hi = span(family, at_hand(x), IntegerGrid(bits, "affine"))[1]
    best = min(squared_error(x, 0.0, t, levels) for t in np.linspace(0.04, 1, 25) * x.max())
    assert squared_error(x, 0.0, hi, levels) <= 1.08 * best


@EVERY_FAMILY
def test_zeros_after_a_relu_change_nothing(family):
    x = np.abs(drawn(family))
    more = np.concatenate([x, np.zeros(3 * len(x), np.float32)])
    for grid in IntegerGrid(4, "affine"), IntegerGrid(4):
        assert span(family, at_hand(more), grid)[1] == pytest.approx(span(family, at_hand(x), grid)[1], rel=1e-6)


@EVERY_FAMILY
@pytest.mark.parametrize("convention", ["affine", "restricted", "unsigned"])
def test_a_stream_gives_the_range_of_the_tensor_at_hand(family, convention):
    for x in drawn(family), np.abs(drawn(family)), drawn(family) + 5:
        grid = IntegerGrid(4, convention)
        assert span(family, streamed(x), grid) == pytest.approx(span(family, at_hand(x), grid), rel=1e-4, abs=1e-6)


@EVERY_FAMILY
@pytest.mark.parametrize("bits", [2, 8, 16])
def test_the_range_is_cut_to_the_extrema(family, bits):
    uniform = np.linspace(-1, 1, 1001, dtype=np.float32)
    constant = np.full(5, 3, np.float32)
    for x in uniform, uniform + 20, uniform - 20, uniform.clip(min=0), constant, 0 * constant:
        for convention in "affine", "restricted", "unsigned":
            lo, hi = span(family, at_hand(x), IntegerGrid(bits, convention))
            assert x.min() <= lo <= hi <= x.max()


@EVERY_FAMILY
def test_blocks_are_calibrated_each_for_itself(family):
    x = drawn(family, 4000).reshape(4, 1000) * np.array([[1], [100], [0], [1e-9]], np.float32)
    x[1] = np.abs(x[1])
    lo, hi = ACIQ(family).range(Statistics.of(torch.from_numpy(x), (1, 1000)), IntegerGrid(4, "affine"))
    for row, low, high in zip(x, lo.tolist(), hi.tolist(), strict=True):
        assert span(family, at_hand(row), IntegerGrid(4, "affine")) == pytest.approx((low, high), rel=1e-6)


@pytest.mark.parametrize("distribution", ["gauss", "", None, 1])
def test_other_distributions_are_refused(distribution):
    with pytest.raises(ValueError, match="distribution=.*laplace, normal"):
        ACIQ(distribution)
