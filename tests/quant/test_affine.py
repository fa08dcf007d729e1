"""quantize, dequantize and fake_quantize against rational arithmetic and against torch's own operators."""

import math

import numpy as np
import pytest
import torch

from qexp.quant.affine import QParams, dequantize, fake_quantize, quantize
from qexp.quant.codebooks import AdditivePowerOfTwo, Binary, NormalFloat, PowerOfTwo
from qexp.quant.grid import CONVENTIONS, IntegerGrid
from qexp.quant.layers import Int32
from qexp.quant.level_list import Levels
from qexp.quant.minifloat import Minifloat
from qexp.quant.rounding import Ceil, Floor, HalfAway, HalfEven, Stochastic, TowardZero

EVERY_GRID = pytest.mark.parametrize(
    "grid",
    [IntegerGrid(b, name) for name in CONVENTIONS for b in range(1 if name in ("affine", "unsigned") else 2, 17)],
    ids=str,
)
RANGES = [(-1.0, 1.0), (-0.3, 2.7), (0.0, 6.0), (-5.0, -1.0), (3.0, 4.0), (-1e-38, 1e-38), (-1e30, 2e30)]


def awkward_values(scale, zero_point, grid):
    """Ties and their neighbours for every code and beyond, edges, denormals, zeros, large and random ones."""
    codes = np.arange(grid.quant_min - 3, grid.quant_max + 4)
    if grid.bits > 5:  # odd, so that codes of both parities are among them
        codes = np.unique(np.concatenate([codes[:: 2**grid.bits // 37 | 1], codes[:7], codes[-7:]]))
    codes = codes - zero_point
    ties = ((codes + 0.5) * scale).astype(np.float32)
    near = [ties, np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, np.float32(-np.inf))]
    random = (np.random.default_rng(0).normal(size=60) * scale * 2**grid.bits / 3).astype(np.float32)
    edges = np.array([0.0, -0.0, 1e-45, -1e-45, 1e-39, -1e-39, 2.0**-126, 2e30, -2e30], np.float32)
    values = np.concatenate([*near, (codes * scale).astype(np.float32), random, edges])
    return torch.from_numpy(values[np.abs(values) < 2.0**100 * np.float64(scale)])


@EVERY_GRID
def test_codes_and_values_equal_rational_arithmetic(grid, exact):
    for lo, hi in RANGES if grid.bits <= 8 else RANGES[1::4]:
        qparams = grid.qparams(torch.tensor(lo), torch.tensor(hi))
        scale, zero_point = qparams.scale.item(), int(qparams.zero_point)
        x = awkward_values(np.float32(scale), zero_point, grid)
        codes = quantize(x, qparams, grid)
        lowest, highest = exact.codes_of(grid.bits, grid.convention)
        expected = [exact.quantize(v, scale, zero_point, lowest, highest) for v in x.tolist()]
        assert codes.tolist() == expected
        values = [float(exact.dequantize(code, scale, zero_point)) for code in expected]
        assert dequantize(codes, qparams).tolist() == values
        assert fake_quantize(x, qparams, grid).tolist() == values


def test_the_quotient_is_a_division_and_not_a_product_with_the_reciprocal():
    scale = torch.tensor(float(np.float32(1) / np.float32(255)))
    x = (torch.arange(-20_000, 20_000) + 0.5) * scale
    by_division = np.rint(x.numpy() / scale.numpy())
    by_reciprocal = np.rint(x.numpy() * (np.float32(1) / scale.numpy()))
    wide = type("Wide", (), {"quant_min": -(2**20), "quant_max": 2**20})
    codes = quantize(x, QParams(scale, torch.tensor(0.0)), wide).numpy()
    assert (by_division != by_reciprocal).any()
    assert np.array_equal(codes, by_division)


def test_ties_go_to_the_even_quotient_before_the_zero_point_is_added():
    grid = IntegerGrid(8, "affine")
    codes = quantize(torch.tensor([0.5, 1.5, 2.5, -0.5]), QParams(torch.tensor(1.0), torch.tensor(3.0)), grid)
    assert codes.tolist() == [3, 5, 5, 3]


def test_an_infinite_quotient_saturates_and_a_nan_stays_one():
    grid, qparams = IntegerGrid(8), QParams(torch.tensor(2.0**-126), torch.tensor(0.0))
    assert quantize(torch.tensor([1e30, -1e30]), qparams, grid).tolist() == [127, -127]
    assert fake_quantize(torch.tensor([torch.nan]), qparams, grid).isnan().all()


def rounds_apart(x, scale):
    """Where x / S and x * (1 / S), each rounded to float32, have different nearest integers."""
    x, scale = x.detach().numpy(), np.asarray(scale, np.float32)
    return torch.from_numpy(np.rint(x / scale) != np.rint(x * (np.float32(1) / scale)))


def a_million_values(scale):
    """Normal values, a hundredth of them moved onto ties."""
    x = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(0)) * 60 * scale
    ties = ((x[:, :10] / scale).floor() + 0.5) * scale
    return torch.cat([ties, x[:, 10:]], 1).requires_grad_()


def assert_equal_except_where_the_quotients_round_apart(x, scale, ours, theirs):
    gradients = [torch.autograd.grad((y * torch.arange(1.0, 1001)).sum(), x)[0] for y in (ours, theirs)]
    apart = rounds_apart(x, scale.numpy())
    assert 0 < apart.sum() < 10_000
    assert torch.equal(ours[~apart], theirs[~apart])
    assert torch.equal(gradients[0][~apart], gradients[1][~apart])
    # Where they part, it is by one step.
    assert ((ours - theirs).abs() <= scale * 1.001).all()


@pytest.mark.parametrize(
    ("grid", "zero_point"),
    [(IntegerGrid(8, "affine"), 121), (IntegerGrid(8, "wide_codes"), 0), (IntegerGrid(4), 0)],
)
def test_fake_quantize_equals_torch_per_tensor_in_value_and_gradient(grid, zero_point):
    scale = torch.tensor(0.0123)
    x = a_million_values(scale)
    ours = fake_quantize(x, QParams(scale, torch.tensor(float(zero_point))), grid)
    theirs = torch.fake_quantize_per_tensor_affine(x, scale.item(), zero_point, grid.quant_min, grid.quant_max)
    assert_equal_except_where_the_quotients_round_apart(x, scale, ours, theirs)


@pytest.mark.parametrize(
    "grid",
    [IntegerGrid(8, "affine"), IntegerGrid(8), IntegerGrid(5, "full_range"), IntegerGrid(4, "unsigned")],
    ids=str,
)
def test_fake_quantize_equals_torch_per_channel_in_value_and_gradient(grid):
    generator = torch.Generator().manual_seed(1)
    scale = torch.rand(1000, generator=generator) * 0.02 + 1e-4
    zero_point = torch.randint(0, 256, (1000,), generator=generator) * (not grid.symmetric)
    x = a_million_values(scale[:, None])
    ours = fake_quantize(x, QParams(scale[:, None], zero_point.float()[:, None]), grid)
    theirs = torch.fake_quantize_per_channel_affine(x, scale, zero_point.int(), 0, grid.quant_min, grid.quant_max)
    assert_equal_except_where_the_quotients_round_apart(x, scale[:, None], ours, theirs)


def test_the_gradient_passes_up_to_the_last_tie_and_stops_after_it():
    x = torch.tensor([7.5, 7.4999995, 7.51, 6.0, -7.5, -7.6], requires_grad=True)
    fake_quantize(x, QParams(torch.tensor(1.0), torch.tensor(0.0)), IntegerGrid(4)).sum().backward()
    # 7.5 rounds to the even 8, which is clamped.
    assert x.grad.tolist() == [0, 1, 0, 1, 0, 0]


def test_the_input_is_left_as_it_was():
    x = torch.tensor([0.3, 99.0])
    fake_quantize(x, QParams(torch.tensor(1.0), torch.tensor(0.0)), IntegerGrid(4))
    quantize(x, QParams(torch.tensor(1.0), torch.tensor(0.0)), IntegerGrid(4))
    assert x.tolist() == [torch.tensor(0.3).item(), 99.0]


def definition(x, scale, zero_point, grid, rounding):
    """Values and mask of the gradient as the equations have them, one tensor after the other."""
    quotient = x / scale
    codes = rounding(quotient.clone()) + zero_point
    values = (codes.clamp(grid.quant_min, grid.quant_max) - zero_point) * scale
    # Of a drawn code the gradient is that of the mean, which leaves the range where the quotient does.
    seen = quotient + zero_point if rounding.is_random else codes
    return values + 0.0, ((seen >= grid.quant_min) & (seen <= grid.quant_max)).float()


def edge_values(grid, zero_point, scale):
    """One row for each scale: the ends of the range, of the gradient, and the float neighbours of both."""
    lowest, highest = grid.quant_min, grid.quant_max
    codes = torch.tensor([lowest - 1, lowest - 0.5, lowest, highest, highest + 0.5])
    points = (codes.double() - zero_point.double()) * scale.double()
    points = [points.float()]
    for side in math.inf, -math.inf:
        near = points[0]
        for _ in range(4):
            near = torch.nextafter(near, torch.tensor(side))
            points.append(near)
    random = torch.randn(len(scale), 40, generator=torch.Generator().manual_seed(0)) * scale * 2 ** min(grid.bits, 24)
    fixed = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-38, -1e-38, 3e38, -3e38, math.inf, -math.inf])
    return torch.cat([*points, random, random.floor(), fixed.expand(len(scale), -1)], 1)


