"""From a calibrated network to a fine-tuned one: attach, train with checkpoints, settle."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn

from qexp import prepare
from qexp.finetune.execute import ExecuteFineTune
from qexp.finetune.plan import FineTune
from qexp.quant.batchnorm import reestimate_batchnorm_, refold_batchnorm_, unfold_batchnorm_
from qexp.quant.convert import layers, quantizers, set_mode_
from qexp.quant.dataflow import Dataflow
from qexp.quant.estimators import StraightThrough
from qexp.quant.quantizer import Mode, Once
from qexp.quant.sites import same_tensor
from qexp.report import terminal
from qexp.settings import Settings
from qexp.store import StoreError
from qexp.tasks.qat import QATTask

LAST = "last.ckpt"


def finetune_(
    model: nn.Module, net: nn.Module, flow: Dataflow, settings: Settings, data: pl.LightningDataModule,
    folder: Path, logger: Any,
) -> list[dict[str, float]]:  # fmt: skip
    """Train a calibrated network by the plan of its settings; `net` is the float network that it came from.

    A checkpoint in `folder` is gone on from, and one is left there after each epoch until all is done. Returns one row
    for each epoch. Errors: ValueError and StoreError, one sentence.
    """
    plan = settings.finetune
    start = {name: weight.detach().clone() for name, weight in _weights(model)}
    attach_(model, plan, flow.example)
    if plan.batchnorm != "folded":
        unfold_batchnorm_(model, net, flow, plan.batchnorm)
    history = _fit(model, net, settings, data, folder, logger)
    if plan.reestimate:
        set_mode_(model, Mode.QUANTIZE)
        reestimate_batchnorm_(model, (images for images, _ in prepare.calibration_loader(data, settings.seed)))
    if plan.batchnorm != "folded":
        refold_batchnorm_(model)
    _settle_(model)
    model.eval()
    history[-1]["weight_change"] = _relative_change(start, dict(_weights(model)))
    return history


def finished_(folder: Path) -> None:
    """Forget the checkpoints of a fine-tuning whose result is stored."""
    shutil.rmtree(folder, ignore_errors=True)


def _weights(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, layer.weight) for name, layer in layers(model) if hasattr(layer, "weight_quantizer")]


def attach_(model: nn.Module, plan: FineTune, images: Tensor) -> None:
    """Give quantizers their estimators, and weights the form in which they are trained."""
    for quantizer in quantizers(model):
        estimator = plan.weight if quantizer.is_weight else plan.activation
        if estimator is not None:
            quantizer.train_with_(estimator if estimator.fits(quantizer) else StraightThrough())
    for first, *others in same_tensor(model, images):
        for quantizer in others:  # engines quantize a tensor once, whoever reads it
            for name in first.learned:
                setattr(quantizer, name, getattr(first, name))
            if first.learned:
                first.once = quantizer.once = first.once or Once()
    with torch.no_grad():
        for _, layer in layers(model):
            if hasattr(layer, "weight_quantizer") and layer.weight_quantizer.estimator is not None:
                quantizer = layer.weight_quantizer
                layer.weight.copy_(quantizer.estimator.start(quantizer, layer.weight.detach()))


def _fit(
    model: nn.Module, net: nn.Module, settings: Settings, data: pl.LightningDataModule, folder: Path, logger: Any
) -> list[dict[str, float]]:
    plan = settings.finetune
    task = QATTask(model, data.num_classes, plan, copy.deepcopy(net).eval() if plan.distill else None)
    task.seed = settings.seed
    task.train()
    execute = ExecuteFineTune(plan, model)
    keep = ModelCheckpoint(folder, "last", save_on_train_epoch_end=True, enable_version_counter=False)
    with terminal.stage(f"fine-tuning, {settings.config['finetune']['name']}, {_epochs(plan)}") as update:
        trainer = prepare.finetuning_trainer(settings.config, plan.epochs, update, [execute, keep], logger)
        try:
            trainer.fit(task, data.train_dataloader(), ckpt_path=_readable(folder / LAST), weights_only=True)
        except ValueError as error:
            kept = f"; the last good epoch is kept in {folder / LAST}" if (folder / LAST).exists() else ""
            raise ValueError(f"{error}{kept}") from error
    return execute.history


def _readable(checkpoint: Path) -> Path | None:
    """The checkpoint, where there is one. Errors: StoreError when it is damaged."""
    if not checkpoint.exists():
        return None
    try:
        torch.load(checkpoint, weights_only=True, map_location="cpu")["state_dict"]
    except Exception as error:  # whatever a damaged file makes the reader raise
        why = f"checkpoint {checkpoint} is damaged ({type(error).__name__})"
        raise StoreError(f"{why}; delete {checkpoint.parent} to fine-tune from the start") from None
    return checkpoint


@torch.no_grad()
def _settle_(model: nn.Module) -> None:
    """What was learned becomes scale, zero point and weight; quantizers are those of any calibrated network again."""
    for _, layer in layers(model):
        if hasattr(layer, "weight_quantizer"):
            layer.weight.copy_(layer.weight_quantizer.settle_(layer.weight.detach()))
    for quantizer in quantizers(model):
        quantizer.settle_()
        quantizer.follows = False
        quantizer.mode = Mode.QUANTIZE


def _relative_change(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    """||w' - w|| / ||w|| over all weights."""
    moved = sum((after[name].detach() - weight).square().sum().double() for name, weight in before.items())
    return float((moved / sum(weight.square().sum().double() for weight in before.values())).sqrt())


def _epochs(plan: FineTune) -> str:
    return f"{plan.epochs} epoch{'s' * (plan.epochs > 1)}"
