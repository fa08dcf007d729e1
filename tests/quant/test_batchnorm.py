"""BatchNorm in quantization-aware training, against nn.BatchNorm and against numpy."""

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from qexp.models import mobilenet, resnet8
from qexp.quant.batchnorm import (
    ARMS,
    QuantConvNorm2d,
    QuantLinearNorm,
    freeze_batchnorm_,
    norm_layers,
    reestimate_batchnorm_,
    refold_batchnorm_,
    unfold_batchnorm_,
)
from qexp.quant.convert import calibrating, fold_batchnorm_, layers, prepare_export_, quantize_, quantizers, set_mode_
from qexp.quant.dataflow import Dataflow
from qexp.quant.granularity import PerChannel, PerTensor
from qexp.quant.grid import IntegerGrid
from qexp.quant.layers import QuantConv2d, QuantLinear
from qexp.quant.quantizer import Mode
from qexp.quant.recipe import Recipe, Scheme
from qexp.quant.rounding import Stochastic

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPES = {
    "int8": Recipe(Scheme(IntegerGrid(8), PerChannel(0))),
    "int4 per tensor": Recipe(Scheme(IntegerGrid(4), PerTensor()), Scheme(IntegerGrid(4, "affine"))),
    "stochastic": Recipe(Scheme(IntegerGrid(4), PerChannel(0), rounding=Stochastic(seed=3))),
}
NETS = {
    "conv": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)), (8, 3, 6, 6)),
    "bias": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4, eps=0.1, momentum=0.3)), (8, 3, 7, 7)),
    "depthwise": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=4, padding="same"), nn.BatchNorm2d(4, momentum=None)),
        (8, 4, 5, 5),
    ),
    "grouped": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.BatchNorm2d(8, affine=False)),
        (8, 4, 5, 5),
    ),
    "linear": (lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)), (16, 6)),
}
DEEP = {"resnet8": (lambda: resnet8(width=4), (6, 1, 8, 8)), "mobilenet": (lambda: mobilenet(width=4), (6, 1, 8, 8))}
EVERY_ARM = pytest.mark.parametrize("arm", ARMS)
EVERY_NET = pytest.mark.parametrize("name", NETS)


