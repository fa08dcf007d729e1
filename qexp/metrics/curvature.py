"""Curvature of a loss: products with its Hessian, its largest eigenvalue and its trace."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from qexp.metrics.surface import Direction, Loss, gradients, require_known
from qexp.quant.convert import quantizers
from qexp.quant.quantizer import Mode


def hessian_vector_product(loss: Loss, direction: Direction) -> dict[str, Tensor]:
    """H v = d/dw (dL/dw . v), the Hessian H = d2L/dw2 times a vector (Pearlmutter 1994).

    Shapes: as the parameters, names that miss in v are zeros. Errors: ValueError for a model that autograd cannot
    differentiate twice, such as one that quantizes: its Hessian is that of the float model at the weights meant.

    >>> loss = Loss(torch.nn.Linear(1, 2, bias=False), [(torch.zeros(4, 1), torch.zeros(4, dtype=torch.int64))])
    >>> hessian_vector_product(loss, {"weight": torch.ones(2, 1)})["weight"].flatten().tolist()
    [0.0, 0.0]
    """
    require_known(direction, loss.parameters)
    for quantizer in quantizers(loss.model):
        if quantizer.mode not in (Mode.OFF, Mode.OBSERVE):
            raise ValueError(f"{quantizer.site}: quantizes, and a staircase has no Hessian; pass the float model")

    def product(share: Tensor, weights: dict[str, Tensor]) -> tuple[Tensor, ...]:
        slopes = dict(zip(weights, gradients(share, weights, create_graph=True), strict=True))
        along = torch.stack([(slopes[n] * v).sum() for n, v in direction.items()]).sum()
        try:
            _require_no_error_in(along)
            return gradients(along, weights)
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

    >>> loss = Loss(torch.nn.Linear(1, 2, bias=False), [(torch.zeros(4, 1), torch.zeros(4, dtype=torch.int64))])
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

    >>> loss = Loss(torch.nn.Linear(2, 2, bias=False), [(torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64))])
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
