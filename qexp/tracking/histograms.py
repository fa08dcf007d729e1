"""Histograms of what is quantized: small, and computed when a logger asks for them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from qexp.quant.convert import layers, quantizers
from qexp.quant.quantizer import Mode
from qexp.store import TensorCache
from qexp.tracking.loggers import Histogram

BINS = 64


def histograms(model: nn.Module | None, sketches: TensorCache) -> Iterator[tuple[str, Histogram]]:
    """Weights of each layer before and after quantization, in the same bins, and activations as calibration saw them.

    A network that is not quantized has none. Names have slashes for dots, at which W&B would take them apart.
    """
    if model is None:
        return
    yield from _weights(model)
    yield from _activations(model, sketches)


@torch.no_grad()
def _weights(model: nn.Module) -> Iterator[tuple[str, Histogram]]:
    for name, layer in layers(model):
        quantizer = getattr(layer, "weight_quantizer", None)
        if quantizer is not None and quantizer.mode is Mode.QUANTIZE:
            before, after = layer.weight.detach(), quantizer(layer.weight.detach())
            span = torch.stack([before, after]).aminmax()
            for what, values in ("float", before), ("quantized", after):
                yield f"weights/{_slashed(name)}/{what}", _histogram(values, None, (float(span.min), float(span.max)))


def _activations(model: nn.Module, sketches: TensorCache) -> Iterator[tuple[str, Histogram]]:
    seen = sketches.load() or {}
    for quantizer in quantizers(model):
        if quantizer.is_weight or quantizer.dynamic or quantizer.mode is not Mode.QUANTIZE:
            continue
        observer = quantizer.new_observer()
        state = seen.get(f"{quantizer.site}: {observer.key}")
        if state is not None:
            observer.load(state)
            stats = observer.compute()
            yield f"activations/{_slashed(quantizer.site)}", _histogram(stats.points, stats.weights, None)


def _slashed(name: str) -> str:
    return name.replace(".", "/")


def _histogram(values: Tensor, weights: Tensor | None, span: tuple[float, float] | None) -> Histogram:
    flat = None if weights is None else weights.flatten().numpy()
    counts, edges = np.histogram(values.flatten().double().numpy(), BINS, span, weights=flat)
    return Histogram(counts.tolist(), edges.tolist())
