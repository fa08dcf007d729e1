"""Quantized layers against integer arithmetic: int64 sums of codes, int32 bias codes, one float64 product."""

import numpy as np
import pytest
import torch
from torch import nn

from qexp.quant.convert import calibrating, quantize_
from qexp.quant.granularity import PerChannel, PerTensor
from qexp.quant.grid import CONVENTIONS, IntegerGrid
from qexp.quant.layers import Add
from qexp.quant.quantizer import Mode, Quantizer
from qexp.quant.recipe import Recipe, Scheme

RECIPES = {
    "int8": Recipe(Scheme(IntegerGrid(8), PerChannel(0))),
    "int3": Recipe(Scheme(IntegerGrid(3), PerChannel(0)), Scheme(IntegerGrid(3, "affine"))),
    "affine weights": Recipe(Scheme(IntegerGrid(8, "affine")), Scheme(IntegerGrid(8, "full_range"))),
    "per tensor": Recipe(Scheme(IntegerGrid(4, "wide_codes"), PerTensor()), Scheme(IntegerGrid(4, "pow2_divisor"))),
}
EVERY_RECIPE = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


def quantized(layer, x, recipe):
    """The layer, quantized and calibrated on x."""
    model = nn.Sequential(layer).eval()
    quantize_(model, recipe)
    with calibrating(model), torch.no_grad():
        model(x)
    return model[0]


def integers(x, quantizer):
    """q - Z by float32 numpy, as int64."""
    scale, zero_point = quantizer.scale.numpy(), quantizer.zero_point.numpy().astype(np.int64)
    codes = np.rint(x.detach().numpy() / scale).astype(np.int64) + zero_point
    return codes.clip(quantizer.grid.quant_min, quantizer.grid.quant_max) - zero_point


def convolve(x, w, layer):
    """Convolution of integers, groups and all."""
    (stride, _), (pad, _), groups = layer.stride, layer.padding, layer.groups
    x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    windows = np.lib.stride_tricks.sliding_window_view(x, w.shape[2:], axis=(2, 3))[:, :, ::stride, ::stride]
    parts = zip(np.split(windows, groups, 1), np.split(w, groups, 0), strict=True)
    return np.concatenate([np.einsum("nchwij,ocij->nohw", a, b) for a, b in parts], axis=1)


def assert_is_integer_arithmetic(layer, x, multiply, channels):
    """channels is the shape along which output channels lie."""
    steps = layer.input_quantizer.scale.numpy() * layer.weight_quantizer.scale.numpy().reshape(-1)  # float32
    q_x, q_w = integers(x, layer.input_quantizer), integers(layer.weight, layer.weight_quantizer)
    bias = 0 if layer.bias is None else np.rint(layer.bias.detach().numpy() / steps).astype(np.int64)
    steps, bias = (np.broadcast_to(v, layer.weight.shape[:1]).reshape(channels) for v in (steps, bias))
    expected = (multiply(q_x, q_w) + bias) * steps.astype(np.float64)
    # Each of K additions, and of the roundings of a term, costs at most 2^-24 of what is summed.
    terms = layer.weight[0].numel() + 4
    slack = (multiply(abs(q_x), abs(q_w)) + abs(bias)) * steps * terms * 2.0**-24
    with torch.no_grad():
        assert (np.abs(layer(x).numpy() - expected) <= slack).all()


@EVERY_RECIPE
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_is_integer_arithmetic(recipe, bias):
    x = torch.randn(50, 40, generator=torch.Generator().manual_seed(1)) + 0.5
    layer = quantized(nn.Linear(40, 12, bias=bias), x, recipe)
    assert_is_integer_arithmetic(layer, x * 1.2, lambda a, b: a @ b.T, (1, -1))


@EVERY_RECIPE
@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.Conv2d(4, 6, 3, padding=1),
        lambda: nn.Conv2d(4, 8, 3, 2, groups=4),
        lambda: nn.Conv2d(4, 2, 1),
    ],
)
def test_a_convolution_is_integer_arithmetic(recipe, layer):
    x = torch.randn(5, 4, 9, 9, generator=torch.Generator().manual_seed(1)) + 0.5
    layer = quantized(layer(), x, recipe)
    assert_is_integer_arithmetic(layer, x * 1.2, lambda a, b: convolve(a, b, layer), (1, -1, 1, 1))


@EVERY_RECIPE
def test_the_bias_is_on_the_grid_of_the_accumulator(recipe):
    x = torch.rand(20, 5)
    layer = quantized(nn.Linear(5, 7), x, recipe)
    with torch.no_grad():
        seen = layer.bias_quantizer(layer.bias, layer.input_quantizer, layer.weight_quantizer)
    step = layer.input_quantizer.scale.double() * layer.weight_quantizer.scale.double().flatten()
    assert torch.allclose(seen / step, (layer.bias / step).round(), rtol=1e-6, atol=0)
    assert not torch.equal(seen, layer.bias)


def test_the_bias_stays_in_float_where_input_or_weight_does():
    layer = quantized(nn.Linear(5, 7), torch.rand(20, 5), RECIPES["int3"])
    for site in layer.input_quantizer, layer.weight_quantizer:
        site.mode = Mode.OFF
        assert layer.bias_quantizer(layer.bias, layer.input_quantizer, layer.weight_quantizer) is layer.bias
        site.mode = Mode.QUANTIZE


