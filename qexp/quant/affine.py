"""The equations of uniform quantization, once.

q  = clamp(round(x / S) + Z, quant_min, quant_max)      Gholami et al. 2021, equation 2 (sign of Z as in ONNX)
x~ = S (q - Z)                                          equation 3

The quotient is a float32 division, rounded, then Z is added: the order that ONNX defines.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from qexp.quant.rounding import round_half_even

Rounding = Callable[[Tensor], Tensor]


class CodeRange(Protocol):
    """Anything with a smallest and a largest code."""

    quant_min: int
    quant_max: int


class QParams(NamedTuple):
    """Scale S and zero point Z, float32 tensors that broadcast against what they quantize; Z holds integers."""

    scale: Tensor
    zero_point: Tensor


def quantize(x: Tensor, qparams: QParams, grid: CodeRange, rounding: Rounding = round_half_even) -> Tensor:
    """Codes q = clamp(round(x / S) + Z, quant_min, quant_max), as float32 integers of the shape of x.

    >>> from qexp.quant.grid import IntegerGrid
    >>> quantize(torch.tensor([-1.0, 0.25, 9.0]), QParams(torch.tensor(0.5), torch.tensor(0.0)), IntegerGrid(4))
    tensor([-2.,  0.,  7.])
    """
    codes = rounding(x / qparams.scale).add_(qparams.zero_point)
    return codes.clamp_(grid.quant_min, grid.quant_max)


def dequantize(codes: Tensor, qparams: QParams) -> Tensor:
    """Values x~ = S (q - Z)."""
    return (codes - qparams.zero_point) * qparams.scale


class _FakeQuantize(torch.autograd.Function):
    """Quantize and dequantize; the gradient is the straight-through one, zero where the code was clamped."""

    @staticmethod
    def forward(ctx, x: Tensor, qparams: QParams, grid: CodeRange, rounding: Rounding) -> Tensor:
        codes = rounding(x / qparams.scale).add_(qparams.zero_point)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward((codes >= grid.quant_min) & (codes <= grid.quant_max))
        codes.clamp_(grid.quant_min, grid.quant_max)
        return codes.sub_(qparams.zero_point).mul_(qparams.scale)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (inside,) = ctx.saved_tensors
        return grad * inside, None, None, None


def fake_quantize(x: Tensor, qparams: QParams, grid: CodeRange, rounding: Rounding = round_half_even) -> Tensor:
    """What inference will see of x: dequantize(quantize(x)), with the straight-through gradient.

    dL/dx = dL/dx~ where quant_min <= round(x / S) + Z <= quant_max, else 0 (Gholami et al. 2021, section III.G).

    >>> from qexp.quant.grid import IntegerGrid
    >>> x = torch.tensor([0.26, 9.0], requires_grad=True)
    >>> y = fake_quantize(x, QParams(torch.tensor(0.5), torch.tensor(0.0)), IntegerGrid(4))
    >>> y.sum().backward(); y.tolist(), x.grad.tolist()
    ([0.5, 3.5], [1.0, 0.0])
    """
    return _FakeQuantize.apply(x, qparams, grid, rounding)
