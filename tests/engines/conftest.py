"""Small networks with every kind of layer, quantized and deployed as a run does it."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qexp.engines.deploy import certify_deployment, deploy, simulation_for
from qexp.engines.export import export_quantized
from qexp.engines.onnxruntime import OnnxRuntime
from qexp.engines.openvino import OpenVino
from qexp.engines.saturation import saturates
from qexp.quant.convert import calibrating, fold_batchnorm_, layers, quantize_
from qexp.quant.dataflow import Dataflow
from qexp.quant.granularity import PerChannel, PerTensor
from qexp.quant.grid import IntegerGrid
from qexp.quant.layers import Add
from qexp.quant.recipe import Recipe, Scheme

ENGINES = {"onnxruntime": OnnxRuntime, "openvino": OpenVino}


class Residual(nn.Module):
    """Two additions: the input itself, and two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv10 = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.short = nn.Conv2d(3, 6, 1, stride=2, bias=False)
        self.add1, self.add2, self.relu = Add(), Add(), nn.ReLU()
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = self.relu(self.add1(self.relu(self.conv1(x)), x))
        return self.head(self.relu(self.add2(self.conv10(x), self.short(x))).mean((2, 3)))


class Twice(nn.Module):
    """A layer that runs twice, and one tensor that two layers read."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.left, self.right = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.conv(torch.relu(self.conv(x))))
        pooled = [torch.relu(layer(x)).mean((2, 3)) for layer in (self.left, self.right)]
        return self.head(torch.cat(pooled, 1))


def plain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.Conv2d(8, 8, 3, padding="same", dilation=2, groups=8), nn.ReLU(),
        nn.Conv2d(8, 8, 1, groups=2), nn.Hardtanh(-0.5, 0.75),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5, bias=False),
    )  # fmt: skip


def pooled() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(8, 8, 3), nn.MaxPool2d(2, ceil_mode=True),
        nn.Conv2d(8, 5, 3, padding=1, padding_mode="reflect"), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU6(), nn.Linear(32, 5))


NETS = {
    "plain": (plain, (3, 8, 8)), "residual": (Residual, (3, 8, 8)), "twice": (Twice, (3, 8, 8)),
    "pooled": (pooled, (3, 12, 12)), "perceptron": (perceptron, (12,)),
}  # fmt: skip
# Where sums of two u8 x s8 products saturate in 16 bits, parity is for weights of 7 bits.
WIDE = 7 if any(saturates(make()) for make in ENGINES.values()) else 8
RECIPES = {
    "w8a8": Recipe(Scheme(IntegerGrid(WIDE, "restricted"), PerChannel(0)), Scheme(IntegerGrid(8, "affine"))),
    "w4a4": Recipe(Scheme(IntegerGrid(4, "restricted"), PerChannel(0)), Scheme(IntegerGrid(4, "affine"))),
    "w2a3": Recipe(Scheme(IntegerGrid(2, "full_range"), PerTensor()), Scheme(IntegerGrid(3, "affine"))),
    "symmetric": Recipe(Scheme(IntegerGrid(5, "wide_codes"), PerTensor()), Scheme(IntegerGrid(6, "full_range"))),
}


def settled(make, shape: tuple[int, ...], seed: int = 0) -> tuple[nn.Module, torch.Tensor]:
    """A network with BatchNorm statistics of its own, in evaluation mode, and 24 samples."""
    torch.manual_seed(seed)
    net, images = make().train(), torch.randn(24, *shape)
    with torch.no_grad():
        net(images)
    return net.eval(), images


def quantized(net: nn.Module, images: torch.Tensor, recipe: Recipe = RECIPES["w8a8"]) -> SimpleNamespace:
    """net, images, flow, the calibrated model and its graph."""
    torch.set_num_threads(1)
    flow, model = Dataflow(net, images[:2]), copy.deepcopy(net)
    fold_batchnorm_(model, flow)
    probe = copy.deepcopy(model)
    quantize_(probe, recipe)
    quantize_(model, recipe, tuple(flow.open_layers({name for name, _ in layers(probe)})))
    with torch.no_grad(), calibrating(model):
        model(images)
    return SimpleNamespace(net=net, images=images, flow=flow, model=model, graph=export_quantized(model, flow))


def deployed(job: SimpleNamespace, engine):
    """The deployment with its certificate over all samples, in batches of 10 and a last one of 4."""
    done = deploy(engine, job.graph, simulation_for(engine, job.model, job.flow), job.flow, 1)
    batches = [(images, torch.zeros(len(images), dtype=torch.int64)) for images in job.images.split(10)]
    done.logits = certify_deployment(done, batches, 1)
    return done


@pytest.fixture(scope="session")
def made():
    """The functions and tables above, and quantized networks by name, each made once."""
    jobs = {}

    def job(net: str = "plain", recipe: str = "w8a8") -> SimpleNamespace:
        if (net, recipe) not in jobs:
            jobs[net, recipe] = quantized(*settled(*NETS[net]), RECIPES[recipe])
        return jobs[net, recipe]

    return SimpleNamespace(job=job, quantized=quantized, settled=settled, deployed=deployed, recipes=RECIPES)


@pytest.fixture(params=ENGINES)
def engine(request):
    """Each engine."""
    return ENGINES[request.param]()
