"""Depthwise-separable networks: `mobilenet` for small images and `mobilenet_v2` for ImageNet."""

import torch
from torch import nn

from qexp.models.blocks import Head, conv_bn, init_convolutions, relu_named, require_positive
from qexp.quant.layers import Add

# Output channels (as multiples of `width`) and stride of each separable block.
SEPARABLE = [(2, 1), (4, 2), (4, 1), (8, 2), (8, 1), (16, 1)]

# Expansion, output channels, repeats and first stride of each group of MobileNet-v2 blocks.
INVERTED = [
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
]


class SeparableBlock(nn.Module):
    """Depthwise 3x3 convolution, then pointwise 1x1 convolution, each with batch norm and a ReLU, by default ReLU6.

    Shapes: (N, channels[0], H, W) -> (N, channels[1], ceil(H / stride), ceil(W / stride)).

    >>> SeparableBlock((4, 8), stride=2)(torch.zeros(1, 4, 8, 8)).shape
    torch.Size([1, 8, 4, 4])
    """

    def __init__(self, channels: tuple[int, int], stride: int, activation: type[nn.Module] = nn.ReLU6):
        super().__init__()
        inner = channels[0]
        self.depthwise = conv_bn((inner, inner), 3, stride, groups=inner, activation=activation)
        self.pointwise = conv_bn(channels, 1, activation=activation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pointwise(self.depthwise(x))


class InvertedResidual(nn.Module):
    """Pointwise expansion, depthwise 3x3 and linear projection, plus a skip where shapes allow.

    Shapes: (N, channels[0], H, W) -> (N, channels[1], ceil(H / stride), ceil(W / stride)).

    >>> InvertedResidual((4, 8), stride=2, expansion=6)(torch.zeros(1, 4, 8, 8)).shape
    torch.Size([1, 8, 4, 4])
    """

    def __init__(self, channels: tuple[int, int], stride: int, expansion: int):
        super().__init__()
        inner, outer = channels
        wide = inner * expansion
        # An expansion of one would be a square 1x1 convolution; the paper leaves it out.
        widens = expansion != 1
        self.expand = conv_bn((inner, wide), 1, activation=nn.ReLU6) if widens else None
        self.depthwise = conv_bn((wide, wide), 3, stride, groups=wide, activation=nn.ReLU6)
        self.project = conv_bn((wide, outer), 1)
        self.add = Add() if stride == 1 and inner == outer else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = x if self.expand is None else self.expand(x)  # (N, wide, H, W)
        branch = self.project(self.depthwise(branch))
        return branch if self.add is None else self.add(branch, x)


class MobileNet(nn.Module):
    """Stem, `blocks`, an optional last 1x1 convolution and a linear head.

    Shapes: (N, C, H, W) -> (N, num_classes), C being what the stem takes.

    >>> stem = conv_bn((1, 4), 3, activation=nn.ReLU6)
    >>> MobileNet(stem, [SeparableBlock((4, 8), 2)], None, Head(8, 3))(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 3])
    """

    def __init__(self, stem: nn.Module, blocks: list[nn.Module], last: nn.Module | None, head: nn.Module):
        super().__init__()
        self.stem = stem
        self.blocks = nn.Sequential(*blocks)
        self.last = last
        self.head = head
        init_convolutions(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(self.stem(x))
        if self.last is not None:
            x = self.last(x)
        return self.head(x)  # (N, num_classes)


def mobilenet(in_channels: int = 1, num_classes: int = 10, width: int = 16, activation: str = "relu6") -> MobileNet:
    """Small MobileNet-v1 of six separable blocks from `width` up to 16 times `width` channels, all ReLU6 or all ReLU.

    Shapes: (N, in_channels, H, W) -> (N, num_classes), H and W from 4 up.
    Raises `ValueError` for a size below 1 and for another activation.

    >>> mobilenet()(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """
    require_positive(in_channels=in_channels, num_classes=num_classes, width=width)
    relu = relu_named(activation)
    stem = conv_bn((in_channels, width), 3, activation=relu)
    blocks, inner = [], width
    for factor, stride in SEPARABLE:
        blocks.append(SeparableBlock((inner, factor * width), stride, relu))
        inner = factor * width
    return MobileNet(stem, blocks, None, Head(inner, num_classes))


def mobilenet_v2(in_channels: int = 3, num_classes: int = 1000) -> MobileNet:
    """MobileNet-v2 of Sandler et al. at width 1, for ImageNet-sized images.

    Shapes: (N, in_channels, H, W) -> (N, num_classes), usually H = W = 224.
    Raises `ValueError` for a size below 1.

    >>> sum(p.numel() for p in mobilenet_v2().parameters())
    3504872
    """
    require_positive(in_channels=in_channels, num_classes=num_classes)
    stem = conv_bn((in_channels, 32), 3, stride=2, activation=nn.ReLU6)
    blocks, inner = [], 32
    for expansion, outer, repeats, first in INVERTED:
        for stride in [first] + [1] * (repeats - 1):
            blocks.append(InvertedResidual((inner, outer), stride, expansion))
            inner = outer
    last = conv_bn((inner, 1280), 1, activation=nn.ReLU6)
    return MobileNet(stem, blocks, last, Head(1280, num_classes, dropout=0.2))
