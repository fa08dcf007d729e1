"""Flatness against dense Hessians, closed forms, and the corners of a cell one by one."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from qexp.metrics.flatness import (
    Flatness,
    Loss,
    flatness,
    half_steps,
    half_width,
    hessian_vector_product,
    random_direction,
    sam_sharpness,
    slice_1d,
    slice_2d,
    top_eigenvalue,
    trace,
    worst_in_cell,
)
from qexp.quant.codebooks import NormalFloat
from qexp.quant.convert import calibrating, quantize_, quantizers, set_mode_
from qexp.quant.granularity import PerGroup, PerTensor
from qexp.quant.grid import IntegerGrid
from qexp.quant.quantizer import Mode
from qexp.quant.recipe import Recipe, Scheme


def random_batches(*shape: int, classes: int, sizes=(40, 24), seed: int = 0):
    random = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, *shape, generator=random), torch.randint(classes, (n,), generator=random)) for n in sizes]


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(24, 4),
    )  # fmt: skip


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 20), nn.Tanh(), nn.Linear(20, 4))


def trained(make, shape, seed: int = 0) -> Loss:
    """A network near a minimum, as those that are measured."""
    torch.manual_seed(seed)
    model, batches = make(), random_batches(*shape, classes=4)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(40):
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    optimizer.zero_grad()
    return Loss(model, batches)


NETWORKS = [(convolutional, (1, 8, 8)), (perceptron, (8,))]
network = pytest.mark.parametrize("loss", [trained(*each) for each in NETWORKS], ids=["convolutional", "perceptron"])


def dense_hessian(loss: Loss) -> torch.Tensor:
    """By torch.autograd.functional, of one batch that holds all samples, in float64."""
    model, named = loss.model, dict(loss.model.named_parameters())
    x, y = (torch.cat(part) for part in zip(*loss.batches, strict=True))
    sizes = [p.numel() for p in named.values()]

    def value(flat):
        parts = zip(named.items(), flat.split(sizes), strict=True)
        weights = {n: part.view_as(p) for (n, p), part in parts}
        buffers = {n: b.double() if b.is_floating_point() else b for n, b in model.named_buffers()}
        return F.cross_entropy(functional_call(model.eval(), (weights, buffers), (x.double(),)), y)

    flat = torch.cat([p.detach().flatten() for p in named.values()]).double()
    hessian = torch.autograd.functional.hessian(value, flat, vectorize=True)
    model.train()
    return hessian


def flat(direction) -> torch.Tensor:
    return torch.cat([d.flatten() for d in direction.values()]).double()


def state(model: nn.Module):
    tensors = {n: t.clone() for n, t in model.state_dict().items()}
    return tensors, [m.training for m in model.modules()], [(p.data_ptr(), p.grad) for p in model.parameters()]


def assert_untouched(model: nn.Module, before) -> None:
    after = state(model)
    assert all(torch.equal(tensor, after[0][name]) for name, tensor in before[0].items())
    assert after[1:] == before[1:]


class Quadratic(nn.Module):
    """Two logits (f, 0) with f = ln(e^q - 1) and q = w^T A w / 2 + b w + 1, so that the loss for label 1 is q."""

    def __init__(self, curvature: torch.Tensor, slope: torch.Tensor):
        super().__init__()
        self.curvature, self.slope, self.w = curvature, slope, nn.Parameter(torch.zeros(len(slope)))

    def forward(self, x):
        q = self.w @ self.curvature @ self.w / 2 + self.slope @ self.w + 1
        f = torch.log(torch.expm1(q)).expand(len(x), 1)
        return torch.cat([f, torch.zeros_like(f)], 1)


def quadratic(eigenvalues, slope, seed: int = 0) -> Loss:
    random = torch.Generator().manual_seed(seed)
    n = len(eigenvalues)
    basis = torch.linalg.qr(torch.randn(n, n, generator=random, dtype=torch.float64)).Q
    curvature = basis @ torch.tensor(eigenvalues, dtype=torch.float64).diag() @ basis.T
    model = Quadratic(curvature, torch.as_tensor(slope, dtype=torch.float64)).double()
    return Loss(model, [(torch.zeros(3, 1), torch.ones(3, dtype=torch.int64))])


def logistic(features: int, classes: int, seed: int) -> Loss:
    """Convex in its weights, in float64."""
    torch.manual_seed(seed)
    batches = random_batches(features, classes=classes, sizes=(7, 5), seed=seed)
    model = nn.Linear(features, classes).double()
    return Loss(model, [(x.double(), y) for x, y in batches])


@network
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


@network
def test_hessian_products_top_eigenvalue_and_trace_are_those_of_the_dense_hessian(loss):
    hessian = dense_hessian(loss)
    assert len(hessian) < 2000
    v = random_direction(loss, seed=5)
    torch.testing.assert_close(flat(hessian_vector_product(loss, v)), hessian @ flat(v), rtol=1e-3, atol=1e-5)
    eigenvalues = torch.linalg.eigvalsh(hessian)
    for seed in range(3):
        found = top_eigenvalue(loss, seed)
        assert found.value == pytest.approx(eigenvalues[-1].item(), rel=0.01)
        assert found.residual <= 1e-3 * found.value
        assert found.iterations < 60
        estimate = trace(loss, samples=150, seed=seed)
        assert estimate.value == pytest.approx(hessian.trace().item(), rel=0.01)
        assert 0 < estimate.error < 0.01 * estimate.value
    exact = trace(loss, samples=len(hessian))
    assert exact.error == 0
    assert exact.value == pytest.approx(hessian.trace().item(), rel=1e-4)


@pytest.mark.parametrize("sketched", [0, 2])
def test_the_standard_error_is_the_spread_of_the_estimates(sketched):
    eigenvalues = [8.0, 4, 2, 1, 1, 1, 0.5, 0.25, -0.5, -1, 0.1, 0.2]
    found = [trace(quadratic(eigenvalues, [0.0] * 12), 10, seed, sketched) for seed in range(100)]
    values, errors = torch.tensor(found, dtype=torch.float64).T
    assert abs(values.mean() - sum(eigenvalues)) < 4 * values.std() / 10
    assert errors.square().mean().sqrt() == pytest.approx(values.std().item(), rel=0.25)


def test_of_signs_a_diagonal_hessian_has_no_error():
    loss = quadratic([3.0, 2, 1, 0.5], [0.0] * 4)
    loss.model.curvature = torch.tensor([3.0, 2, 1, 0.5], dtype=torch.float64).diag()
    assert trace(loss, samples=3, sketched=0) == pytest.approx((6.5, 0), abs=1e-9)


@pytest.mark.parametrize("eigenvalues", [[5.0, 4.9, 1, 0, -3], [0.5, 0.5, 0.5, 0.5, 0.5], [0.1, -9, -2, -1, -4]])
def test_the_top_eigenvalue_is_the_largest_and_not_that_of_largest_size(eigenvalues):
    found = top_eigenvalue(quadratic(eigenvalues, [0.1] * 5), seed=1, tolerance=1e-8)
    assert found.value == pytest.approx(max(eigenvalues), rel=1e-6)
    assert found.iterations <= 5


def test_without_time_to_converge_the_residual_bounds_the_distance_to_an_eigenvalue():
    eigenvalues = [2.0 ** -(i / 4) for i in range(40)]
    found = top_eigenvalue(quadratic(eigenvalues, [0.0] * 40), max_iterations=4, tolerance=1e-12)
    assert found.iterations == 4
    assert found.residual > 1e-3
    assert min(abs(found.value - e) for e in eigenvalues) <= found.residual


@pytest.mark.parametrize(("samples", "sketched"), [(1, 0), (10, 5), (10, -1)])
def test_samples_that_give_no_standard_error_are_refused(samples, sketched):
    with pytest.raises(ValueError, match=f"samples={samples}"):
        trace(quadratic([1.0] * 20, [0.0] * 20), samples, sketched=sketched)


@network
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


def test_a_filter_of_zeros_stands_still():
    model = nn.Linear(3, 2)
    model.weight.data[1] = 0
    direction = random_direction(Loss(model, random_batches(3, classes=2)), seed=0)
    assert direction["weight"][0].any()
    assert direction["weight"][1].tolist() == [0, 0, 0]


def test_filter_normalised_slices_do_not_see_the_scale_of_a_layer_before_batchnorm():
    loss = trained(convolutional, (1, 8, 8))
    before = slice_1d(loss, random_direction(loss, 0), [-0.5, 0.0, 0.7]).losses
    twin = convolutional()
    twin.load_state_dict(loss.model.state_dict())
    with torch.no_grad():
        twin[0].weight *= 8
        twin[0].bias *= 8
        twin[1].running_mean *= 8
        twin[1].running_var.copy_((twin[1].running_var + twin[1].eps) * 64 - twin[1].eps)
    scaled = Loss(twin, loss.batches)
    torch.testing.assert_close(slice_1d(scaled, random_direction(scaled, 0), [-0.5, 0.0, 0.7]).losses, before)


@network
def test_slices_are_the_losses_of_a_network_with_those_weights(loss):
    d, e = random_direction(loss, 0), random_direction(loss, 1)
    twin = (convolutional if isinstance(loss.model[0], nn.Conv2d) else perceptron)()
    before, x, y = state(loss.model), [-1.0, 0.0, 0.5], [0.25, 2.0]
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
    assert_untouched(loss.model, before)


def quantized(granularity=None, grid=None) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    weight = Scheme(grid or IntegerGrid(3), **({"granularity": granularity} if granularity else {}))
    quantize_(model, Recipe(weight=weight))
    with calibrating(model), torch.no_grad():
        model(random_batches(8, classes=4)[0][0])
    return model


def test_slices_of_a_quantized_network_are_staircases_and_leave_it_untouched():
    model = quantized()
    loss, before = Loss(model, random_batches(8, classes=4)), state(model)
    direction = random_direction(loss, 0)
    near = slice_1d(loss, direction, [0.0, 1e-7]).losses
    assert near[0] == near[1]
    expected = []
    for a in (-0.5, 0.5):
        twin = quantized()
        twin.load_state_dict(model.state_dict())
        for name, p in twin.named_parameters():
            p.data += a * direction[name]
        expected.append(Loss(twin, loss.batches)())
    assert slice_1d(loss, direction, [-0.5, 0.5]).losses.tolist() == pytest.approx(expected, rel=1e-6)
    assert_untouched(model, before)


class Breaks(nn.Linear):
    def forward(self, x):
        if not torch.equal(x, torch.zeros_like(x)):
            raise RuntimeError("stop")
        return super().forward(x)


def test_an_error_leaves_the_model_untouched():
    model = Breaks(3, 2).train()
    loss = Loss(model, [(torch.zeros(2, 3), torch.tensor([0, 1])), (torch.ones(2, 3), torch.tensor([0, 1]))])
    before = state(model)
    for call in (
        lambda: slice_1d(loss, random_direction(loss, 0), [0.5]), lambda: sam_sharpness(loss),
        lambda: worst_in_cell(loss, {"weight": torch.ones(2, 3)}), lambda: top_eigenvalue(loss),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="stop"):
            call()
        assert_untouched(model, before)


@network
def test_nothing_that_measures_touches_the_network(loss):
    before = state(loss.model)
    cell = {"0.weight": torch.full_like(loss.parameters["0.weight"], 0.05)}
    flatness(loss.model, loss.batches, cell, seed=0)
    assert_untouched(loss.model, before)


def test_parameters_that_are_not_named_or_need_no_gradient_are_fixed():
    loss = trained(perceptron, (8,))
    loss.model[0].requires_grad_(False)
    assert list(loss.parameters) == ["2.weight", "2.bias"]
    assert list(Loss(loss.model, loss.batches, ("0.bias",)).parameters) == ["0.bias"]
    assert len(flat(hessian_vector_product(loss, random_direction(loss, 0)))) == 84


def test_sharpness_of_a_quadratic_has_the_closed_form_and_more_steps_find_the_maximum():
    eigenvalues, slope, rho = [4.0, 1.0, 0.5], torch.tensor([0.1, 0.2, -0.4], dtype=torch.float64), 0.3
    loss = quadratic(eigenvalues, slope)
    unit = slope / slope.norm()
    first = rho * slope.norm() + rho**2 / 2 * unit @ loss.model.curvature @ unit
    assert sam_sharpness(loss, rho) == pytest.approx(first.item(), rel=1e-6)
    # The maximum on the sphere solves (m I - A) e = b with |e| = rho, m above every eigenvalue; found by bisection.
    identity, low, high = torch.eye(3, dtype=torch.float64), 4.0, 100.0
    for _ in range(100):
        middle = (low + high) / 2
        e = torch.linalg.solve(middle * identity - loss.model.curvature, slope)
        low, high = (middle, high) if e.norm() > rho else (low, middle)
    largest = slope @ e + e @ loss.model.curvature @ e / 2
    assert first < largest
    assert sam_sharpness(loss, rho, steps=200) == pytest.approx(largest.item(), rel=1e-4)


def test_at_a_stationary_point_sam_goes_nowhere():
    assert sam_sharpness(quadratic([4.0, 1.0], [0.0, 0.0])) == 0


@pytest.mark.parametrize(("rho", "steps"), [(-0.1, 1), (0.1, 0)])
def test_balls_and_steps_that_are_none_are_refused(rho, steps):
    with pytest.raises(ValueError, match=f"rho={rho}, steps={steps}"):
        sam_sharpness(quadratic([1.0], [1.0]), rho, steps)


@pytest.mark.parametrize("seed", range(6))
def test_the_worst_in_a_cell_is_that_of_its_corners_where_the_loss_is_convex(seed):
    loss = logistic(3, 2, seed)
    random = torch.Generator().manual_seed(seed)
    halves = {n: torch.rand(w.shape, generator=random, dtype=torch.float64) * 2 for n, w in loss.parameters.items()}
    losses = []
    for signs in itertools.product([-1.0, 1.0], repeat=8):
        d = flat(halves) * torch.tensor(signs, dtype=torch.float64)
        losses.append(loss({"weight": d[:6].view(2, 3), "bias": d[6:]}))
    assert worst_in_cell(loss, halves, seed=seed) == pytest.approx(max(losses) - loss(), rel=1e-6)


def test_what_is_found_in_a_cell_lies_in_it_and_grows_with_it():
    loss = trained(perceptron, (8,))
    cells = [{n: torch.full_like(w, half) for n, w in loss.parameters.items()} for half in (0.0, 0.01, 0.1)]
    found = [worst_in_cell(loss, cell) for cell in cells]
    assert found[0] == 0 < found[1] < found[2]
    # To first order it is the sum of S_i / 2 |g_i|.
    small = worst_in_cell(loss, {n: torch.full_like(w, 1e-3) for n, w in loss.parameters.items()})
    assert small >= 1e-3 * flat(loss.gradient()[1]).abs().sum().item()
    only = {"2.bias": torch.full((4,), 0.1)}
    assert worst_in_cell(loss, only) <= 0.2  # a logit that moves by h moves the loss by no more than 2 h


def test_along_one_weight_the_worst_is_at_the_higher_end():
    loss = quadratic([2.0], [0.1])
    cell = {"w": torch.tensor([0.5], dtype=torch.float64)}
    assert worst_in_cell(loss, cell) == pytest.approx(0.25 + 0.05)
    loss.model.w.data[:] = -0.06  # the slope is -0.02 here, and the corner to the right lies higher
    loss.model.slope = torch.tensor([0.11], dtype=torch.float64)
    right = (0.44**2 - 0.06**2) + 0.11 * 0.5
    left = (0.56**2 - 0.06**2) - 0.11 * 0.5
    assert worst_in_cell(loss, cell) == pytest.approx(max(left, right))


def test_the_worst_is_the_highest_on_the_way_and_not_where_it_ends():
    loss = quadratic([-2.0], [0.5])  # w / 2 - w^2, whose ascent goes back and forth between 0 and 0.3
    assert worst_in_cell(loss, {"w": torch.tensor([0.6], dtype=torch.float64)}) == pytest.approx(0.06)


@pytest.mark.parametrize(
    ("cell", "why"),
    [({"nope": torch.ones(2)}, "nope: is no parameter"), ({"bias": torch.ones(3)}, "bias: half steps"),
     ({"bias": torch.tensor([0.1, -0.1])}, "bias: half steps"), ({"bias": torch.full((2,), math.nan)}, "bias")],
)  # fmt: skip
def test_cells_that_are_none_are_refused(cell, why):
    with pytest.raises(ValueError, match=why):
        worst_in_cell(logistic(3, 2, 0), cell)


@pytest.mark.parametrize("granularity", [None, PerTensor(), PerGroup(4), PerGroup(5, pad=True)], ids=str)
def test_moving_a_weight_by_less_than_half_a_step_from_its_level_changes_no_code(granularity):
    model = quantized(granularity)
    halves = half_steps(model)
    assert list(halves) == ["0.weight", "2.weight"]
    for name, half in halves.items():
        layer = model.get_submodule(name.rpartition(".")[0])
        level = layer.weight_quantizer(layer.weight).detach()
        inside = layer.weight_quantizer.codes(level * 0.5).abs() < 2  # below the outermost level
        codes = layer.weight_quantizer.codes(level)
        for sign in -1, 1:
            assert torch.equal(layer.weight_quantizer.codes(level + 0.99 * sign * half), codes.clamp(-3, 3))
            beyond = layer.weight_quantizer.codes(level + 1.01 * sign * half)
            assert (beyond != codes)[inside & (codes.abs() < 3)].all()


def test_at_the_half_width_the_mean_square_of_the_moves_is_that_of_half_steps():
    model = quantized()
    loss, halves = Loss(model, random_batches(8, classes=4)), half_steps(model)
    direction = random_direction(loss, 0)
    moved = {n: half_width(direction, halves) * direction[n] for n in halves}
    assert flat(moved).square().mean().item() == pytest.approx(flat(halves).square().mean().item(), rel=1e-6)
    with pytest.raises(ValueError, match="direction: moves no weight"):
        half_width({n: torch.zeros_like(h) for n, h in halves.items()}, halves)


def test_cells_of_levels_that_are_no_step_apart_are_refused():
    with pytest.raises(ValueError, match="0.weight: the cells of"):
        half_steps(quantized(grid=NormalFloat(4)))


def test_a_network_that_quantizes_has_no_hessian_until_its_quantizers_are_off():
    model = quantized()
    loss = Loss(model, random_batches(8, classes=4))
    with pytest.raises(ValueError, match="0.input: quantizes"):
        top_eigenvalue(loss)
    set_mode_(model, Mode.OFF)
    assert top_eigenvalue(loss).value > 0
    assert all(q.mode is Mode.OFF for q in quantizers(model))


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]


class Detached(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, grad):
        return (2 * grad * ctx.saved_tensors[0]).detach()


class Square(nn.Module):
    def __init__(self, function, after: bool):
        super().__init__()
        self.function, self.first, self.last = function, nn.Linear(3, 2), nn.Linear(2, 2) if after else nn.Identity()

    def forward(self, x):
        return self.last(self.function(self.first(x)))


@pytest.mark.parametrize(
    ("function", "after"),
    [(Once.apply, False), (Once.apply, True), (Detached.apply, False)],
    ids=["once at the end", "once inside", "detached"],
)
def test_a_network_that_cannot_be_differentiated_twice_is_refused(function, after):
    loss = Loss(Square(function, after), random_batches(3, classes=2))
    assert sam_sharpness(loss) > 0
    for call in top_eigenvalue, trace:
        with pytest.raises(ValueError, match="Square is not twice differentiable"):
            call(loss)
    assert top_eigenvalue(Loss(Square(torch.square, after), loss.batches)).value > 0


def test_losses_of_nothing_are_refused():
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="batches"):
        Loss(model, [])
    with pytest.raises(ValueError, match="nope: is no parameter"):
        Loss(model, random_batches(3, classes=2), ("nope",))
    with pytest.raises(ValueError, match="nope: is no parameter"):
        Loss(model, random_batches(3, classes=2))({"nope": torch.ones(1)})
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        Loss(model.requires_grad_(False), random_batches(3, classes=2))


def test_all_figures_together_are_those_of_each_function_and_the_same_twice():
    loss = trained(perceptron, (8,))
    cell = {n: torch.full_like(w, 0.02) for n, w in loss.parameters.items()}
    found = flatness(loss.model, loss.batches, cell, seed=3)
    assert isinstance(found, Flatness)
    assert found == flatness(loss.model, loss.batches, cell, seed=3)
    assert found.metrics() == {
        "flat/loss": loss(), "flat/top_eigenvalue": top_eigenvalue(loss, 3).value, "flat/trace": found.trace,
        "flat/trace_error": found.trace_error, "flat/sam_sharpness": sam_sharpness(loss, 0.05),
        "flat/worst_in_cell": worst_in_cell(loss, cell, seed=3),
    }  # fmt: skip
    assert (found.trace, found.trace_error) == trace(loss, seed=3)
