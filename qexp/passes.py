"""Passes of Lightning over data: calibration, the test pass, and what is read from it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from qexp import caches, prepare, smoothing
from qexp.metrics.sqnr import sqnr_db
from qexp.quant import bias_correction
from qexp.quant.convert import calibrating, fold_batchnorm_, observing, quantize_, quantizers, recall_, targets
from qexp.quant.dataflow import Dataflow
from qexp.quant.layers import QuantLinear
from qexp.quant.observers import Observer
from qexp.quant.quantizer import Mode, Quantizer
from qexp.quant.recipe import Recipe
from qexp.quant.sites import site_shapes
from qexp.report import terminal
from qexp.sections import ConfigError
from qexp.settings import Settings
from qexp.store import TensorCache
from qexp.tasks.ptq import PTQTask


def evaluate(settings: Settings, data: pl.LightningDataModule, net: nn.Module, update: terminal.Update) -> PTQTask:
    """The task after a pass over the test set; that of an encoder has what its head read, (N, features)."""
    task, embeddings = PTQTask(net, data.num_classes), []
    hook = None
    if hasattr(net, "embed"):
        hook = net.head.register_forward_pre_hook(lambda head, inputs: embeddings.append(inputs[0].detach()))
    try:
        prepare.trainer(settings.config, update).test(task, data.test_dataloader(), verbose=False)
    finally:
        if hook is not None:
            hook.remove()
            task.embeddings = torch.cat(embeddings)
    return task


@dataclass(frozen=True)
class Reference:
    """What the float network answers over the test set: logits, its accuracy, and what an encoder's head read."""

    logits: Tensor
    accuracy: float
    embeddings: Tensor | None = None


def reference(
    settings: Settings, data: pl.LightningDataModule, net: nn.Module, float_network: TensorCache
) -> Reference:
    """The answers of the float network; an encoder's, whose pass takes long, are kept by the texts it saw."""
    if not hasattr(net, "embed"):
        return _reference(settings, data, net)
    cache = caches.reference_cache(float_network, settings, data)
    with cache.lock():
        state = cache.load()
        if state is None:
            found = _reference(settings, data, net)
            accuracy = torch.tensor(found.accuracy, dtype=torch.float64)
            cache.save({"logits": found.logits, "accuracy": accuracy, "embeddings": found.embeddings})
            return found
    terminal.console.print("[dim]       -[/dim]  answers of the float network from the cache")
    return Reference(state["logits"], float(state["accuracy"]), state["embeddings"])


def _reference(settings: Settings, data: pl.LightningDataModule, net: nn.Module) -> Reference:
    with terminal.stage("evaluating the float network") as update:
        task = evaluate(settings, data, net, update)
    return Reference(task.logits, accuracy_of(task), getattr(task, "embeddings", None))


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


@torch.no_grad()
def batch_dependence(model: nn.Module, data: pl.LightningDataModule, most: int = 16) -> dict[str, float | bool]:
    """How far the logits of samples in one batch are from those of each sample alone, where ranges are of each call.

    With one range for a whole tensor they differ; with one for each token or group of features they are the same, but
    for the order in which products are summed.
    """
    ranges = [q.scheme.granularity for q in quantizers(model) if q.dynamic and q.mode is Mode.QUANTIZE]
    inputs = next(iter(data.test_dataloader()))[0][:most]
    together, alone = model(inputs), torch.cat([model(one) for one in inputs.split(1)])
    signal, error = together.double().square().sum(), (together - alone).double().square().sum()
    return {
        "dynamic/within_sample": all(granularity.follows_batch for granularity in ranges),
        "dynamic/batch_samples": len(inputs),
        "dynamic/batch_sqnr_db": sqnr_db(signal, error),
        "dynamic/batch_flips": int((together.argmax(1) != alone.argmax(1)).sum()),
    }


def calibrated(
    net: nn.Module, settings: Settings, data: pl.LightningDataModule, flow: Dataflow, sketches: TensorCache
) -> nn.Module:
    """A copy of the float network, folded, smoothed, with all its quantizers, calibrated. Errors: ConfigError.

    Its `smoothed` says what SmoothQuant did, its `biases` what bias correction did. Where it is not to be folded, no
    engine asks for outputs of layers, and BatchNorm follows them in float.
    """
    recipe, model, folds = settings.recipe, copy.deepcopy(net), settings.config["fold_batchnorm"]
    if folds:
        fold_batchnorm_(model, flow)
    model.smoothed = smoothing.smooth_(model, settings, data, flow, sketches)
    try:
        in_float = flow.normalized_additions() + flow.uncalled()
        quantized = {name for name, _ in targets(model, recipe)}.difference(in_float)
        shapes = site_shapes(model, flow.example)
        logits = _logits_layer(net, recipe, flow, quantized)
        outputs = tuple(flow.open_layers(quantized)) if folds else ()
        quantize_(model, recipe, outputs, logits, shapes, in_float)
    except ValueError as error:
        raise ConfigError(prepare.blamed(error)) from None
    calibrate_(model, settings, data, flow, smoothing.sketches_of(sketches, model.smoothed, settings))
    model.biases = correct_biases_(model, settings, data) if settings.bias_samples else {}
    return model


def correct_biases_(model: nn.Module, settings: Settings, data: pl.LightningDataModule) -> dict[str, int]:
    """Correct the biases of a calibrated network; how many were, by the names of metrics. Errors: ConfigError."""
    samples = torch.cat([inputs for inputs, _ in prepare.calibration_loader(data, settings.seed)])
    if len(samples) < settings.bias_samples:
        raise ConfigError(f"bias_correction={settings.bias_samples}: there are {len(samples)} calibration samples")
    samples = samples[: settings.bias_samples]
    read = model.words(samples) if hasattr(model, "words") else None
    with terminal.stage("correcting biases"), prepare.evaluating(model):
        corrected, kept = bias_correction.correct_biases_(model, samples, read)
    if kept:
        terminal.output.print(f"biases not corrected, of layers used more than once: {', '.join(kept)}", markup=False)
    return {"bias_correction/layers": len(corrected), "bias_correction/skipped": len(kept)}


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
