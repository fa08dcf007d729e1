"""Flatness of a minimum: the worst loss within a ball and within a quantization cell, and all figures together."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qexp.metrics.curvature import top_eigenvalue, trace
from qexp.metrics.surface import Direction, Loss, require_known
from qexp.quant.convert import layers
from qexp.quant.grid import IntegerGrid


def sam_sharpness(loss: Loss, rho: float = 0.05, steps: int = 1) -> float:
    """Highest L(w + e) - L(w) on an ascent within |e| <= rho, of which the first step is e = rho g / |g|.

    g = dL/dw (Foret et al. 2021, equation 2); each further step adds rho g / |g| at w + e and projects onto the ball.
    A lower bound of the maximum over the ball. Errors: ValueError for rho below 0 or no step.

    >>> loss = Loss(nn.Linear(1, 2), [(torch.ones(4, 1), torch.zeros(4, dtype=torch.int64))])
    >>> 0 < sam_sharpness(loss, 0.05) < sam_sharpness(loss, 0.1)
    True
    """
    if rho < 0 or steps < 1:
        raise ValueError(f"rho={rho}, steps={steps}: must be at least 0 and at least 1")
    base, slope = loss.gradient()
    moved, highest = {n: torch.zeros_like(g) for n, g in slope.items()}, -math.inf
    for _ in range(steps):
        moved = _shortened({n: moved[n] + g for n, g in _scaled(slope, rho).items()}, rho)
        value, slope = loss.gradient(moved)
        highest = max(highest, value)
    return highest - base


def _norm(direction: Direction) -> float:
    return math.sqrt(sum(float(d.double().square().sum()) for d in direction.values()))


def _scaled(direction: Direction, length: float) -> dict[str, Tensor]:
    norm = _norm(direction)
    return {n: d * (length / norm if norm else 0.0) for n, d in direction.items()}


def _shortened(direction: dict[str, Tensor], length: float) -> dict[str, Tensor]:
    return direction if _norm(direction) <= length else _scaled(direction, length)


def half_steps(model: nn.Module) -> dict[str, Tensor]:
    """S / 2 of every weight of a quantized network, by the names and shapes of its weights.

    Errors: ValueError naming a weight that has no uniform grid.
    """
    halves = {}
    for name, layer in layers(model):
        if (quantizer := getattr(layer, "weight_quantizer", None)) is None:
            continue
        if not isinstance(quantizer.grid, IntegerGrid):
            raise ValueError(f"{name}.weight: the cells of {quantizer.grid} are not all one step wide")
        half, shape = quantizer.scale.detach() / 2, layer.weight.shape
        for axis, block in enumerate(quantizer.scheme.granularity.block_shape(tuple(shape))):
            half = half.repeat_interleave(block, axis).narrow(axis, 0, shape[axis])
        halves[f"{name}.weight"] = half
    return halves


def half_width(direction: Direction, half_steps: Direction) -> float:
    """Distance |S / 2| / |d|, at which the weights have moved by half a step in the root mean square.

    Both norms are over the weights that `half_steps` names. Errors: ValueError where none of them moves.

    >>> half_width({"w": torch.tensor([3.0, 4.0])}, {"w": torch.tensor([0.0, 0.5])})
    0.1
    """
    require_known(half_steps, direction)
    length = _norm({n: direction[n] for n in half_steps})
    if not length:
        raise ValueError("direction: moves no weight that has a step")
    return _norm(half_steps) / length


def worst_in_cell(loss: Loss, half_steps: Direction, steps: int = 10, seed: int = 0, starts: int = 4) -> float:
    """Highest L(w + d) - L(w) found with |d_i| <= S_i / 2, so a lower bound of the true worst case in the cell.

    d <- clamp(d + S/4 sign(dL/dw), -S/2, S/2) from d = 0, from the corner S/2 sign(dL/dw) and from `starts` random
    corners (Madry et al. 2018, section 2.1, of weights). Shapes: half_steps S_i / 2 as the parameters; what is not
    named is fixed. Errors: ValueError for unknown names, other shapes and negative steps.

    >>> loss = Loss(nn.Linear(1, 2), [(torch.ones(4, 1), torch.zeros(4, dtype=torch.int64))])
    >>> 0 < worst_in_cell(loss, {"bias": torch.tensor([0.1, 0.1])}) < 0.2
    True
    """
    _require_cell(half_steps, loss.parameters)
    random = torch.Generator().manual_seed(seed)
    base, slope = loss.gradient()
    corners = [{n: h * slope[n].sign() for n, h in half_steps.items()}]
    for _ in range(starts):
        signs = {n: 2 * torch.randint(2, h.shape, generator=random) - 1 for n, h in half_steps.items()}
        corners.append({n: h * signs[n].to(h) for n, h in half_steps.items()})
    nowhere = {n: torch.zeros_like(h) for n, h in half_steps.items()}
    return max(_climbed(loss, half_steps, start, steps) for start in (nowhere, *corners)) - base


def _climbed(loss: Loss, half_steps: Direction, moved: Direction, steps: int) -> float:
    """Highest loss on the way."""
    highest, slope = loss.gradient(moved)
    for _ in range(steps):
        moved = {n: (moved[n] + h / 2 * slope[n].sign()).clamp(-h, h) for n, h in half_steps.items()}
        value, slope = loss.gradient(moved)
        highest = max(highest, value)
    return highest


def _require_cell(half_steps: Direction, weights: Direction) -> None:
    require_known(half_steps, weights)
    for name, half in half_steps.items():
        if half.shape != weights[name].shape or not bool((half >= 0).all()):
            raise ValueError(f"{name}: half steps must be 0 or more, in the shape {tuple(weights[name].shape)}")


@dataclass(frozen=True)
class Flatness:
    """How flat a minimum is; nats, and of the Hessian nats for a squared unit of weight."""

    loss: float
    eigenvalue: float
    trace: float
    trace_error: float
    sharpness: float
    worst_in_cell: float

    def metrics(self) -> dict[str, float]:
        """The figures by their names in a run.

        >>> Flatness(0.1, 2.0, 3.0, 0.1, 0.2, 0.3).metrics()["flat/top_eigenvalue"]
        2.0
        """
        names = {"eigenvalue": "top_eigenvalue", "sharpness": "sam_sharpness"}
        return {f"flat/{names.get(name, name)}": value for name, value in vars(self).items()}


def flatness(loss: Loss, half_steps: Direction, seed: int, samples: int = 300, rho: float = 0.05) -> Flatness:
    """All figures of a float model at its weights; `half_steps` as in `worst_in_cell`, `samples` as in `trace`.

    Errors: ValueError as of `trace`, `hessian_vector_product` and `worst_in_cell`.

    >>> loss = Loss(nn.Linear(1, 2), [(torch.ones(4, 1), torch.zeros(4, dtype=torch.int64))])
    >>> flat = flatness(loss, {"bias": torch.tensor([0.1, 0.1])}, seed=0)
    >>> flat.trace_error, flat.eigenvalue <= 1.001 * flat.trace
    (0.0, True)
    """
    traced = trace(loss, samples, seed)
    return Flatness(
        loss(), top_eigenvalue(loss, seed).value, traced.value, traced.error, sam_sharpness(loss, rho),
        worst_in_cell(loss, half_steps, seed=seed),
    )  # fmt: skip
