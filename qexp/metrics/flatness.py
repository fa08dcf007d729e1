"""Flatness of a minimum: curvature, loss slices, and the worst loss within a ball and within a quantization cell.

All are of the mean cross-entropy of a network in evaluation mode over fixed batches, as a function of its weights w.
Points w + d are evaluated without writing to a parameter, so nothing has to be restored, also after an error.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from qexp.quant.convert import layers, quantizers
from qexp.quant.grid import IntegerGrid
from qexp.quant.quantizer import Mode

Direction = Mapping[str, Tensor]  # parameter name -> displacement of its shape; what is not named stands still
STILL: Direction = {}


class Point(NamedTuple):
    """Mean cross-entropy in nats, and share of correct predictions."""

    loss: float
    accuracy: float


@dataclass(frozen=True, eq=False)
class Loss:
    """L(w + d), the mean cross-entropy of a model over batches of (inputs (B, ...), labels (B,)).

    `names` are the parameters that it is a function of; () means all that require a gradient. The model runs in
    evaluation mode and is left as it was. Errors: ValueError without samples, and for a name that is no parameter.

    >>> model = nn.Linear(1, 2, bias=False)
    >>> loss = Loss(model, [(torch.ones(4, 1), torch.zeros(4, dtype=torch.int64))])
    >>> round(loss({"weight": -model.weight.detach()}), 4)  # ln 2
    0.6931
    """

    model: nn.Module
    batches: Sequence[tuple[Tensor, Tensor]]
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "batches", tuple(self.batches))
        _require_known(self.names, dict(self.model.named_parameters()))
        if not self.count:
            raise ValueError("batches: must hold a sample")
        if not self.parameters:
            raise ValueError("names: the model has no parameter that requires a gradient")

    @property
    def count(self) -> int:
        """Number of samples."""
        return sum(len(labels) for _, labels in self.batches)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The parameters w by their names, detached."""
        named = self.model.named_parameters()
        return {n: p.detach() for n, p in named if (n in self.names if self.names else p.requires_grad)}

    def __call__(self, moved: Direction = STILL) -> float:
        """L(w + moved)."""
        return self.measure(moved).loss

    @torch.no_grad()
    def measure(self, moved: Direction = STILL) -> Point:
        """Loss and accuracy at w + moved."""
        loss, correct = 0.0, 0
        with _evaluating(self.model):
            for logits, labels in self._outputs(self._at(moved)):
                loss += float(F.cross_entropy(logits, labels, reduction="sum"))
                correct += int((logits.argmax(1) == labels).sum())
        return Point(loss / self.count, correct / self.count)

    def gradient(self, moved: Direction = STILL) -> tuple[float, dict[str, Tensor]]:
        """L and dL/dw at w + moved; through a fake-quantizer it is the straight-through gradient."""
        return self.derive(_gradient, moved)

    def derive(self, derivative: Callable, moved: Direction = STILL) -> tuple[float, dict[str, Tensor]]:
        """L and derivative(L, w) at w + moved, which is linear in L and so a sum over batches."""
        weights = {n: w.requires_grad_() for n, w in self._at(moved).items()}
        value, sums = 0.0, [torch.zeros_like(w, dtype=torch.float64) for w in weights.values()]
        with torch.enable_grad(), _evaluating(self.model):
            for logits, labels in self._outputs(weights):
                share = F.cross_entropy(logits, labels, reduction="sum") / self.count
                value += float(share.detach())
                for total, part in zip(sums, derivative(share, weights), strict=True):
                    total += part.detach()
        return value, {n: total.to(w.dtype) for (n, w), total in zip(weights.items(), sums, strict=True)}

    def _at(self, moved: Direction) -> dict[str, Tensor]:
        """New tensors w + moved."""
        _require_known(moved, self.parameters)
        return {n: w + moved[n] if n in moved else w.clone() for n, w in self.parameters.items()}

    def _outputs(self, weights: dict[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        return ((functional_call(self.model, weights, (x,)), labels) for x, labels in self.batches)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _require_known(names: Iterable[str], known: Direction) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{name}: is no parameter of this loss; it has {', '.join(known)}")


def _gradient(loss: Tensor, weights: dict[str, Tensor], **options) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, list(weights.values()), materialize_grads=True, **options)


def hessian_vector_product(loss: Loss, direction: Direction) -> dict[str, Tensor]:
    """H v = d/dw (dL/dw . v), the Hessian H = d2L/dw2 times a vector (Pearlmutter 1994).

    Shapes: as the parameters, names that miss in v are zeros. Errors: ValueError for a model that autograd cannot
    differentiate twice, such as one that quantizes: its Hessian is that of the float model at the weights meant.

    >>> loss = Loss(nn.Linear(1, 2, bias=False), [(torch.zeros(4, 1), torch.zeros(4, dtype=torch.int64))])
    >>> hessian_vector_product(loss, {"weight": torch.ones(2, 1)})["weight"].flatten().tolist()
    [0.0, 0.0]
    """
    _require_known(direction, loss.parameters)
    for quantizer in quantizers(loss.model):
        if quantizer.mode not in (Mode.OFF, Mode.OBSERVE):
            raise ValueError(f"{quantizer.site}: quantizes, and a staircase has no Hessian; pass the float model")

    def product(share: Tensor, weights: dict[str, Tensor]) -> tuple[Tensor, ...]:
        slopes = dict(zip(weights, _gradient(share, weights, create_graph=True), strict=True))
        along = torch.stack([(slopes[n] * v).sum() for n, v in direction.items()]).sum()
        try:
            _require_no_error_in(along)
            return _gradient(along, weights)
        except RuntimeError as error:
            raise ValueError(f"{type(loss.model).__name__} is not twice differentiable: {error}") from error

    return loss.derive(product)[1]


def _require_no_error_in(value: Tensor) -> None:
    """Refuse what @once_differentiable leaves in a graph, which autograd walks around and takes for zero."""
    seen, waiting = set(), [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            if node.name() == "torch::autograd::Error":
                raise RuntimeError("it has a function that is marked with @once_differentiable")
            seen.add(node)
            waiting.extend(following for following, _ in node.next_functions)


class _Hessian:
    """The Hessian as a symmetric matrix of float64 columns (n,)."""

    def __init__(self, loss: Loss, seed: int) -> None:
        self.loss, self.weights, self.random = loss, loss.parameters, torch.Generator().manual_seed(seed)
        self.sizes = [w.numel() for w in self.weights.values()]
        self.device, self.n = next(iter(self.weights.values())).device, sum(self.sizes)

    def normal(self) -> Tensor:
        return torch.randn(self.n, generator=self.random, dtype=torch.float64).to(self.device)

    def signs(self, count: int) -> Tensor:
        drawn = torch.randint(2, (self.n, count), generator=self.random, dtype=torch.float64)
        return (2 * drawn - 1).to(self.device)

    def __matmul__(self, columns: Tensor) -> Tensor:
        """Shapes: (n,) -> (n,), (n, m) -> (n, m)."""
        if columns.dim() == 2:
            return torch.stack([self @ column for column in columns.T], 1)
        parts = zip(self.weights.items(), columns.split(self.sizes), strict=True)
        product = hessian_vector_product(self.loss, {n: part.view_as(w).to(w.dtype) for (n, w), part in parts})
        return torch.cat([part.flatten() for part in product.values()]).double()


class Eigenvalue(NamedTuple):
    """An eigenvalue lies within `residual` of the value, after so many products with the Hessian."""

    value: float
    iterations: int
    residual: float


def top_eigenvalue(loss: Loss, seed: int = 0, tolerance: float = 1e-3, max_iterations: int = 100) -> Eigenvalue:
    """Largest eigenvalue of the Hessian: Lanczos with full reorthogonalisation (Golub, Van Loan 2013, section 10.3).

    H Q = Q T + b q e^T with T tridiagonal; T s = t s gives |H Q s - t Q s| = b |s_m|, which ends it at tolerance |t|.
    The residual tells where max_iterations came first. Errors: ValueError as of `hessian_vector_product`.

    >>> loss = Loss(nn.Linear(1, 2, bias=False), [(torch.zeros(4, 1), torch.zeros(4, dtype=torch.int64))])
    >>> top_eigenvalue(loss)
    Eigenvalue(value=0.0, iterations=1, residual=0.0)
    """
    hessian = _Hessian(loss, seed)
    start = hessian.normal()
    basis, diagonal, beside = [start / start.norm()], [], []
    for _ in range(min(max(max_iterations, 1), hessian.n)):
        following = hessian @ basis[-1]
        diagonal.append(following @ basis[-1])
        before = torch.stack(basis)
        for _ in range(2):  # once leaves rounding errors
            following = following - before.T @ (before @ following)
        length = following.norm()
        off = torch.stack(beside) if beside else following.new_zeros(0)
        values, vectors = torch.linalg.eigh(torch.diag(torch.stack(diagonal)) + off.diag(1) + off.diag(-1))
        value, residual = float(values[-1]), float(length * vectors[-1, -1].abs())
        if residual <= tolerance * abs(value):
            break
        beside.append(length)
        basis.append(following / length)
    return Eigenvalue(value, len(diagonal), residual)


class Trace(NamedTuple):
    """Mean of an unbiased estimate and its standard error, 0 where the trace is exact."""

    value: float
    error: float


def trace(loss: Loss, samples: int = 300, seed: int = 0, sketched: int | None = None) -> Trace:
    """Trace of the Hessian from `samples` products with it: Hutch++ (Meyer et al. 2021, algorithm 1).

    tr(Q^T H Q) + mean of g^T (I - Q Q^T) H (I - Q Q^T) g, with Q a basis of H times `sketched` random vectors (a third
    of the samples) and g of random signs; sketched=0 is Hutchinson's mean of g^T H g. As many samples as weights give
    the exact trace. Errors: ValueError where less than two g are left, and as of `hessian_vector_product`.

    >>> loss = Loss(nn.Linear(2, 2, bias=False), [(torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64))])
    >>> trace(loss, samples=4)
    Trace(value=0.0, error=0.0)
    """
    hessian, sketched = _Hessian(loss, seed), samples // 3 if sketched is None else sketched
    if samples >= hessian.n:
        unit = torch.eye(hessian.n, dtype=torch.float64, device=hessian.device)
        return Trace(float((hessian @ unit).trace()), 0.0)
    count = samples - 2 * sketched
    if count < 2 or sketched < 0:
        raise ValueError(f"samples={samples}: must be at least 2, and 2 more than twice sketched={sketched}")
    known, rest = 0.0, hessian.signs(count)
    if sketched:
        basis = torch.linalg.qr(hessian @ hessian.signs(sketched)).Q
        known = float((basis * (hessian @ basis)).sum())
        rest = rest - basis @ (basis.T @ rest)
    draws = (rest * (hessian @ rest)).sum(0)
    return Trace(known + float(draws.mean()), float(draws.std()) / math.sqrt(count))


def random_direction(loss: Loss, seed: int) -> dict[str, Tensor]:
    """A normal direction in which each filter is as long as that of the weights, d <- d / |d| |w| (Li et al. 2018, 4).

    A filter is an index of the first dimension; biases and norms, which have one dimension, stand still. Distance 1
    along it moves every filter by its own norm.

    >>> loss = Loss(nn.Linear(3, 2), [(torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64))])
    >>> d, w = random_direction(loss, seed=0), loss.parameters
    >>> torch.allclose(d["weight"].norm(dim=1), w["weight"].norm(dim=1)), d["bias"].tolist()
    (True, [0.0, 0.0])
    """
    random = torch.Generator().manual_seed(seed)
    drawn = {n: (torch.randn(w.shape, generator=random).to(w), w) for n, w in loss.parameters.items()}
    return {n: d / _lengths(d) * _lengths(w) if w.dim() > 1 else torch.zeros_like(w) for n, (d, w) in drawn.items()}


def _lengths(w: Tensor) -> Tensor:
    """Norms of the filters, in a shape that broadcasts."""
    return w.flatten(1).norm(dim=1).view(-1, *[1] * (w.dim() - 1))


@dataclass(frozen=True, eq=False)
class Slice:
    """Losses and accuracies (K,) or (K, M) at distances (K,), (M,) along one or two directions; float64."""

    distances: tuple[Tensor, ...]
    losses: Tensor
    accuracies: Tensor


def slice_1d(loss: Loss, direction: Direction, distances: Sequence[float]) -> Slice:
    """L(w + a d) for each distance a; works for quantized networks too, for it needs no gradient.

    >>> loss = Loss(nn.Linear(1, 2), [(torch.zeros(4, 1), torch.zeros(4, dtype=torch.int64))], ("weight",))
    >>> slice_1d(loss, random_direction(loss, seed=0), [-1, 0, 1]).losses.diff().tolist()
    [0.0, 0.0]
    """
    return _slice(loss, [direction], [distances])


def slice_2d(loss: Loss, directions: tuple[Direction, Direction], x: Sequence[float], y: Sequence[float]) -> Slice:
    """L(w + a d + b e) for each a of x and b of y, directions being (d, e) (Li et al. 2018, section 3); see `slice_1d`.

    Shapes: x (K,), y (M,) -> losses (K, M).
    """
    return _slice(loss, directions, [x, y])


def _slice(loss: Loss, directions: Sequence[Direction], distances: Sequence[Sequence[float]]) -> Slice:
    axes = tuple(torch.as_tensor(d, dtype=torch.float64) for d in distances)
    places = itertools.product(*(axis.tolist() for axis in axes))
    points = [loss.measure(_combined(directions, place)) for place in places]
    losses, accuracies = torch.tensor(points, dtype=torch.float64).T.reshape(2, *map(len, axes))
    return Slice(axes, losses, accuracies)


def _combined(directions: Sequence[Direction], place: Sequence[float]) -> Direction:
    names = dict.fromkeys(n for direction in directions for n in direction)
    return {n: sum(a * d[n] for a, d in zip(place, directions, strict=True) if n in d) for n in names}


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
    _require_known(half_steps, direction)
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
    _require_known(half_steps, weights)
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


def flatness(
    model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], half_steps: Direction, seed: int, rho: float = 0.05
) -> Flatness:
    """All figures of the float model at its weights; `half_steps` as in `worst_in_cell`.

    Errors: ValueError as of `Loss`, `hessian_vector_product` and `worst_in_cell`.

    >>> batches = [(torch.ones(4, 1), torch.zeros(4, dtype=torch.int64))]
    >>> flat = flatness(nn.Linear(1, 2), batches, {"bias": torch.tensor([0.1, 0.1])}, seed=0)
    >>> flat.trace_error, flat.eigenvalue <= 1.001 * flat.trace
    (0.0, True)
    """
    loss = Loss(model, batches)
    traced = trace(loss, seed=seed)
    return Flatness(
        loss(), top_eigenvalue(loss, seed).value, traced.value, traced.error, sam_sharpness(loss, rho),
        worst_in_cell(loss, half_steps, seed=seed),
    )  # fmt: skip
