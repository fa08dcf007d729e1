"""Passes over data: the test pass of Lightning and what is read from it."""

from __future__ import annotations

from collections.abc import Iterator

import pytorch_lightning as pl
from torch import Tensor, nn
from torch.utils.data import DataLoader

from qexp import prepare
from qexp.report import terminal
from qexp.settings import Settings
from qexp.tasks.ptq import PTQTask


def evaluate(settings: Settings, data: pl.LightningDataModule, net: nn.Module, update: terminal.Update) -> PTQTask:
    """The task after a pass over the test set."""
    task = PTQTask(net, data.num_classes)
    prepare.trainer(settings.config, update).test(task, data.test_dataloader(), verbose=False)
    return task


def counted(loader: DataLoader, update: terminal.Update) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of a loader, with progress."""
    for number, batch in enumerate(loader, 1):
        yield batch
        update(number, len(loader))


def accuracy_of(task: PTQTask) -> float:
    """Share of samples that were decided rightly: the metric is float32, but a share is a whole number of n-ths."""
    samples = len(task.logits)
    return round(float(task.trainer.callback_metrics["acc"]) * samples) / samples


def agreement(logits: Tensor, reference: Tensor) -> float:
    """Share of samples on which both decide alike."""
    return float((logits.argmax(1) == reference.argmax(1)).double().mean())
