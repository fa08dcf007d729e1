"""The loss of a network as a function of its weights, and its slices along directions.

It is the mean cross-entropy in evaluation mode over fixed batches. Points w + d are evaluated without writing to a
parameter, so nothing has to be restored, also after an error.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

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
        require_known(self.names, dict(self.model.named_parameters()))
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
        return self.derive(gradients, moved)

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
        require_known(moved, self.parameters)
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


def require_known(names: Iterable[str], known: Direction) -> None:
    """Refuse what is no parameter. Errors: ValueError."""
    for name in names:
        if name not in known:
            raise ValueError(f"{name}: is no parameter of this loss; it has {', '.join(known)}")


def gradients(loss: Tensor, weights: dict[str, Tensor], **options) -> tuple[Tensor, ...]:
    """d loss / d w for each of the weights, zeros for those that it does not depend on."""
    return torch.autograd.grad(loss, list(weights.values()), materialize_grads=True, **options)


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
