"""Data modules: each gives seeded loaders of (images or token ids, labels). Importing the package needs no torch."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_MODULES = {
    "CIFAR10": "cifar10",
    "Digits": "digits",
    "ImageFolder": "image_folder",
    "StdlibDocs": "stdlib_docs",
    "TextCSV": "text_csv",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
