"""Calibrations against numpy, brute force and a plain loop over TensorRT's algorithm."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats
from torch.ao.quantization import MovingAverageMinMaxObserver

from qexp.quant.aciq import ACIQ
from qexp.quant.calibration import Calibration, MinMax, MovingAverage, Percentile
from qexp.quant.entropy import Entropy
from qexp.quant.granularity import PerChannel, PerTensor, PerToken
from qexp.quant.grid import CONVENTIONS, IntegerGrid
from qexp.quant.minifloat import Minifloat
from qexp.quant.recipe import Recipe, Scheme
from qexp.quant.search import MSE, CrossEntropy, HalfQuadratic
from qexp.quant.sketch import Sketch
from qexp.quant.stats import Statistics

pytestmark = pytest.mark.usefixtures("one_thread")

AFFINE, SYMMETRIC = IntegerGrid(8, "affine"), IntegerGrid(8, "restricted")
ALL = [
    MinMax(), MovingAverage(), Percentile(99.0), MSE(20), Entropy(512, 64), ACIQ(), ACIQ("normal"), HalfQuadratic()
]  # fmt: skip
EVERY_CALIBRATION = pytest.mark.parametrize("calibration", ALL, ids=str)
examples = settings(max_examples=60, deadline=None)


def normal(n=20_000):
    return np.random.default_rng(0).normal(size=n).astype(np.float32)


def after_relu(n=20_000):
    return normal(n).clip(min=0) + np.float32(0)


def laplace_with_outliers(n=20_000):
    x = np.random.default_rng(1).laplace(size=n).astype(np.float32)
    x[:5] = [60, -55, 48, 70, -44]
    return x


def with_outliers(n=20_000):
    """A thousandth of the values a thousand times as large as the bulk."""
    x = np.random.default_rng(3).normal(size=n).astype(np.float32)
    x[:: n // 20] *= 1000
    return x


def after_relu_with_outliers(n=20_000):
    return with_outliers(n).clip(min=0) + np.float32(0)


OUTLIERS = pytest.mark.parametrize("draw", [with_outliers, after_relu_with_outliers])
DISTRIBUTIONS = pytest.mark.parametrize("draw", [normal, after_relu, laplace_with_outliers])


def at_hand(x):
    return Statistics.of(torch.as_tensor(x), np.shape(x))


def streamed(x):
    sketch = Sketch()
    for batch in np.array_split(x, 7):
        sketch.update(torch.from_numpy(batch))
    return sketch.compute()


def span(calibration, stats, grid):
    lo, hi = calibration.range(stats, grid)
    assert lo.shape == hi.shape == stats.lo.shape
    return lo.item(), hi.item()


def test_minmax_is_the_extrema():
    x = normal()
    assert span(MinMax(), at_hand(x), AFFINE) == (x.min(), x.max())


percentiles = st.one_of(st.sampled_from([62.5, 75, 87.5, 99.0, 99.9, 99.99, 100]), st.floats(50.1, 100))


@examples
@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=60), percentiles)
def test_percentile_of_a_tensor_is_that_of_numpy(values, percentile):
    share = len(values) * percentile / 100
    # Close to a whole number of values numpy's own rounding decides, unless the product is exact.
    assume(abs(share - round(share)) > 1e-9 or (percentile * 8) % 100 == 0)
    x = np.array(values, np.float32)

    def inverted_cdf(values):
        return np.percentile(values, percentile, method="inverted_cdf")

    bound = inverted_cdf(np.abs(x))
    assert span(Percentile(percentile), at_hand(x), SYMMETRIC) == (-bound, bound)
    assert span(Percentile(percentile), at_hand(x), AFFINE) == (-inverted_cdf(-x), inverted_cdf(x))


@pytest.mark.parametrize("draw", [normal, after_relu, laplace_with_outliers, with_outliers, after_relu_with_outliers])
@pytest.mark.parametrize("percentile", [60.0, 90.0, 99.0, 99.99, 100])
def test_percentile_of_a_stream_is_within_a_cell_of_numpy(draw, percentile):
    """Cells are 2^-11 wide, relative to their values; the extreme ones are exact."""
    x = draw()
    rel = 2.0**-12 if percentile < 95 else 0
    bound = np.percentile(np.abs(x), percentile, method="inverted_cdf")
    assert span(Percentile(percentile), streamed(x), SYMMETRIC) == pytest.approx((-bound, bound), rel=rel, abs=0)
    expected = (
        -np.percentile(-x, percentile, method="inverted_cdf"),
        np.percentile(x, percentile, method="inverted_cdf"),
    )
    assert span(Percentile(percentile), streamed(x), AFFINE) == pytest.approx(expected, rel=rel, abs=0)


def squared_error(x, lo, hi, grid):
    """Mean squared quantization error in float64."""
    if grid.symmetric:
        scale = max(-lo, hi) / {"restricted": grid.quant_max, "full_range": (2**grid.bits - 1) / 2}[grid.convention]
        zero_point = 0
    else:
        scale = (hi - lo) / (2**grid.bits - 1)
        zero_point = -np.rint(lo / scale)
    codes = np.clip(np.rint(x.astype(np.float64) / scale) + zero_point, grid.quant_min, grid.quant_max)
    return np.mean((scale * (codes - zero_point) - x) ** 2)


def brute_force(x, grid, n):
    """Error of every range k/n [min, max], k = 1..n."""
    lo, hi = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    return [squared_error(x, lo * k / n, hi * k / n, grid) for k in range(1, n + 1)]


@DISTRIBUTIONS
@pytest.mark.parametrize(
    "grid", [IntegerGrid(b, c) for b in (2, 4, 8) for c in ("affine", "restricted", "full_range")], ids=str
)
def test_mse_finds_the_candidate_of_brute_force(draw, grid):
    x = draw(2000)
    errors = brute_force(x, grid, 50)
    for stats, slack in (at_hand(x), 1e-5), (streamed(x), 1e-3):
        lo, hi = span(MSE(50), stats, grid)
        k = round(hi / x.max() * 50)
        assert (lo, hi) == pytest.approx((min(x.min(), 0) * k / 50, x.max() * k / 50), rel=1e-6)
        assert errors[k - 1] <= min(errors) * (1 + slack)


def test_mse_clips_outliers_at_few_bits_and_nothing_of_a_uniform_tensor():
    x = laplace_with_outliers(4000)
    assert span(MSE(), at_hand(x), IntegerGrid(4))[1] < 0.75 * x.max()
    uniform = np.linspace(-1, 1, 10_001, dtype=np.float32)
    assert span(MSE(), at_hand(uniform), SYMMETRIC) == (-1, 1)


@OUTLIERS
@pytest.mark.parametrize("grid", [AFFINE, SYMMETRIC, IntegerGrid(4, "affine"), Minifloat(2, 1, "none")], ids=str)
def test_mse_of_a_stream_with_outliers_is_that_of_the_tensor(draw, grid):
    x = draw()

    def error(lo, hi):
        qparams = grid.qparams(torch.tensor(lo), torch.tensor(hi))
        back = grid.decode(grid.encode(torch.from_numpy(x), qparams), qparams)
        return float((back.double() - torch.from_numpy(x).double()).square().sum())

    whole, stream = (error(*span(MSE(), stats, grid)) for stats in (at_hand(x), streamed(x)))
    assert stream == pytest.approx(whole, rel=1e-4)


def tensorrt(values, weights, levels, bins, start):
    """Divergence of every candidate: number of bins -> KL(P || Q), from the description alone."""
    top = np.abs(values).max()
    counts = np.zeros(bins)
    for value, weight in zip(np.abs(values), weights, strict=True):
        counts[min(int(value / top * np.float32(bins)), bins - 1)] += weight
    counts[0] = counts[1]
    divergence = {}
    for i in range(max(start, levels), bins + 1):
        p = counts[:i].copy()
        p[-1] += counts[i:].sum()
        q = np.zeros(i)
        for level in range(levels):
            run = slice(-(-level * i // levels), -(-(level + 1) * i // levels))
            filled = counts[run] > 0
            if filled.any():
                q[run][filled] = counts[run].sum() / filled.sum()
        divergence[i] = scipy_stats.entropy(p, q)
    return divergence


@DISTRIBUTIONS
@pytest.mark.parametrize(
    ("grid", "bins", "start"), [(SYMMETRIC, 260, 64), (AFFINE, 320, 64), (IntegerGrid(4), 512, 100)]
)
def test_entropy_is_the_algorithm_of_tensorrt(draw, grid, bins, start):
    x = draw()
    levels = 2**grid.bits if x.min() >= 0 and not grid.symmetric else 2 ** (grid.bits - 1)
    for stats in at_hand(x), streamed(x):
        divergence = tensorrt(stats.points[0].numpy(), stats.weights[0].numpy(), levels, bins, start)
        lo, hi = span(Entropy(bins, start), stats, grid)
        threshold, top = max(-lo, hi), np.abs(x).max()
        chosen = round(float(threshold / top * bins))
        assert threshold == pytest.approx(top * chosen / bins, rel=1e-6)
        assert divergence[chosen] <= min(divergence.values()) + 1e-9
        assert (lo, hi) == pytest.approx((max(x.min(), -threshold), min(x.max(), threshold)), rel=1e-6)


@OUTLIERS
@pytest.mark.parametrize("grid", [SYMMETRIC, AFFINE], ids=str)
def test_entropy_of_a_stream_with_outliers_is_that_of_the_tensor(draw, grid):
    x = draw()
    levels = 2**grid.bits if x.min() >= 0 and not grid.symmetric else 2 ** (grid.bits - 1)
    divergence = tensorrt(x, np.ones(len(x)), levels, 512, 64)
    lo, hi = span(Entropy(512, 64), streamed(x), grid)
    chosen = round(max(-lo, hi) / np.abs(x).max() * 512)
    # A cell that an edge of the histogram divides may move a few values into the next bin.
    assert divergence[chosen] <= min(divergence.values()) * 1.01 + 1e-6


def test_entropy_with_its_defaults_is_the_algorithm_of_tensorrt():
    x = laplace_with_outliers(2000)
    divergence = tensorrt(x, np.ones(len(x)), 128, 2048, 128)
    chosen = round(span(Entropy(), at_hand(x), SYMMETRIC)[1] / np.abs(x).max() * 2048)
    assert divergence[chosen] <= min(divergence.values()) + 1e-9
    assert chosen < 2048


def test_entropy_keeps_the_whole_range_of_a_uniform_tensor():
    x = (np.arange(512, dtype=np.float32) + 1) / 512
    assert span(Entropy(512, 64), at_hand(np.concatenate([x, -x])), IntegerGrid(6)) == (-1, 1)


def test_entropy_of_a_block_of_one_value_is_that_value():
    x = torch.randn(50_000, 1)  # one by one, this would take minutes
    lo, hi = Entropy().range(Statistics.of(x, (1, 1)), AFFINE)
    assert torch.equal(lo, x[:, 0]) and torch.equal(hi, x[:, 0])


def test_entropy_does_not_see_how_many_zeros_there_are():
    x = after_relu()
    more = np.concatenate([x, np.zeros(200_000, np.float32)])
    assert span(Entropy(), streamed(more), AFFINE) == span(Entropy(), streamed(x), AFFINE)


@EVERY_CALIBRATION
@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("value", [0.0, 2.5, -2.5, 1e-30])
def test_constant_tensors_keep_their_value_in_the_range(calibration, convention, value):
    x = np.full(100, value, np.float32)
    grid = IntegerGrid(8, convention)
    for stats in at_hand(x), streamed(x):
        lo, hi = span(calibration, stats, grid)
        qparams = grid.qparams(torch.tensor(lo), torch.tensor(hi))
        back = grid.decode(grid.encode(torch.from_numpy(x), qparams), qparams)
        # At most one step, which pow2_divisor loses at its maximum; unsigned codes have nothing below zero.
        expected = x.clip(min=0) if convention == "unsigned" else x
        assert back.tolist() == pytest.approx(expected.tolist(), rel=1.01 / 128)


@EVERY_CALIBRATION
@pytest.mark.parametrize("grid", [AFFINE, SYMMETRIC, IntegerGrid(3, "full_range")], ids=str)
def test_rows_are_calibrated_each_for_itself(calibration, grid):
    rows = np.stack([normal(500), after_relu(500), laplace_with_outliers(500) * 1e4, np.zeros(500), normal(500) * 1e-9])
    rows = torch.from_numpy(rows).float()
    lo, hi = calibration.range(Statistics.of(rows, (1, 500)), grid)
    for row, low, high in zip(rows, lo.tolist(), hi.tolist(), strict=True):
        assert span(calibration, at_hand(row), grid) == (low, high)


@pytest.mark.parametrize("calibration", ALL[:-1], ids=str)  # a half-quadratic fit may widen the range by a hair
def test_the_range_lies_within_the_extrema_of_affine_data(calibration):
    for x in normal(), after_relu(), laplace_with_outliers():
        lo, hi = span(calibration, streamed(x), AFFINE)
        assert x.min() <= lo <= hi <= x.max()


def batches(n=40):
    """Batches whose extrema wander, some without a sign."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.randn(n, 1, 1, generator=generator).exp()
    x = torch.randn(n, 60, 4, generator=generator) * scales + torch.randn(n, 1, 4, generator=generator)
    return [batch.abs() if k % 5 == 0 else batch for k, batch in enumerate(x)]