@EVERY_RECIPE
def test_a_nearly_dead_channel_keeps_its_bias(recipe):
    linear = nn.Linear(16, 3)
    with torch.no_grad():
        linear.weight[1] = 1e-12
        linear.bias[:] = torch.tensor([0.3, 0.1, -0.2])
    x = torch.rand(30, 16)
    layer = quantized(linear, x, recipe)
    weight = layer.weight_quantizer(layer.weight).detach()
    with torch.no_grad():
        step = layer.input_quantizer.scale * layer.weight_quantizer.scale.max()
        assert torch.allclose(layer(x)[:, 1], torch.tensor(0.1), rtol=1e-6, atol=step.item() / 2 * 1.001)
    # The others are quantized as without it.
    alone = Quantizer(recipe.weight, linear.weight.shape, is_weight=True)
    alone.calibrate(linear.weight.detach())
    alone.mode = Mode.QUANTIZE
    assert torch.equal(weight[[0, 2]], alone(linear.weight).detach()[[0, 2]])


@pytest.mark.parametrize("weight", [1e-12, 1e-30, 1e-42, 0.0])
@pytest.mark.parametrize("bias", [0.1, 0.0, 1e-30])
@pytest.mark.parametrize("size", [1.0, 1e-5, 1e-8, 0.0])
def test_vanishing_weights_inputs_and_biases_give_finite_outputs(weight, bias, size):
    linear, x = nn.Linear(4, 2), torch.full((3, 4), size)
    with torch.no_grad():
        linear.weight.fill_(weight)
        linear.bias.fill_(bias)
    y = quantized(linear, x, RECIPES["int8"])(x)
    assert torch.allclose(y, torch.tensor(bias), rtol=1e-6, atol=1e-11)


def test_the_gradient_reaches_weight_bias_and_input():
    x = torch.rand(20, 5, requires_grad=True)
    layer = quantized(nn.Linear(5, 7), x.detach(), RECIPES["int8"])
    layer(x).square().sum().backward()
    assert all(t.grad is not None and t.grad.abs().sum() > 0 for t in (x, layer.weight, layer.bias))


def test_an_addition_quantizes_each_input_with_its_own_scale():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.add = nn.Linear(4, 4), Add()

        def forward(self, x):
            return self.add(x, self.fc(x) * 100)

    model, x = Sum().eval(), torch.rand(10, 4)
    quantize_(model, RECIPES["int8"])
    with calibrating(model), torch.no_grad():
        model(x)
    add, a, b = model.add, torch.rand(10, 4), torch.rand(10, 4) * 100
    expected = sum(integers(v, q) * q.scale.double().numpy() for v, q in ((a, add.a_quantizer), (b, add.b_quantizer)))
    assert np.allclose(add(a, b).numpy(), expected, rtol=1e-6, atol=1e-6)
    assert add.a_quantizer.scale < add.b_quantizer.scale / 10


def test_a_pool_quantizes_its_input():
    model, x = nn.Sequential(nn.Conv2d(1, 2, 1), nn.AdaptiveAvgPool2d(1)).eval(), torch.rand(10, 1, 4, 4)
    quantize_(model, RECIPES["int3"])
    with calibrating(model), torch.no_grad():
        model(x)
    pool, y = model[1], torch.rand(10, 2, 4, 4)
    expected = (integers(y, pool.input_quantizer) * pool.input_quantizer.scale.double().numpy()).mean(
        (2, 3), keepdims=True
    )
    assert np.allclose(pool(y).numpy(), expected, atol=1e-6)


def test_an_output_quantizer_puts_the_output_on_its_grid():
    model, x = nn.Sequential(nn.Linear(4, 3)).eval(), torch.rand(10, 4)
    quantize_(model, RECIPES["int8"], outputs=("0",))
    with calibrating(model), torch.no_grad():
        model(x)
    site = model[0].output_quantizer
    with torch.no_grad():
        y = model(x).numpy()
    steps = y / site.scale.double().numpy()
    assert np.allclose(steps, np.rint(steps), atol=1e-4)


def test_an_uncalibrated_quantizer_raises_and_names_itself():
    quantizer = Quantizer(Scheme(), site="stage1.conv.input")
    quantizer.mode = Mode.QUANTIZE
    with pytest.raises(RuntimeError, match="stage1.conv.input.*never calibrated"):
        quantizer(torch.ones(2))


def test_a_quantizer_that_is_off_returns_the_tensor_itself():
    x = torch.ones(2)
    assert Quantizer(Scheme())(x) is x


@pytest.mark.parametrize("grid", [IntegerGrid(b, c) for b in (3, 8) for c in CONVENTIONS], ids=str)
@pytest.mark.parametrize("shape", [(), (6, 4)])
def test_stored_codes_are_the_codes_shifted_into_the_stored_type(grid, shape):
    x = torch.randn(6, 4)
    quantizer = Quantizer(Scheme(grid), shape, is_weight=bool(shape))
    quantizer.start_observing()
    quantizer(x)
    quantizer.calibrate(x if shape else None)
    stored = quantizer.stored_codes(x)
    assert stored.dtype == (torch.int8 if shape else torch.uint8)
    shift = (stored.double() - quantizer.codes(x).double()).unique()
    assert len(shift) == 1
    span = stored.min().item(), stored.max().item()
    assert grid.quant_min + shift.item() <= span[0] < span[1] <= grid.quant_max + shift.item()
