"""Small networks near a minimum, losses with a known Hessian, and dense Hessians."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from qexp.metrics.surface import Loss
from qexp.quant.convert import calibrating, quantize_
from qexp.quant.grid import IntegerGrid
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


def quantized(granularity=None, grid=None) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    weight = Scheme(grid or IntegerGrid(3), **({"granularity": granularity} if granularity else {}))
    quantize_(model, Recipe(weight=weight))
    with calibrating(model), torch.no_grad():
        model(random_batches(8, classes=4)[0][0])
    return model


@pytest.fixture(scope="session")
def made():
    """Networks, losses and what to compare them with."""
    shared = (
        random_batches, convolutional, perceptron, trained, dense_hessian, flat, state, assert_untouched, quadratic,
        logistic, quantized,
    )  # fmt: skip
    return SimpleNamespace(**{function.__name__: function for function in shared})


@pytest.fixture(params=[trained(*each) for each in NETWORKS], ids=["convolutional", "perceptron"])
def loss(request):
    """That of a network near a minimum."""
    return request.param
