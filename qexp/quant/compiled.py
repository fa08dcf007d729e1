"""The same fake-quantize compiled into one pass over memory, for training; results are equal to the bit.

The first call for a shape compiles for some seconds (a C++ compiler is needed on a CPU), which pays off when a network
trains for minutes. Stochastic rounding gains most: its hash costs a dozen passes otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache

import torch
import torch._inductor
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from qexp.quant.affine import CodeRange, QParams, inside_of
from qexp.quant.rounding import HalfEven, Rounding, Stochastic, hashed_uniform

HALF_EVEN = HalfEven()


def fake_quantize(x: Tensor, qparams: QParams, grid: CodeRange, rounding: Rounding = HALF_EVEN) -> Tensor:
    """`qexp.quant.affine.fake_quantize`, compiled: the same values and the same gradient.

    Errors: ValueError for a rounding other than half_even and stochastic.
    """
    if not isinstance(rounding, (HalfEven, Stochastic)):
        raise ValueError(f"rounding={rounding}: compiled are half_even and stochastic")
    x = x.contiguous()
    inputs = [qparams.scale, qparams.zero_point, *_scalars(float(grid.quant_min), float(grid.quant_max))]
    if rounding.is_random:
        return _Random.apply(x, *inputs, torch.tensor(rounding.stream, dtype=torch.int32))
    if qparams.scale.numel() > 1:
        return _ManyScales.apply(x, *inputs)
    return _OneScale.apply(x, *inputs, inside_of(grid, float(qparams.scale), int(qparams.zero_point)))


class _OneScale(torch.autograd.Function):
    """The mask is an interval of x."""

    @staticmethod
    def forward(ctx, x: Tensor, *inputs) -> Tensor:
        *tensors, ctx.inside = inputs
        ctx.save_for_backward(x)
        return _run(_values, x, *tensors)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _run(_where_inside, grad, *ctx.saved_tensors, *_scalars(*ctx.inside)), *[None] * 5


class _ManyScales(torch.autograd.Function):
    """Backward finds the codes anew, so only x is kept."""

    @staticmethod
    def forward(ctx, x: Tensor, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(x, *inputs)
        return _run(_values, x, *inputs)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _run(_where_codes_inside, grad, *ctx.saved_tensors), *[None] * 4


class _Random(torch.autograd.Function):
    """A drawn code is inside for certain exactly where x / S itself is (see `affine.fake_quantize`)."""

    @staticmethod
    def forward(ctx, x: Tensor, *inputs: Tensor) -> Tensor:
        *others, key = inputs
        ctx.save_for_backward(x, *others)
        return _run(_drawn_values, x, *others, key)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _run(_where_quotient_inside, grad, *ctx.saved_tensors), *[None] * 5


def _values(x: Tensor, scale: Tensor, zero_point: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    codes = (torch.round(x / scale) + zero_point).clamp(lowest, highest)
    return (codes - zero_point) * scale


def _drawn_values(
    x: Tensor, scale: Tensor, zero_point: Tensor, lowest: Tensor, highest: Tensor, key: Tensor
) -> Tensor:
    quotient = x / scale
    lower = quotient.floor()
    index = torch.arange(x.numel(), dtype=torch.int32).view(x.shape)
    codes = lower + (quotient - lower > hashed_uniform(index, key)) + zero_point
    return (codes.clamp(lowest, highest) - zero_point) * scale


def _where_inside(grad: Tensor, x: Tensor, below: Tensor, above: Tensor) -> Tensor:
    return torch.where((x > below) & (x < above), grad, 0.0)


def _where_codes_inside(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, lowest: Tensor, highest: Tensor
) -> Tensor:
    codes = torch.round(x / scale) + zero_point
    return torch.where((codes >= lowest) & (codes <= highest), grad, 0.0)


def _where_quotient_inside(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, lowest: Tensor, highest: Tensor
) -> Tensor:
    place = x / scale + zero_point
    return torch.where((place >= lowest) & (place <= highest), grad, 0.0)


@lru_cache(maxsize=1024)
def _scalars(*values: float) -> tuple[Tensor, ...]:
    return tuple(map(torch.tensor, values))


# (function, threads, shapes) -> its loop; code is made for contiguous tensors of one shape and one number of threads.
_loops: dict[tuple, Callable] = {}


def _run(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Call the generated loop; past torch.compile's checks of every argument, which would take longer than the loop."""
    inputs = inputs if inputs[0].is_contiguous() else (inputs[0].contiguous(), *inputs[1:])
    key = function, torch.get_num_threads(), *(x.shape for x in inputs)
    if key not in _loops:
        detached = [x.detach() for x in inputs]
        _loops[key] = torch._inductor.compile(make_fx(lambda *args: function(*args))(*detached), detached)
    return _loops[key](*inputs)


def warm_up(x: Tensor, qparams: QParams, grid: CodeRange, rounding: Rounding = HALF_EVEN) -> float:
    """Compile for inputs like this one; returns the seconds that it took."""
    start = time.perf_counter()
    x = x.detach().clone().requires_grad_()
    fake_quantize(x, qparams, grid, rounding).backward(torch.ones_like(x))
    return time.perf_counter() - start
