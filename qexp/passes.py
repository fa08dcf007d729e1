"""Passes of Lightning over data: calibration, the test pass, and what is read from it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytorch_lightning as pl
from torch import Tensor, nn
from torch.utils.data import DataLoader

from qexp import prepare, smoothing
from qexp.quant.convert import calibrating, fold_batchnorm_, observing, quantize_, recall_, targets
from qexp.quant.dataflow import Dataflow
from qexp.quant.layers import QuantLinear
from qexp.quant.observers import Observer
from qexp.quant.quantizer import Quantizer
from qexp.quant.recipe import Recipe
from qexp.quant.sites import site_shapes
from qexp.report import terminal
from qexp.sections import ConfigError
from qexp.settings import Settings
from qexp.store import TensorCache
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


def calibrated(
    net: nn.Module, settings: Settings, data: pl.LightningDataModule, flow: Dataflow, sketches: TensorCache
) -> nn.Module:
    """A copy of the float network, folded, smoothed, with all its quantizers, calibrated. Errors: ConfigError.

    Its `smoothed` says what SmoothQuant did. Where it is not to be folded, no engine asks for outputs of layers, and
    BatchNorm follows them in float.
    """
    recipe, model, folds = settings.recipe, copy.deepcopy(net), settings.config["fold_batchnorm"]
    if folds:
        fold_batchnorm_(model, flow)
    model.smoothed = smoothing.smooth_(model, settings, data, flow, sketches)
    try:
        quantized = {name for name, _ in targets(model, recipe)}
        shapes = site_shapes(model, flow.example)
        logits = _logits_layer(net, recipe, flow, quantized)
        quantize_(model, recipe, tuple(flow.open_layers(quantized)) if folds else (), logits, shapes)
    except ValueError as error:
        raise ConfigError(prepare.blamed(error)) from None
    calibrate_(model, settings, data, flow, smoothing.sketches_of(sketches, model.smoothed, settings))
    return model


def _logits_layer(net: nn.Module, recipe: Recipe, flow: Dataflow, quantized: set[str]) -> str | None:
    if recipe.logits is None:
        return None
    name = flow.logits_layer()
    if name not in quantized:
        what = f"the output of layer {name!r}, which is excluded," if name else "what is no output of a layer"
        raise ConfigError(f"calibration.logits={recipe.logits}: {type(net).__name__} returns {what}; choose null")
    return name


def calibrate_(
    model: nn.Module, settings: Settings, data: pl.LightningDataModule, flow: Dataflow, sketches: TensorCache
) -> None:
    """One pass over the calibration data, unless one over the same data and network has been made before."""
    with calibrating(model), sketches.lock():
        seen = sketches.load() or {}
        asked = len(observing(model))
        recall_(model, seen)
        if observers := observing(model):
            with _logits_observed(model, flow) as more:
                calibration_pass(model, settings, data)
            states = {key: observer.state() for key, observer in (observers | more).items()}
            sketches.save(seen | states)
        elif asked:
            terminal.console.print("[dim]       -[/dim]  calibration pass from the cache")


def recalibrate_(model: nn.Module, settings: Settings, data: pl.LightningDataModule) -> None:
    """A calibration pass over a network that training has changed: nothing is known of it."""
    with calibrating(model):
        calibration_pass(model, settings, data)


def calibration_pass(model: nn.Module, settings: Settings, data: pl.LightningDataModule) -> None:
    """Let the calibration data run through the model."""
    loader = prepare.calibration_loader(data, settings.seed)
    with terminal.stage("calibration pass") as update:
        task = PTQTask(model, data.num_classes)
        prepare.trainer(settings.config, update).validate(task, loader, verbose=False)


@contextmanager
def _logits_observed(model: nn.Module, flow: Dataflow) -> Iterator[dict[str, Observer]]:
    """Look at the logits, too, whatever is asked for, so that a sweep over all calibrations makes one pass."""
    name = flow.logits_layer()
    layer = model.get_submodule(name) if name else None
    if not isinstance(layer, QuantLinear) or isinstance(layer.output_quantizer, Quantizer):
        yield {}
        return
    observer = Observer(row_length=layer.out_features)
    hook = layer.register_forward_hook(lambda layer, inputs, output: observer.update(output))
    try:
        yield {f"{name}.output: {observer.key}": observer}
    finally:
        hook.remove()
