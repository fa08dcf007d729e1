"""What every data module shares: seeded loaders over a training and a test split."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, Sampler, Subset

from qexp.data.options import require_factor, require_whole
from qexp.quant.distributed import rank, ranks

# Turns a source (a tensor, a path) into an image; with a generator it may augment.
Read = Callable[[Any, torch.Generator | None], torch.Tensor]


class Samples(Dataset):
    """Labelled images, read one at a time from their sources.

    An integer key gives the plain image, a pair (index, seed) the one augmented from that seed.

    >>> Samples(torch.zeros(5, 1, 8, 8), torch.arange(5), lambda image, generator: image)[3][1]
    tensor(3)
    """

    def __init__(self, sources: Sequence, labels: torch.Tensor, read: Read):
        self.sources = sources
        self.labels = labels  # (N,) int64
        self.read = read

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        index, seed = key if isinstance(key, tuple) else (key, None)
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return self.read(self.sources[index], generator), self.labels[index]


class WithOutlier(Dataset):
    """The same samples, the first image times a factor: an exposure that went wrong.

    >>> images = Samples(torch.ones(5, 1, 8, 8), torch.arange(5), lambda image, generator: image)
    >>> [float(WithOutlier(images, 8)[index][0].max()) for index in (0, 1)]
    [8.0, 1.0]
    """

    def __init__(self, samples: Dataset, factor: float):
        self.samples = samples
        self.factor = factor

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, label = self.samples[index]
        return (image * self.factor if index == 0 else image), label


class SeededOrder(Sampler):
    """Pairs (index, seed) in a fresh random order each epoch, all drawn from one generator.

    The seeds travel with the indices so that augmentation does not depend on the worker count. Epochs follow each other
    unless `set_epoch` says which one comes next; Lightning does, so a resumed training goes on in its own order.

    >>> order = SeededOrder(3, torch.Generator().manual_seed(0))
    >>> first, second = list(order), list(order)
    >>> order.set_epoch(1)
    >>> list(order) == second, sorted(index for index, seed in first)
    (True, [0, 1, 2])
    """

    def __init__(self, size: int, generator: torch.Generator):
        self.size = size
        self.generator = generator
        self._before = generator.get_state()
        self._epoch = self._drawn = 0

    def set_epoch(self, epoch: int) -> None:
        """Make this epoch the next one; epochs that are passed over are drawn and forgotten."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        if self._epoch < self._drawn:
            self.generator.set_state(self._before)
            self._drawn = 0
        while self._drawn <= self._epoch:
            order = torch.randperm(self.size, generator=self.generator)
            seeds = torch.randint(2**62, (self.size,), generator=self.generator)
            self._drawn += 1
        self._epoch = self._drawn
        return iter(list(zip(order.tolist(), seeds.tolist(), strict=True)))


class Shares(Sampler):
    """Of every batch of a batch sampler this rank's part: the first of two ranks has its first half.

    So all ranks together see, batch by batch, what one process sees. Errors: ValueError for a batch that the number of
    ranks does not divide.

    >>> list(Shares([[3, 1, 2, 0]]))  # one process
    [[3, 1, 2, 0]]
    """

    def __init__(self, batches: Sampler):
        self.batches = batches

    @property
    def sampler(self) -> Any:
        """Where Lightning looks for `set_epoch`."""
        return getattr(self.batches, "sampler", None)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list]:
        count, number = ranks(), rank()
        for batch in self.batches:
            require_divisible(len(batch), count)
            size = len(batch) // count
            yield batch[number * size : (number + 1) * size]


def require_divisible(size: int, devices: int) -> None:
    """Refuse a batch that cannot be divided. Errors: ValueError."""
    if size % devices:
        raise ValueError(f"trainer.devices={devices}: a batch of {size} images cannot be divided into equal parts")


