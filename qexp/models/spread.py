"""Channels of unequal size in a network that computes the same: what makes one scale for a whole weight tensor bad."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from qexp.quant.dataflow import BATCHNORMS, CONVOLUTIONS, Dataflow, aten

LAYERS = (*CONVOLUTIONS, aten.linear.default)
KINDS = (nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d)
# f(s x) = s f(x) for s > 0; a ReLU6 is none of them.
HOMOGENEOUS = (aten.relu.default, aten.relu_.default, aten.dropout.default)


def spread_channels_(net: nn.Module, flow: Dataflow, most: int, seed: int) -> None:
    """Multiply every channel between two layers by 2^k, and the weights that read it by 2^-k, in place.

    W1' = s W1,  b1' = s b1,  W2' = W2 / s,  s_c = 2^k_c,  k_c uniform in {-most, ..., most}

    This undoes what cross-layer equalization does (Nagel et al. 2019, arXiv 1906.04721, section 4.1); a BatchNorm
    between the two takes s in its gamma and beta. Factors are powers of two, so that logits stay the same to the bit.
    Errors: ValueError for a network without two layers that nothing but a ReLU parts.

    >>> net, x = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 1, 3)).eval(), torch.rand(2, 1, 8, 8)
    >>> before = net(x)
    >>> spread_channels_(net, Dataflow(net, x), most=4, seed=0)
    >>> torch.equal(net(x), before), bool(net[0].weight.abs().amax() > 1)  # all were below 1/3
    (True, True)
    """
    generator = torch.Generator().manual_seed(seed)
    for written, read in require_pairs(net, flow):
        first, second = net.get_submodule(written), net.get_submodule(read)
        channels = len(first.weight)
        scale = torch.exp2(torch.randint(-most, most + 1, (channels,), generator=generator).to(first.weight.dtype))
        _scale_outputs_(first, scale)
        _divide_inputs_(second, scale)


def require_pairs(net: nn.Module, flow: Dataflow) -> list[tuple[str, str]]:
    """Who writes a channel and who alone reads it: a layer, or the BatchNorm behind it, and the next layer.

    Errors: ValueError where there is none.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 1, 3)).eval()
    >>> require_pairs(net, Dataflow(net, torch.zeros(2, 1, 8, 8)))
    [('1', '3')]
    """
    found = [_pair(flow, node) for node in flow.nodes if node.target in LAYERS]
    pairs = [pair for pair in found if pair is not None and _scalable(net, *pair)]
    if not pairs:
        raise ValueError(f"{type(net).__name__} has no two layers that nothing but a BatchNorm and a ReLU parts")
    return pairs


def _pair(flow: Dataflow, node: fx.Node) -> tuple[str, str] | None:
    """Names of the last module that scales this layer's output, and of the layer that alone reads it."""
    kind, written = node.target is aten.linear.default, node
    while len(node.users) == 1:
        (user,) = node.users
        if user.target in LAYERS:
            names = flow.layer(written), flow.layer(user)
            alike = (user.target is aten.linear.default) == kind and user.args[0] is node
            return names if alike and all(_runs_once(flow, name) for name in names) else None
        if user.target in BATCHNORMS and node is written:
            written = user
        elif user.target not in HOMOGENEOUS:
            return None
        node = user
    return None


def _runs_once(flow: Dataflow, name: str) -> bool:
    return len(flow.calls[name]) == 1


def _scalable(net: nn.Module, written: str, read: str) -> bool:
    """Whether both are modules of a known kind; a BatchNorm without gamma has nothing that could be scaled."""
    first, second = net.get_submodule(written), net.get_submodule(read)
    return type(first) in KINDS and first.weight is not None and type(second) in (nn.Conv2d, nn.Linear)


@torch.no_grad()
def _scale_outputs_(module: nn.Module, scale: Tensor) -> None:
    """y' = s y. Parameters are new, because another layer may share the old ones."""
    module.weight = nn.Parameter(module.weight * scale.view(-1, *[1] * (module.weight.dim() - 1)))
    if module.bias is not None:
        module.bias = nn.Parameter(module.bias * scale)


@torch.no_grad()
def _divide_inputs_(layer: nn.Module, scale: Tensor) -> None:
    """W'[o, i] = W[o, i] / s[channel that it reads]; of G groups, each reads its own part of the channels."""
    outputs, groups = len(layer.weight), getattr(layer, "groups", 1)
    read = scale.view(groups, 1, -1).expand(-1, outputs // groups, -1).reshape(outputs, -1)  # (out, in / G)
    layer.weight = nn.Parameter(layer.weight / read.view(*read.shape, *[1] * (layer.weight.dim() - 2)))
