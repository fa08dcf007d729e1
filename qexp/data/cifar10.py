"""CIFAR-10 from disk, in its binary or its python version."""

from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from qexp.data.base import DataModule, Samples
from qexp.data.cifar_files import read_binary, read_pickled, require_file
from qexp.data.options import require_folder

MEAN = torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)
STD = torch.tensor([0.2470, 0.2435, 0.2616]).view(3, 1, 1)
TRAIN = [f"data_batch_{number}" for number in range(1, 6)]
TEST = ["test_batch"]


class CIFAR10(DataModule):
    """Colour images of ten classes, read from `cifar-10-batches-bin` or `cifar-10-batches-py`.

    Shapes: images (B, 3, 32, 32), normalised with the usual channel means and deviations.
    Raises `FileNotFoundError` for a missing folder or file, `ValueError` for a damaged one.

    >>> CIFAR10("/no/such")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    FileNotFoundError: data.root=/no/such: no such folder; expected the CIFAR-10 folder ...
    """

    num_classes = 10
    input_shape = (3, 32, 32)

    def __init__(
        self,
        root: str | Path | None = None,
        augment: bool = True,
        batch_size: int = 128,
        calibration_size: int = 512,
        seed: int = 0,
        calibration_outlier: float = 1,
    ):
        super().__init__(batch_size, calibration_size, seed, calibration_outlier=calibration_outlier)
        folders = "CIFAR-10 folder cifar-10-batches-bin or cifar-10-batches-py"
        self.root = require_folder(root, f"the {folders}")
        if augment not in (True, False):
            raise ValueError(f"data.augment={augment!r}: must be true or false")
        self.augment = augment

    def load(self) -> tuple[Samples, Samples]:
        """Read the five training files and the test file."""
        read = partial(read_image, augment=self.augment)
        return Samples(*self._split(TRAIN), read), Samples(*self._split(TEST), read)

    def _split(self, names: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        batches = [self._batch(name) for name in names]
        images, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
        return torch.from_numpy(images), torch.from_numpy(labels)

    def _batch(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        # The binary version holds plain bytes, so it goes first.
        binary = self.root / "cifar-10-batches-bin"
        pickled = self.root / "cifar-10-batches-py"
        if binary.is_dir():
            return read_binary(require_file(binary / f"{name}.bin"))
        if pickled.is_dir():
            return read_pickled(require_file(pickled / name))
        raise FileNotFoundError(f"data.root={self.root}: holds neither {binary.name} nor {pickled.name}")


def read_image(image: torch.Tensor, generator: torch.Generator | None, augment: bool):
    """Normalise one image after a random crop and flip if a generator is given.

    Shapes: (3, 32, 32) uint8 -> (3, 32, 32) float32.

    >>> read_image(torch.zeros(3, 32, 32, dtype=torch.uint8), None, augment=True).dtype
    torch.float32
    """
    if augment and generator is not None:
        padded = F.pad(image, (4, 4, 4, 4))  # (3, 40, 40)
        top, left, flip = torch.randint(0, 18, (3,), generator=generator).tolist()
        image = padded[:, top % 9 : top % 9 + 32, left % 9 : left % 9 + 32]
        image = image.flip(2) if flip % 2 else image
    return (image / 255 - MEAN) / STD
