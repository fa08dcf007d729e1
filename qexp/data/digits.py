"""The 8x8 handwritten digits that come with scikit-learn; needs no download."""

import torch

from qexp.data.base import DataModule, Samples
from qexp.data.options import require_share


class Digits(DataModule):
    """1797 grey images of ten digits in a seeded, stratified split.

    Shapes: images (B, 1, 8, 8) with the mean 0 and deviation 1 of the training split.
    Raises `ValueError` for an option out of range, naming it.

    >>> images, labels = next(iter(Digits(batch_size=32).test_dataloader()))
    >>> images.shape
    torch.Size([32, 1, 8, 8])
    """

    num_classes = 10
    input_shape = (1, 8, 8)

    def __init__(
        self,
        batch_size: int = 64,
        train_share: float = 0.5,
        calibration_size: int = 256,
        seed: int = 0,
        calibration_outlier: float = 1,
    ):
        super().__init__(batch_size, calibration_size, seed, calibration_outlier=calibration_outlier)
        self.train_share = require_share("train_share", train_share)

    def load(self) -> tuple[Samples, Samples]:
        """Read, split and normalise the images."""
        # scikit-learn takes about a second to import, so only where it is used.
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        labels = torch.from_numpy(digits.target).long()  # (1797,)
        images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16  # (1797, 1, 8, 8)
        train, test = train_test_split(
            torch.arange(len(labels)).numpy(),
            train_size=self.train_share,
            stratify=labels.numpy(),
            random_state=self.seed,
        )
        std, mean = torch.std_mean(images[train])
        images = (images - mean) / std
        return (
            Samples(images[train], labels[train], read_tensor),
            Samples(images[test], labels[test], read_tensor),
        )


def read_tensor(image: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Return the image as it is: digits are not augmented."""
    return image
