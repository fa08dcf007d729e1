"""Ranges found by trying: half-quadratic splitting and the cross-entropy of logits against numpy."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from torch import nn

from qexp.quant.calibration import MinMax
from qexp.quant.codebooks import NormalFloat
from qexp.quant.convert import calibrating, quantize_, quantizers
from qexp.quant.grid import IntegerGrid
from qexp.quant.minifloat import Minifloat
from qexp.quant.quantizer import Mode
from qexp.quant.recipe import Recipe, Scheme
from qexp.quant.search import MSE, CrossEntropy, HalfQuadratic
from qexp.quant.sketch import Sketch
from qexp.quant.stats import Statistics

pytestmark = pytest.mark.usefixtures("one_thread")

UNIFORM = [IntegerGrid(b, c) for b in (2, 3, 4, 8) for c in ("affine", "restricted", "full_range", "unsigned")]
LEVELS = [NormalFloat(4), Minifloat(4, 3, "fn"), Minifloat(2, 1, "none")]
EVERY_GRID = pytest.mark.parametrize("grid", UNIFORM + LEVELS, ids=str)
DRAWS = {
    "normal": lambda rng, n: rng.normal(size=n),
    "relu": lambda rng, n: rng.normal(size=n).clip(min=0),
    "shifted": lambda rng, n: rng.normal(size=n) + 3,
    "outliers": lambda rng, n: np.concatenate([rng.laplace(size=n - 6), [60, -55, 48, 70, -44, 30]]),
}
EVERY_DRAW = pytest.mark.parametrize("draw", DRAWS)


def sample(draw, n=2000):
    return (DRAWS[draw](np.random.default_rng(0), n) * 0.37).astype(np.float32)


def at_hand(x):
    return Statistics.of(torch.as_tensor(x), np.shape(x))


def streamed(x):
    sketch = Sketch()
    for batch in np.array_split(x, 5):
        sketch.update(torch.from_numpy(batch))
    return sketch.compute()


def span(calibration, stats, grid):
    lo, hi = calibration.range(stats, grid)
    assert lo.shape == hi.shape == stats.lo.shape
    return lo.item(), hi.item()


def quantized(x, lo, hi, grid):
    """Values on the grid of the range [lo, hi], and S; float32 as in the equations, by numpy."""
    x, lo, hi = x.astype(np.float32), np.float32(min(lo, 0)), np.float32(max(hi, 0))
    if not isinstance(grid, IntegerGrid):
        levels = np.array(grid.unit, np.float32)
        top, bottom = levels[-1], -levels[0]
        largest = max(top, bottom)
        scale = max(hi * np.float32(largest / top), -lo * np.float32(largest / bottom)) / largest
        middles = (levels[1:].astype(np.float64) + levels[:-1]) / 2
        return (levels[np.searchsorted(middles, x / scale)] * scale).astype(np.float64), float(scale)
    codes = grid.quant_min, grid.quant_max
    if grid.convention == "affine":
        scale = (hi - lo) / np.float32(2**grid.bits - 1)
        zero_point = -np.rint(lo / scale)
    else:
        divisor = {"full_range": (2**grid.bits - 1) / 2}.get(grid.convention, grid.quant_max)
        scale, zero_point = (max(-lo, hi) if grid.signed else hi) / np.float32(divisor), np.float32(0)
    q = np.clip(np.rint(x / scale) + zero_point, *codes)
    return ((q - zero_point) * scale).astype(np.float64), float(scale)


def lp_error(x, lo, hi, grid, p=0.7):
    return (np.abs(x.astype(np.float64) - quantized(x, lo, hi, grid)[0]) ** p).sum()


def half_quadratic(x, grid, p=0.7, beta=10.0, kappa=1.01, steps=20, starts=8):
    """Every range that the equations visit, with its error."""
    lo, hi = np.float32(min(x.min(), 0.0)), np.float32(max(x.max(), 0.0))
    from_each = (np.float32([lo * (k / starts), hi * (k / starts)]) for k in range(1, starts + 1))
    return [visit for span in from_each for visit in descent(x, grid, *map(float, span), p, beta, kappa, steps)]


def descent(x, grid, lo, hi, p, beta, kappa, steps):
    visited = []
    for _ in range(steps + 1):
        back, scale = quantized(x, lo, hi, grid)
        visited.append((lp_error(x, lo, hi, grid, p), lo, hi))
        u = (x - back) / scale
        threshold = p * np.maximum(np.abs(u), 1e-12) ** (p - 1) / beta
        e = scale * np.sign(u) * np.maximum(np.abs(u) - threshold, 0)
        beta *= kappa
        columns = [back, np.ones_like(back)] if grid.convention == "affine" else [back]
        solution, *_ = np.linalg.lstsq(np.stack(columns, 1), x - e, rcond=None)
        c = solution[1] if len(solution) == 2 else 0.0
        lo, hi = min(solution[0] * lo + c, 0.0), max(solution[0] * hi + c, 0.0)
        lo, hi = float(np.float32(lo)), float(np.float32(hi))
    return visited


@EVERY_DRAW
@EVERY_GRID
def test_half_quadratic_is_its_equations_in_numpy(draw, grid):
    x = sample(draw)
    least, lo, hi = min(half_quadratic(x, grid))
    found = span(HalfQuadratic(), at_hand(x), grid)
    assert found == pytest.approx((lo, hi), rel=1e-4, abs=1e-6)
    assert lp_error(x, *found, grid) == pytest.approx(least, rel=1e-3)


@pytest.mark.parametrize(
    "options", [(0.5, 10.0, 1.01, 20), (0.9, 3.0, 1.1, 7, 3), (1.0, 1.0, 1.0, 5, 1), (0.7, 9.0, 1.0, 1, 2)]
)
def test_half_quadratic_means_its_options(options):
    x = sample("outliers")
    for grid in IntegerGrid(3, "affine"), IntegerGrid(3), NormalFloat(4):
        _, lo, hi = min(half_quadratic(x, grid, *options))
        assert span(HalfQuadratic(*options), at_hand(x), grid) == pytest.approx((lo, hi), rel=1e-4, abs=1e-6)


@EVERY_DRAW
@EVERY_GRID
@pytest.mark.parametrize("p", [0.4, 0.7, 1.0])
def test_half_quadratic_is_never_worse_than_minmax(draw, grid, p):
    x = sample(draw)
    error = lp_error(x, *span(HalfQuadratic(p), at_hand(x), grid), grid, p)
    assert error <= lp_error(x, *span(MinMax(), at_hand(x), grid), grid, p) * (1 + 1e-6)


@pytest.mark.parametrize("grid", [*UNIFORM[4:7], *UNIFORM[8:11], *LEVELS[::2]], ids=str)
def test_half_quadratic_leaves_outliers_out(grid):
    """Four values at 8 sigma among two thousand, at 3 and 4 bits."""
    x = np.concatenate([np.random.default_rng(0).normal(size=1996), [8, -8, 7, -7.5]]).astype(np.float32)
    lo, hi = span(HalfQuadratic(), at_hand(x), grid)
    assert max(-lo, hi) < 0.85 * 8
    assert lp_error(x, lo, hi, grid) < 0.9 * lp_error(x, x.min(), x.max(), grid)


@EVERY_DRAW
@EVERY_GRID
@pytest.mark.parametrize("factor", [4.0, 2.0**-40, 3.0])
def test_half_quadratic_does_not_depend_on_the_size_of_values(draw, grid, factor):
    x = sample(draw)
    if factor == 3.0:  # rounds, so that a code may differ
        x = x.astype(np.float16).astype(np.float32)
    lo, hi = span(HalfQuadratic(), at_hand(x), grid)
    bigger = span(HalfQuadratic(), at_hand(x * np.float32(factor)), grid)
    assert bigger == pytest.approx((lo * factor, hi * factor), rel=1e-5 if factor != 3 else 1e-2, abs=0)


@EVERY_DRAW
@pytest.mark.parametrize("grid", [IntegerGrid(4, "affine"), IntegerGrid(4), NormalFloat(4)], ids=str)
def test_half_quadratic_of_a_stream_is_that_of_the_tensor_at_hand(draw, grid):
    """A stream's points are off by 2^-12, which may flip codes; the error of the range is the same."""
    x = sample(draw, 10_000)
    whole, stream = (lp_error(x, *span(HalfQuadratic(), stats, grid), grid) for stats in (at_hand(x), streamed(x)))
    assert stream == pytest.approx(whole, rel=2e-3)


