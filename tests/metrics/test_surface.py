"""The loss, directions and slices against networks that have those very weights."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qexp.metrics.curvature import hessian_vector_product
from qexp.metrics.surface import Loss, random_direction, slice_1d, slice_2d


def test_the_loss_is_the_mean_over_samples_and_not_over_batches(loss):
    x, y = (torch.cat(part) for part in zip(*loss.batches, strict=True))
    with torch.no_grad():
        logits = loss.model.eval()(x)
    loss.model.train()
    measured = loss.measure()
    assert measured.loss == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-5)
    assert measured.accuracy == (logits.argmax(1) == y).double().mean().item()
    value, slope = loss.gradient()
    assert value == pytest.approx(measured.loss, rel=1e-6)
    F.cross_entropy(loss.model.eval()(x), y).backward()
    for name, parameter in loss.model.named_parameters():
        torch.testing.assert_close(slope[name], parameter.grad, rtol=1e-4, atol=1e-6)
        parameter.grad = None
    loss.model.train()


def test_directions_have_the_norms_of_the_filters_and_leave_biases_and_norms(loss):
    direction, again, other = (random_direction(loss, seed) for seed in (0, 0, 1))
    for name, w in loss.model.named_parameters():
        assert torch.equal(direction[name], again[name])
        if w.dim() == 1:
            assert not direction[name].any()
            continue
        assert not torch.equal(direction[name], other[name])
        for of_direction, of_weight in zip(direction[name], w.detach(), strict=True):
            assert of_direction.norm().item() == pytest.approx(of_weight.norm().item(), rel=1e-5)


def test_a_filter_of_zeros_stands_still(made):
    model = nn.Linear(3, 2)
    model.weight.data[1] = 0
    direction = random_direction(Loss(model, made.random_batches(3, classes=2)), seed=0)
    assert direction["weight"][0].any()
    assert direction["weight"][1].tolist() == [0, 0, 0]


def test_filter_normalised_slices_do_not_see_the_scale_of_a_layer_before_batchnorm(made):
    loss = made.trained(made.convolutional, (1, 8, 8))
    before = slice_1d(loss, random_direction(loss, 0), [-0.5, 0.0, 0.7]).losses
    twin = made.convolutional()
    twin.load_state_dict(loss.model.state_dict())
    with torch.no_grad():
        twin[0].weight *= 8
        twin[0].bias *= 8
        twin[1].running_mean *= 8
        twin[1].running_var.copy_((twin[1].running_var + twin[1].eps) * 64 - twin[1].eps)
    scaled = Loss(twin, loss.batches)
    torch.testing.assert_close(slice_1d(scaled, random_direction(scaled, 0), [-0.5, 0.0, 0.7]).losses, before)


def test_slices_are_the_losses_of_a_network_with_those_weights(made, loss):
    d, e = random_direction(loss, 0), random_direction(loss, 1)
    twin = (made.convolutional if isinstance(loss.model[0], nn.Conv2d) else made.perceptron)()
    before, x, y = made.state(loss.model), [-1.0, 0.0, 0.5], [0.25, 2.0]
    plane, line = slice_2d(loss, (d, e), x, y), slice_1d(loss, d, x)
    assert plane.losses.shape == plane.accuracies.shape == (3, 2)
    for i, j in itertools.product(range(3), range(2)):
        twin.load_state_dict(loss.model.state_dict())
        with torch.no_grad():
            for name, p in twin.named_parameters():
                p += x[i] * d[name] + y[j] * e[name]
        expected = Loss(twin, loss.batches).measure()
        assert plane.losses[i, j].item() == pytest.approx(expected.loss, rel=1e-5)
        assert plane.accuracies[i, j].item() == expected.accuracy
    assert line.losses[1].item() == loss()
    assert line.distances[0].tolist() == x
    made.assert_untouched(loss.model, before)


def test_slices_of_a_quantized_network_are_staircases_and_leave_it_untouched(made):
    model = made.quantized()
    loss, before = Loss(model, made.random_batches(8, classes=4)), made.state(model)
    direction = random_direction(loss, 0)
    near = slice_1d(loss, direction, [0.0, 1e-7]).losses
    assert near[0] == near[1]
    expected = []
    for a in (-0.5, 0.5):
        twin = made.quantized()
        twin.load_state_dict(model.state_dict())
        for name, p in twin.named_parameters():
            p.data += a * direction[name]
        expected.append(Loss(twin, loss.batches)())
    assert slice_1d(loss, direction, [-0.5, 0.5]).losses.tolist() == pytest.approx(expected, rel=1e-6)
    made.assert_untouched(model, before)


def test_parameters_that_are_not_named_or_need_no_gradient_are_fixed(made):
    loss = made.trained(made.perceptron, (8,))
    loss.model[0].requires_grad_(False)
    assert list(loss.parameters) == ["2.weight", "2.bias"]
    assert list(Loss(loss.model, loss.batches, ("0.bias",)).parameters) == ["0.bias"]
    assert len(made.flat(hessian_vector_product(loss, random_direction(loss, 0)))) == 84


def test_losses_of_nothing_are_refused(made):
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="batches"):
        Loss(model, [])
    with pytest.raises(ValueError, match="nope: is no parameter"):
        Loss(model, made.random_batches(3, classes=2), ("nope",))
    with pytest.raises(ValueError, match="nope: is no parameter"):
        Loss(model, made.random_batches(3, classes=2))({"nope": torch.ones(1)})
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        Loss(model.requires_grad_(False), made.random_batches(3, classes=2))
