"""Bias correction: one pass does what its definition does layer by layer, and means are right after it."""

import copy

import pytest
import torch
from torch import nn

from qexp.models.encoder import bert_tiny_random
from qexp.models.resnet import resnet8
from qexp.quant.bias_correction import correct_biases_
from qexp.quant.convert import calibrating, fold_batchnorm_, layers, quantize_, quantizers, set_mode_
from qexp.quant.dataflow import Dataflow
from qexp.quant.granularity import PerChannel
from qexp.quant.grid import IntegerGrid
from qexp.quant.quantizer import Mode
from qexp.quant.recipe import Recipe, Scheme

pytestmark = pytest.mark.usefixtures("one_thread")
RECIPE = Recipe(Scheme(IntegerGrid(3), PerChannel(0)), Scheme(IntegerGrid(6, "affine")))
DYNAMIC = Recipe(Scheme(IntegerGrid(3), PerChannel(0)), Scheme(IntegerGrid(6, "affine"), dynamic=True))


def images() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    net, x = resnet8(width=4).train(), torch.randn(12, 1, 8, 8)
    with torch.no_grad():
        net(x)
    return net.eval(), x


def texts() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    net, ids = bert_tiny_random(vocabulary=64, length=16).eval(), torch.randint(1, 64, (10, 16))
    ids[2:, 9:] = 0
    return net, ids


def calibrated(net: nn.Module, inputs: torch.Tensor, recipe: Recipe) -> nn.Module:
    model, flow = copy.deepcopy(net), Dataflow(net, inputs[:2])
    fold_batchnorm_(model, flow)
    quantize_(model, recipe, in_float=flow.normalized_additions())
    with torch.no_grad(), calibrating(model):
        model(inputs)
    return model


def weighted(model: nn.Module) -> list[nn.Module]:
    return [layer for _, layer in layers(model) if hasattr(layer, "weight")]


def output(model: nn.Module, layer: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """What a layer gives, its channels last."""
    seen = []
    handle = layer.register_forward_hook(lambda layer, x, y: seen.append(y))
    model(inputs)
    handle.remove()
    (y,) = seen
    return y.movedim(1, -1) if y.dim() == 4 else y


@torch.no_grad()
def layer_by_layer(model: nn.Module, inputs: torch.Tensor, read: torch.Tensor | None) -> None:
    """The definition: the whole network runs again for each layer."""

    def mean(y):
        rows = y[read] if read is not None and y.dim() == 3 else y.reshape(-1, y.shape[-1])
        return rows.double().mean(0)

    modes = [(quantizer, quantizer.mode) for quantizer in quantizers(model)]
    set_mode_(model, Mode.OFF)
    wanted = [mean(output(model, layer, inputs)) for layer in weighted(model)]
    for quantizer, mode in modes:
        quantizer.mode = mode
    for layer, target in zip(weighted(model), wanted, strict=True):
        shift = target - mean(output(model, layer, inputs))
        used = layer.bias_quantizer(layer.bias, layer.input_quantizer, layer.weight_quantizer)
        layer.bias = nn.Parameter((used.double() + shift).float())


@pytest.mark.parametrize("recipe", [RECIPE, DYNAMIC], ids=["static", "dynamic"])
@pytest.mark.parametrize("make", [images, texts])
def test_one_pass_gives_what_one_pass_for_each_layer_gives(make, recipe):
    net, inputs = make()
    model = calibrated(net, inputs, recipe)
    read = inputs.ne(0) if make is texts else None
    naive = copy.deepcopy(model)
    layer_by_layer(naive, inputs, read)
    corrected, kept = correct_biases_(model, inputs, read)
    assert (len(corrected), kept) == (len(weighted(model)), [])
    for ours, theirs in zip(weighted(model), weighted(naive), strict=True):
        assert torch.equal(ours.bias, theirs.bias)
    assert all(quantizer.mode is Mode.QUANTIZE for quantizer in quantizers(model))


@torch.no_grad()
@pytest.mark.parametrize("make", [images, texts])
def test_means_are_those_of_the_float_network_up_to_the_grid_of_the_bias(make):
    net, inputs = make()
    model = calibrated(net, inputs, RECIPE)
    before, shifted = copy.deepcopy(model), copy.deepcopy(model)
    set_mode_(shifted, Mode.OFF)
    correct_biases_(model, inputs)
    worst = []
    for ours, theirs, old in zip(*map(weighted, (model, shifted, before)), strict=True):
        wanted = output(shifted, theirs, inputs).flatten(0, -2).mean(0)
        error = (output(model, ours, inputs).flatten(0, -2).mean(0) - wanted).abs()
        step = ours.bias_quantizer.qparams(ours.input_quantizer, ours.weight_quantizer).scale
        assert (error <= 0.5 * step + 1e-5 * wanted.abs().max()).all()
        worst.append(float((output(before, old, inputs).flatten(0, -2).mean(0) - wanted).abs().max() / error.max()))
    assert min(worst[1:]) > 2  # behind the first layer, whose input is random, there was something to correct


def test_what_nobody_reads_has_no_say():
    net, ids = texts()
    read = ids.ne(0)
    model = calibrated(net, ids, RECIPE)
    other = copy.deepcopy(model)
    correct_biases_(model, ids, read)
    # A hook changes what the first layer gives at padding, far from what it was.
    first = weighted(other)[0]
    first.register_forward_hook(lambda layer, x, y: torch.where(read[..., None], y, 100.0))
    correct_biases_(other, ids, read)
    assert torch.equal(weighted(model)[0].bias, first.bias)
    without = calibrated(net, ids, RECIPE)
    correct_biases_(without, ids)
    assert not torch.equal(weighted(without)[0].bias, first.bias)


def test_a_layer_that_is_used_twice_keeps_its_bias_and_is_named():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.again, self.last = nn.Linear(4, 4), nn.Linear(4, 2, bias=False)

        def forward(self, x):
            return self.last(self.again(self.again(x)))

    torch.manual_seed(0)
    net, x = Twice().eval(), torch.randn(32, 4)
    model = calibrated(net, x, RECIPE)
    assert correct_biases_(model, x) == (["last"], ["again"])
    assert torch.equal(model.again.bias, net.again.bias)
    assert model.last.bias.abs().min() > 0  # it had none
    assert net.last.bias is None


def test_a_bias_that_two_layers_share_is_corrected_for_each():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).eval(), torch.randn(32, 4)
    net[2].bias = net[0].bias
    model = calibrated(net, x, RECIPE)
    assert model[0].bias is model[2].bias
    naive = copy.deepcopy(model)
    naive[2].bias = nn.Parameter(naive[0].bias.detach().clone())
    layer_by_layer(naive, x, None)
    correct_biases_(model, x)
    assert torch.equal(model[0].bias, naive[0].bias) and torch.equal(model[2].bias, naive[2].bias)


def test_an_error_leaves_the_network_quantized():
    net, inputs = images()
    model = calibrated(net, inputs, RECIPE)
    with pytest.raises(RuntimeError):
        correct_biases_(model, inputs[:, :, 0])
    assert all(quantizer.mode is Mode.QUANTIZE for quantizer in quantizers(model))
    assert not any(layer._forward_hooks for layer in model.modules())
