"""Folding BatchNorm: the same outputs without it, and hands off where it cannot be folded."""

import pytest
import torch
from torch import nn

from qexp.models import resnet8
from qexp.quant.convert import fold_batchnorm_
from qexp.quant.dataflow import Dataflow


def shake_(model):
    """Statistics and affine parameters of every BatchNorm as after training."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.3, 3)
            if module.affine:
                nn.init.uniform_(module.weight, -1, 2)
                nn.init.normal_(module.bias)
    return model.eval()


FOLDABLE = {
    "conv": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), (2, 3, 5, 5)),
    "conv without bias": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)),
        (2, 3, 5, 5),
    ),
    "grouped": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8, affine=False)),
        (2, 4, 5, 5),
    ),
    "linear": (lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)), (2, 6)),
    "padding same": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding="same"), nn.BatchNorm2d(4)),
        (2, 3, 5, 5),
    ),
    "resnet8": (lambda: resnet8(in_channels=1), (2, 1, 16, 16)),
}


@pytest.mark.parametrize(("build", "shape"), FOLDABLE.values(), ids=FOLDABLE)
def test_folding_changes_no_output_and_leaves_identities(build, shape):
    model, x = shake_(build()), torch.randn(shape)
    with torch.no_grad():
        expected = model.double()(x.double())
        model.float()
        norms = [name for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        fold_batchnorm_(model, Dataflow(model, x))
        assert norms and all(type(model.get_submodule(name)) is nn.Identity for name in norms)
        assert (model(x) - expected).norm() <= 1e-5 * expected.norm()


class LinearOverSequences(nn.Sequential):
    """BatchNorm1d normalises dimension 1 of (N, C, L), a linear layer writes the last."""

    def __init__(self, length=4):
        super().__init__(nn.Linear(4, 4), nn.BatchNorm1d(length))


class FunctionalConvolution(nn.Module):
    """Convolves with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.weight, self.norm = nn.Parameter(torch.randn(2, 1, 3, 3)), nn.BatchNorm2d(2)

    def forward(self, x):
        return self.norm(nn.functional.conv2d(x, self.weight))


class ReadTwice(nn.Module):
    """A convolution that a BatchNorm does not read alone."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y


class RunTwice(nn.Module):
    """One convolution with two BatchNorms."""

    def __init__(self):
        super().__init__()
        self.conv, self.one, self.two = nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1), nn.BatchNorm2d(1)

    def forward(self, x):
        return self.two(self.conv(self.one(self.conv(x))))


def tied():
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))
    model[2].weight = model[0].weight
    return model


def parametrized():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 2, 3)), nn.BatchNorm2d(2))


UNFOLDABLE = {
    "linear over sequences": (LinearOverSequences, (2, 4, 4)),
    "linear over longer sequences": (lambda: LinearOverSequences(5), (2, 5, 4)),
    "functional convolution": (FunctionalConvolution, (2, 1, 8, 8)),
    "read twice": (ReadTwice, (2, 1, 8, 8)),
    "run twice": (RunTwice, (2, 1, 8, 8)),
    "without statistics": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, track_running_stats=False)), (2, 1, 8, 8)
    ),
    "tied weights": (tied, (2, 1, 8, 8)),
    "parametrized": (parametrized, (2, 1, 8, 8)),
}  # fmt: skip


@pytest.mark.parametrize(("build", "shape"), UNFOLDABLE.values(), ids=UNFOLDABLE)
def test_what_cannot_be_folded_still_computes_the_same(build, shape):
    torch.manual_seed(0)
    model, x = shake_(build()), torch.randn(shape)
    with torch.no_grad():
        expected = model(x)
        fold_batchnorm_(model, Dataflow(model, x))
        assert torch.allclose(model(x), expected, rtol=1e-5, atol=1e-6)