def assert_equal_to_the_bit(x, qparams, grid, rounding):
    x = x.clone().requires_grad_()
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(5)) + 3
    values = fake_quantize(x, qparams, grid, rounding)
    (values * weights).masked_fill(x.isinf(), 0).sum().backward()
    expected, inside = definition(x.detach(), qparams.scale, qparams.zero_point, grid, rounding)
    assert torch.equal(values.view(torch.int32), expected.view(torch.int32))
    finite = x.isfinite()
    assert torch.equal(x.grad[finite], (weights * inside)[finite])
    with torch.no_grad():  # keeps nothing, and may overwrite what it likes
        assert torch.equal(fake_quantize(x, qparams, grid, rounding).view(torch.int32), expected.view(torch.int32))


def odd_scales():
    random = torch.exp2(torch.empty(30).uniform_(-60, 60, generator=torch.Generator().manual_seed(2)))
    return torch.cat([random, torch.tensor([1.0, 0.1, 1 / 3, 1 / 255, 2.0**-126, 2.0**-20, 2.0**100])]).view(-1, 1)


class Int32Range(Int32):
    """The range of a bias."""

    bits = 30


FORMS = [
    *(IntegerGrid(b, name) for name in CONVENTIONS for b in (2, 3, 8, 16)), IntegerGrid(1, "affine"), Int32Range,
]  # fmt: skip
EVERY_FORM = pytest.mark.parametrize("grid", FORMS, ids=lambda g: "int32" if g is Int32Range else str(g))


