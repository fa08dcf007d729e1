"""One quantization site: a grid, a granularity, a calibration, and what a pass does with them."""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor, nn

from qexp.quant import onnx_form
from qexp.quant.affine import QParams, fake_quantize
from qexp.quant.grid import IntegerGrid
from qexp.quant.observers import HistogramObserver, MinMaxObserver, Statistics
from qexp.quant.recipe import Scheme


class Mode(Enum):
    """What a quantizer does with a tensor that passes: nothing, look, quantize, or write itself into an ONNX graph."""

    OFF = "off"
    OBSERVE = "observe"
    QUANTIZE = "quantize"
    EXPORT = "export"


class Quantizer(nn.Module):
    """Quantizes one tensor of one layer; `print(model)` shows its whole choice.

    Shapes: scale and zero_point are those of the granularity's blocks, and broadcast against the tensor. Errors:
    ValueError naming the site for NaN or infinite values, RuntimeError when it must quantize uncalibrated.

    >>> quantizer = Quantizer(Scheme(IntegerGrid(8, "affine")), site="fc.input")
    >>> quantizer
    Quantizer(uint8 affine, per_tensor, minmax, off)
    >>> quantizer.mode = Mode.OBSERVE
    >>> _ = quantizer(torch.tensor([0.0, 2.55]))
    >>> quantizer.calibrate()
    >>> quantizer.mode = Mode.QUANTIZE
    >>> quantizer(torch.tensor([1.004, 7.0]))
    tensor([1.0000, 2.5500])
    """

    def __init__(self, scheme: Scheme, shape: tuple[int, ...] = (), site: str = "") -> None:
        super().__init__()
        self.scheme, self.shape, self.site = scheme, tuple(shape), site
        self.mode = Mode.OFF
        params = scheme.granularity.param_shape(self.shape) if self.shape else ()
        self.register_buffer("scale", torch.ones(params))
        self.register_buffer("zero_point", torch.zeros(params))
        self.register_buffer("calibrated", torch.tensor(False))
        # What the clipping range was computed from; the scale above is computed from it.
        self.register_buffer("lo", torch.zeros(params))
        self.register_buffer("hi", torch.zeros(params))
        self.observer = HistogramObserver() if scheme.calibration.needs_histogram else MinMaxObserver()

    @property
    def grid(self) -> IntegerGrid:
        """The number format."""
        return self.scheme.grid

    @property
    def qparams(self) -> QParams:
        """Scale and zero point. Errors: RuntimeError before calibration."""
        if not self.calibrated:
            raise RuntimeError(f"{self.site}: this quantizer was never calibrated")
        return QParams(self.scale, self.zero_point)

    def forward(self, x: Tensor) -> Tensor:
        if self.mode is Mode.QUANTIZE:
            return fake_quantize(x, self.qparams, self.grid)
        if self.mode is Mode.OBSERVE:
            self._named(self.observer.update, x)
        elif self.mode is Mode.EXPORT:
            return self.export(x)
        return x

    def codes(self, x: Tensor) -> Tensor:
        """Integer codes of x, as float32."""
        return self.grid.encode(x, self.qparams)

    def stored_codes(self, x: Tensor) -> Tensor:
        """Integer codes of x as the ONNX file stores them: activations uint8, weights int8."""
        stored, shift = _storage(self.grid, is_weight=bool(self.shape))
        return (self.codes(x) + shift).to(stored)

    def calibrate(self, x: Tensor | None = None) -> None:
        """Fix scale and zero point from what was observed, or from x itself where it is at hand (weights)."""
        if x is None:
            stats = self._named(self.observer.compute)
            self.observer.reset()
        else:
            stats = self._named(Statistics.of, x, self.scheme.granularity.block_shape(self.shape))
        lo, hi = self.scheme.calibration.range(stats, self.grid)
        self.set_range(lo.view(self.scale.shape), hi.view(self.scale.shape))

    @torch.no_grad()
    def set_range(self, lo: Tensor, hi: Tensor) -> None:
        """Fix scale and zero point from a clipping range [lo, hi]."""
        qparams = self._named(self.grid.qparams, lo, hi)
        self.lo.copy_(lo)
        self.hi.copy_(hi)
        self.scale.copy_(qparams.scale)
        self.zero_point.copy_(qparams.zero_point)
        self.calibrated.fill_(True)

    @torch.no_grad()
    def prepare_export(self, x: Tensor | None = None) -> None:
        """Store what the ONNX file holds: scale and zero point, and of weights (x) the codes instead of values."""
        scale, zero_point = self.qparams
        if scale.numel() > 1 and (x is None or scale.shape[0] != scale.numel()):
            raise ValueError(f"{self.site}: ONNX has no {self.scheme.granularity} scale here, only one or one per row")
        shape = (-1,) if scale.numel() > 1 else ()
        stored, shift = _storage(self.grid, is_weight=x is not None)
        self.register_buffer("onnx_scale", scale.reshape(shape).clone())
        self.register_buffer("onnx_zero_point", (zero_point + shift).reshape(shape).to(stored))
        if x is not None:
            self.register_buffer("onnx_codes", self.stored_codes(x))
        else:
            for name, bound in ("onnx_lowest", self.grid.quant_min), ("onnx_highest", self.grid.quant_max):
                self.register_buffer(name, torch.tensor(bound + shift, dtype=stored))

    def export(self, x: Tensor) -> Tensor:
        """The ONNX form of this quantizer, after `prepare_export`."""
        if hasattr(self, "onnx_codes"):
            return onnx_form.dequantize(self.onnx_codes, self.onnx_scale, self.onnx_zero_point)
        bounds = self.onnx_lowest, self.onnx_highest
        return onnx_form.quantize_dequantize(x, self.onnx_scale, self.onnx_zero_point, bounds)

    def _named(self, call, *args):
        try:
            return call(*args)
        except ValueError as error:
            raise ValueError(f"{self.site}: {error}") from None

    def __repr__(self) -> str:
        return f"Quantizer({self.scheme}, {self.mode.value})"


def _storage(grid: IntegerGrid, is_weight: bool) -> tuple[torch.dtype, int]:
    """Integer type in the file and what is added to codes and zero point: weights int8, activations uint8."""
    if is_weight:
        return torch.int8, -128 if grid.quant_max > 127 else 0
    return torch.uint8, 128 if grid.quant_min < 0 else 0