def test_half_quadratic_calibrates_blocks_each_for_itself():
    x = np.stack([sample("normal"), sample("relu") * 1e4, sample("outliers"), np.zeros(2000), np.full(2000, -2.5)])
    x = x.astype(np.float32)
    for grid in IntegerGrid(3, "affine"), IntegerGrid(3), NormalFloat(4):
        lo, hi = HalfQuadratic().range(Statistics.of(torch.from_numpy(x), (1, 2000)), grid)
        for row, low, high in zip(x, lo.tolist(), hi.tolist(), strict=True):
            assert span(HalfQuadratic(), at_hand(row), grid) == pytest.approx((low, high), rel=1e-6)
        assert (lo[3], hi[3]) == (0, 0)
        assert (lo <= 0).all() and (hi >= 0).all()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("p", 0), ("p", 1.1), ("p", True), ("p", "0.7"), ("p", float("nan")), ("beta", 0), ("beta", float("inf")),
        ("kappa", -1), ("kappa", None), ("steps", 0), ("steps", 2.0), ("steps", True), ("starts", 0),
    ],
)  # fmt: skip
def test_half_quadratic_refuses_other_options(field, value):
    with pytest.raises(ValueError, match=f"{field}="):
        HalfQuadratic(**{field: value})


def logits(n=300, classes=10, seed=0):
    """As of a trained network: one large logit in each row, some rows undecided."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, classes)) * 2
    z[np.arange(n), rng.integers(classes, size=n)] += rng.exponential(6, size=n)
    return z.astype(np.float32)


def losses(z, grid, n, rows=None):
    """Cross-entropy of decisions for every range k/n [min, max], k = 1..n."""
    rows = z if rows is None else rows
    lo, hi = min(float(z.min()), 0.0), max(float(z.max()), 0.0)
    target = softmax(rows.astype(np.float64), axis=1)
    ranges = [(np.float32(lo) * np.float32(k / n), np.float32(hi) * np.float32(k / n)) for k in range(1, n + 1)]
    return [-(target * log_softmax(quantized(rows, *r, grid)[0], axis=1)).sum(1).mean() for r in ranges]


def rows_at_hand(z):
    whole = at_hand(z)
    return Statistics(whole.lo, whole.hi, whole.points, whole.weights, whole.average, torch.from_numpy(z))


@EVERY_GRID
@pytest.mark.parametrize("seed", [0, 1])
def test_cross_entropy_finds_the_range_of_brute_force(grid, seed):
    z = logits(seed=seed)
    loss = losses(z, grid, 50)
    lo, hi = span(CrossEntropy(50), rows_at_hand(z), grid)
    k = round(hi / z.max() * 50)
    assert (lo, hi) == pytest.approx((z.min() * k / 50, z.max() * k / 50), rel=1e-6)
    assert loss[k - 1] <= min(loss) + 1e-9


def test_cross_entropy_is_another_range_than_that_of_least_squared_error():
    z = logits()
    grid = IntegerGrid(3, "affine")
    assert span(CrossEntropy(), rows_at_hand(z), grid) != span(MSE(), rows_at_hand(z), grid)


def test_cross_entropy_without_rows_is_refused():
    with pytest.raises(ValueError, match="for calibration.logits alone"):
        CrossEntropy().range(at_hand(logits()), IntegerGrid(8))


@pytest.mark.parametrize("tensor", ["weight", "activation"])
def test_cross_entropy_of_weights_and_activations_is_refused(tensor):
    with pytest.raises(ValueError, match=rf"calibration.{tensor}=cross_entropy.*: is for calibration.logits alone"):
        Recipe(**{tensor: Scheme(calibration=CrossEntropy())})


@pytest.mark.parametrize("candidates", [1, 0, True, 2.0, "100"])
def test_cross_entropy_refuses_other_numbers_of_candidates(candidates):
    with pytest.raises(ValueError, match="candidates="):
        CrossEntropy(candidates)


def small():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 6)).eval()
    with torch.no_grad():
        net[4].weight *= 20
    return net


def images(n):
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bits", [3, 8])
def test_the_logits_of_a_network_get_the_range_of_brute_force(bits):
    """The float logits of all batches, fewer than a sample holds, are what is compared."""
    x, grid = images(200), IntegerGrid(bits, "affine")
    with torch.no_grad():
        z = torch.cat([small()(batch) for batch in x.split(48)]).numpy()
    net, recipe = small(), Recipe(activation=Scheme(grid), logits=CrossEntropy(50))
    quantize_(net, recipe, logits="4")
    with calibrating(net), torch.no_grad():
        for batch in x.split(48):
            net(batch)
    site = net[4].output_quantizer
    assert str(site.scheme) == f"{grid}, per_tensor, cross_entropy(50)"
    loss, k = losses(z, grid, 50), round(site.hi.item() / z.max() * 50)
    assert (site.lo.item(), site.hi.item()) == pytest.approx((z.min() * k / 50, z.max() * k / 50), rel=1e-5)
    assert loss[k - 1] <= min(loss) + 1e-9
    levels = site.grid.levels(site.qparams).flatten()
    with torch.no_grad():
        assert torch.isin(net(x), levels).all()
    assert all(q.mode is Mode.QUANTIZE for q in quantizers(net))


def test_of_many_logits_a_sample_decides_whatever_the_order_of_batches():
    ranges = []
    x = images(1500)
    for order in x, x.flip(0):
        net = small()
        quantize_(net, Recipe(logits=CrossEntropy(20)), logits="4")
        with calibrating(net), torch.no_grad():
            for batch in order.split(100):
                net(batch)
            assert len(net[4].output_quantizer.observer.compute().rows) == 1024
        ranges.append((net[4].output_quantizer.lo.item(), net[4].output_quantizer.hi.item()))
    assert ranges[0] == pytest.approx(ranges[1], rel=1e-5)


def test_other_calibrations_serve_the_logits_too():
    net = small()
    quantize_(net, Recipe(logits=MinMax()), logits="4")
    with calibrating(net), torch.no_grad():
        net(images(20))
    with torch.no_grad():
        z = small()(images(20))
    assert (net[4].output_quantizer.lo, net[4].output_quantizer.hi) == (z.min(), z.max())