def random(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.3


def trained(build, shape):
    """A float network whose BatchNorms have seen data and whose gamma and beta are no longer 1 and 0."""
    torch.manual_seed(0)
    net = build().train()
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.uniform_(module.weight, -0.5, 1.5)
            nn.init.normal_(module.bias)
    torch.optim.swa_utils.update_bn([random(shape, seed) for seed in range(3)], net)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.num_batches_tracked.fill_(5)
    return net.eval()


@dataclass
class Made:
    """A float network, its graph, and what it became."""

    net: nn.Module
    flow: Dataflow
    model: nn.Module
    x: torch.Tensor


def folded(name, recipe=RECIPES["int8"]):
    build, shape = (NETS | DEEP)[name]
    net, x = trained(build, shape), random(shape, 9)
    flow, model = Dataflow(net, x), copy.deepcopy(net)
    fold_batchnorm_(model, flow)
    quantize_(model, recipe)
    with calibrating(model), torch.no_grad():
        model(x)
    return Made(net, flow, model, x)


def unfolded(name, arm, recipe=RECIPES["int8"]):
    made = folded(name, recipe)
    unfold_batchnorm_(made.model, made.net, made.flow, arm)
    return made


def train_(made, steps=3):
    """A few steps that move parameters and statistics."""
    made.model.train()
    optimizer = torch.optim.SGD(made.model.parameters(), lr=0.02)
    for seed in range(steps):
        optimizer.zero_grad()
        made.model(random(made.x.shape, 20 + seed)).square().mean().backward()
        optimizer.step()


@torch.no_grad()
def evaluated(made):
    return copy.deepcopy(made.model).eval()(made.x)


def statistics(model):
    return {name: b.clone() for name, b in model.named_buffers() if "running_" in name or "tracked" in name}


def assert_close(found, expected, tolerance=2e-5):
    assert found.shape == expected.shape
    assert (found - expected).norm() <= tolerance * (expected.norm() + 1e-3)


@EVERY_ARM
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", NETS | DEEP)
def test_unfolding_changes_no_bit_of_what_is_evaluated(name, recipe, arm):
    made = folded(name, RECIPES[recipe])
    expected, scales = evaluated(made), {q.site: q.scale.clone() for q in quantizers(made.model)}
    unfold_batchnorm_(made.model, made.net, made.flow, arm)
    assert torch.equal(evaluated(made), expected)
    assert all(torch.equal(q.scale, scales[q.site]) for q in quantizers(made.model))
    assert [n for n, _ in norm_layers(made.model)] == list(made.flow.batchnorms())


@EVERY_ARM
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", NETS | DEEP)
def test_folding_again_after_training_changes_no_bit_and_leaves_plain_layers(name, recipe, arm):
    made, reference = unfolded(name, arm, RECIPES[recipe]), folded(name, RECIPES[recipe])
    before = evaluated(made)
    train_(made)
    expected = evaluated(made)
    assert not torch.equal(expected, before)
    refold_batchnorm_(made.model)
    assert torch.equal(evaluated(made), expected)
    assert [type(m) for m in made.model.modules()] == [type(m) for m in reference.model.modules()]
    assert made.model.state_dict().keys() == reference.model.state_dict().keys()
    for (_, layer), (_, other) in zip(layers(made.model), layers(reference.model), strict=True):
        assert vars(layer).keys() == vars(other).keys()


@EVERY_ARM
def test_a_folded_again_model_is_calibrated_and_prepared_for_export_as_any_other(arm):
    made = unfolded("resnet8", arm)
    train_(made)
    refold_batchnorm_(made.model)
    made.model.eval()
    with calibrating(made.model), torch.no_grad():
        made.model(made.x)
    prepare_export_(made.model)
    assert all(q.mode is Mode.EXPORT for q in quantizers(made.model))


@EVERY_ARM
@EVERY_NET
def test_without_quantization_training_is_that_of_torch(name, arm):
    made = unfolded(name, arm)
    set_mode_(made.model, Mode.OFF)
    net, model = made.net.train(), made.model.train()
    for seed in range(3):
        x, y = random(made.x.shape, seed).requires_grad_(), random(made.x.shape, seed).requires_grad_()
        expected, found = net(x), model(y)
        assert_close(found, expected)
        upstream = random(expected.shape, 40 + seed)
        net.zero_grad()
        model.zero_grad()
        expected.backward(upstream)
        found.backward(upstream)
        assert_close(y.grad, x.grad)
        assert_close(model[0].weight.grad, net[0].weight.grad)
        if net[1].affine:
            assert_close(model[0].norm.weight.grad, net[1].weight.grad)
            assert_close(model[0].norm.bias.grad, net[1].bias.grad)
    assert_close(model[0].norm.running_mean, net[1].running_mean)
    assert_close(model[0].norm.running_var, net[1].running_var)
    assert model[0].norm.num_batches_tracked == net[1].num_batches_tracked
    assert_close(model.eval()(made.x), net.eval()(made.x))


@EVERY_ARM
@pytest.mark.parametrize("name", DEEP)
def test_without_quantization_a_whole_network_trains_as_in_torch(name, arm):
    made = unfolded(name, arm)
    set_mode_(made.model, Mode.OFF)
    expected, found = made.net.train()(made.x), made.model.train()(made.x)
    assert_close(found, expected, 1e-4)
    for output in expected, found:
        output.square().sum().backward()
    for layer, norm in made.flow.batchnorms().items():
        mine, theirs = made.model.get_submodule(layer), made.net.get_submodule(norm)
        assert_close(mine.weight.grad, made.net.get_submodule(layer).weight.grad, 1e-3)
        assert_close(mine.norm.weight.grad, theirs.weight.grad, 1e-3)
        assert_close(mine.norm.running_var, theirs.running_var, 1e-4)


@EVERY_ARM
@pytest.mark.parametrize("name", NETS)
def test_the_training_pass_is_its_equation(name, arm):
    made = unfolded(name, arm)
    layer, norm = made.model[0], made.net[1].double()
    x = layer.input_quantizer(random(made.x.shape, 5))
    products = made.net[0](x).detach()  # of the float weights
    axes = [d for d in range(products.dim()) if d != 1]
    mean, var = products.double().mean(axes), products.double().var(axes, correction=0)
    shape = (1, -1, *[1] * (products.dim() - 2))
    gamma, beta = (1.0, 0.0) if norm.weight is None else (norm.weight.detach(), norm.bias.detach())
    sigma, sigma_batch = (norm.running_var + norm.eps).sqrt(), (var + norm.eps).sqrt()

    bare = copy.deepcopy(made.net[0]).requires_grad_(False)
    used = sigma_batch if arm == "batch" else sigma
    scaled = bare.weight.double() * (gamma / used).view(-1, *[1] * (bare.weight.dim() - 1))
    bare.weight.copy_(layer.weight_quantizer(scaled.float()).detach())
    own, bare.bias = bare.bias, None
    mean = mean if own is None else mean - own.double()
    bias = (beta - mean * gamma / sigma_batch).float()
    if arm == "batch":
        expected = bare(x) + layer.bias_quantizer(bias, layer.input_quantizer, layer.weight_quantizer).view(shape)
    else:
        expected = bare(x) * (sigma / sigma_batch).float().view(shape) + bias.view(shape)
    with torch.no_grad():
        found = layer.train()(random(made.x.shape, 5))
    # A weight or a bias next to a threshold may fall on its other side.
    assert ((found - expected).abs() <= 1e-4).float().mean() >= 0.9


def weights_used(layer, batches):
    """The weights after quantization in training passes over these batches."""
    seen = []
    hook = layer.weight_quantizer.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    with torch.no_grad():
        for x in batches:
            layer(x)
    hook.remove()
    return seen


@pytest.mark.parametrize(("arm", "jitters"), [("batch", True), ("corrected", False)])
def test_only_weights_folded_by_the_batch_jitter_from_batch_to_batch(arm, jitters):
    layer = unfolded("conv", arm).model.train()[0]
    layer.norm.momentum = 0.0
    one, two = weights_used(layer, [random((8, 3, 6, 6), seed) * (1 + seed) for seed in range(2)])
    assert torch.equal(one, two) is not jitters


@EVERY_ARM
def test_quantized_training_moves_every_parameter_by_finite_gradients(arm):
    made = unfolded("mobilenet", arm)
    made.model.train()(made.x).square().mean().backward()
    gradients = {name: p.grad for name, p in made.model.named_parameters()}
    assert all(g is not None and g.isfinite().all() and g.any() for g in gradients.values())


@pytest.mark.parametrize("name", ["conv", "bias", "linear"])
def test_quantized_gradients_are_close_to_those_in_float_where_the_grid_is_fine(name):
    fine = Recipe(Scheme(IntegerGrid(16), PerChannel(0)), Scheme(IntegerGrid(16, "affine")))
    made = unfolded(name, "corrected", fine)
    net, model, x = made.net.train(), made.model.train(), made.x
    for network in net, model:
        network(x).pow(3).sum().backward()
    assert_close(model[0].weight.grad, net[0].weight.grad, 0.01)
    assert_close(model[0].norm.weight.grad, net[1].weight.grad, 0.01)
    assert_close(model[0].norm.bias.grad, net[1].bias.grad, 0.01)


def reloaded(made, arm):
    fresh = unfolded("resnet8", arm)
    fresh.model.load_state_dict(made.model.state_dict())
    return fresh.model


SURVIVES = {
    "itself": lambda made, arm: made.model,
    "train()": lambda made, arm: made.model.eval().train(),
    "deepcopy": lambda made, arm: copy.deepcopy(made.model),
    "state_dict": reloaded,
}


@EVERY_ARM
@pytest.mark.parametrize("how", SURVIVES)
def test_frozen_training_is_evaluation_and_moves_no_statistics(how, arm):
    made = unfolded("resnet8", arm)
    train_(made)
    freeze_batchnorm_(made.model)
    model = SURVIVES[how](made, arm).train()
    expected, before = evaluated(made), statistics(model)
    found = model(made.x)
    assert torch.equal(found, expected)
    assert all(torch.equal(b, before[name]) for name, b in statistics(model).items())
    found.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@EVERY_ARM
def test_what_is_not_frozen_moves_its_statistics_and_trains_by_the_batch(arm):
    made = unfolded("resnet8", arm)
    before = statistics(made.model)
    found = made.model.train()(made.x * 2)
    assert not torch.allclose(found, evaluated(made), rtol=0.01)
    assert not any(torch.equal(b, before[name]) for name, b in statistics(made.model).items())


@EVERY_ARM
@pytest.mark.parametrize("frozen", [True, False])
@EVERY_NET
def test_estimated_statistics_are_those_of_two_passes_over_the_products(name, frozen, arm):
    made = unfolded(name, arm)
    if frozen:
        freeze_batchnorm_(made.model)
    batches = [random(made.x.shape, seed)[: 8 - seed] * (1 + seed) for seed in range(3)]
    layer, means, variances = made.model[0], [], []
    for x in batches:
        with torch.no_grad():
            products = made.net[0](layer.input_quantizer(x)).numpy().astype(np.float64)
        values = np.moveaxis(products, 1, 0).reshape(products.shape[1], -1)
        means.append(values.sum(1) / values.shape[1])
        variances.append(((values - means[-1][:, None]) ** 2).sum(1) / (values.shape[1] - 1))
    reestimate_batchnorm_(made.model, iter(batches))
    np.testing.assert_allclose(layer.norm.running_mean.numpy(), np.mean(means, 0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(layer.norm.running_var.numpy(), np.mean(variances, 0), rtol=1e-5)
    assert layer.norm.num_batches_tracked == 3 and bool(layer.frozen) is frozen


@EVERY_ARM
def test_estimated_statistics_of_a_network_in_float_are_those_of_torch(arm):
    made = unfolded("mobilenet", arm)
    set_mode_(made.model, Mode.OFF)
    batches = [random(made.x.shape, seed) * 2 for seed in range(4)]
    reestimate_batchnorm_(made.model, batches)
    torch.optim.swa_utils.update_bn(batches, made.net)
    for layer, norm in made.flow.batchnorms().items():
        mine, theirs = made.model.get_submodule(layer).norm, made.net.get_submodule(norm)
        assert_close(mine.running_mean, theirs.running_mean, 1e-4)
        assert_close(mine.running_var, theirs.running_var, 1e-4)


def whole_state(model):
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return tensors, [module.training for module in model.modules()], [q.mode for q in quantizers(model)]


def mixed_modes(arm, recipe="stochastic"):
    """Half frozen, partly in training mode, one site off."""
    made = unfolded("resnet8", arm, RECIPES[recipe])
    freeze_batchnorm_(made.model.stage1)
    made.model.train().stage2.eval()
    next(quantizers(made.model)).mode = Mode.OFF
    return made


@EVERY_ARM
def test_estimating_leaves_modes_and_everything_else_alone(arm):
    made = mixed_modes(arm)
    tensors, *modes = whole_state(made.model)
    reestimate_batchnorm_(made.model, [made.x * 2, made.x])
    after, *modes_after = whole_state(made.model)
    assert modes_after == modes
    changed = {name for name in tensors if not torch.equal(tensors[name], after[name])}
    assert changed and all("norm.running_" in name or "tracked" in name for name in changed)
    assert not any("seen" in vars(layer) for _, layer in norm_layers(made.model))


def failing(x):
    yield x
    raise OSError("no more images")


FAILURES = {
    "the data": (failing, OSError, "no more"),
    "no batch": (lambda x: [], ValueError, "none has reached"),
    "a wrong shape": (lambda x: [x, x[:, :, :, :, None]], RuntimeError, "Expected 3D"),
    "one value": (lambda x: [x, x[:1, :, :1, :1]], ValueError, "stem.conv.weight: one value a channel"),
}


@EVERY_ARM
@pytest.mark.parametrize("why", FAILURES)
def test_an_error_while_estimating_restores_everything(why, arm):
    made = mixed_modes(arm)
    batches, error, message = FAILURES[why]
    tensors, *modes = whole_state(made.model)
    with pytest.raises(error, match=message):
        reestimate_batchnorm_(made.model, batches(made.x))
    after, *modes_after = whole_state(made.model)
    assert modes_after == modes and all(torch.equal(tensors[name], after[name]) for name in tensors)
    assert not any("seen" in vars(layer) for _, layer in norm_layers(made.model))


@EVERY_ARM
def test_estimating_helps_where_statistics_are_stale(arm):
    made = unfolded("resnet8", arm)
    expected = evaluated(made)
    for _, layer in norm_layers(made.model):
        layer.norm.running_mean.add_(0.5)
    stale = (evaluated(made) - expected).norm()
    # The batches that the statistics came from in the first place, with quantization now.
    reestimate_batchnorm_(made.model, [random(made.x.shape, seed) for seed in range(3)])
    assert (evaluated(made) - expected).norm() < 0.1 * stale


@EVERY_ARM
def test_unfolded_layers_are_found_as_quantized_layers(arm):
    made, reference = unfolded("resnet8", arm), folded("resnet8")
    assert [n for n, _ in layers(made.model)] == [n for n, _ in layers(reference.model)]
    kinds = {type(layer) for _, layer in norm_layers(made.model)}
    assert kinds == {QuantConvNorm2d}
    assert {type(m) for _, m in norm_layers(unfolded("linear", arm).model)} == {QuantLinearNorm}


def test_models_share_no_tensor_with_the_float_network():
    made = unfolded("resnet8", "corrected")
    before = {name: t.clone() for name, t in made.net.state_dict().items()}
    train_(made)
    assert all(torch.equal(t, before[name]) for name, t in made.net.state_dict().items())
    assert all(p.requires_grad for p in made.model.parameters())


@EVERY_ARM
def test_layers_left_in_float_stay_folded(arm):
    recipe = Recipe(Scheme(IntegerGrid(8), PerChannel(0)), exclude=("stem",))
    made = folded("resnet8", recipe)
    expected = evaluated(made)
    unfold_batchnorm_(made.model, made.net, made.flow, arm)
    assert torch.equal(evaluated(made), expected)
    assert type(made.model.stem.conv) is nn.Conv2d
    assert type(made.model.stage1[0].conv1) is QuantConvNorm2d
    refold_batchnorm_(made.model)
    assert type(made.model.stage1[0].conv1) is QuantConv2d and type(made.model.head.fc) is QuantLinear


def test_another_arm_is_refused():
    made = folded("conv")
    with pytest.raises(ValueError, match="arm='naive': must be one of batch, corrected"):
        unfold_batchnorm_(made.model, made.net, made.flow, "naive")


def change_weight(made):
    with torch.no_grad():
        made.model.stage2[0].conv1.weight.mul_(1.01)


def change_bias(made):
    with torch.no_grad():
        made.model.stage2[0].conv1.bias.add_(0.01)


def change_net(made):
    made.net.stage2[0].bn1.running_var.mul_(1.01)


@pytest.mark.parametrize("change_", [change_weight, change_bias, change_net])
def test_a_layer_that_is_not_the_net_folded_is_refused_by_name_and_nothing_is_unfolded(change_):
    made = folded("resnet8")
    change_(made)
    with pytest.raises(ValueError, match="'stage2.0.conv1': its weights are not those of net with BatchNorm2d"):
        unfold_batchnorm_(made.model, made.net, made.flow, "batch")
    assert not list(norm_layers(made.model))


def test_a_model_that_was_never_folded_is_refused():
    made = folded("conv")
    model = copy.deepcopy(made.net)
    quantize_(model, RECIPES["int8"])
    with pytest.raises(ValueError, match="'0': its weights are not those of net"):
        unfold_batchnorm_(model, made.net, made.flow, "batch")


@EVERY_ARM
def test_one_value_a_channel_is_refused_in_training_as_torch_does(arm):
    made = unfolded("linear", arm)
    with pytest.raises(ValueError, match=r"Expected more than 1 value"):
        made.net.train()(made.x[:1])
    with pytest.raises(ValueError, match=r"0.weight: one value a channel has no variance"):
        made.model.train()(made.x[:1])
    freeze_batchnorm_(made.model)
    assert made.model(made.x[:1]).isfinite().all()


@EVERY_ARM
@pytest.mark.parametrize("steps", [0, 3])
def test_a_dead_channel_stays_finite(arm, steps):
    build, shape = NETS["conv"]
    net = trained(build, shape)
    with torch.no_grad():
        net[0].weight[1] = 0.0
        net[1].running_var[1] = 0.0
    x, model = random(shape, 9), copy.deepcopy(net)
    flow = Dataflow(net, x)
    fold_batchnorm_(model, flow)
    quantize_(model, RECIPES["int8"])
    with calibrating(model), torch.no_grad():
        model(x)
    made = Made(net, flow, model, x)
    unfold_batchnorm_(model, net, flow, arm)
    train_(made, steps)
    output = made.model.train()(x)
    assert output.isfinite().all()
    assert steps or output[:, 1].std() == 0
