"""One quantization site: a grid, a granularity, a calibration, a rounding, and what a pass does with them."""

from __future__ import annotations

import weakref
from dataclasses import replace
from enum import Enum

import torch
from torch import Tensor, nn

from qexp.quant import onnx_form
from qexp.quant.affine import QParams
from qexp.quant.distributed import across_ranks, rank
from qexp.quant.estimators import Estimator
from qexp.quant.granularity import blocks, join, split
from qexp.quant.grid import Grid, IntegerGrid
from qexp.quant.observers import Observer
from qexp.quant.recipe import Scheme
from qexp.quant.rounding import Rounding
from qexp.quant.stats import Statistics


class Mode(Enum):
    """What a quantizer does with a tensor that passes: nothing, look, quantize, or write itself into an ONNX graph."""

    OFF = "off"
    OBSERVE = "observe"
    QUANTIZE = "quantize"
    EXPORT = "export"


class Once:
    """Sites that read one tensor by one learned scale quantize it once in a step of training, as an engine does."""

    def __init__(self) -> None:
        self._read: weakref.ref[Tensor] | None = None
        self._made: weakref.ref[Tensor] | None = None
        self._version = 0

    def known(self, x: Tensor) -> Tensor | None:
        """What this very tensor has become, while somebody still holds it."""
        same = self._read is not None and self._read() is x and self._version == x._version
        return self._made() if same else None

    def keep(self, x: Tensor, values: Tensor) -> Tensor:
        """Remember what x has become."""
        self._read, self._made, self._version = weakref.ref(x), weakref.ref(values), x._version
        return values


