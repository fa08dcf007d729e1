"""The equations of uniform quantization, once.

q  = clamp(round(x / S) + Z, quant_min, quant_max)      Gholami et al. 2021, equation 2 (sign of Z as in ONNX)
x~ = S (q - Z)                                          equation 3

The quotient is a float32 division, rounded, then Z is added: the order that ONNX defines. Bounds are integers, so

    clamp(round(x / S) + Z, a, b) - Z = round(clamp(x / S, a - Z, b - Z))

holds to the bit, and is how it is computed: four passes over memory.
"""

from __future__ import annotations

import ctypes
import math
import struct
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from qexp.quant.rounding import HalfEven, Rounding

HALF_EVEN = HalfEven()


class CodeRange(Protocol):
    """Anything with a smallest and a largest code."""

    quant_min: int
    quant_max: int


class QParams(NamedTuple):
    """Scale S and zero point Z, float32 tensors that broadcast against what they quantize; Z holds integers.

    `levels` are those of a codebook made for the data, for S = 1, increasing; None where the format has its own.
    """

    scale: Tensor
    zero_point: Tensor
    levels: Tensor | None = None


def quantize(x: Tensor, qparams: QParams, grid: CodeRange, rounding: Rounding = HALF_EVEN) -> Tensor:
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


def fake_quantize(x: Tensor, qparams: QParams, grid: CodeRange, rounding: Rounding = HALF_EVEN) -> Tensor:
    """What inference will see of x: dequantize(quantize(x)), with the straight-through gradient.

    dL/dx = dL/dx~ where quant_min <= round(x / S) + Z <= quant_max, else 0 (Gholami et al. 2021, section III.G).
    Of stochastic rounding it is the gradient of the mean, E[x~] = x where quant_min <= x / S + Z <= quant_max.

    >>> from qexp.quant.grid import IntegerGrid
    >>> x = torch.tensor([0.26, 9.0], requires_grad=True)
    >>> y = fake_quantize(x, QParams(torch.tensor(0.5), torch.tensor(0.0)), IntegerGrid(4))
    >>> y.sum().backward(); y.tolist(), x.grad.tolist()
    ([0.5, 3.5], [1.0, 0.0])
    """
    scale, zero_point = qparams.scale, qparams.zero_point
    if isinstance(rounding, HalfEven) and scale.numel() == 1 and x.device.type == "cpu":
        return _OneScale.apply(x, scale.detach().view(()), int(zero_point), grid)
    if isinstance(rounding, HalfEven) and isinstance(grid.quant_min, int) and not bool(zero_point.any()):
        return _ZeroPointZero.apply(x, scale, grid)
    return _AnyForm.apply(x, qparams, grid, rounding)


class _OneScale(torch.autograd.Function):
    """One S and one Z: the mask of the gradient is an interval of x, so nothing but x is kept."""

    @staticmethod
    def forward(ctx, x: Tensor, divisor: Tensor, zero_point: int, grid: CodeRange) -> Tensor:
        scale = float(divisor)
        lowest, highest = grid.quant_min - zero_point, grid.quant_max - zero_point
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(x)
            ctx.bounds = inside_of(grid, scale, zero_point)
        values = torch.div(x, divisor).clamp_(lowest, highest).round_()
        # One fused pass: S times the code, and + 0 turns a negative zero into zero.
        return torch.add(_zero(x.dtype), values, alpha=scale, out=values)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(grad, x, *ctx.bounds), None, None, None


@lru_cache(maxsize=16)
def _zero(dtype: torch.dtype) -> Tensor:
    return torch.zeros((), dtype=dtype)


def inside_of(grid: CodeRange, scale: float, zero_point: int) -> tuple[float, float]:
    """The open interval of float32 numbers x with quant_min <= round(x / S) + Z <= quant_max."""
    lowest, highest = grid.quant_min - zero_point, grid.quant_max - zero_point
    return -_first_outside(-lowest, scale), _first_outside(highest, scale)


