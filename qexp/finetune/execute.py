"""The callback that executes a plan while Lightning trains."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from qexp.finetune.plan import FineTune
from qexp.quant.batchnorm import freeze_batchnorm_
from qexp.quant.convert import layers, quantizers
from qexp.quant.distributed import mean_across_ranks
from qexp.quant.estimators import sync_
from qexp.quant.quantizer import Mode, Quantizer
from qexp.quant.rounding import HalfEven, Rounding

HALF_EVEN = HalfEven()


class ExecuteFineTune(pl.Callback):
    """Switches what the plan says in the epoch it says, keeps ranges in step with what is learned, rounds updates.

    `history` has one row for each epoch: the mean loss and, where weights are rounded to their grid, the share of
    codes that changed in a step. Errors: ValueError where a learned range became impossible.
    """

    def __init__(self, plan: FineTune, model: nn.Module) -> None:
        self.plan = plan
        self.history: list[dict[str, float]] = []
        self._bits = {q.site: q.grid.bits for q in quantizers(model)}
        self._losses: list[Tensor] = []
        self._changed: list[Tensor] = []

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history = state["history"]

    def on_train_start(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        if trainer.current_epoch:  # a checkpoint holds the scales of the epoch before
            self._set_bits(task.net, trainer.current_epoch - 1, rescale=False)
        if self.plan.update is not None:
            round_weights_(task.net, HALF_EVEN, 0)

    def on_train_epoch_start(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        epoch, plan = trainer.current_epoch, self.plan
        pl.seed_everything(_seed_of(task, epoch), workers=True, verbose=False)  # so an epoch is the same when resumed
        self._set_bits(task.net, epoch, rescale=True)
        for quantizer in quantizers(task.net):
            trained = plan.weight if quantizer.is_weight else plan.activation
            on = trained is not None and epoch >= plan.start and quantizer.calibrated
            quantizer.mode = Mode.QUANTIZE if on else Mode.OFF
            quantizer.follows = on and epoch < plan.observe
        if plan.batchnorm_freeze is not None and epoch >= plan.batchnorm_freeze:
            freeze_batchnorm_(task.net)
        self._losses, self._changed = [], []

    def _set_bits(self, model: nn.Module, epoch: int, rescale: bool) -> None:
        if self.plan.gradual:
            for quantizer in quantizers(model):
                quantizer.set_bits_(self.plan.bits_in(epoch, self._bits[quantizer.site]), rescale)

    def on_train_batch_end(self, trainer: pl.Trainer, task: pl.LightningModule, outputs, batch, index: int) -> None:
        self._losses.append(outputs["loss"].detach())
        sync_(quantizers(task.net))
        if self.plan.update is not None:
            self._changed.append(round_weights_(task.net, self.plan.update, trainer.global_step))
            task.log("finetune/changed_codes", self._changed[-1])

    def on_train_epoch_end(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        row = {"epoch": trainer.current_epoch, "loss": float(mean_across_ranks(torch.stack(self._losses).mean()))}
        if self._changed:
            row["changed_codes"] = float(torch.stack(self._changed).mean())
        self.history.append(row)


def _seed_of(task: pl.LightningModule, epoch: int) -> int:
    return (task.seed * 1_000_003 + epoch) % 2**32


def weights(model: nn.Module) -> Iterator[tuple[nn.Parameter, Quantizer]]:
    """The weights of all quantized layers with their quantizers."""
    return ((layer.weight, layer.weight_quantizer) for _, layer in layers(model) if hasattr(layer, "weight_quantizer"))


@torch.no_grad()
def round_weights_(model: nn.Module, rounding: Rounding, step: int) -> Tensor:
    """Store every weight on its grid: w <- S (Q(w / S) - Z), Q being this rounding (Gupta et al. 2015, section 3).

    Returns the share of codes that differ from those stored before.
    """
    changed, count = [], 0
    for weight, quantizer in weights(model):
        before = getattr(quantizer, "stored", None)
        codes = quantizer.codes(weight, rounding.at(quantizer.site, step))
        weight.copy_(quantizer.decoded(codes))
        if before is not None:
            changed.append((codes != before).sum())
            count += codes.numel()
        quantizer.stored = codes
    return torch.stack(changed).sum() / count if changed else torch.tensor(0.0)
