"""Flatness against closed forms, and the corners of a cell one by one."""

import itertools
import math

import pytest
import torch
from torch import nn

from qexp.metrics.curvature import top_eigenvalue, trace
from qexp.metrics.flatness import (
    Flatness,
    flatness,
    half_steps,
    half_width,
    sam_sharpness,
    worst_in_cell,
)
from qexp.metrics.surface import Loss, random_direction, slice_1d
from qexp.quant.codebooks import NormalFloat
from qexp.quant.granularity import PerGroup, PerTensor


class Breaks(nn.Linear):
    def forward(self, x):
        if not torch.equal(x, torch.zeros_like(x)):
            raise RuntimeError("stop")
        return super().forward(x)


def test_an_error_leaves_the_model_untouched(made):
    model = Breaks(3, 2).train()
    loss = Loss(model, [(torch.zeros(2, 3), torch.tensor([0, 1])), (torch.ones(2, 3), torch.tensor([0, 1]))])
    before = made.state(model)
    for call in (
        lambda: slice_1d(loss, random_direction(loss, 0), [0.5]), lambda: sam_sharpness(loss),
        lambda: worst_in_cell(loss, {"weight": torch.ones(2, 3)}), lambda: top_eigenvalue(loss),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="stop"):
            call()
        made.assert_untouched(model, before)


def test_nothing_that_measures_touches_the_network(made, loss):
    before = made.state(loss.model)
    cell = {"0.weight": torch.full_like(loss.parameters["0.weight"], 0.05)}
    flatness(loss, cell, seed=0)
    made.assert_untouched(loss.model, before)


def test_sharpness_of_a_quadratic_has_the_closed_form_and_more_steps_find_the_maximum(made):
    eigenvalues, slope, rho = [4.0, 1.0, 0.5], torch.tensor([0.1, 0.2, -0.4], dtype=torch.float64), 0.3
    loss = made.quadratic(eigenvalues, slope)
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


def test_at_a_stationary_point_sam_goes_nowhere(made):
    assert sam_sharpness(made.quadratic([4.0, 1.0], [0.0, 0.0])) == 0


@pytest.mark.parametrize(("rho", "steps"), [(-0.1, 1), (0.1, 0)])
def test_balls_and_steps_that_are_none_are_refused(made, rho, steps):
    with pytest.raises(ValueError, match=f"rho={rho}, steps={steps}"):
        sam_sharpness(made.quadratic([1.0], [1.0]), rho, steps)


@pytest.mark.parametrize("seed", range(6))
def test_the_worst_in_a_cell_is_that_of_its_corners_where_the_loss_is_convex(made, seed):
    loss = made.logistic(3, 2, seed)
    random = torch.Generator().manual_seed(seed)
    halves = {n: torch.rand(w.shape, generator=random, dtype=torch.float64) * 2 for n, w in loss.parameters.items()}
    losses = []
    for signs in itertools.product([-1.0, 1.0], repeat=8):
        d = made.flat(halves) * torch.tensor(signs, dtype=torch.float64)
        losses.append(loss({"weight": d[:6].view(2, 3), "bias": d[6:]}))
    assert worst_in_cell(loss, halves, seed=seed) == pytest.approx(max(losses) - loss(), rel=1e-6)


def test_what_is_found_in_a_cell_lies_in_it_and_grows_with_it(made):
    loss = made.trained(made.perceptron, (8,))
    cells = [{n: torch.full_like(w, half) for n, w in loss.parameters.items()} for half in (0.0, 0.01, 0.1)]
    found = [worst_in_cell(loss, cell) for cell in cells]
    assert found[0] == 0 < found[1] < found[2]
    # To first order it is the sum of S_i / 2 |g_i|.
    small = worst_in_cell(loss, {n: torch.full_like(w, 1e-3) for n, w in loss.parameters.items()})
    assert small >= 1e-3 * made.flat(loss.gradient()[1]).abs().sum().item()
    only = {"2.bias": torch.full((4,), 0.1)}
    assert worst_in_cell(loss, only) <= 0.2  # a logit that moves by h moves the loss by no more than 2 h


def test_along_one_weight_the_worst_is_at_the_higher_end(made):
    loss = made.quadratic([2.0], [0.1])
    cell = {"w": torch.tensor([0.5], dtype=torch.float64)}
    assert worst_in_cell(loss, cell) == pytest.approx(0.25 + 0.05)
    loss.model.w.data[:] = -0.06  # the slope is -0.02 here, and the corner to the right lies higher
    loss.model.slope = torch.tensor([0.11], dtype=torch.float64)
    right = (0.44**2 - 0.06**2) + 0.11 * 0.5
    left = (0.56**2 - 0.06**2) - 0.11 * 0.5
    assert worst_in_cell(loss, cell) == pytest.approx(max(left, right))


def test_the_worst_is_the_highest_on_the_way_and_not_where_it_ends(made):
    loss = made.quadratic([-2.0], [0.5])  # w / 2 - w^2, whose ascent goes back and forth between 0 and 0.3
    assert worst_in_cell(loss, {"w": torch.tensor([0.6], dtype=torch.float64)}) == pytest.approx(0.06)


@pytest.mark.parametrize(
    ("cell", "why"),
    [({"nope": torch.ones(2)}, "nope: is no parameter"), ({"bias": torch.ones(3)}, "bias: half steps"),
     ({"bias": torch.tensor([0.1, -0.1])}, "bias: half steps"), ({"bias": torch.full((2,), math.nan)}, "bias")],
)  # fmt: skip
def test_cells_that_are_none_are_refused(made, cell, why):
    with pytest.raises(ValueError, match=why):
        worst_in_cell(made.logistic(3, 2, 0), cell)


@pytest.mark.parametrize("granularity", [None, PerTensor(), PerGroup(4), PerGroup(5, pad=True)], ids=str)
def test_moving_a_weight_by_less_than_half_a_step_from_its_level_changes_no_code(made, granularity):
    model = made.quantized(granularity)
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


def test_at_the_half_width_the_mean_square_of_the_moves_is_that_of_half_steps(made):
    model = made.quantized()
    loss, halves = Loss(model, made.random_batches(8, classes=4)), half_steps(model)
    direction = random_direction(loss, 0)
    moved = {n: half_width(direction, halves) * direction[n] for n in halves}
    assert made.flat(moved).square().mean().item() == pytest.approx(made.flat(halves).square().mean().item(), rel=1e-6)
    with pytest.raises(ValueError, match="direction: moves no weight"):
        half_width({n: torch.zeros_like(h) for n, h in halves.items()}, halves)


def test_cells_of_levels_that_are_no_step_apart_are_refused(made):
    with pytest.raises(ValueError, match="0.weight: the cells of"):
        half_steps(made.quantized(grid=NormalFloat(4)))


def test_all_figures_together_are_those_of_each_function_and_the_same_twice(made):
    loss = made.trained(made.perceptron, (8,))
    cell = {n: torch.full_like(w, 0.02) for n, w in loss.parameters.items()}
    found = flatness(loss, cell, seed=3)
    assert isinstance(found, Flatness)
    assert found == flatness(loss, cell, seed=3)
    assert found.metrics() == {
        "flat/loss": loss(), "flat/top_eigenvalue": top_eigenvalue(loss, 3).value, "flat/trace": found.trace,
        "flat/trace_error": found.trace_error, "flat/sam_sharpness": sam_sharpness(loss, 0.05),
        "flat/worst_in_cell": worst_in_cell(loss, cell, seed=3),
    }  # fmt: skip
    assert (found.trace, found.trace_error) == trace(loss, seed=3)
