"""Model families: each constructor returns a plain `nn.Module` of named, traceable parts."""

from qexp.models.mobilenet import mobilenet, mobilenet_v2
from qexp.models.resnet import resnet8, resnet18

__all__ = ["mobilenet", "mobilenet_v2", "resnet8", "resnet18"]
