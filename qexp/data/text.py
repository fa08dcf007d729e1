"""What every text classification data set shares: token ids of texts, in a seeded, stratified split."""

from __future__ import annotations

import hashlib

import torch

from qexp.data.base import DataModule, Samples
from qexp.data.options import TOO_LONG, require_choice, require_share, require_whole
from qexp.data.vocabulary import vocabulary


class TextDataModule(DataModule):
    """Base of the text data modules: a subclass writes `read`, the texts and their labels.

    Shapes: ids (B, length) int64, 0 where a text has ended.
    Raises `ValueError` for an option out of range, naming it, for a class that cannot be split, and with
    too_long=refuse for texts of more than `length` tokens.
    """

    samples = "texts"
    source = "data"  # what messages about the texts begin with
    version = ""  # whatever else tells these texts from others of the same name
    class_names: list[str]  # sorted; a label is the place in it

    def __init__(
        self,
        batch_size: int = 64,
        train_share: float = 0.5,
        calibration_size: int = 256,
        seed: int = 0,
        length: int = 64,
        vocabulary: str | None = None,
        too_long: str = "truncate",
    ):
        super().__init__(batch_size, calibration_size, seed)
        self.train_share = require_share("train_share", train_share)
        self.length = require_whole("length", length, minimum=2)
        self.too_long = require_choice("too_long", too_long, TOO_LONG)
        self.vocabulary = vocabulary
        self.input_shape = (length,)
        self.total = self.truncated = 0  # texts, and those of them that were cut

    def read(self) -> tuple[list[str], list[str]]:
        """The texts and the label of each, in an order that is always the same; every data set writes its own."""
        raise TypeError(f"{type(self).__name__} must define read")

    @property
    def notice(self) -> str | None:
        """One sentence on what was done to the texts; None where nothing was."""
        self.setup()
        if not self.truncated:
            return None
        have, were = ("has", "was") if self.truncated == 1 else ("have", "were")
        return (
            f"data: {self.truncated:,} of {self.total:,} texts {have} more than {self.length} tokens "
            f"and {were} truncated (data.length)"
        )

    def fingerprint(self) -> str:
        """Hash of the training samples, of the names of their classes and of the version of the texts."""
        told = [super().fingerprint(), self.version, *self.class_names]
        return hashlib.sha256("\n".join(told).encode()).hexdigest()

    def load(self) -> tuple[Samples, Samples]:
        """Read the texts, turn them into ids and split them."""
        words = vocabulary(self.vocabulary)
        texts, names = self.read()
        self.class_names = sorted(set(names))
        self.num_classes = len(self.class_names)
        number = {name: place for place, name in enumerate(self.class_names)}
        labels = torch.tensor([number[name] for name in names], dtype=torch.int64)
        self._require_classes(labels)
        ids, lengths = words.encode(texts, self.length)
        self._require_lengths(lengths)
        self.total, self.truncated = len(texts), int((lengths > self.length).sum())
        train, test = stratified_split(labels, self.train_share, self.seed)
        return Samples(ids[train], labels[train], read_ids), Samples(ids[test], labels[test], read_ids)

    def _require_classes(self, labels: torch.Tensor) -> None:
        if self.num_classes < 2:
            found = f"only the class {self.class_names[0]!r}" if self.class_names else "no text"
            raise ValueError(f"{self.source}: holds {found}, but at least 2 classes are needed")
        alone = (labels.bincount() < 2).nonzero().flatten().tolist()
        if alone:
            others = f" ({len(alone)} classes have 1)" if len(alone) > 1 else ""
            raise ValueError(
                f"{self.source}: the class {self.class_names[alone[0]]!r} has 1 text, "
                f"but each needs at least 2, one to train on and one to test{others}"
            )

    def _require_lengths(self, lengths: torch.Tensor) -> None:
        over = int((lengths > self.length).sum())
        if self.too_long == "refuse" and over:
            raise ValueError(
                f"data.too_long=refuse: {over:,} of {len(lengths):,} texts have more than data.length={self.length} "
                f"tokens, the longest {int(lengths.max()):,}; raise data.length or choose data.too_long=truncate"
            )


def read_ids(ids: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Return the ids as they are: texts are not augmented."""
    return ids


def stratified_split(labels: torch.Tensor, share: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of both sides in a random order; every class of at least 2 is on both, and divided by the share.

    >>> train, test = stratified_split(torch.tensor([0, 0, 0, 0, 1, 1]), share=0.75, seed=0)
    >>> sorted(train.tolist() + test.tolist()), len(train)
    ([0, 1, 2, 3, 4, 5], 4)
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = order[labels[order] == label]
        chosen[members[: min(max(round(share * len(members)), 1), len(members) - 1)]] = True
    return order[chosen[order]], order[~chosen[order]]
