"""Residual networks: `resnet8` for small images and `resnet18` at the ImageNet shapes."""

import torch
from torch import nn

from qexp.models.blocks import Head, conv_bn, init_convolutions, require_positive
from qexp.quant.layers import Add


class BasicBlock(nn.Module):
    """Two 3x3 convolutions whose result is added to a skip branch.

    The skip branch is the input itself, or a 1x1 convolution where the shape changes.
    Shapes: (N, channels[0], H, W) -> (N, channels[1], ceil(H / stride), ceil(W / stride)).

    >>> BasicBlock((16, 32), stride=2)(torch.zeros(1, 16, 8, 8)).shape
    torch.Size([1, 32, 4, 4])
    """

    def __init__(self, channels: tuple[int, int], stride: int):
        super().__init__()
        inner, outer = channels
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        reshapes = stride != 1 or inner != outer
        self.shortcut = conv_bn(channels, 1, stride) if reshapes else None
        self.add = Add()
        self.relu2 = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = self.relu1(self.bn1(self.conv1(x)))
        branch = self.bn2(self.conv2(branch))  # (N, outer, H / stride, W / stride)
        skip = x if self.shortcut is None else self.shortcut(x)
        return self.relu2(self.add(branch, skip))


class ResNet(nn.Module):
    """Stem, stages `stage1`, `stage2`, ... of basic blocks, and a linear head.

    Every stage but the first halves the resolution in its first block.
    Shapes: (N, C, H, W) -> (N, num_classes), C being what the stem takes.

    >>> net = ResNet(conv_bn((1, 4), 3, activation=nn.ReLU), [4, 8], depth=1, num_classes=3)
    >>> net(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 3])
    """

    def __init__(self, stem: nn.Sequential, widths: list[int], depth: int, num_classes: int):
        super().__init__()
        self.stem = stem
        self.stages = []
        inner = widths[0]
        for number, outer in enumerate(widths, start=1):
            first = BasicBlock((inner, outer), stride=1 if number == 1 else 2)
            rest = [BasicBlock((outer, outer), stride=1) for _ in range(depth - 1)]
            # Registered under its own name so that a site reads `stage2.0.conv1`.
            self.add_module(f"stage{number}", nn.Sequential(first, *rest))
            self.stages.append(f"stage{number}")
            inner = outer
        self.head = Head(inner, num_classes)
        init_convolutions(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for name in self.stages:
            x = self.get_submodule(name)(x)  # (N, widths[i], H / 2**i, W / 2**i)
        return self.head(x)  # (N, num_classes)


def resnet8(in_channels: int = 1, num_classes: int = 10, width: int = 16) -> ResNet:
    """Small residual network of three basic blocks with `width`, 2 and 4 times `width` channels.

    Shapes: (N, in_channels, H, W) -> (N, num_classes), H and W from 4 up.
    Raises `ValueError` for a size below 1.

    >>> sum(p.numel() for p in resnet8().parameters())
    77754
    """
    require_positive(in_channels=in_channels, num_classes=num_classes, width=width)
    stem = conv_bn((in_channels, width), 3, activation=nn.ReLU)
    return ResNet(stem, [width, 2 * width, 4 * width], 1, num_classes)


def resnet18(in_channels: int = 3, num_classes: int = 1000) -> ResNet:
    """Residual network of He et al. with 18 weighted layers, for ImageNet-sized images.

    Shapes: (N, in_channels, H, W) -> (N, num_classes), usually H = W = 224.
    Raises `ValueError` for a size below 1.

    >>> sum(p.numel() for p in resnet18().parameters())
    11689512
    """
    require_positive(in_channels=in_channels, num_classes=num_classes)
    stem = conv_bn((in_channels, 64), 7, stride=2, activation=nn.ReLU)
    stem.add_module("pool", nn.MaxPool2d(3, 2, 1))
    return ResNet(stem, [64, 128, 256, 512], 2, num_classes)
