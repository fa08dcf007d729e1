"""Quantized layers; a forward is the definition of its layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qexp.quant import affine, compiled, onnx_form
from qexp.quant.affine import HALF_EVEN, QParams, quantize
from qexp.quant.granularity import PerTensor
from qexp.quant.quantizer import Mode, Quantizer


class Add(nn.Module):
    """The sum of two tensors as a module, so that a residual connection has a name and its inputs can be quantized.

    A side that arrives with its channels (the last dimension) divided by s has s as `a_factor` or `b_factor` (C,),
    which undoes that: y = s_a a + s_b b. Without one, a side is added as it is.

    >>> Add()(torch.ones(2), torch.ones(2))
    tensor([2., 2.])
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("a_factor", None)  # None is no part of the state_dict
        self.register_buffer("b_factor", None)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        if self.a_factor is not None:
            a = a * self.a_factor
        if self.b_factor is not None:
            b = b * self.b_factor
        return a + b


class MatMul(nn.Module):
    """The product of two activations as a module, so that its operands can be quantized.

    Shapes: a (..., M, K) and b (..., K, N) to (..., M, N).

    >>> MatMul()(torch.ones(2, 3), torch.ones(3, 1))
    tensor([[3.],
            [3.]])
    """

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b


class ScaledLinear(nn.Linear):
    """y = (f x) W^T + b, each feature of x multiplied by its own factor (C,) first, as smoothing leaves it.

    Its buffer `factor` is given to a layer that is there: see `multiply_in_front_`.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.factor)


def multiply_in_front_(layer: nn.Linear, factor: Tensor) -> None:
    """Turn a linear layer into y = (f x) W^T + b, in place; its own parameters stay.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> multiply_in_front_(layer, torch.tensor([2.0, 0.0]))
    >>> torch.equal(layer(torch.ones(1, 2)), layer.weight[:, :1] * 2)
    True
    """
    layer.__class__ = ScaledLinear
    layer.register_buffer("factor", factor)


class Int32:
    """The grid of a bias. Accumulators add up to |code| + K 255 127, so a quarter of the range is used."""

    quant_min, quant_max = -(2**29), 2**29


class BiasQuantizer(nn.Module):
    """int32 bias on the grid of the accumulator: S_b = S_x S_w, Z = 0 (Jacob et al. 2018, equation 11).

    The bias stays in float where input or weight does, and where products are no integers times S_x S_w.
    """

    def forward(self, bias: Tensor | None, input_quantizer: Quantizer, weight_quantizer: Quantizer) -> Tensor | None:
        modes = {input_quantizer.mode, weight_quantizer.mode}
        if bias is None or modes & {Mode.OFF, Mode.OBSERVE}:
            return bias
        if Mode.EXPORT in modes and not input_quantizer.dynamic:
            return onnx_form.dequantize(self.onnx_codes, self.onnx_scale, self.onnx_zero_point)
        qparams = self.qparams(input_quantizer, weight_quantizer)
        if qparams is None:
            return bias
        fast = compiled.is_loaded() and compiled.serves(bias, HALF_EVEN)
        return (compiled if fast else affine).fake_quantize(bias, qparams, Int32)

    @staticmethod
    def has_grid(layer: nn.Module) -> bool:
        """Whether integers times one scale a channel are all products of this layer."""
        return None not in (layer.input_quantizer.product_scale, layer.weight_quantizer.product_scale)

    def qparams(self, input_quantizer: Quantizer, weight_quantizer: Quantizer) -> QParams | None:
        """Scale (one per output channel, or one) and zero point 0; None where there is no such grid."""
        of_input, of_weight = input_quantizer.product_scale, weight_quantizer.product_scale
        if of_input is None or of_weight is None:
            return None
        scale = of_input * of_weight
        return QParams(scale, torch.zeros_like(scale))

    @torch.no_grad()
    def prepare_export(self, bias: Tensor, input_quantizer: Quantizer, weight_quantizer: Quantizer) -> None:
        """Store what the ONNX file holds: int32 codes and their scale."""
        qparams = self.qparams(input_quantizer, weight_quantizer)
        self.register_buffer("onnx_codes", quantize(bias, qparams, Int32).to(torch.int32))
        self.register_buffer("onnx_scale", qparams.scale.expand(len(bias)).clone())
        self.register_buffer("onnx_zero_point", torch.zeros(len(bias), dtype=torch.int32))


class QuantLinear(nn.Linear):
    """y = Q(x) Q(W)^T + Q(b), then Q(y) where an engine needs it."""

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias_quantizer(self.bias, self.input_quantizer, self.weight_quantizer)
        y = F.linear(self.input_quantizer(x), self.weight_quantizer(self.weight), bias)
        return self.output_quantizer(y)


class QuantScaledLinear(ScaledLinear, QuantLinear):
    """y = Q(f x) Q(W)^T + Q(b), then Q(y) where an engine needs it: what is quantized is what was multiplied."""


class QuantConv2d(nn.Conv2d):
    """y = Q(x) * Q(W) + Q(b), then Q(y) where an engine needs it."""

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias_quantizer(self.bias, self.input_quantizer, self.weight_quantizer)
        y = self._conv_forward(self.input_quantizer(x), self.weight_quantizer(self.weight), bias)
        return self.output_quantizer(y)


class QuantAdd(Add):
    """y = s_a Q(a) + s_b Q(b), then Q(y) where an engine needs it; an engine may want one of the two in float."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.output_quantizer(super().forward(self.a_quantizer(a), self.b_quantizer(b)))


class QuantMatMul(MatMul):
    """y = Q(a) Q(b): both operands are computed, as the queries and keys of attention are."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self._operand(self.a_quantizer, a) @ self._operand(self.b_quantizer, b, transposed=True)

    @staticmethod
    def _operand(quantizer: Quantizer, x: Tensor, transposed: bool = False) -> Tensor:
        """Q(x); tokens are rows of a and columns of b, whatever dimensions stand before."""
        if not isinstance(quantizer, Quantizer) or quantizer.scheme.granularity == PerTensor():
            return quantizer(x)
        rows = x.mT if transposed else x
        values = quantizer(rows.reshape(-1, *rows.shape[-2:])).view(rows.shape)
        return values.mT if transposed else values


class QuantAdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    """y = mean of Q(x); so the layer before it ends in a quantizer, which ONNX Runtime needs to run it in int8."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.input_quantizer(x)
        # So does torch; written out, it is an operator that ONNX has.
        return x.mean((-2, -1), keepdim=True) if self.output_size in (1, (1, 1)) else super().forward(x)
