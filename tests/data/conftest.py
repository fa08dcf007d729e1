"""Small data sets on disk, and one constructor for each data module."""

import numpy as np
import pytest
import torch
from PIL import Image

from qexp.data import CIFAR10, Digits, ImageFolder


@pytest.fixture
def cifar_root(tmp_path, cifar_batches):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for name, images, labels in cifar_batches:
        records = np.concatenate([labels[:, None].astype(np.uint8), images], axis=1)
        records.tofile(folder / f"{name}.bin")
    return tmp_path


@pytest.fixture
def cifar_batches():
    """Name, pixels and labels of each CIFAR-10 file."""
    generator = np.random.default_rng(0)
    names = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    return [(name, generator.integers(0, 256, (20, 3072), dtype=np.uint8), np.arange(20) % 10) for name in names]


@pytest.fixture
def image_root(tmp_path):
    generator = np.random.default_rng(0)
    for split, count in [("train", 6), ("val", 3)]:
        for name in ["bird", "ant"]:
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (20 + number, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.{'jpg' if number % 2 else 'png'}")
    return tmp_path


@pytest.fixture(params=["digits", "cifar10", "image_folder"])
def make(request):
    """Constructor of one of the data modules, small options given."""
    if request.param == "digits":
        return lambda **options: Digits(**{"batch_size": 16, "calibration_size": 30, **options})
    root = request.getfixturevalue("cifar_root" if request.param == "cifar10" else "image_root")
    options = {"root": root, "batch_size": 4, "calibration_size": 4}
    if request.param == "cifar10":
        return lambda **more: CIFAR10(**{**options, **more})
    return lambda **more: ImageFolder(**{**options, "image_size": 16, "num_workers": 0, **more})


@pytest.fixture
def batches():
    """Function that returns the images and labels of one epoch of a loader."""

    def collect(loader):
        images, labels = zip(*loader, strict=True)
        return torch.cat(images), torch.cat(labels)

    return collect