@pytest.mark.parametrize("constant", [0.01, 0.3, 1.0])
def test_moving_averages_are_those_of_torch(constant):
    mine, torchs = Sketch(constant=constant), MovingAverageMinMaxObserver(averaging_constant=constant)
    for batch in batches():
        mine.update(batch)
        torchs(batch)
        expected = torchs.min_val.item(), torchs.max_val.item()
        assert span(MovingAverage(constant), mine.compute(), AFFINE) == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("constant", [0.01, 0.3])
@pytest.mark.parametrize("shards", [2, 5])
def test_moving_averages_of_consecutive_shards_are_those_of_the_whole(constant, shards):
    torchs, merged = MovingAverageMinMaxObserver(averaging_constant=constant), Sketch(constant=constant)
    for batch in batches():
        torchs(batch)
    for k in range(shards):
        shard = Sketch(constant=constant)
        for batch in batches()[len(batches()) * k // shards : len(batches()) * (k + 1) // shards]:
            shard.update(batch)
        merged.merge(shard)
    expected = torchs.min_val.item(), torchs.max_val.item()
    assert span(MovingAverage(constant), merged.compute(), AFFINE) == pytest.approx(expected, rel=1e-4)


def test_moving_averages_of_channels_are_each_its_own():
    channels = Sketch(PerChannel(1), (1, 4), 0.3)
    for batch in batches():
        channels.update(batch)
    lo, hi = MovingAverage(0.3).range(channels.compute(), AFFINE)
    for c in range(4):
        torchs = MovingAverageMinMaxObserver(averaging_constant=0.3)
        for batch in batches():
            torchs(batch[:, c])
        assert (lo[c].item(), hi[c].item()) == pytest.approx((torchs.min_val.item(), torchs.max_val.item()), rel=1e-4)


def test_the_moving_average_of_a_tensor_at_hand_is_its_extrema():
    assert span(MovingAverage(), at_hand(normal()), AFFINE) == (normal().min(), normal().max())


@pytest.mark.parametrize("constant", [0, -0.1, 1.1, True, "0.1", float("nan")])
def test_moving_average_refuses_other_constants(constant):
    with pytest.raises(ValueError, match="constant="):
        MovingAverage(constant)


TOO_COARSE = [
    (IntegerGrid(16, "affine"), MSE()), (IntegerGrid(12), MSE()), (IntegerGrid(16, "affine"), Entropy()),
    (IntegerGrid(16), HalfQuadratic()), (IntegerGrid(9, "affine"), Entropy(256)), (IntegerGrid(12), Entropy(8192)),
]  # fmt: skip


@pytest.mark.parametrize(("grid", "calibration"), TOO_COARSE, ids=str)
def test_a_stream_is_refused_a_calibration_that_cannot_tell_its_steps_apart(grid, calibration):
    for granularity in PerTensor(), PerChannel(1):
        with pytest.raises(ValueError) as refused:
            Recipe(activation=Scheme(grid, granularity, calibration))
        assert str(refused.value).startswith(f"calibration.activation={calibration}: ")
        assert "\n" not in str(refused.value) and str(grid) in str(refused.value)
    with pytest.raises(ValueError, match="calibration.logits="):
        Recipe(activation=Scheme(grid), logits=calibration)


@pytest.mark.parametrize(("grid", "calibration"), TOO_COARSE[:4], ids=str)
def test_what_is_at_hand_as_a_whole_may_have_any_width(grid, calibration):
    assert Recipe(weight=Scheme(grid, calibration=calibration)).weight.grid == grid
    assert Recipe(activation=Scheme(grid, PerToken(), calibration)).activation.grid == grid


@pytest.mark.parametrize("calibration", [MinMax(), MovingAverage(), Percentile(), ACIQ()], ids=str)
def test_calibrations_of_few_numbers_take_16_bits_of_a_stream(calibration):
    recipe = Recipe(activation=Scheme(IntegerGrid(16, "affine"), calibration=calibration), logits=CrossEntropy())
    assert recipe.logits_scheme.grid.bits == 16


@pytest.mark.parametrize("calibration", [MSE(20), Entropy(), HalfQuadratic()], ids=str)
def test_at_the_largest_width_a_stream_is_as_good_as_the_tensor(calibration):
    """The documented limit of 11 bits, where steps of the format are as fine as cells at the top of the range."""
    x, grid = normal(100_000), IntegerGrid(11, "affine")
    Recipe(activation=Scheme(grid, calibration=calibration))
    whole, stream = (squared_error(x, *span(calibration, stats, grid), grid) for stats in (at_hand(x), streamed(x)))
    assert stream == pytest.approx(whole, rel=0.05)


@pytest.mark.parametrize("percentile", [50, 0, 100.1, -1, float("nan"), True, "99"])
def test_percentile_refuses_other_shares(percentile):
    with pytest.raises(ValueError, match="percentile="):
        Percentile(percentile)


@pytest.mark.parametrize("candidates", [1, 0, True, 2.0, "100"])
def test_mse_refuses_other_numbers_of_candidates(candidates):
    with pytest.raises(ValueError, match="candidates="):
        MSE(candidates)


@pytest.mark.parametrize(
    ("bins", "start_bin"), [(255, 128), (2048, 0), (256, 256), (2048.0, 128), (True, 1), (2048, True)]
)
def test_entropy_refuses_other_histograms(bins, start_bin):
    with pytest.raises(ValueError, match="bins=|start_bin="):
        Entropy(bins, start_bin)


def test_a_calibration_without_a_range_says_so():
    with pytest.raises(TypeError, match="must define range"):
        Calibration().range(at_hand(normal()), AFFINE)


def test_calibrations_print_their_choice():
    assert list(map(str, [*ALL, Entropy(), MSE(), Percentile(), MovingAverage(0.3), CrossEntropy()])) == [
        "minmax", "moving_average(0.01)", "percentile(99)", "mse(20)", "entropy(512, 64)", "aciq(laplace)",
        "aciq(normal)", "hqo(0.7)", "entropy", "mse(100)", "percentile(99.99)", "moving_average(0.3)",
        "cross_entropy(100)",
    ]  # fmt: skip
