"""Noise of every quantization site of a model, taken while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qexp.metrics.sqnr import QuantizationNoise
from qexp.quant.affine import QParams
from qexp.quant.convert import layers, quantizers
from qexp.quant.grid import IntegerGrid
from qexp.quant.quantizer import Mode, Quantizer


def clipped(x: Tensor, qparams: QParams, grid: IntegerGrid) -> Tensor:
    """Number of values further than half a step outside the representable range."""
    codes = x / qparams.scale + qparams.zero_point
    return ((codes < grid.quant_min - 0.5) | (codes > grid.quant_max + 0.5)).sum()


@contextmanager
def measuring_sites(model: nn.Module) -> Iterator[dict[str, QuantizationNoise]]:
    """Site -> noise; activations add up inside the block, weights are measured once when it starts."""
    found = {quantizer.site: QuantizationNoise() for quantizer in quantizers(model) if quantizer.mode is Mode.QUANTIZE}

    def record(quantizer: Quantizer, x: Tensor, quantized: Tensor) -> None:
        found[quantizer.site].update(x, quantized, clipped(x, quantizer.qparams, quantizer.grid))

    hooks = []
    try:
        for quantizer in quantizers(model):
            if quantizer.site in found and not quantizer.shape:
                hook = lambda site, inputs, output: record(site, inputs[0], output)  # noqa: E731
                hooks.append(quantizer.register_forward_hook(hook))
        with torch.no_grad():
            for _, layer in layers(model):
                quantizer = getattr(layer, "weight_quantizer", None)
                if quantizer is not None and quantizer.site in found:
                    record(quantizer, layer.weight.detach(), quantizer(layer.weight))
        yield found
    finally:
        for hook in hooks:
            hook.remove()
