"""Data modules: one interface for training, calibration and test images."""

from qexp.data.cifar10 import CIFAR10
from qexp.data.digits import Digits
from qexp.data.image_folder import ImageFolder

__all__ = ["CIFAR10", "Digits", "ImageFolder"]
