"""Pieces shared by the model families: the convolution unit, the head and the initialisation."""

from collections import OrderedDict

import torch
from torch import nn


def conv_bn(
    channels: tuple[int, int],
    kernel: int,
    stride: int = 1,
    groups: int = 1,
    activation: type[nn.Module] | None = None,
) -> nn.Sequential:
    """Bias-free convolution and batch normalisation, named `conv` and `bn`, then `relu` if asked.

    Shapes: (N, channels[0], H, W) -> (N, channels[1], ceil(H / stride), ceil(W / stride)).

    >>> list(dict(conv_bn((3, 8), 3, activation=nn.ReLU6).named_children()))
    ['conv', 'bn', 'relu']
    """
    conv = nn.Conv2d(*channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    parts = OrderedDict(conv=conv, bn=nn.BatchNorm2d(channels[1]))
    if activation is not None:
        parts["relu"] = activation()
    return nn.Sequential(parts)


class Head(nn.Module):
    """Global average pool and linear classifier.

    Shapes: (N, channels, H, W) -> (N, num_classes).

    >>> Head(8, 10)(torch.zeros(2, 8, 4, 4)).shape
    torch.Size([2, 10])
    """

    def __init__(self, channels: int, num_classes: int, dropout: float = 0.0):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.dropout = nn.Dropout(dropout) if dropout else None
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.flatten(self.pool(x))  # (N, channels)
        if self.dropout is not None:
            x = self.dropout(x)
        return self.fc(x)  # (N, num_classes)


def init_convolutions(model: nn.Module) -> None:
    """He-normal initialisation of every convolution, scaled for the variance of the output.

    >>> init_convolutions(nn.Conv2d(1, 4, 3))
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            # Depthwise kernels see one channel only, but torch counts the fan of all
            # output channels; without the division they would start far too small.
            gain = module.groups**0.5
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            with torch.no_grad():
                module.weight.mul_(gain)


def relu_named(activation: str) -> type[nn.Module]:
    """The module of this name; `ValueError` for another.

    >>> relu_named("relu6")()
    ReLU6()
    """
    found = {"relu": nn.ReLU, "relu6": nn.ReLU6}
    if activation not in found:
        raise ValueError(f"model.activation={activation!r}: allowed are {', '.join(found)}")
    return found[activation]


def require_positive(**sizes: int) -> None:
    """Check the constructor's sizes; `ValueError` names the first that is no positive whole number.

    >>> require_positive(width=0)
    Traceback (most recent call last):
    ValueError: model.width=0: must be a whole number of at least 1
    """
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"model.{name}={value!r}: must be a whole number of at least 1")
