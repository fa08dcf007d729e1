"""Level formats against published tables, scipy, scikit-learn, enumeration; files of levels."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import integrate
from scipy.stats import laplace, norm
from sklearn.cluster import KMeans as SklearnKMeans

from qexp.quant.affine import QParams
from qexp.quant.codebooks import AdditivePowerOfTwo, Binary, KMeans, NormalFloat, PowerOfTwo
from qexp.quant.granularity import PerChannel, PerTensor
from qexp.quant.grid import CONVENTIONS, IntegerGrid
from qexp.quant.level_list import Levels
from qexp.quant.lloyd_max import LloydMax
from qexp.quant.minifloat import Minifloat
from qexp.quant.quantizer import Mode, Quantizer
from qexp.quant.recipe import Scheme
from qexp.quant.rounding import Stochastic
from qexp.quant.stats import Statistics

ONE = QParams(torch.tensor(1.0), torch.tensor(0.0))
DENSITIES = {"normal": norm, "laplace": laplace(scale=math.sqrt(0.5))}  # of variance 1


def fitted(grid, x):
    """Levels of a k-means grid for one tensor."""
    qparams = grid.qparams(x.min().view(1), x.max().view(1))
    return grid.fit(Statistics.of(x, tuple(x.shape)), qparams)


def brute_force(x, levels):
    """The distance of each value to its nearest level, in float64."""
    return np.abs(np.asarray(x, np.float64)[:, None] - np.asarray(levels, np.float64)[None]).min(1)


def test_nf4_is_the_published_table():
    # Dettmers et al. 2023, appendix E.
    table = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
    table += [-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725]
    table += [0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941]
    table += [0.7229568362236023, 1.0]
    assert list(NormalFloat(4).unit) == table


@pytest.mark.parametrize("bits", range(2, 9))
def test_normal_floats_are_normal_quantiles(bits):
    # The construction of the authors' code (bitsandbytes, create_normal_map), for any number of bits.
    n, half = 2**bits, 2 ** (bits - 1)
    offset = 0.5 * ((1 - 1 / (2 * n)) + (1 - 1 / (2 * (n - 1))))
    positive = norm.ppf(np.linspace(offset, 0.5, half + 1)[:-1])
    negative = -norm.ppf(np.linspace(offset, 0.5, half)[:-1])
    values = np.sort(np.concatenate([positive, [0.0], negative])) / positive.max()
    assert len(values) == n
    assert np.abs(np.array(NormalFloat(bits).unit) - values).max() < 1e-6
    if bits == 4:
        assert offset == pytest.approx(0.9677083, abs=1e-7)  # the constant in that code


def distortion(levels, density):
    """E (x - Q(x))^2 by numerical integration between the nearest-level thresholds."""
    edges = [-np.inf, *((np.array(levels)[1:] + np.array(levels)[:-1]) / 2), np.inf]
    cells = zip(levels, edges[:-1], edges[1:], strict=True)
    return sum(integrate.quad(lambda x, v=v: (x - v) ** 2 * density.pdf(x), a, b, epsabs=1e-13)[0] for v, a, b in cells)


@pytest.mark.parametrize(
    ("bits", "published", "levels"),
    [
        (1, 0.3634, [0.7980]),
        (2, 0.1175, [0.4528, 1.510]),
        (3, 0.03454, [0.2451, 0.7560, 1.344, 2.152]),
        (4, 0.009497, [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733]),
    ],
)
def test_lloyd_max_has_the_distortion_and_levels_of_max_1960(bits, published, levels):
    grid = LloydMax(bits)
    # The last printed digits are off by up to four: by integration it is 0.034548 and 0.0095010.
    assert distortion(grid.unit, norm) == pytest.approx(published, rel=5e-4)
    assert grid.unit[2 ** (bits - 1) :] == pytest.approx(levels, abs=6e-4)


@pytest.mark.parametrize("distribution", DENSITIES)
@pytest.mark.parametrize("bits", range(1, 7))
def test_lloyd_max_levels_are_the_means_of_their_cells(bits, distribution):
    density, levels = DENSITIES[distribution], np.array(LloydMax(bits, distribution).unit)
    assert len(levels) == 2**bits
    assert np.array_equal(levels, -levels[::-1]) and (np.diff(levels) > 0).all()
    edges = [*((levels[1:] + levels[:-1]) / 2)[2 ** (bits - 1) - 1 :], 40.0]
    for level, a, b in zip(levels[2 ** (bits - 1) :], edges[:-1], edges[1:], strict=True):
        moment = integrate.quad(lambda x: x * density.pdf(x), a, b, points=[min(b, a + 3)], epsabs=1e-14)[0]
        assert level == pytest.approx(moment / (density.sf(a) - density.sf(b)), rel=1e-6)
    # Any other place of a level costs more.
    best = distortion(levels, density)
    for i, step in itertools.product({0, len(levels) // 3}, (-1e-2, 1e-2)):
        moved = levels.copy()
        moved[i] += step
        assert distortion(moved, density) > best


def test_the_laplace_distortion_of_one_bit_has_a_closed_form():
    # The mean of |x| is sqrt(1/2), so E x^2 - E|x|^2 = 1/2.
    assert LloydMax(1, "laplace").unit == pytest.approx((-math.sqrt(0.5), math.sqrt(0.5)), rel=1e-12)
    assert distortion(LloydMax(1, "laplace").unit, DENSITIES["laplace"]) == pytest.approx(0.5, rel=1e-8)
    assert LloydMax(1).unit == pytest.approx((-math.sqrt(2 / math.pi), math.sqrt(2 / math.pi)), rel=1e-12)


# The terms a, b, c of Li et al. 2020 as their code lists them, as exponents of 1/2.
APOT_TERMS = {
    2: [[1, 2, 3]],
    3: [[1, 2, 4], [3]],
    4: [[1, 3, 5], [2, 4, 6]],
    5: [[1, 3, 6], [2, 4, 7], [5]],
    6: [[1, 4, 7], [2, 5, 8], [3, 6, 9]],
}


@pytest.mark.parametrize("bits", APOT_TERMS)
def test_apot_levels_are_all_sums_of_their_terms(bits):
    terms = [[0.0, *(2.0**-e for e in exponents)] for exponents in APOT_TERMS[bits]]
    sums = np.array(sorted({sum(parts) for parts in itertools.product(*terms)}))
    assert len(sums) == 2**bits
    expected = sums / sums.max()
    unsigned, signed = np.array(AdditivePowerOfTwo(bits, False).unit), np.array(AdditivePowerOfTwo(bits + 1).unit)
    assert unsigned / unsigned[-1] == pytest.approx(expected, rel=1e-15)
    assert signed[2**bits - 1 :] == pytest.approx(unsigned)
    assert np.array_equal(signed, -signed[::-1])
    # Written as integers, whose largest is their number of smallest steps.
    assert unsigned.tolist() == np.rint(unsigned).tolist() and unsigned[1] == 1


@pytest.mark.parametrize("bits", range(2, 7))
@pytest.mark.parametrize("signed", [True, False])
def test_powers_of_two_double_from_level_to_level(bits, signed):
    levels = np.array(PowerOfTwo(bits, signed).unit)
    positive = levels[levels > 0]
    assert len(positive) == 2 ** (bits - signed) - 1
    assert (positive[1:] == 2 * positive[:-1]).all() and 0.0 in levels
    assert np.array_equal(levels[levels < 0], -positive[::-1] if signed else [])


def test_the_best_binary_scale_is_the_mean_magnitude():
    # Rastegari et al. 2016, section 3.1: sum (x - S sign x)^2 is least at S = mean|x|.
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0)).double()
    error = [float((x - s * x.sign()).square().sum()) for s in np.linspace(0.7, 0.9, 401)]
    best = np.linspace(0.7, 0.9, 401)[int(np.argmin(error))]
    assert best == pytest.approx(float(x.abs().mean()), abs=5e-4)
    codes = Binary().encode(x.float(), ONE)
    assert torch.equal(Binary().decode(codes, ONE), x.sign().float())


LEVEL_GRIDS = [
    Binary(), PowerOfTwo(4), PowerOfTwo(4, False), AdditivePowerOfTwo(4), AdditivePowerOfTwo(6, False), NormalFloat(4),
    NormalFloat(6), KMeans(4), LloydMax(4), LloydMax(3, "laplace"), Minifloat(4, 3, "fn"), Minifloat(2, 1, "none"),
    Levels((-1, -0.3, 0.1, 4)), Levels((-0.5, 0, 0.5, 9)),
]  # fmt: skip


@pytest.mark.parametrize("grid", LEVEL_GRIDS, ids=str)
@pytest.mark.parametrize("size", [1.0, 1e-6, 3e7])
def test_every_value_becomes_a_nearest_level(grid, size):
    x = torch.randn(3000, generator=torch.Generator().manual_seed(1)) * size
    qparams = grid.qparams(-x.abs().max(), x.abs().max())
    levels = grid.levels(qparams)
    values = grid.fake_quantize(x, qparams)
    assert torch.isin(values, levels).all()
    error = (values.double() - x.double()).abs().numpy()
    # The quotient x / S is rounded, and so is the product with S.
    slack = np.abs(x.double().numpy()) * 2.0**-22 + np.abs(values.double().numpy()) * 2.0**-22
    assert (error <= brute_force(x, levels) + slack).all()


@pytest.mark.parametrize("grid", LEVEL_GRIDS, ids=str)
def test_the_largest_level_lies_on_the_range(grid):
    bottom, top = grid.unit[0], grid.unit[-1]
    for lo, hi in (-1.0, 1.0), (-3.0, 0.5), (-0.25, 7.0):
        scale = grid.qparams(torch.tensor(lo), torch.tensor(hi)).scale.item()
        expected = max(hi / top, lo / bottom) if bottom < 0 else hi / top
        assert scale == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("grid", LEVEL_GRIDS, ids=str)
def test_the_gradient_passes_between_the_outermost_levels(grid):
    low, high = grid.unit[0], grid.unit[-1]
    x = torch.tensor([low * 1.01 - 0.01, low, (low + high) / 2, high, high * 1.01]).requires_grad_()
    (grid.fake_quantize(x, ONE) * torch.tensor([5.0, 4, 3, 2, 1])).sum().backward()
    assert x.grad.tolist() == [0, 4, 3, 2, 0]


@pytest.mark.parametrize("grid", LEVEL_GRIDS, ids=str)
def test_clipped_counts_what_lies_half_a_step_outside(grid):
    levels = np.array(grid.unit)
    below, above = levels[0] - (levels[1] - levels[0]) / 2, levels[-1] + (levels[-1] - levels[-2]) / 2
    x = torch.linspace(float(below) * 2 - 1, float(above) * 2 + 1, 1001)
    expected = sum(not below <= v <= above for v in x.double().tolist())
    assert grid.clipped(x, ONE).item() == pytest.approx(expected, abs=2) and expected > 0


STORED = [
    *(IntegerGrid(b, name) for b in (2, 4, 8) for name in CONVENTIONS), Binary(), PowerOfTwo(4), PowerOfTwo(3, False),
    AdditivePowerOfTwo(4), AdditivePowerOfTwo(6), Minifloat(2, 1, "none"), Minifloat(2, 3, "none"),
    Levels((-1.5, -0.25, 0, 2)),
]  # fmt: skip


@pytest.mark.parametrize("grid", STORED, ids=str)
def test_stored_integers_times_the_step_are_the_values_exactly(grid):
    x = torch.randn(500, generator=torch.Generator().manual_seed(2))
    for size in 1.0, 1e-9, 1e20:
        qparams = grid.qparams(x.min() * size, x.max() * size)
        codes = grid.encode(x * size, qparams)
        integers = grid.stored(codes)
        assert grid.stores_as_int8
        assert torch.equal(integers, integers.round())
        steps = integers - qparams.zero_point
        assert torch.equal(steps * (qparams.scale * grid.step), grid.decode(codes, qparams))
        lowest, highest = (0, 255) if isinstance(grid, IntegerGrid) and grid.quant_min == 0 else (-128, 127)
        assert lowest <= integers.min() <= integers.max() <= highest


@pytest.mark.parametrize(
    "grid",
    [NormalFloat(4), KMeans(2), LloydMax(2), Minifloat(4, 3), Minifloat(5, 2, "ieee"), PowerOfTwo(5), IntegerGrid(9)],
    ids=str,
)
def test_values_that_are_no_small_integers_times_a_step_are_not_stored_as_int8(grid):
    assert not grid.stores_as_int8


def mse(x, levels):
    return float(np.square(brute_force(x, levels)).mean())


def samples(kind, n=1000):
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(n, generator=generator)
    humps, outlier = x * 0.1 + x.sign(), x + 20 * (x > 2.5)
    return {"normal": x, "cubed": x**3, "positive": x.abs(), "two humps": humps, "outlier": outlier}[kind]


@pytest.mark.parametrize("kind", ["normal", "cubed", "positive", "two humps", "outlier"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_k_means_equals_that_of_scikit_learn_from_the_same_start(kind, bits):
    x = samples(kind)
    qparams = fitted(KMeans(bits, iterations=1000), x)
    u = (x / qparams.scale).double().numpy().reshape(-1, 1)
    start = np.linspace(u.min(), u.max(), 2**bits).reshape(-1, 1)
    with np.errstate(all="ignore"):
        theirs = SklearnKMeans(2**bits, init=start, n_init=1, max_iter=1000, tol=0, algorithm="lloyd").fit(u)
    ours = qparams.levels.numpy()
    assert (np.diff(ours) > 0).all()
    error, best = mse(u.ravel(), ours), theirs.inertia_ / len(u)
    counts = np.bincount(theirs.labels_, minlength=2**bits)
    # scikit-learn moves a centre that has no points; where all have some from the start, the clusterings are one.
    if len(np.unique(brute_cells(u.ravel(), start.ravel()))) == 2**bits and counts.min() > 0:
        assert ours == pytest.approx(np.sort(theirs.cluster_centers_.ravel()), abs=1e-5)
        assert error == pytest.approx(best, rel=1e-5)
    assert error <= mse(u.ravel(), start.ravel()) + 1e-12


def brute_cells(x, levels):
    return np.abs(x[:, None] - levels[None]).argmin(1)


@pytest.mark.parametrize("kind", ["normal", "cubed", "positive", "two humps", "outlier"])
@pytest.mark.parametrize("bits", range(1, 7))
def test_k_means_is_never_worse_than_evenly_spaced_levels_and_each_level_is_a_mean(kind, bits):
    x = samples(kind)
    qparams = fitted(KMeans(bits), x)
    u = (x / qparams.scale).double().numpy()
    levels = qparams.levels.double().numpy()
    evenly = np.linspace(u.min(), u.max(), 2**bits)
    assert mse(u, levels) <= mse(u, evenly) + 1e-12
    converged = fitted(KMeans(bits, iterations=10_000), x).levels.double().numpy()
    cells = brute_cells(u, converged)
    for i in np.unique(cells):
        assert converged[i] == pytest.approx(u[cells == i].mean(), abs=1e-5)


def test_k_means_finds_the_best_two_clusters_by_brute_force():
    x = torch.tensor([-3.0, -2.9, -2.5, 0.1, 0.2, 0.9, 1.0, 1.3])
    qparams = fitted(KMeans(1), x)
    u = np.sort((x / qparams.scale).double().numpy())
    best = min(u[:i].var() * i + u[i:].var() * (len(u) - i) for i in range(1, len(u)))
    assert np.square(brute_force(u, qparams.levels)).sum() == pytest.approx(best, rel=1e-6)


def test_k_means_levels_are_shared_by_all_blocks_of_a_tensor():
    weight = torch.randn(8, 100, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 8).view(-1, 1)
    quantizer = Quantizer(Scheme(KMeans(3), PerChannel(0)), weight.shape, is_weight=True)
    quantizer.calibrate(weight)
    quantizer.mode = Mode.QUANTIZE
    u = weight / weight.abs().amax(1, keepdim=True)
    together = fitted(KMeans(3), u.flatten() / u.abs().max())
    assert torch.allclose(quantizer.levels, together.levels, atol=1e-6)
    values = quantizer(weight) / quantizer.scale
    assert len(values.unique().tolist()) <= 8 * 4  # eight levels, S x levels / S rounded anew in each row
    assert brute_force(values.flatten().numpy(), quantizer.levels).max() < 1e-6


@pytest.mark.parametrize("rounding", [None, Stochastic(0)], ids=str)
@pytest.mark.parametrize("value", [0.0, 0.7, -3.0, 1e-30])
def test_a_codebook_of_constant_data_keeps_the_constant(rounding, value):
    x = torch.full((4, 6), value)
    scheme = Scheme(KMeans(2), PerTensor()) if rounding is None else Scheme(KMeans(2), PerTensor(), rounding=rounding)
    quantizer = Quantizer(scheme, x.shape, is_weight=True)
    quantizer.calibrate(x)
    quantizer.mode = Mode.QUANTIZE
    assert quantizer(x).flatten().tolist() == pytest.approx([value] * 24, rel=1e-6, abs=1e-35)


def test_fewer_distinct_values_than_levels_are_all_kept():
    x = torch.tensor([-2.0, -1.0, 0.5, 2.0]).repeat(50)
    qparams = fitted(KMeans(4), x)
    assert torch.allclose(KMeans(4).fake_quantize(x, qparams), x, rtol=1e-6)


def levels_file(tmp_path, text):
    path = tmp_path / "my.levels"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_file_of_levels_is_read(tmp_path):
    file = levels_file(tmp_path, "# four levels\n-1.5\n-0.25  # the second\n\n0\n2e0\n")
    grid = Levels(file=file)
    assert grid.unit == (-1.5, -0.25, 0.0, 2.0)
    assert grid.middles is None and (grid.quant_min, grid.quant_max, grid.bits) == (-2, 1, 2)
    x = torch.tensor([-9, -0.9, -0.8, -0.1, 0.99, 1.01])
    assert grid.fake_quantize(x, ONE).tolist() == [-1.5, -1.5, -0.25, 0, 0, 2]


def test_thresholds_of_a_file_decide(tmp_path):
    grid = Levels(file=levels_file(tmp_path, "-1, -0.9\n0 0.125\n1\n"))
    assert grid.unit == (-1, 0, 1) and grid.middles == pytest.approx((-0.9, 0.125))
    x = torch.tensor([-1, -0.91, -0.89, 0.12, 0.125, 0.13, 7])
    # Equation 7: a value on a threshold belongs to the level below; half to even agrees where that one is even.
    assert grid.fake_quantize(x, ONE).tolist() == [-1, -1, 0, 0, 0, 1, 1]
    assert grid == Levels((-1, 0, 1), (-0.9, 0.125))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds 0 levels, at least 2 are needed"),
        ("# nothing\n", "holds 0 levels"),
        ("1.0\n", "holds 1 levels, at least 2 are needed"),
        ("1\n0\n", "levels must increase, but 0 follows 1"),
        ("0\n1\n1\n", "levels must increase, but 1 follows 1"),
        ("0\nhalf\n", "'half' is no level, which must be a finite number"),
        ("0\nnan\n", "'nan' is no level"),
        ("0\ninf\n", "'inf' is no level"),
        ("0\n1e31\n", "between -2.100 and 2.100"),
        ("0\n1e-45\n", "not all within 2.-100"),
        ("0\n1\n1.00000000001\n", "levels as float32 must increase, but 1 follows 1"),
        ("0 0.1 0.2\n1\n", "line 1 holds 3 numbers"),
        ("0 0.5\n1\n2\n", "3 levels need 2 thresholds, not 1"),
        ("0 0.5\n1 1.5\n2 2.5\n", "3 levels need 2 thresholds, not 3"),
        ("0 1.5\n1 1.6\n2\n", "the threshold 1.5 must lie between 0 and 1"),
        ("0 0.9\n1 0.9\n2\n", "thresholds must increase, but 0.9 follows 0.9"),
        ("0 low\n1\n", "'low' is no threshold"),
        ("0 1e300\n1\n", "threshold .* must lie between 0 and 1"),
    ],
)
def test_a_wrong_file_is_refused_in_one_sentence_that_names_it(tmp_path, text, says):
    file = levels_file(tmp_path, text)
    with pytest.raises(ValueError, match=says) as error:
        Levels(file=file)
    message = str(error.value)
    assert message.startswith(f"file={file}: ") and "\n" not in message


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x01")
    for name, why in ("none", "No such file"), ("", "directory"), ("binary", "it is no text"):
        file = tmp_path / name
        with pytest.raises(ValueError, match=why) as error:
            Levels(file=str(file))
        assert str(error.value).startswith(f"file={file}: cannot be read")
    with pytest.raises(ValueError, match="^file=5: must name a text file"):
        Levels(file=5)
    with pytest.raises(ValueError, match="file=None: must name a text file"):
        Levels()


def test_a_device_is_no_file_of_levels():
    with pytest.raises(ValueError, match=r"^file=/dev/zero: cannot be read \(it is no file\)$"):
        Levels(file="/dev/zero")  # it has no end


def test_a_file_may_hold_as_many_levels_as_16_bits_and_no_more(tmp_path):
    lines = "\n".join(map(str, range(2**16 + 1)))
    with pytest.raises(ValueError, match="holds 65537 levels, at most 65536 are allowed"):
        Levels(file=levels_file(tmp_path, lines))
    assert Levels(file=levels_file(tmp_path, lines.rpartition("\n")[0])).bits == 16


def test_the_mark_that_editors_put_in_front_of_a_file_is_no_level(tmp_path):
    assert Levels(file=levels_file(tmp_path, "\ufeff-1\n1\n")).unit == (-1, 1)


def test_a_negative_zero_in_a_file_is_zero(tmp_path):
    grid = Levels(file=levels_file(tmp_path, "-1\n-0.0\n1\n"))
    assert math.copysign(1, grid.unit[1]) == 1
    assert not torch.signbit(grid.fake_quantize(torch.tensor([-0.1, 0.1, -0.0]), ONE)).any()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: PowerOfTwo(1), "bits=1: allowed are the integers 2 to 6"),
        (lambda: PowerOfTwo(7), "bits=7"),
        (lambda: PowerOfTwo(4, 1), "signed=1: allowed are true and false"),
        (lambda: AdditivePowerOfTwo(2), "bits=2: allowed are the integers 3 to 7"),
        (lambda: AdditivePowerOfTwo(7, False), "bits=7: allowed are the integers 2 to 6"),
        (lambda: NormalFloat(9), "bits=9: allowed are the integers 2 to 8"),
        (lambda: KMeans(0), "bits=0: allowed are the integers 1 to 8"),
        (lambda: KMeans(4, 0), "iterations=0"),
        (lambda: KMeans(4, True), "iterations=True"),
        (lambda: LloydMax(7), "bits=7: allowed are the integers 1 to 6"),
        (lambda: LloydMax(4, "cauchy"), "distribution='cauchy': allowed are normal, laplace"),
        (lambda: NormalFloat("4"), "bits='4'"),
    ],
)
def test_options_that_do_not_exist_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()