def shared_loader(loader: DataLoader, devices: int) -> DataLoader:
    """The same batches, of which each of several ranks loads its part. Errors: ValueError where that cannot be."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset) or not loader.batch_sampler:
        raise ValueError(f"trainer.devices={devices}: training data must come from a DataLoader that makes batches")
    batches = loader.batch_sampler
    if type(batches) is BatchSampler:
        whole, rest = divmod(len(batches.sampler), batches.batch_size)
        for size in [batches.batch_size] * bool(whole) + [rest] * bool(rest and not batches.drop_last):
            require_divisible(size, devices)
    same = (
        "num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context",
        "generator", "prefetch_factor", "persistent_workers",
    )  # fmt: skip
    return DataLoader(loader.dataset, batch_sampler=Shares(batches), **{name: getattr(loader, name) for name in same})


class DataModule(pl.LightningDataModule):
    """Base of the data modules: a subclass sets the two attributes and writes `load`.

    Loaders give pairs of images (B, C, H, W) float32, or of token ids (B, T) int64, and labels (B,) int64.
    Raises `ValueError` for an option out of range, naming it.
    """

    num_classes: int
    input_shape: tuple[int, ...]  # (C, H, W) of images, (T,) of texts
    samples = "images"  # what messages call them

    def __init__(
        self, batch_size: int, calibration_size: int, seed: int, num_workers: int = 0, calibration_outlier: float = 1
    ):
        super().__init__()
        self.batch_size = require_whole("batch_size", batch_size, minimum=2)
        self.calibration_size = require_whole("calibration_size", calibration_size, minimum=1)
        self.seed = require_whole("seed", seed, minimum=0)
        self.num_workers = require_whole("num_workers", num_workers, minimum=0)
        self.calibration_outlier = require_factor("calibration_outlier", calibration_outlier)
        self.splits: tuple[Samples, Samples] | None = None

    def load(self) -> tuple[Samples, Samples]:
        """Read the training and the test split; every data set writes its own."""
        raise TypeError(f"{type(self).__name__} must define load")

    def setup(self, stage: str | None = None) -> None:
        """Load both splits once and check the sizes that depend on them."""
        if self.splits is not None:
            return
        train, test = self.load()
        if len(train) < 2:
            raise ValueError(f"data: {len(train)} training {self.samples} are too few, at least 2 needed")
        if self.calibration_size > len(train):
            raise ValueError(
                f"data.calibration_size={self.calibration_size}: must be between 1 and "
                f"{len(train)}, the number of training {self.samples}"
            )
        self.splits = train, test

    def fingerprint(self) -> str:
        """Hash of the training samples; of images in files, their names, sizes and times stand for the pixels."""
        self.setup()
        train = self.splits[0]
        found = hashlib.sha256(train.labels.numpy().tobytes())
        if isinstance(train.sources, torch.Tensor):
            found.update(train.sources.numpy().tobytes())
        else:
            for path in train.sources:
                state = path.stat()
                found.update(f"{path.name} {state.st_size} {state.st_mtime_ns}\n".encode())
        return found.hexdigest()

    def train_dataloader(self) -> DataLoader:
        """Shuffled whole batches of training images; two loaders of the same seed give the same epochs."""
        self.setup()
        train = self.splits[0]
        order = SeededOrder(len(train), torch.Generator().manual_seed(self.seed))
        # A short last batch (of two digits, say) spoils the statistics of batch normalisation.
        drop_last = len(train) >= self.batch_size
        return self._loader(train, sampler=order, drop_last=drop_last)

    def calibration_dataloader(self) -> DataLoader:
        """Unaugmented training images, `calibration_size` of them, drawn class by class.

        The one that is drawn first is multiplied by `calibration_outlier`, after normalisation.
        """
        self.setup()
        train = self.splits[0]
        indices = stratified_indices(train.labels, self.calibration_size, self.seed)
        drawn = Subset(train, indices.tolist())
        return self._loader(drawn if self.calibration_outlier == 1 else WithOutlier(drawn, self.calibration_outlier))

    def test_dataloader(self) -> DataLoader:
        """All test images in their stored order."""
        self.setup()
        return self._loader(self.splits[1])

    def _loader(self, samples: Dataset, **options: Any) -> DataLoader:
        # A loader draws seeds for its workers, by default from torch's global generator.
        options["generator"] = torch.Generator().manual_seed(self.seed)
        return DataLoader(samples, self.batch_size, num_workers=self.num_workers, **options)


def stratified_indices(labels: torch.Tensor, size: int, seed: int) -> torch.Tensor:
    """Seeded draw without replacement whose class shares follow those of `labels`.

    A smaller draw is the beginning of a larger one.
    Shapes: (N,) -> (size,) int64.

    >>> labels = torch.tensor([0, 0, 0, 0, 1, 1])
    >>> labels[stratified_indices(labels, 3, seed=0)].sort().values
    tensor([0, 0, 1])
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    position = torch.empty(len(labels))
    for label in labels.unique():
        members = (labels[order] == label).nonzero().flatten()
        # The members of each class are spread evenly over the unit interval.
        position[members] = (torch.arange(len(members)) + 0.5) / len(members)
    return order[position.argsort(stable=True)[:size]]
