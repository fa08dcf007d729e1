"""Images in one folder per class, the layout in which ImageNet is commonly kept."""

import math
from functools import partial
from pathlib import Path

import torch

from qexp.data.base import DataModule, Samples
from qexp.data.options import require_folder, require_whole

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
SUFFIXES = {".jpg", ".jpeg", ".png"}


class ImageFolder(DataModule):
    """Images `root/train/<class>/*` and `root/val/<class>/*`; the test split is `val`.

    Classes are numbered in the sorted order of the folder names below `train`.
    Shapes: images (B, 3, image_size, image_size), normalised with the usual ImageNet statistics.
    Raises `FileNotFoundError` for a missing or empty folder, `ValueError` for an unreadable image.

    >>> ImageFolder()
    Traceback (most recent call last):
    ValueError: data.root=null: must name the folder that holds the folders train and val
    """

    def __init__(
        self,
        root: str | Path | None = None,
        image_size: int = 224,
        batch_size: int = 128,
        calibration_size: int = 512,
        seed: int = 0,
        num_workers: int = 4,
        calibration_outlier: float = 1,
    ):
        super().__init__(batch_size, calibration_size, seed, num_workers, calibration_outlier)
        self.image_size = require_whole("image_size", image_size, minimum=1)
        self.root = require_folder(root, "the folders train and val")
        self.classes = class_names(self.root / "train")
        self.num_classes = len(self.classes)
        self.input_shape = (3, image_size, image_size)

    def load(self) -> tuple[Samples, Samples]:
        """List the files of both splits; images are decoded batch by batch."""
        if class_names(self.root / "val") != self.classes:
            raise ValueError(f"data.root={self.root}: train and val hold different class folders")
        return self._split("train"), self._split("val")

    def _split(self, name: str) -> Samples:
        files, labels = [], []
        for label, class_name in enumerate(self.classes):
            found = image_files(self.root / name / class_name)
            files += found
            labels += [label] * len(found)
        return Samples(files, torch.tensor(labels), partial(read_image, size=self.image_size))


def class_names(folder: Path) -> list[str]:
    """Return the sorted names of the folders in `folder`; `FileNotFoundError` if there are none.

    >>> class_names(Path("/no/such/train"))
    Traceback (most recent call last):
    FileNotFoundError: data.root=/no/such: train must hold one folder of images per class
    """
    names = [entry.name for entry in folder.iterdir() if entry.is_dir()] if folder.is_dir() else []
    if not names:
        raise FileNotFoundError(f"data.root={folder.parent}: {folder.name} must hold one folder of images per class")
    return sorted(names)


def image_files(folder: Path) -> list[Path]:
    """Return the sorted image files in `folder`; `FileNotFoundError` if there are none."""
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not files:
        raise FileNotFoundError(f"data.root: {folder} holds no jpg, jpeg or png image")
    return files


def read_image(path: Path, generator: torch.Generator | None, size: int) -> torch.Tensor:
    """Decode, crop and normalise one image; a generator makes the crop and a flip random.

    Shapes: (3, size, size) float32; `ValueError` if the file cannot be decoded.
    """
    # Pillow is needed by this data set alone.
    from PIL import Image

    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except Exception as error:
        # Pillow's decoders raise their own mixture of errors on a damaged file.
        raise ValueError(f"data.root: {path} is no readable image") from error
    box = center_box(image.size) if generator is None else random_box(image.size, generator)
    image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    pixels = pixels.view(size, size, 3).permute(2, 0, 1)  # (3, size, size)
    if generator is not None and torch.rand((), generator=generator) < 0.5:
        pixels = pixels.flip(2)
    return (pixels / 255 - MEAN) / STD


def center_box(size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Return the central square of 224/256 of the shorter side, as (left, top, right, bottom).

    Cutting the box before resizing gives the same view as resizing the shorter side to
    256/224 of the image size and cutting the center.

    >>> center_box((256, 512))
    (16.0, 144.0, 240.0, 368.0)
    """
    width, height = size
    side = min(size) * 224 / 256
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def random_box(size: tuple[int, int], generator: torch.Generator) -> tuple[float, float, float, float]:
    """Return a random box of 8 to 100 % of the area and an aspect ratio from 3/4 to 4/3.

    >>> left, top, right, bottom = random_box((40, 30), torch.Generator().manual_seed(0))
    >>> 0 <= left < right <= 40 and 0 <= top < bottom <= 30
    True
    """
    width, height = size
    for _ in range(10):
        area, ratio, x, y = torch.rand(4, generator=generator).tolist()
        pixels = (0.08 + 0.92 * area) * width * height
        aspect = (3 / 4) ** (1 - 2 * ratio)  # log-uniform
        w, h = math.sqrt(pixels * aspect), math.sqrt(pixels / aspect)
        if w <= width and h <= height:
            left, top = x * (width - w), y * (height - h)
            return left, top, left + w, top + h
    # A very long image seldom has room for such a box.
    return center_box(size)