class Quantizer(nn.Module):
    """Quantizes one tensor of one layer; `print(model)` shows its whole choice.

    Scale and zero point have one element for each block of a tensor of `shape`; of activations the first dimension
    is the batch, and () means that one scale serves whatever arrives. Where blocks lie within one sample (tokens,
    groups of a pixel), the range is that of each call and nothing is stored. Errors: ValueError naming the site for
    NaN or infinite values, RuntimeError when it must quantize uncalibrated.

    >>> quantizer = Quantizer(Scheme(IntegerGrid(8, "affine")), site="fc.input")
    >>> quantizer
    Quantizer(uint8 affine, per_tensor, minmax, off)
    >>> quantizer.start_observing()
    >>> _ = quantizer(torch.tensor([0.0, 2.55]))
    >>> quantizer.calibrate()
    >>> quantizer.mode = Mode.QUANTIZE
    >>> quantizer(torch.tensor([1.004, 7.0]))
    tensor([1.0000, 2.5500])
    """

    def __init__(self, scheme: Scheme, shape: tuple[int, ...] = (), site: str = "", is_weight: bool = False) -> None:
        super().__init__()
        self.scheme, self.shape, self.site, self.is_weight = scheme, tuple(shape), site, is_weight
        self.mode = Mode.OFF
        self.dynamic = not is_weight and scheme.of_call
        params = scheme.granularity.param_shape(self.shape) if self.shape and not self.dynamic else ()
        self.register_buffer("scale", torch.ones(params))
        self.register_buffer("zero_point", torch.zeros(params))
        self.register_buffer("calibrated", torch.tensor(self.dynamic))
        # What the clipping range was computed from; the scale above is computed from it.
        self.register_buffer("lo", torch.zeros(params))
        self.register_buffer("hi", torch.zeros(params))
        if scheme.grid.fits_data:
            self.register_buffer("levels", torch.tensor(scheme.grid.unit))
        if scheme.rounding.is_random:
            self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.observer: Observer | None = None
        self.estimator: Estimator | None = None  # what stands in for the staircase while the network trains
        self.follows = False  # whether the range follows the data while the network trains
        self.once: Once | None = None  # with those that read the same tensor by the same learned scale

    @property
    def grid(self) -> Grid:
        """The number format."""
        return self.scheme.grid

    @property
    def rounding(self) -> Rounding:
        """The mode of rounding; a random one draws anew in every training step, and the same in all evaluations."""
        return self.drawn(self.scheme.rounding)

    def drawn(self, mode: Rounding) -> Rounding:
        """A mode as this site uses it in this step.

        Of a batch that several ranks share, each draws for its part what one process would draw for those elements;
        weights, which all of them hold, are rounded alike by all.
        """
        if not mode.is_random:
            return mode
        return mode.at(self.site, int(self.step), 0 if self.is_weight or not self.training else rank())

    @property
    def qparams(self) -> QParams:
        """Scale and zero point. Errors: RuntimeError before calibration, and where every call has its own."""
        # An estimator is given to what is calibrated alone, so that a step of training need not ask.
        if self.dynamic or (self.estimator is None and not self.calibrated):
            why = "has scales of its own in each call" if self.dynamic else "was never calibrated"
            raise RuntimeError(f"{self.site}: this quantizer {why}")
        return QParams(self.scale, self.zero_point, self._buffers.get("levels"))

    def qparams_for(self, x: Tensor) -> QParams:
        """The stored scale and zero point, or those of this very tensor."""
        if not self.dynamic:
            return self.qparams
        x = x.detach()
        stats = self._named(Statistics.of, x, self.scheme.granularity.block_shape(tuple(x.shape)))
        lo, hi = self.scheme.calibration.range(stats, self.grid)
        params = self._named(self.scheme.granularity.param_shape, tuple(x.shape))
        qparams = self._named(self.grid.qparams, lo.view(params), hi.view(params))
        return self.grid.fit(stats, qparams)

    def forward(self, x: Tensor) -> Tensor:
        if self.mode is Mode.QUANTIZE:
            if x.dtype in (torch.float16, torch.bfloat16):  # autocast's; codes and scales are those of float32
                x = x.float()
            training, estimator = self.training, self.estimator
            if training and "step" in self._buffers:
                self.step += 1
            if training and self.follows:
                self.follow_(x)
            shares = training and self.once is not None
            if shares and (values := self.once.known(x)) is not None:
                return values
            blocked, qparams = self._blocked(x if estimator is None else estimator.before(self, x))
            if training and estimator is not None:
                values = self._joined(estimator.values(self, blocked, qparams), x)
                return self.once.keep(x, values) if shares else values
            return self._joined(self.grid.fake_quantize(blocked, qparams, self.rounding), x)
        if self.mode is Mode.OBSERVE:
            self._named(self.observer.update, x)
        elif self.mode is Mode.EXPORT:
            return self.export(x)
        return x

    def codes(self, x: Tensor, rounding: Rounding | None = None) -> Tensor:
        """Integer codes of x, as float32, by the quantizer's own rounding or another."""
        blocked, qparams = self._blocked(x)
        return self._joined(self.grid.encode(blocked, qparams, rounding or self.rounding), x)

    def decoded(self, codes: Tensor, x: Tensor | None = None) -> Tensor:
        """The values of integer codes; x is what they are codes of, whose range counts where each call has its own."""
        blocked, qparams = self._blocked(codes, x)
        return self._joined(self.grid.decode(blocked, qparams), codes)

    def clipped(self, x: Tensor) -> Tensor:
        """Number of values further than half a step outside the representable range."""
        return self.grid.clipped(*self._blocked(x))

    def _blocked(self, x: Tensor, ranged: Tensor | None = None) -> tuple[Tensor, QParams]:
        """x and its scales, or those of another tensor of its shape, broadcasting: x itself, or viewed as blocks."""
        qparams = self.qparams_for(x if ranged is None else ranged)
        params = qparams.scale.shape
        if len(params) == 0 or all(p in (1, n) for p, n in zip(params, x.shape, strict=False)):
            return x, qparams
        shape = [size for p in params for size in (p, 1)]
        scale, zero_point = qparams.scale.view(shape), qparams.zero_point.view(shape)
        return split(x, self.scheme.granularity.block_shape(tuple(x.shape))), QParams(scale, zero_point, qparams.levels)

    @staticmethod
    def _joined(values: Tensor, x: Tensor) -> Tensor:
        return values if values.dim() == x.dim() else join(values, tuple(x.shape))

    def stored_codes(self, x: Tensor) -> Tensor:
        """Integer codes of x as the ONNX file stores them: activations uint8, weights int8."""
        stored, shift = _storage(self.grid, self.is_weight)
        return (self.grid.stored(self.codes(x)) + shift).to(stored)

    def of_stored(self, codes: Tensor, x: Tensor | None = None) -> Tensor:
        """The values of codes as the ONNX file stores them; x as in `decoded`."""
        return self.decoded(codes.float() - _storage(self.grid, self.is_weight)[1], x)

    def start_observing(self) -> None:
        """Look at what passes from now on; sites whose ranges are those of each call have nothing to look at."""
        self.mode = Mode.OFF if self.dynamic else Mode.OBSERVE
        self.observer = None if self.dynamic else self.new_observer()

    def new_observer(self) -> Observer:
        """An empty observer of this site."""
        calibration = self.scheme.calibration
        rows = self.shape[-1] if calibration.needs_rows else 0
        constant = getattr(calibration, "constant", 0.01)
        return Observer(self.scheme.granularity, self.shape or (1,), constant, rows)

    def calibrate(self, x: Tensor | None = None) -> None:
        """Fix scale and zero point from what was observed, or from x itself where it is at hand (weights)."""
        if self.dynamic:
            return
        if x is None:
            stats = self._named(self.observer.compute)
            self.observer = None
        else:
            stats = self._named(Statistics.of, x, self.scheme.granularity.block_shape(self.shape))
        lo, hi = self._named(self.scheme.calibration.range, stats, self.grid)
        self.set_range(lo.view(self.scale.shape), hi.view(self.scale.shape))
        if self.grid.fits_data:
            self.levels.copy_(self.grid.fit(stats, self.qparams).levels)

    @torch.no_grad()
    def follow_(self, x: Tensor) -> None:
        """Move the range with one batch: a weight's is its own, an activation's a moving average of extrema.

        E = (1 - c) E + c extrema, with the c of the calibration (Jacob et al. 2018, section 3.1).
        """
        if self.dynamic:
            return
        if self.is_weight:
            self.calibrate(x.detach())
            return
        rows = blocks(x.detach(), self.scheme.granularity.block_shape(tuple(x.shape)))
        lo, hi = (extremum.view(self.lo.shape) for extremum in across_ranks(rows.amin(1), rows.amax(1)))
        constant = getattr(self.scheme.calibration, "constant", 0.01)
        self.set_range(torch.lerp(self.lo, lo, constant), torch.lerp(self.hi, hi, constant))

    @torch.no_grad()
    def set_bits_(self, bits: int, rescale: bool = True) -> None:
        """Change the width of an integer grid; with `rescale` the range stays and the scale follows."""
        if bits == self.grid.bits:
            return
        lowest, highest = (self.scale * (end - self.zero_point) for end in (self.grid.quant_min, self.grid.quant_max))
        self.scheme = replace(self.scheme, grid=replace(self.grid, bits=bits))
        if rescale and not self.dynamic:
            self.set_range(lowest, highest)
            if self.estimator is not None:
                learned = {name: getattr(self, name) for name in self.learned}
                self.estimator.attach_(self)
                for name, parameter in learned.items():  # which the optimizer holds
                    parameter.copy_(getattr(self, name))
                    setattr(self, name, parameter)

    def train_with_(self, estimator: Estimator) -> None:
        """Train through this quantizer, which is calibrated. Errors: ValueError naming the site where it cannot be."""
        why = estimator.refusal(self.scheme, self.is_weight)
        if why is not None:
            raise ValueError(f"{self.site}: {estimator}: {why}")
        if not self.calibrated:
            raise RuntimeError(f"{self.site}: this quantizer was never calibrated")
        if estimator.draws and not hasattr(self, "step"):
            self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        estimator.attach_(self)
        self.estimator = estimator

    @property
    def learned(self) -> tuple[str, ...]:
        """Names of what the estimator gave this quantizer to learn."""
        return tuple(name for name in (self.estimator.learns if self.estimator else ()) if hasattr(self, name))

    @torch.no_grad()
    def settle_(self, x: Tensor | None = None) -> Tensor | None:
        """End training: what was learned stays in scale and zero point. Returns what is to be quantized from now on.

        x is a weight, which an estimator may have seen in another form.
        """
        if self.estimator is None:
            return x
        self.estimator.sync_(self)
        settled = x if x is None else self.estimator.before(self, x).detach().clone()
        for name in self.learned:
            delattr(self, name)
        self.estimator = self.once = None
        if not self.scheme.rounding.is_random and hasattr(self, "step"):
            del self.step
        return settled

    @torch.no_grad()
    def set_range(self, lo: Tensor, hi: Tensor) -> None:
        """Fix scale and zero point from a clipping range [lo, hi]."""
        qparams = self._named(self.grid.qparams, lo, hi)
        self.lo.copy_(lo)
        self.hi.copy_(hi)
        self.scale.copy_(qparams.scale)
        self.zero_point.copy_(qparams.zero_point)
        self.calibrated.fill_(True)

    @property
    def product_scale(self) -> Tensor | None:
        """What an integer of this site is worth, one or one for each output channel; None where there is no such."""
        scale, step = self.scale, self.grid.step
        if self.dynamic or step is None:
            return None
        if scale.numel() != 1 and not (self.is_weight and scale.numel() == scale.shape[0] == self.shape[0]):
            return None
        return scale.flatten() if step == 1 else scale.flatten() * step

    @torch.no_grad()
    def prepare_export(self, x: Tensor | None = None) -> None:
        """Store what the ONNX file holds: scale and zero point, and of weights (x) the codes instead of values."""
        if self.dynamic:  # nothing is stored
            return
        scale = self.product_scale
        if scale is None or (why := self.scheme.not_in_int8(self.is_weight)):
            raise ValueError(f"{self.site}: {self.scheme.granularity if scale is None else why} has no int8 form here")
        one = self.scale.numel() == 1
        stored, shift = _storage(self.grid, self.is_weight)
        self.register_buffer("onnx_scale", scale.reshape(() if one else (-1,)).clone())
        zero_point = (self.zero_point + shift).reshape(() if one else (-1,))
        self.register_buffer("onnx_zero_point", zero_point.to(stored))
        if x is not None:
            self.register_buffer("onnx_codes", self.stored_codes(x))
        else:
            for name, bound in ("onnx_lowest", self.grid.quant_min), ("onnx_highest", self.grid.quant_max):
                self.register_buffer(name, torch.tensor(bound + shift, dtype=stored))

    def export(self, x: Tensor) -> Tensor:
        """The ONNX form of this quantizer, after `prepare_export`."""
        if hasattr(self, "onnx_codes"):
            return onnx_form.dequantize(self.onnx_codes, self.onnx_scale, self.onnx_zero_point)
        if self.dynamic:
            size = getattr(self.scheme.granularity, "size", 0)
            return onnx_form.quantize_dynamically(x, self.scheme.dynamic_form or "none", size)
        bounds = self.onnx_lowest, self.onnx_highest
        return onnx_form.quantize_dequantize(x, self.onnx_scale, self.onnx_zero_point, bounds)

    def _named(self, call, *args):
        try:
            return call(*args)
        except ValueError as error:
            raise ValueError(f"{self.site}: {error}") from None

    def __repr__(self) -> str:
        trained = "" if self.estimator is None else f", {self.estimator}"
        return f"Quantizer({self.scheme}, {self.mode.value}{trained})"


def _storage(grid: Grid, is_weight: bool) -> tuple[torch.dtype, int]:
    """Integer type in the file and what is added to codes and zero point: weights int8, activations uint8."""
    if not isinstance(grid, IntegerGrid):
        return torch.int8, 0
    if is_weight:
        return torch.int8, -128 if grid.quant_max > 127 else 0
    return torch.uint8, 128 if grid.quant_min < 0 else 0