@lru_cache(maxsize=4096)
def _first_outside(code: int, scale: float) -> float:
    """The smallest float32 x with round(x / S) > code; round(-x / S) < -code holds for the same x."""
    # A tie at code + 1/2 rounds to the even neighbour, which is outside where code is odd.
    tie, outside_at_tie = code + 0.5, code % 2 != 0

    def outside(x: float) -> bool:
        # A quotient of two float32 numbers in float64, rounded to float32, is their float32 quotient.
        quotient = _float32(x / scale)
        return quotient >= tie if outside_at_tie else quotient > tie

    x = _float32(tie * scale)
    while outside(x):
        x = _next_float32(x, -1)
    while not outside(x) and x < math.inf:
        x = _next_float32(x, 1)
    return x


def _float32(value: float) -> float:
    """The nearest float32; infinity beyond the largest."""
    return ctypes.c_float(value).value


def _next_float32(x: float, step: int) -> float:
    """The float32 next to x, above it for step 1, below it for step -1."""
    (bits,) = struct.unpack("<i", struct.pack("<f", x))
    if x == 0:
        return step * 2.0**-149
    (moved,) = struct.unpack("<f", struct.pack("<i", bits + (step if x > 0 else -step)))
    return moved


class _ZeroPointZero(torch.autograd.Function):
    """Many S, Z = 0: the mask is an interval of the quotient, which is kept; its ends are exact in float32."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, grid: CodeRange) -> Tensor:
        quotient = x / scale
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(quotient)
            ctx.bounds = -_first_quotient_outside(-grid.quant_min), _first_quotient_outside(grid.quant_max)
            codes = quotient.clamp(grid.quant_min, grid.quant_max)
        else:
            codes = quotient.clamp_(grid.quant_min, grid.quant_max)
        return codes.round_().mul_(scale).add_(0.0)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (quotient,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(grad, quotient, *ctx.bounds), None, None


@lru_cache(maxsize=256)
def _first_quotient_outside(code: int) -> float:
    """The smallest float32 with round(quotient) > code."""
    tie = torch.tensor(code + 0.5)
    return float(tie if code % 2 else torch.nextafter(tie, torch.tensor(math.inf)))


class _AnyForm(torch.autograd.Function):
    """The definition as it stands, with a mask."""

    @staticmethod
    def forward(ctx, x: Tensor, qparams: QParams, grid: CodeRange, rounding: Rounding) -> Tensor:
        quotient = x / qparams.scale
        codes = rounding(quotient).add_(qparams.zero_point)
        if ctx.needs_input_grad[0]:
            place = quotient.add_(qparams.zero_point) if rounding.is_random else codes
            ctx.save_for_backward((place >= grid.quant_min) & (place <= grid.quant_max))
        codes.clamp_(grid.quant_min, grid.quant_max)
        return codes.sub_(qparams.zero_point).mul_(qparams.scale)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (inside,) = ctx.saved_tensors
        return grad * inside, None, None, None


class _StraightThrough(torch.autograd.Function):
    """Values that came about somehow, with the gradient of x, all of it or where `inside`."""

    @staticmethod
    def forward(ctx, x: Tensor, values: Tensor, inside: Tensor | None) -> Tensor:
        ctx.save_for_backward(*[] if inside is None else [inside])
        return values

    @staticmethod
    def backward(ctx, grad: Tensor):
        for inside in ctx.saved_tensors:
            grad = grad * inside
        return grad, None, None


def straight_through(x: Tensor, values: Tensor, inside: Tensor | None = None) -> Tensor:
    """`values` in the forward pass; in the backward pass dL/dx = dL/dvalues where inside (or everywhere), else 0."""
    return _StraightThrough.apply(x, values, inside)


class _TellScale(torch.autograd.Function):
    """The identity, which tells the scale what passes."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, scale = ctx.saved_tensors
        if scale.numel() == 1:
            total = torch.dot(grad.reshape(-1), x.reshape(-1)).view(scale.shape)
        else:
            total = (grad * x).sum_to_size(scale.shape)
        return grad, total * (ctx.factor / scale), None


def tell_scale(x: Tensor, scale: Tensor, factor: float) -> Tensor:
    """x itself; in the backward pass dL/dS = factor / S sum dL/dx x, over the elements that share S.

    As if x were x (S / s)^factor, s being the value of S. Around a fake-quantize, -1 before and 1 after it give the
    gradient of S Q(x / S), with respect to S.
    """
    return _TellScale.apply(x, scale, factor)
