"""Noise of every quantization site of a model, taken while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qexp.metrics.sqnr import QuantizationNoise
from qexp.quant.convert import layers, quantizers
from qexp.quant.quantizer import Mode, Quantizer


@contextmanager
def measuring_sites(model: nn.Module) -> Iterator[dict[str, QuantizationNoise]]:
    """Site -> noise; activations add up inside the block, weights are measured once when it starts."""
    found = {quantizer.site: QuantizationNoise() for quantizer in quantizers(model) if quantizer.mode is Mode.QUANTIZE}

    def record(quantizer: Quantizer, x: Tensor, quantized: Tensor) -> None:
        found[quantizer.site].update(x, quantized, quantizer.clipped(x))

    hooks = []
    try:
        for quantizer in quantizers(model):
            if quantizer.site in found and not quantizer.is_weight:
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
