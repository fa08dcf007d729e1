"""What all tasks share: a test pass that keeps the logits."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy


class EvaluatedTask(pl.LightningModule):
    """A classifier with a test pass; batches are (images, labels), the network returns logits (N, classes).

    After `trainer.test`, `logits` holds those of the whole test set. Errors: ValueError for NaN or infinite logits,
    and for labels that no logit stands for.
    """

    def __init__(self, net: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.net = net
        self.accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.logits = torch.empty(0)
        self._batches: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def require_classes(self, labels: Tensor) -> None:
        """Refuse labels outside 0 to num_classes - 1. Errors: ValueError."""
        lowest, highest, classes = int(labels.min()), int(labels.max()), self.accuracy.num_classes
        if lowest < 0 or highest >= classes:
            wrong = lowest if lowest < 0 else highest
            raise ValueError(f"data: a label is {wrong}, but with num_classes={classes} labels are 0 to {classes - 1}")

    def on_test_epoch_start(self) -> None:
        self._batches = []

    def test_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        images, labels = batch
        self.require_classes(labels)
        logits = self(images)
        if not bool(logits.isfinite().all()):
            raise ValueError(f"test batch {index}: the network returns NaN or infinite logits")
        self.accuracy.update(logits, labels)
        self._batches.append(logits.detach().cpu())

    def on_test_epoch_end(self) -> None:
        self.logits = torch.cat(self._batches) if self._batches else torch.empty(0)
        self._batches = []
        self.log("acc", self.accuracy.compute())
        self.accuracy.reset()
