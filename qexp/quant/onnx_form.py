"""The ONNX form of a quantizer: QuantizeLinear and DequantizeLinear as symbolic operators of torch's exporter.

A hand-written fake-quantize would export as a plain float graph, so these are emitted explicitly. Activations are
stored as uint8 and weights as int8 whatever their grid (a shift of codes and zero point together changes no value),
because that is the pair that engines multiply fastest. Codes of fewer than 8 bits are cut in the integer domain,
after the QuantizeLinear that an engine fuses into the layer before.
"""

from __future__ import annotations

import torch
from torch import Tensor

OPSET = 21
DYNAMIC = "DynamicQuantize"  # stands in the graph of all engines for what each of them writes in its own way


def quantize_dequantize(x: Tensor, scale: Tensor, zero_point: Tensor, bounds: tuple[Tensor, Tensor]) -> Tensor:
    """QuantizeLinear, Clip of the codes to bounds, DequantizeLinear; the Clip goes where it does nothing."""
    codes = _symbolic("QuantizeLinear", (x, scale, zero_point), torch.uint8, x.shape)
    codes = _symbolic("Clip", (codes, *bounds), torch.uint8, x.shape)
    return _symbolic("DequantizeLinear", (codes, scale, zero_point), torch.float32, x.shape)


def quantize_dynamically(x: Tensor, form: str, size: int) -> Tensor:
    """A place for quantization by the range of each call, in one of the forms of `Scheme.dynamic_form`."""
    return _symbolic(f"qexp::{DYNAMIC}", (x,), torch.float32, x.shape, {"form": form, "size": size})


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """DequantizeLinear of stored codes; a scale of one dimension runs along axis 0."""
    attributes = {"axis": 0} if scale.dim() else {}
    return _symbolic("DequantizeLinear", (codes, scale, zero_point), torch.float32, codes.shape, attributes)


def _symbolic(operator: str, inputs: tuple[Tensor, ...], dtype: torch.dtype, shape, attributes=None) -> Tensor:
    return torch.onnx.ops.symbolic(operator, inputs, attributes, dtype=dtype, shape=shape, version=OPSET)
