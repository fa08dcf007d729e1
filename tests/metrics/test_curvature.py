"""Curvature against dense Hessians and closed forms."""

import pytest
import torch
from torch import nn

from qexp.metrics.curvature import hessian_vector_product, top_eigenvalue, trace
from qexp.metrics.flatness import (
    sam_sharpness,
)
from qexp.metrics.surface import Loss, random_direction
from qexp.quant.convert import quantizers, set_mode_
from qexp.quant.quantizer import Mode


def test_hessian_products_top_eigenvalue_and_trace_are_those_of_the_dense_hessian(made, loss):
    hessian = made.dense_hessian(loss)
    assert len(hessian) < 2000
    v = random_direction(loss, seed=5)
    torch.testing.assert_close(made.flat(hessian_vector_product(loss, v)), hessian @ made.flat(v), rtol=1e-3, atol=1e-5)
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
def test_the_standard_error_is_the_spread_of_the_estimates(made, sketched):
    eigenvalues = [8.0, 4, 2, 1, 1, 1, 0.5, 0.25, -0.5, -1, 0.1, 0.2]
    found = [trace(made.quadratic(eigenvalues, [0.0] * 12), 10, seed, sketched) for seed in range(100)]
    values, errors = torch.tensor(found, dtype=torch.float64).T
    assert abs(values.mean() - sum(eigenvalues)) < 4 * values.std() / 10
    assert errors.square().mean().sqrt() == pytest.approx(values.std().item(), rel=0.25)


def test_of_signs_a_diagonal_hessian_has_no_error(made):
    loss = made.quadratic([3.0, 2, 1, 0.5], [0.0] * 4)
    loss.model.curvature = torch.tensor([3.0, 2, 1, 0.5], dtype=torch.float64).diag()
    assert trace(loss, samples=3, sketched=0) == pytest.approx((6.5, 0), abs=1e-9)


@pytest.mark.parametrize("eigenvalues", [[5.0, 4.9, 1, 0, -3], [0.5, 0.5, 0.5, 0.5, 0.5], [0.1, -9, -2, -1, -4]])
def test_the_top_eigenvalue_is_the_largest_and_not_that_of_largest_size(made, eigenvalues):
    found = top_eigenvalue(made.quadratic(eigenvalues, [0.1] * 5), seed=1, tolerance=1e-8)
    assert found.value == pytest.approx(max(eigenvalues), rel=1e-6)
    assert found.iterations <= 5


def test_without_time_to_converge_the_residual_bounds_the_distance_to_an_eigenvalue(made):
    eigenvalues = [2.0 ** -(i / 4) for i in range(40)]
    found = top_eigenvalue(made.quadratic(eigenvalues, [0.0] * 40), max_iterations=4, tolerance=1e-12)
    assert found.iterations == 4
    assert found.residual > 1e-3
    assert min(abs(found.value - e) for e in eigenvalues) <= found.residual


@pytest.mark.parametrize(("samples", "sketched"), [(1, 0), (10, 5), (10, -1)])
def test_samples_that_give_no_standard_error_are_refused(made, samples, sketched):
    with pytest.raises(ValueError, match=f"samples={samples}"):
        trace(made.quadratic([1.0] * 20, [0.0] * 20), samples, sketched=sketched)


def test_a_network_that_quantizes_has_no_hessian_until_its_quantizers_are_off(made):
    model = made.quantized()
    loss = Loss(model, made.random_batches(8, classes=4))
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
def test_a_network_that_cannot_be_differentiated_twice_is_refused(made, function, after):
    loss = Loss(Square(function, after), made.random_batches(3, classes=2))
    assert sam_sharpness(loss) > 0
    for call in top_eigenvalue, trace:
        with pytest.raises(ValueError, match="Square is not twice differentiable"):
            call(loss)
    assert top_eigenvalue(Loss(Square(torch.square, after), loss.batches)).value > 0