@EVERY_FORM
def test_one_scale_equals_the_definition_in_value_and_gradient(grid):
    scales = odd_scales()
    middle = (grid.quant_min + grid.quant_max + 1) // 2
    zero_points = [0] if grid.quant_min < 0 else [0, 1, middle, grid.quant_max]
    for zero_point in map(float, zero_points):
        rows = edge_values(grid, torch.tensor(zero_point), scales)
        for scale, x in list(zip(scales, rows, strict=True))[:: 4 if zero_point else 1]:
            assert_equal_to_the_bit(x, QParams(scale[0], torch.tensor(zero_point)), grid, HalfEven())


@EVERY_FORM
def test_many_scales_equal_the_definition_in_value_and_gradient(grid):
    scales = odd_scales()
    zero_point = torch.zeros_like(scales)
    assert_equal_to_the_bit(edge_values(grid, zero_point, scales), QParams(scales, zero_point), grid, HalfEven())


@pytest.mark.parametrize("grid", [g for g in FORMS if g is not Int32Range and g.quant_min == 0], ids=str)
def test_many_scales_and_zero_points_equal_the_definition_in_value_and_gradient(grid):
    scales = odd_scales()
    zero_point = torch.arange(len(scales)).view(-1, 1) * 7 % (grid.quant_max + 1)
    qparams = QParams(scales, zero_point.float())
    assert_equal_to_the_bit(edge_values(grid, zero_point, scales), qparams, grid, HalfEven())


@EVERY_FORM
@pytest.mark.parametrize("rounding", [HalfAway(), Floor(), Ceil(), TowardZero(), Stochastic(1)], ids=str)
def test_other_roundings_equal_the_definition_in_value_and_gradient(grid, rounding):
    scales = odd_scales()
    for zero_point in (0,) if grid.quant_min < 0 else (0, grid.quant_max // 2):
        qparams = QParams(scales, torch.full_like(scales, zero_point))
        x = edge_values(grid, qparams.zero_point, scales)
        assert_equal_to_the_bit(x, qparams, grid, rounding)
        assert_equal_to_the_bit(x[3], QParams(scales[3, 0], qparams.zero_point[3, 0]), grid, rounding)


def test_transposed_and_blocked_tensors_equal_the_definition():
    x, scale = torch.randn(6, 8, 5), torch.rand(1, 8, 1) + 0.1
    for grid, zero_point in (IntegerGrid(4), 0.0), (IntegerGrid(4, "affine"), 5.0):
        one, turned = torch.tensor(0.3), x.transpose(0, 1)
        for values, s in (x, scale), (x.transpose(0, 2), scale), (x, one), (turned, one), (turned, scale[:, 0]):
            qparams = QParams(s, torch.full_like(s, zero_point))
            x_leaf = values.detach().clone(memory_format=torch.preserve_format).requires_grad_()
            y = fake_quantize(x_leaf, qparams, grid)
            y.sum().backward()
            expected, inside = definition(values, *qparams[:2], grid, HalfEven())
            assert torch.equal(y, expected) and torch.equal(x_leaf.grad, inside)


@pytest.mark.parametrize("rounding", [HalfEven(), HalfAway(), Ceil(), TowardZero(), Stochastic(0)], ids=str)
@pytest.mark.parametrize(
    "grid",
    [
        IntegerGrid(8), IntegerGrid(2), IntegerGrid(8, "affine"), IntegerGrid(8, "unsigned"), Binary(), PowerOfTwo(4),
        AdditivePowerOfTwo(4), NormalFloat(4), Minifloat(4, 3, "fn"), Levels((-1, -0.0, 1)),
    ],
    ids=str,
)  # fmt: skip
def test_no_result_is_a_negative_zero(grid, rounding):
    x = torch.tensor([-0.0, 0.0, -1e-45, -1e-30, -0.1, -0.3, 0.3, -0.5, -0.9, -5e9, 2.0]).repeat(2, 1)
    for scale in torch.tensor(1.0), torch.tensor([[1.0], [0.7]]):
        for zero_point in (0.0, 3.0) if not grid.symmetric else (0.0,):
            values = grid.fake_quantize(x, QParams(scale, torch.full_like(scale, zero_point)), rounding)
            assert not torch.signbit(values[values == 0]).any()
