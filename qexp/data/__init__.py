"""Data modules: each gives seeded loaders of (images, labels). Importing the package alone needs no torch."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_MODULES = {"CIFAR10": "cifar10", "Digits": "digits", "ImageFolder": "image_folder"}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
