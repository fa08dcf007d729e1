"""Bytes of a quantized model as its formats have them: packed codes, scales, and what stays in float."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from qexp.quant.convert import quantizers
from qexp.quant.quantizer import Quantizer


@dataclass(frozen=True)
class Footprint:
    """Bits of weight codes, of all that says what codes mean, and of parameters that are no codes."""

    codes: int = 0
    qparams: int = 0
    other: int = 0

    def metrics(self) -> dict[str, int]:
        """The figures by the names of the record; an incomplete byte counts as one."""
        return {
            "size/packed_bytes": -(-(self.codes + self.qparams + self.other) // 8),
            "size/qparams_bytes": -(-self.qparams // 8),
        }


def site_bits(quantizer: Quantizer) -> tuple[int, int]:
    """Bits of the stored codes of one site (of weights alone) and of its scales, zero points and codebook.

    >>> from qexp.quant.granularity import PerGroup
    >>> from qexp.quant.grid import IntegerGrid
    >>> from qexp.quant.recipe import Scheme
    >>> site_bits(Quantizer(Scheme(IntegerGrid(4), PerGroup(32)), (64, 128), is_weight=True))
    (32768, 8192)
    """
    if quantizer.dynamic:
        return 0, 0  # computed in each call
    grid = quantizer.grid
    codes = math.prod(quantizer.shape) * grid.bits if quantizer.is_weight else 0
    qparams = quantizer.scale.numel() * grid.overhead_bits
    qparams += 32 * len(grid.unit) if grid.fits_data else 0
    qparams += 32 if grid.scale == "e4m3" else 0  # the float32 of the whole tensor
    return codes, qparams


def footprint(model: nn.Module) -> Footprint:
    """Bytes of a model after `quantize_`; biases count 32 bits, and so does every parameter that stays in float."""
    sites = [(quantizer, *site_bits(quantizer)) for quantizer in quantizers(model)]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    quantized = sum(math.prod(quantizer.shape) for quantizer, _, _ in sites if quantizer.is_weight)
    return Footprint(sum(c for _, c, _ in sites), sum(q for _, _, q in sites), 32 * (parameters - quantized))
