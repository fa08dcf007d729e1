"""Progress of a Lightning pass over all its epochs, told to whoever shows it."""

from __future__ import annotations

from collections.abc import Callable

import pytorch_lightning as pl


def _untold(done: int, total: int) -> None:
    """Tell nobody."""


class TellProgress(pl.Callback):
    """Calls `update(done, total)` after every batch; both count batches of the whole pass."""

    def __init__(self, update: Callable[[int, int], None]) -> None:
        self.update = update

    def __getstate__(self) -> dict:
        return {"update": _untold}  # where it was sent, nobody looks

    def on_train_batch_end(self, trainer: pl.Trainer, *_) -> None:
        self.update(trainer.global_step, int(trainer.estimated_stepping_batches))

    def on_validation_batch_end(self, trainer: pl.Trainer, task, outputs, batch, index: int, *_) -> None:
        self.update(index + 1, int(trainer.num_val_batches[0]))

    def on_test_batch_end(self, trainer: pl.Trainer, task, outputs, batch, index: int, *_) -> None:
        self.update(index + 1, int(trainer.num_test_batches[0]))
