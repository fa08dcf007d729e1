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
from qexp.quant.quantizer import Mode


def clipped(x: Tensor, qparams: QParams, grid: IntegerGrid) -> Tensor:
    """Number of values further than half a step outside the representable range."""
    codes = x / qparams.scale + qparams.zero_point
    return ((codes < grid.quant_min - 0.5) | (codes > grid.quant_max + 0.5)).sum()


@contextmanager
def measuring_sites(model: nn.Module) -> Iterator[dict[str, QuantizationNoise]]:
    """Site -> noise; activations add up inside the block, weights are measured once when it starts."""
    found: dict[str, QuantizationNoise] = {}
    hooks = []
    for quantizer in quantizers(model):
        if quantizer.mode is Mode.QUANTIZE:
            found[quantizer.site] = noise = QuantizationNoise()

            def record(site, inputs, output, noise=noise) -> None:
                noise.update(inputs[0], output, clipped(inputs[0], site.qparams, site.grid))

            if quantizer.shape:
                continue
            hooks.append(quantizer.register_forward_hook(record))
    with torch.no_grad():
        for name, layer in layers(model):
            quantizer = getattr(layer, "weight_quantizer", None)
            if quantizer is not None and quantizer.mode is Mode.QUANTIZE:
                weight = layer.weight.detach()
                found[f"{name}.weight"].update(
                    weight, quantizer(weight), clipped(weight, quantizer.qparams, quantizer.grid)
                )
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
