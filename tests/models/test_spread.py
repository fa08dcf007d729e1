"""Channels of unequal size: the function stays to the bit, ranges of weights do not."""

import copy

import pytest
import torch
from torch import nn

from qexp.models import mobilenet, resnet8
from qexp.models.spread import require_pairs, spread_channels_
from qexp.quant.dataflow import Dataflow


def alive(net: nn.Module) -> nn.Module:
    """With statistics and parameters of BatchNorm as training leaves them, and biases."""
    generator = torch.Generator().manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.2, 2.0, generator=generator)
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_(generator=generator)
    return net.eval()


def spread(net: nn.Module, x: torch.Tensor, most: int = 4, seed: int = 0) -> nn.Module:
    wide = copy.deepcopy(net)
    spread_channels_(wide, Dataflow(wide, x), most, seed)
    return wide


def grouped() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2), nn.ReLU(), nn.Conv2d(4, 2, 1))


def dense() -> nn.Module:
    layers = nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 6, bias=False), nn.Dropout(0.5), nn.Linear(6, 3)
    return nn.Sequential(nn.Flatten(), *layers)


@pytest.mark.parametrize("make", [resnet8, lambda: mobilenet(activation="relu"), grouped, dense])
@torch.no_grad()
def test_logits_stay_the_same_to_the_bit_and_weights_do_not(make):
    torch.manual_seed(0)
    net, x = alive(make()), torch.randn(16, 1, 8, 8)
    wide = spread(net, x)
    assert torch.equal(wide(x), net(x))
    pairs = require_pairs(net, Dataflow(net, x))
    for written, read in pairs:
        for name in written, read:
            assert not torch.equal(net.get_submodule(name).weight, wide.get_submodule(name).weight)


@torch.no_grad()
def test_factors_are_the_powers_of_two_of_the_range_each_as_likely():
    net, x = alive(mobilenet(activation="relu")), torch.randn(2, 1, 8, 8)
    wide = spread(net, x, most=2)
    pairs = require_pairs(net, Dataflow(net, x))
    assert pairs[:2] == [("stem.bn", "blocks.0.depthwise.conv"), ("blocks.0.depthwise.bn", "blocks.0.pointwise.conv")]
    found = []
    for written, _ in pairs:
        old, new = net.get_submodule(written), wide.get_submodule(written)
        assert torch.equal(new.weight / old.weight, new.bias / old.bias)
        found += (new.weight / old.weight).log2().tolist()
    counts = torch.tensor(found).add(2).long().bincount()
    assert set(found) == {-2.0, -1.0, 0.0, 1.0, 2.0} and counts.min() > 0.75 * len(found) / 5


@torch.no_grad()
def test_each_weight_is_divided_by_the_factor_of_the_channel_that_it_reads():
    net, x = grouped().eval(), torch.randn(2, 1, 8, 8)
    wide = spread(net, x)
    first, second = (wide[0].weight / net[0].weight)[:, 0, 0, 0], (wide[2].weight / net[2].weight)
    outgoing = (wide[2].bias / net[2].bias).view(4, 1, 1, 1)
    for output in range(4):
        read = first[:3] if output < 2 else first[3:]
        assert torch.equal(second[output], (outgoing[output] / read.view(3, 1, 1)).expand(3, 3, 3))


def test_the_seed_decides():
    net, x = alive(resnet8()), torch.randn(2, 1, 8, 8)
    one, again, other = (spread(net, x, seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_channels_with_two_readers_and_a_shared_parameter_are_left_alone():
    net, x = alive(resnet8()), torch.randn(2, 1, 8, 8)
    written = [name for name, _ in require_pairs(net, Dataflow(net, x))]
    assert written == [f"stage{number}.0.bn1" for number in (1, 2, 3)]  # the stem feeds a skip, too
    tied = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)).eval()
    tied[4].weight = tied[2].weight
    with torch.no_grad():
        assert torch.equal(spread(tied, x)(x), tied(x))


def test_a_relu6_and_a_layer_that_runs_twice_are_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 1)

        def forward(self, x):
            return self.conv(self.conv(x).relu())

    x = torch.randn(2, 1, 8, 8)
    for net in mobilenet().eval(), Twice().eval(), nn.Sequential(nn.Conv2d(1, 2, 1)).eval():
        with pytest.raises(ValueError, match=r"^\w+ has no two layers that nothing but a BatchNorm and a ReLU parts$"):
            require_pairs(net, Dataflow(net, x))
